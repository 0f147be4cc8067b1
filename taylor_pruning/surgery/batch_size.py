"""The size of the batch of a trace, by which the batch is told from all other dimensions."""

from itertools import chain, count
from types import CodeType, FunctionType, MethodType

from torch import nn

from taylor_pruning.held import own_values
from taylor_pruning.surgery.nested import map_tensors, tensors_in

LEAST = 41  # on tensors without values, where a large batch costs nothing
LEAST_OF_VALUES = 5  # where the forward runs on values


def batch_size(model: nn.Module, example, least: int = LEAST) -> int:
    """The smallest prime from `least` on that divides no size which the network has or is given, the batch itself excepted.

    Numbers in the code of its forward count as sizes.

    Args:
        example: tensors [N, ...] in nested lists and dictionaries, the first of which has the batch.
    """
    tensors, rows = tensors_in(example), _rows(example)
    sizes = {size for tensor in chain(model.parameters(), model.buffers()) for size in tensor.shape}
    for tensor in tensors:
        sizes.update(tensor.shape[1:] if tensor.dim() and len(tensor) == rows else tensor.shape)
    for module in model.modules():
        values = (held[key] for held, key in own_values(module).values())
        held = chain.from_iterable(v if isinstance(v, (tuple, list)) else [v] for v in values)
        sizes.update(value for value in held if type(value) is int)
    sizes.update(_literals(model))
    sizes.discard(0)
    primes = (n for n in count(least) if all(n % d for d in range(2, int(n**0.5) + 1)))
    return next(prime for prime in primes if all(size % prime for size in sizes))


def _literals(model):
    """Numbers in the code of the network: in methods of its classes, functions that it holds, and functions that these name."""
    kinds = {kind for module in model.modules() for kind in type(module).__mro__}
    held = chain.from_iterable(vars(owner).values() for owner in (*kinds, *model.modules()))
    functions, seen, found = [f for f in held if isinstance(f, (FunctionType, MethodType))], set(), set()
    while functions:
        function = functions.pop()
        if (
            function in seen
            or str(function.__module__).startswith(("torch", "numpy"))
            or function.__name__.startswith("__")
        ):
            continue
        seen.add(function)
        codes = [function.__code__]
        for code in codes:
            constants = list(chain.from_iterable(c if type(c) is tuple else [c] for c in code.co_consts))
            codes.extend(c for c in constants if isinstance(c, CodeType))
            found.update(abs(c) for c in constants if type(c) is int)
            named = (function.__globals__.get(name) for name in code.co_names)
            functions.extend(f for f in named if isinstance(f, FunctionType))
    return found


def first_samples(example, number):
    """The first `number` rows of the tensors that have the batch, in the same structure."""
    rows = _rows(example)
    return map_tensors(example, lambda t: t[:number] if t.dim() and len(t) == rows else t)


def _rows(example):
    first = tensors_in(example)[0]
    return len(first) if first.dim() else None
