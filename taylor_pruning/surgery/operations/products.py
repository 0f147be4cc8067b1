"""Contractions: matrix products, einsum, attention."""

import math

import torch

from taylor_pruning.surgery.ids import Value, flat, varying
from taylor_pruning.surgery.operations.elementwise import align, find_zero_operands
from taylor_pruning.surgery.operations.registry import rule


def contract(call, operands, out, linear=False):
    """sum over all labels that are not in `out` of the product of the operands.

    Args:
        operands: [(value, labels)], one label for each dimension.
        out: labels of the result.
        linear: new ids that come from a constant operand are filters of a fully connected layer.
    """
    ids, info = call.ids, call.info
    labels = list(dict.fromkeys(label for _, own in operands for label in own))
    sizes = dict.fromkeys(labels, 1)
    for value, own in operands:
        for label, size in zip(own, value.shape, strict=True):
            sizes[label] = max(sizes[label], size)
    shape = tuple(sizes[label] for label in labels)
    aligned = [_spread(value, own, labels) for value, own in operands]
    axes, reason = align(ids, aligned, shape, call.where)
    _count(call, [own for _, own in operands], out, sizes, axes)
    kept, summed = [], {labels.index(label) for label in labels if label not in out}
    for axis in axes:
        if not summed.intersection(varying(axis.layer)):
            kept.append(axis)
        elif all(call.is_constant(i) for i in axis.carriers if i < len(call.operands)):
            call.protect(axis.layer, "is summed over parameters alone, where no gate can be, in")
        else:
            info.reads = True
    find_zero_operands(call, kept)
    if info.reads:
        info.mains = None if info.source else info.mains
    layers = []
    for axis in kept:
        layer = axis.layer
        if linear and not info.constant and all(call.is_constant(i) for i in axis.carriers):
            ids.issue(call.node, flat(layer), linear=True)
        for d in summed:
            layer = layer.narrow(d, 0, 1)
        order = [labels.index(label) for label in out]
        layer = layer.permute(*order, *sorted(summed))
        layers.append(layer.reshape(layer.shape[: len(out)]) if summed else layer)
    return call.result([layer.expand(call.shape) for layer in layers], reason)


def _count(call, terms, out, sizes, axes):
    """Counts the products of a contraction: of two terms (lists of labels) at a time, first summed over what no other has.

    Args:
        sizes: {label: size}, all labels in the order of the dimensions of the `axes`.
    """
    held = set(terms[0])
    for i, own in enumerate(terms[1:], start=1):
        later = set(out).union(*terms[i + 1 :])
        met = {label for label in held.union(own) if label in later or label in held and label in own}
        if not met <= later:  # a product that sums nothing is one of single elements
            dims = {d for d, label in enumerate(sizes) if label in met}
            layers = [axis.layer for axis in axes if dims.issuperset(varying(axis.layer))]
            call.multiplies(math.prod(sizes[label] for label in met), layers)
        held = met & later


def _spread(value, own, labels):
    """The value with one dimension for each of `labels`."""
    missing = [label for label in labels if label not in own]
    order = [[*own, *missing].index(label) for label in labels]

    def moved(layer):
        return layer[(..., *(None,) * len(missing))].permute(*order)

    shape = [value.shape[own.index(label)] if label in own else 1 for label in labels]
    return Value(tuple(shape), tuple(moved(layer) for layer in value.layers), value.reason, lost=value.lost)


@rule("addmm baddbmm", linear="each")
def addmm(call):
    """A tensor, and a matrix product that is added to it."""
    added, batch = call.values()[0], ["b"] if call.name == "baddbmm" else []
    call.operands = [*call.operands[1:], call.operands[0]]
    factors = zip(call.values()[:2], ([*batch, "n", "k"], [*batch, "k", "m"]), strict=True)
    product = contract(call, list(factors), [*batch, "n", "m"], linear=any(map(call.is_constant, range(2))))
    call.info.source = True
    axes, reason = align(call.ids, [product, added], call.shape, call.where)
    return call.result([axis.layer for axis in axes], reason)


@rule("tensordot", linear="each")
def tensordot(call):
    (a, b), dims = call.values(), call.get("dims", 2, 2)
    if isinstance(dims, int):
        dims = range(len(a.shape) - dims, len(a.shape)), range(dims)
    first, second = ([f"{side}{d}" for d in range(len(value.shape))] for side, value in (("a", a), ("b", b)))
    for d, other in zip(*dims, strict=True):
        second[int(other)] = first[int(d)]
    out = [label for label in first + second if (label in first) != (label in second)]
    return contract(call, [(a, first), (b, second)], out, linear=any(map(call.is_constant, range(2))))


@rule("cosine_similarity")
def cosine_similarity(call):
    """sum x y / (|x| |y|) along one dimension: of channels that are zero in both it is exact."""
    values = call.values()
    shape = torch.broadcast_shapes(*(value.shape for value in values))
    dim = int(call.get("dim", 2, 1)) % len(shape)
    axes, reason = align(call.ids, values, shape, call.where)
    kept = [axis for axis in axes if dim not in varying(axis.layer)]
    for axis in axes:
        if varying(axis.layer) == [dim] and not any(map(call.is_constant, axis.carriers)):
            call.info.reads = True
        elif axis not in kept:
            call.protect(axis.layer, "is normalised over channels in")
    find_zero_operands(call, kept)
    return call.result([axis.layer.select(dim, 0) for axis in kept], reason)


@rule("matmul bmm mm mv dot", linear="each")
def matmul(call):
    a, b = call.values()
    rank = max(len(a.shape), len(b.shape)) - 2
    batch = [f"b{i}" for i in range(rank)]

    def labels(value, ends):
        ends = ends if len(value.shape) > 1 else [label for label in ends if label == "k"]
        return [*batch[rank - (len(value.shape) - len(ends)) :], *ends]

    first, second = labels(a, ["n", "k"]), labels(b, ["k", "m"])
    out = [*batch, *(["n"] if len(a.shape) > 1 else []), *(["m"] if len(b.shape) > 1 else [])]
    constant_weight = any(call.is_constant(i) for i in range(2))
    return contract(call, [(a, first), (b, second)], out, linear=constant_weight)


@rule("einsum", linear="each")
def einsum(call):
    equation, values = call.args[0].replace(" ", ""), call.values()
    left, arrow, right = equation.partition("->")
    terms = left.split(",")
    if not arrow:
        right = "..." * ("." in left) + "".join(sorted(c for c in set(left) if c.isalpha() and left.count(c) == 1))
    own, out = _labels(terms, right, [len(value.shape) for value in values])
    operands = list(zip(values, own, strict=True))
    return contract(call, operands, out, linear=any(call.is_constant(i) for i in range(len(values))))


def _labels(terms, right, ranks):
    """The labels of the dimensions of every term of an einsum, and of its result; those of "..." are counted from the last."""
    lengths = [rank - len(term.replace("...", "")) for term, rank in zip(terms, ranks, strict=False)]
    most = max([0, *lengths])

    def labelled(term, length):
        before, dots, behind = term.partition("...")
        return [*before, *(f"d{i}" for i in range(most - length, most) if dots), *behind]

    return [labelled(*pair) for pair in zip(terms, lengths, strict=False)], labelled(right, most)


def _repeated(ids, value, times):
    """The value with every head so many times in a row, as several heads of queries read one of keys and values.

    A single head is broadcast, whatever the number of heads that read it.
    """
    if value.shape[-3] == 1:
        return value
    layers = [layer.repeat_interleave(times, -3) for layer in value.layers]
    return ids.value((*value.shape[:-3], value.shape[-3] * times, *value.shape[-2:]), layers, value.reason)


@rule("scaled_dot_product_attention")
def attention(call):
    """softmax(q k^T scale) v: heads and the dimension of the values are channels, so is that of q and k if `scale` is given."""
    ids = call.ids
    q, k, v = (call.get(name, i) for i, name in enumerate(("query", "key", "value")))
    mask, scale = call.get("attn_mask", 3), call.kwargs.get("scale")
    if call.kwargs.get("enable_gqa"):
        k, v = (_repeated(ids, value, q.shape[-3] // value.shape[-3]) for value in (k, v))
    if scale is None:
        for value in (q, k):
            for layer in value.layers:
                if len(value.shape) - 1 in varying(layer):
                    call.protect(layer, "their number scales")
    batch = [f"b{i}" for i in range(max(len(value.shape) for value in (q, k, v)) - 2)]
    labels = [*batch, "l", "d", "s", "e"]
    given = ((q, "ld"), (k, "sd"), (v, "se"), *([(mask, "ls")] if isinstance(mask, Value) else []))
    parts = [(value, [*batch, *ends][len(batch) + 2 - len(value.shape) :]) for value, ends in given]
    sizes = [max(value.shape[own.index(label)] for value, own in parts if label in own) for label in labels]
    values = [_spread(value, own, labels) for value, own in parts]
    axes, reason = align(ids, values, tuple(sizes), call.where)
    terms, lengths = [own for _, own in parts], dict(zip(labels, sizes, strict=True))
    _count(call, terms[:2], [*batch, "l", "s"], lengths, axes)
    _count(call, [[*batch, "l", "s"], terms[2]], [*batch, "l", "e"], lengths, axes)
    call.info.reads = True
    call.info.mains = (call.operands[2][0],)
    layers, d = [], labels.index("d")
    for axis in axes:
        (along,) = varying(axis.layer)
        if along == d:
            continue
        if along in (labels.index("s"), labels.index("l")):
            call.protect(axis.layer, "is no axis of the values in")
            continue
        if 2 not in axis.carriers:  # heads of queries that share their values: a closed one still gives their mean
            call.info.source = True
        layer = axis.layer.select(labels.index("s"), 0).select(d, 0)
        layers.append(layer.expand(call.shape))
    return call.result(layers, reason)
