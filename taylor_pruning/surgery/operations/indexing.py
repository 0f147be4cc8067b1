"""Selecting elements by position."""

import torch

from taylor_pruning.surgery.ids import Value, varying
from taylor_pruning.surgery.numbers import is_tracked
from taylor_pruning.surgery.operations.elementwise import align
from taylor_pruning.surgery.operations.registry import rule
from taylor_pruning.surgery.recorded_calls import operation_name


@rule("narrow select", linear=True)
def narrow(call):
    x, dim = call.values()[0], int(call.get("dim", 1)) % len(call.values()[0].shape)
    index = [slice(None)] * len(x.shape)
    if call.name == "select":
        index[dim] = call.get("index", 2)
    else:
        start, length = call.get("start", 2), call.get("length", 3)
        start = 0 if start == 0 else start
        index[dim] = slice(start, start + length)
    return indexed(call, x, tuple(index))


@rule("pick getitem", linear=True)
def item(call):
    index = call.args[1]
    return indexed(call, call.args[0], index if isinstance(index, tuple) else (index,))


def indexed(call, x, index):
    """Basic indexing. A bound by position keeps what comes before it; by a width, the width follows."""
    index = _spelled_out(index, len(x.shape))
    at = [i for i, part in enumerate(index) if isinstance(part, Value)]
    others = [part for part in index if not isinstance(part, Value)]
    if len(at) == 1 and len(call.operands) == 2 and all(part is None or isinstance(part, slice) for part in others):
        placed = _placed(call, x, sum(part is not None for part in index[: at[0]]))
        if placed is not None:
            x, index = placed, (*index[: at[0]], slice(None), *index[at[0] + 1 :])
    if _by_tensors(index):
        return _advanced(call, x, index)
    plain_index = _basic(call, x, index)
    return call.result([layer[plain_index] for layer in x.layers])


def _spelled_out(index, rank):
    """The index with whole slices in the place of "..."."""
    at = next((i for i, part in enumerate(index) if part is Ellipsis), None)
    if at is None:
        return index
    more = rank - sum(part is not None and part is not Ellipsis for part in index)
    return (*index[:at], *[slice(None)] * more, *index[at + 1 :])


def _by_tensors(index):
    return any(isinstance(i, (Value, list, torch.Tensor)) for i in index)


def _basic(call, x, index):
    """The index in plain numbers; channels are kept, or bound to the numbers by which they are indexed."""
    dim, plain_index = 0, []
    for part in index:
        if part is None:
            plain_index.append(part)
            continue
        along = call.ids.vector(x, dim) if part != slice(None) else None
        if along is not None:
            if isinstance(part, slice) and part.step not in (None, 1):
                _every(call, along, part)
            else:
                for bound in (part.start, part.stop) if isinstance(part, slice) else (part, part + 1):
                    bounded(call, along, bound)
        plain_index.append(_plain_slice(part))
        dim += 1
    return tuple(plain_index)


@rule("setitem", linear=True)
def assignment(call):
    """x[index] = value: zero where both are. Channels of the value are those of the part of x."""
    x, index, value = call.args
    index = index if isinstance(index, tuple) else (index,)
    if _by_tensors(index) or any(isinstance(part, bool) for part in index):
        return call.unknown()
    call.ids.keep_number(value, f"their number enters {call.where}")
    plain_index = _basic(call, x, _spelled_out(index, len(x.shape)))
    layers = tuple(layer[plain_index] for layer in x.layers)
    shape = tuple(torch.empty(x.shape, device="meta")[plain_index].shape)
    part = Value(shape, layers, x.reason)
    values = [part, value] if isinstance(value, Value) else [part]
    axes, reason = align(call.ids, values, shape, call.where)
    call.info.source = any(len(axis.carriers) < len(values) for axis in axes) or _breaks_zero(call, value)
    return call.result(x.layers, reason)


def _breaks_zero(call, value):
    constant = any(map(call.is_constant, range(len(call.operands))))
    return constant or not isinstance(value, Value) and value != 0


def _plain_slice(part):
    if isinstance(part, slice):
        return slice(*(None if b is None else int(b) for b in (part.start, part.stop, part.step)))
    return int(part) if isinstance(part, int) and not isinstance(part, bool) else part


def _every(call, along, part):
    """Every second channel (or third ...): neighbours go together, so that those behind them keep their places."""
    bounds = part.start, part.stop, part.step
    for bound in bounds:
        call.ids.keep_number(bound, f"their number is a bound or step in {call.where}")
    step, start = int(part.step), int(part.start or 0)
    followed = part.stop is None and not any(map(is_tracked, bounds))
    if followed and len(along) % step == 0 and start in range(step):
        call.ids.unite(along.view(-1, step)[:, :1], along.view(-1, step))
    else:
        call.protect(along, "is indexed by position in")


def bounded(call, along, bound):
    """After a cut `bound` must be how many channels are left before it."""
    if bound is None or bound == 0 and not is_tracked(bound):
        return
    reason = f"is indexed by position in {call.where}"
    before = along[: int(bound)] if bound >= 0 else along[int(bound) :]
    if not is_tracked(bound) or (bound.ids is None and not bound.widths):
        call.ids.protect(before, reason)
    elif bound.ids is None:
        call.ids.bind(-bound if bound < 0 else bound, before, reason)
    elif bound.factor is not None and len(bound.ids) == len(along) and 0 < bound.factor < 1:
        call.ids.unite(bound.ids, along)
        table = along.view(bound.factor.denominator, -1)
        call.ids.unite(table[:1], table)
    else:
        call.ids.bind(bound, before, reason)


def _advanced(call, x, index):
    """Indexing by a tensor: exact for channels along other dimensions than the indexed ones."""
    dim, plain_index, kept = 0, [], list(x.layers)
    for part in index:
        if part is None:
            plain_index.append(None)
            continue
        if isinstance(part, Value) or part != slice(None):
            for layer in kept:
                if dim in varying(layer):
                    call.protect(layer, "is indexed by position in")
            kept = [layer for layer in kept if dim not in varying(layer)]
        if isinstance(part, Value):
            for layer in part.layers:
                call.protect(layer, "is an index in")
            plain_index.append(torch.zeros(part.shape, dtype=torch.long))
        else:
            plain_index.append(part if isinstance(part, slice) and part == slice(None) else _plain_slice(part))
        dim += 1
    layers = [layer[tuple(plain_index)] for layer in kept]
    if any(tuple(layer.shape) != tuple(call.shape) for layer in layers):  # a mask
        return call.unknown()
    return call.result(layers)


@rule("embedding", linear="each")
def embedding(call):
    """Rows of a table, whose columns are channels. They are never closed."""
    indices, table = call.get("input", 0), call.get("weight", 1)
    if call.get("max_norm", 3) is not None:  # it writes to the table
        return call.unknown()
    for layer in indices.layers:
        call.protect(layer, "is an index in")
    kept = []
    for layer in table.layers:
        if varying(layer) == [1]:
            kept.append(layer[0].expand(call.shape))
        else:
            call.protect(layer, "is indexed by position in")
    call.info.source, call.info.mains = True, ()
    return call.result(kept, None if kept else table.reason)


@rule("index_select", linear=True)
def index_select(call):
    x, dim = call.values()[0], int(call.get("dim", 1)) % len(call.values()[0].shape)
    if (placed := _placed(call, x, dim)) is not None:
        return placed
    if any(dim in varying(layer) for layer in x.layers):
        return call.unknown(f"is indexed by position in {call.where}")
    layers = [layer.narrow(dim, 0, 1).expand(call.shape) for layer in x.layers]
    return call.result(layers)


@rule("gather", linear=True)
def gather(call):
    """Elements at places along one dimension; along all others the places have the channels of what is read."""
    (x, places), dim = call.values()[:2], int(call.get("dim", 1)) % len(call.values()[0].shape)
    others = [d for d in range(len(x.shape)) if d != dim]
    along = any(dim in varying(layer) for layer in (*x.layers, *places.layers))
    if along or any(x.shape[d] != places.shape[d] for d in others):
        return call.unknown(f"is indexed by position in {call.where}")
    shape = tuple(1 if d == dim else size for d, size in enumerate(x.shape))
    read = Value(shape, tuple(layer.narrow(dim, 0, 1) for layer in x.layers), x.reason)
    axes, reason = align(call.ids, [read, places], call.shape, call.where)
    call.info.mains = (call.operands[0][0],)
    return call.result([axis.layer for axis in axes], reason)


@rule("scatter scatter_add", linear=True)
def scatter(call):
    """Elements put or added to places along one dimension of a tensor; along all others the places have its channels."""
    x, dim = call.values()[0], int(call.get("dim", 1)) % len(call.values()[0].shape)
    shape = tuple(1 if d == dim else size for d, size in enumerate(x.shape))
    along = any(dim in varying(layer) for value in call.values() for layer in value.layers)
    others = any(v.shape[:dim] != x.shape[:dim] or v.shape[dim + 1 :] != x.shape[dim + 1 :] for v in call.values())
    if along or others or call.get("reduce", 4) is not None:
        return call.unknown(f"is indexed by position in {call.where}")
    parts = [Value(shape, tuple(layer.narrow(dim, 0, 1) for layer in v.layers), v.reason) for v in call.values()]
    axes, reason = align(call.ids, parts, shape, call.where)
    real = [
        i for i, (node, _) in enumerate(call.operands) if node.meta.get("real")
    ]  # zeros of the places make no zeros
    meet_all = all(axis.carriers.issuperset(real) for axis in axes)
    call.info.source = len(real) < 2 or not meet_all or any(map(call.is_constant, real))
    call.info.mains = tuple(call.operands[i][0] for i in real)
    return call.result([axis.layer.expand(call.shape) for axis in axes], reason)


# What gives the same positions, perhaps elsewhere or of another type.
SAME_PLACES = set("to long int cuda cpu type detach clone contiguous data".split())


def _placed(call, x, dim):
    """The channels of `x` along `dim` at places that a buffer, the second operand, holds; None if it is no such buffer.

    After a cut the buffer holds the places that its channels have among what is left.
    """
    node, places = call.operands[1]
    while node.op != "get_attr" and operation_name(node) in SAME_PLACES:
        node = node.all_input_nodes[0]
    values, layers = call.ids.places.get(node.target), [layer for layer in x.layers if dim in varying(layer)]
    own = None if values is None else call.ids.vector(places, 0)
    if own is None or not layers:
        return None
    along = call.ids.vector(x, dim)
    values = values % len(along)
    call.ids.unite(own, along[values])
    call.ids.bind_places(node.target, along, f"is indexed by position in {call.where}")
    call.info.mains = (call.operands[0][0],)
    shape = tuple(len(values) if d == dim else size for d, size in enumerate(x.shape))
    return call.ids.value(shape, [layer.index_select(dim, values) for layer in x.layers], x.reason)
