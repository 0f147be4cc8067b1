"""Inputs of other sizes or types than the example's: the forward is recorded on them too, and the two graphs are compared.

A size that has passed through int(), range() or an if is a plain number in the graph, and `x.dtype` a type, right for the
example alone. (The proof of a cut runs in float32 or float64.) Where the steps are the same, the graph runs with the
numbers of the other size; where they are not, that size is refused.
"""

import copy
from dataclasses import dataclass, field

import torch
from torch import fx

from taylor_pruning.errors import InputError
from taylor_pruning.surgery.nested import Slot, map_tensors
from taylor_pruning.surgery.numbers import plain
from taylor_pruning.surgery.outliving import unchanged
from taylor_pruning.surgery.recording import record

REPLACED = ("forward", "_forward_hooks", "_forward_pre_hooks")  # of a module whose graph runs in its place
MOST_SIZES = 50  # that are kept
LEAVES = (bool, int, float, str, type(None), torch.dtype, torch.device)


@dataclass
class AtSize:
    """What differs in a graph on inputs of some size.

    Attributes:
        output: see Trace. arguments: {node: (args, kwargs)}. constants: {name: tensor}.
    """

    output: object
    arguments: dict = field(default_factory=dict)
    constants: dict = field(default_factory=dict)


def _traced_shapes(trace):
    return [tuple(node.meta["shape"]) for node in trace.graph.nodes if node.op == "placeholder"]


def _without_batch(trace, shapes):
    """The shapes of the inputs of a call, without the batch where the example's has one."""
    pairs = zip(shapes, _traced_shapes(trace), strict=True)
    return tuple(tuple(shape)[traced[:1] == (trace.batch,) :] for shape, traced in pairs)


def at_size(trace, model, inputs, own):
    """`AtSize` for the inputs of a call. In another type, where the steps are others, those of the example's are taken.

    Args:
        inputs: list of tensors. own: {attribute: value} of the model while its graph does not run in its place.

    Raises InputError if the forward takes other steps there, or cannot be recorded.
    """
    types = tuple(tensor.dtype for tensor in inputs)
    if types == trace.types and not trace.reads_sizes:
        return AtSize(trace.output)
    example = _example_size(trace)
    size = _without_batch(trace, [tensor.shape for tensor in inputs]) if trace.reads_sizes else example
    if not trace.at_sizes:
        trace.at_sizes[example, trace.types] = AtSize(trace.output)
    if (size, types) not in trace.at_sizes:
        if len(trace.at_sizes) > MOST_SIZES:
            del trace.at_sizes[list(trace.at_sizes)[1]]  # the first is the example's
        trace.at_sizes[size, types] = _found(trace, model, inputs, own)
    found = trace.at_sizes[size, types]
    if found is None and types != trace.types and size == example:
        return AtSize(trace.output)
    if found is None:
        raise InputError(
            f"{type(model).__name__} does other steps on inputs of shape {_named(size)} than on those of its example_input, "
            f"{_named(example)}, so that its graph does not hold there; give inputs of the example's shape"
        )
    return found


def _example_size(trace):
    return _without_batch(trace, _traced_shapes(trace))


def _named(size):
    return " and ".join(map(str, size))


def _found(trace, model, inputs, own):
    model = copy.copy(model)
    for name in REPLACED:
        vars(model).pop(name, None)
        if name in own:
            vars(model)[name] = own[name]
    example = _example_size(trace)

    def given(slot):
        tensor = inputs[slot.index].detach()
        batched = tensor.dim() > len(example[slot.index])
        return tensor[:1].expand(trace.batch, *tensor.shape[1:]) if batched else tensor

    args, kwargs = map_tensors(trace.inputs, given, Slot)
    with unchanged(trace.caches, emptied=True):  # else what calls have left there is read in the place of steps
        return _compared(trace, record(model, kwargs or args, trace.training))


def _compared(trace, other):
    """`AtSize` of another trace of the same forward; None where its steps are others."""
    old, new = list(trace.graph.nodes), list(other.graph.nodes)
    if len(old) != len(new) or trace.constants.keys() != other.constants.keys():
        return None
    same, found = dict(zip(new, old, strict=True)), AtSize(other.output)
    for a, b in zip(old, new, strict=True):
        if (a.op, str(a.target), a.meta.get("autocast")) != (b.op, str(b.target), b.meta.get("autocast")):
            return None
        if a.all_input_nodes != [same[node] for node in b.all_input_nodes]:
            return None
        now = fx.node.map_aggregate(
            (b.args, b.kwargs), lambda item: same.get(item) if isinstance(item, fx.Node) else plain(item)
        )
        if _leaves((a.args, a.kwargs)) != _leaves(now):
            found.arguments[a] = now
    for name, tensor in other.constants.items():
        before = trace.constants[name]
        if before.shape != tensor.shape or not torch.equal(before.to(tensor), tensor):
            found.constants[name] = tensor
    return found


def _leaves(arguments):
    """What the arguments of a call hold, in a form that can be compared; what is no plain value counts by itself."""
    found = []

    def visit(item):
        item = plain(item)
        found.append((type(item), item if isinstance(item, LEAVES) else id(item)))
        return item

    fx.node.map_aggregate(arguments, visit)
    return found
