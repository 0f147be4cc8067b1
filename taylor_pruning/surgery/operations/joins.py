"""Joining tensors along a dimension and splitting them."""

import math

import torch

from taylor_pruning.surgery.ids import Value, flat, spread, varying
from taylor_pruning.surgery.numbers import is_tracked
from taylor_pruning.surgery.operations.elementwise import align
from taylor_pruning.surgery.operations.indexing import bounded
from taylor_pruning.surgery.operations.registry import rule


@rule("cat concat concatenate", linear=True)
def cat(call):
    dim = int(call.get("dim", 1, 0)) % len(call.shape)
    return joined(call, call.values(), dim)


@rule("stack", linear=True)
def stack(call):
    dim = int(call.get("dim", 1, 0)) % len(call.shape)
    parts = []
    for value in call.values():
        shape = (*value.shape[:dim], 1, *value.shape[dim:])
        parts.append(Value(shape, tuple(layer.unsqueeze(dim) for layer in value.layers), value.reason))
    return joined(call, parts, dim)


@rule("hstack vstack row_stack dstack", linear=True)
def stacks(call):
    """A concatenation along the second, first or third dimension."""
    dim = {"hstack": min(1, len(call.shape) - 1), "dstack": 2}.get(call.name, 0)
    raised = {"hstack": torch.atleast_1d, "dstack": torch.atleast_3d}.get(call.name, torch.atleast_2d)
    parts = []
    for value in call.values():
        shape = tuple(raised(torch.empty(value.shape, device="meta")).shape)
        parts.append(Value(shape, tuple(map(raised, value.layers)), value.reason))
    return joined(call, parts, dim)


@rule("broadcast_tensors", linear=True)
def broadcast_tensors(call):
    """Every tensor as it is: along dimensions in which it is repeated it has one element, as in a sum."""
    shape, results = call.node.meta["shapes"][0], []
    align(call.ids, call.values(), shape, call.where)
    for value in call.values():
        more = len(shape) - len(value.shape)
        layers = tuple(layer[(None,) * more] for layer in value.layers)
        results.append(Value((1,) * more + value.shape, layers, value.reason))
    return tuple(results)


def joined(call, parts, dim):
    """Ids along `dim` follow each other; along all other dimensions they are united."""
    kept = [i for i, p in enumerate(parts) if math.prod(p.shape) or len(p.shape) == len(call.shape)]
    parts, constant = [parts[i] for i in kept], {n for n, i in enumerate(kept) if call.is_constant(i)}
    ids, ends = call.ids, []
    others = []
    for part in parts:
        ends.append([layer for layer in part.layers if dim in varying(layer)])
        shape = tuple(1 if d == dim else s for d, s in enumerate(part.shape))
        rest = tuple(layer.narrow(dim, 0, 1) for layer in part.layers if dim not in varying(layer))
        others.append(Value(shape, rest, part.reason))
    shape = tuple(1 if d == dim else s for d, s in enumerate(call.shape))
    axes, reason = align(ids, others, shape, call.where)
    # a learned token beside those of the input has no zeros in a closed channel
    call.info.source = any(len(a.carriers) < len(parts) or a.carriers & constant for a in axes)
    layers = [axis.layer.expand(call.shape) for axis in axes]
    if any(ends):
        pieces = []
        for part, layers_along in zip(parts, ends, strict=True):
            for extra in layers_along[1:]:
                call.protect(extra, "is joined along two axes in")
            if layers_along:
                pieces.append(flat(layers_along[0]))
                continue
            fixed = ids.new(1)
            ids.protect(fixed, part.reason or f"is joined with a fixed number of channels in {call.where}")
            pieces.append(fixed.expand(part.shape[dim]))
        layers.append(spread(torch.cat(pieces), dim, call.shape))
    return call.result(layers, reason)


@rule("pad constant_pad_nd", linear=True)
def pad(call):
    """Space is padded as in pooling; channels of zeros are kept."""
    x, sizes = call.values()[0], list(call.get("pad", 1))
    value, mode = call.get("value", 3 if call.name == "pad" else 2), call.get("mode", 2, "constant")
    rank, layers = len(x.shape), []
    ends = [(rank - 1 - i // 2, i % 2 == 0, size) for i, size in enumerate(sizes)]  # (dimension, whether before, size)
    padded = {d for d, _, size in ends if size != 0}
    for d, _, size in ends:
        if not (_follows(size) and any(d in varying(layer) for layer in x.layers)):
            call.ids.keep_number(size, f"their number is a padding in {call.where}")
    for layer in x.layers:
        along = [d for d in varying(layer) if d in padded]
        small = layer
        for d in range(rank):
            if d not in varying(layer):
                small = small.narrow(d, 0, 1)
        if along and mode != "constant" and call.name == "pad":
            call.protect(layer, "passes through")
            continue
        for d, before, size in ends:
            if d in along:
                small = _padded(call, small, d, before, size)
        layers.append(small.expand(call.shape))
    # what a maximum never takes is no new value; a gate there would make nan of it
    call.info.source = bool(value) and math.isfinite(value)
    return call.result(layers)


def _follows(size):
    """Whether a number of padded channels fills up to another number, or is as many as one attribute says."""
    return is_tracked(size) and bool(size.terms or size.ids is None and len(size.widths) == 1 and size.factor)


def _padded(call, layer, dim, before, size):
    """The layer with `size` more channels at one end of a dimension, or fewer; those whose number follows may go."""
    number, length = int(size), layer.shape[dim]
    if number < 0:  # cropped by position
        call.ids.keep_number(size, f"their number is a padding in {call.where}")
        call.protect(layer.narrow(dim, 0 if before else length + number, -number), "is indexed by position in")
        return layer.narrow(dim, -number if before else 0, length + number)
    if _follows(size):
        more = call.ids.new(number)
        call.ids.bind(size, more, f"their number is a padding in {call.where}")
    else:
        more = call.ids.new(1).expand(number)
        call.protect(more, "meets padding in")
    shape = [number if d == dim else n for d, n in enumerate(layer.shape)]
    more = spread(more, dim, shape)
    return torch.cat([more, layer] if before else [layer, more], dim)


@rule("split chunk tensor_split split_with_sizes", linear=True)
def split(call):
    x = call.values()[0]
    dim = int(call.get("dim", 2, 0)) % len(x.shape)
    sizes = [int(shape[dim]) for shape in call.node.meta["shapes"]]
    parts = [[layer.narrow(dim, sum(sizes[:i]), n) for layer in x.layers] for i, n in enumerate(sizes)]
    along = call.ids.vector(x, dim)
    if along is not None:
        _bind_split(call, along.split(sizes))
    shapes = call.node.meta["shapes"]
    return tuple(call.ids.value(shape, part, x.reason) for shape, part in zip(shapes, parts, strict=True))


def _bind_split(call, parts):
    given = call.get("split_size_or_sections", 1, call.kwargs.get("split_size", call.kwargs.get("chunks")))
    given = call.kwargs.get("split_sizes", call.kwargs.get("indices_or_sections", given))
    reason = f"is split into parts of fixed size in {call.where}"
    ids, equal = call.ids, len({len(p) for p in parts}) == 1
    if isinstance(given, (tuple, list)) and call.name == "tensor_split":
        for bound in given:
            bounded(call, torch.cat(parts), bound)
    elif isinstance(given, (tuple, list)):
        for part, size in zip(parts, given, strict=True):
            if is_tracked(size) and size.ids is not None and not size.whole and equal:
                _equal(ids, parts)
            else:
                ids.bind(size, part, reason)
    elif not equal:
        ids.keep_number(given, reason)
        ids.protect(torch.cat(parts), reason)
    else:
        _equal(ids, parts)
        if call.name in ("chunk", "tensor_split"):
            ids.keep_number(given, reason)
        elif is_tracked(given) and given.ids is not None and not given.whole:
            if given.factor is None or len(given.ids) != sum(map(len, parts)):
                ids.keep_number(given, reason)
                ids.protect(parts[0], reason)
            else:
                ids.unite(given.ids, torch.cat(parts))
        else:
            ids.bind(given, parts[0], reason)


def _equal(ids, parts):
    for part in parts[1:]:
        ids.unite(parts[0], part)


@rule("glu")
def glu(call):
    """One half times the sigmoid of the other: channels go in pairs."""
    x = call.values()[0]
    dim = int(call.get("dim", 1, -1)) % len(x.shape)
    halves = [call.ids.together(layer.unflatten(dim, (2, -1)), dim) for layer in x.layers]
    return call.result([layer.select(dim, 0) for layer in halves])


@rule("unbind", linear=True)
def unbind(call):
    x = call.values()[0]
    dim = int(call.get("dim", 1, 0)) % len(x.shape)
    for layer in x.layers:
        if dim in varying(layer):
            call.protect(layer, "is unbound in")
    shapes = call.node.meta["shapes"]
    return tuple(
        call.ids.value(shape, [layer.select(dim, i) for layer in x.layers], x.reason) for i, shape in enumerate(shapes)
    )
