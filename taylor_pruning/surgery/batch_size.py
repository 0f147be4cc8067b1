"""The size of the batch of a trace, by which the batch is told from all other dimensions."""

from itertools import chain, count

from torch import nn

from taylor_pruning.surgery.nested import map_tensors, tensors_in

LEAST = 41  # on tensors without values, where a large batch costs nothing
LEAST_OF_VALUES = 5  # where the forward runs on values


def batch_size(model: nn.Module, example, least: int = LEAST) -> int:
    """The smallest prime from `least` on that divides no size which the network has or is given, the batch itself excepted.

    Args:
        example: tensors [N, ...] in nested lists and dictionaries, the first of which has the batch.
    """
    tensors, rows = tensors_in(example), _rows(example)
    sizes = {size for tensor in chain(model.parameters(), model.buffers()) for size in tensor.shape}
    for tensor in tensors:
        sizes.update(tensor.shape[1:] if tensor.dim() and len(tensor) == rows else tensor.shape)
    for module in model.modules():
        held = chain.from_iterable(v if isinstance(v, (tuple, list)) else [v] for v in vars(module).values())
        sizes.update(value for value in held if type(value) is int)
    sizes.discard(0)
    primes = (n for n in count(least) if all(n % d for d in range(2, int(n**0.5) + 1)))
    return next(prime for prime in primes if all(size % prime for size in sizes))


def first_samples(example, number):
    """The first `number` rows of the tensors that have the batch, in the same structure."""
    rows = _rows(example)
    return map_tensors(example, lambda t: t[:number] if t.dim() and len(t) == rows else t)


def _rows(example):
    first = tensors_in(example)[0]
    return len(first) if first.dim() else None
