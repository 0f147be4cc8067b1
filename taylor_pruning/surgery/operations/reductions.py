"""Sums, means, extrema and normalisations over dimensions."""

from taylor_pruning.surgery.ids import Value, varying
from taylor_pruning.surgery.operations.elementwise import total
from taylor_pruning.surgery.operations.registry import rule


def reduced(call, x, dims, keepdim, layers):
    """Layers without the reduced dimensions, along which they do not vary."""
    result = []
    for layer in layers:
        for d in sorted(dims, reverse=True):
            layer = layer.narrow(d, 0, 1) if keepdim else layer.select(d, 0)
        result.append(layer)
    return result


def dims_of(call, x, position=1):
    dims = call.get("dim", position)
    rank = len(x.shape)
    if dims is None or isinstance(dims, bool):
        return tuple(range(rank))
    if isinstance(dims, int):
        dims = (dims,)
    return tuple(int(d) % rank for d in dims) or tuple(range(rank))


def fold(call, dims, sums):
    """The result of reducing `dims`; over channels it is exact if the reduction is a sum."""
    x = call.values()[0]
    sums = sums and not call.info.constant  # a closed channel is not zero in a weight
    keepdim = bool(call.kwargs.get("keepdim", False)) or any(a is True for a in call.args[1:])
    kept = []
    for layer in x.layers:
        along = set(varying(layer)) & set(dims)
        if not along:
            kept.append(layer)
        elif sums and set(varying(layer)) <= set(dims):
            call.info.reads = True
        else:
            call.protect(layer, "is reduced over channels in")
    layers = reduced(call, x, dims, keepdim, kept)
    if "shapes" in call.node.meta:
        return tuple(call.ids.value(shape, layers) for shape in call.node.meta["shapes"])
    return call.result([layer.expand(call.shape) for layer in layers])  # several quantiles lie along a first dimension


@rule("sum nansum", linear=True)
def sums(call):
    return fold(call, dims_of(call, call.values()[0]), sums=True)


@rule("mean amax amin nanmean", linear=True)
def means(call):
    return fold(call, dims_of(call, call.values()[0]), sums=False)


@rule("std var median prod any all std_mean var_mean aminmax logsumexp argmax argmin count_nonzero")
def statistics(call):
    call.info.source = call.name not in ("std", "var", "median", "prod", "std_mean", "var_mean")
    dims = dims_of(call, call.values()[0])
    return fold(call, dims, sums=False)


@rule("norm vector_norm linalg_vector_norm")
def norm(call):
    position = 2
    dims = call.get("dim", position)
    x = call.values()[0]
    order = call.get("p", 1, call.kwargs.get("ord", 2))
    dims = tuple(range(len(x.shape))) if dims is None else (dims,) if isinstance(dims, int) else dims
    dims = tuple(int(d) % len(x.shape) for d in dims)
    sums = order in (None, "fro") or (isinstance(order, (int, float)) and 1 <= order < float("inf"))
    return fold(call, dims, sums)


@rule("max min", linear=True)
def extrema(call):
    if len(call.operands) == 2:
        return total(call)
    dims = dims_of(call, call.values()[0])
    return fold(call, dims, sums=False)


@rule("quantile nanquantile", linear=True)
def quantile(call):
    return fold(call, dims_of(call, call.values()[0], 2), sums=False)


@rule("topk sort kthvalue", linear=True)
def ranked(call):
    """Values and their places along one dimension; places of closed channels are not known."""
    x, shapes = call.values()[0], call.node.meta["shapes"]
    dim = int(call.get("dim", 1 if call.name == "sort" else 2, -1)) % len(x.shape)
    call.keep_numbers()
    layers = []
    for layer in x.layers:
        if dim in varying(layer):
            call.protect(layer, "is sorted over channels in")
        else:
            layer = layer.narrow(dim, 0, 1) if len(shapes[0]) == len(x.shape) else layer.select(dim, 0)
            layers.append(layer.expand(shapes[0]))
    return call.ids.value(shapes[0], layers, x.reason), Value(shapes[1], (), f"meets places in {call.where}")


@rule("softmax log_softmax softmin cumsum cumprod logcumsumexp")
def along(call):
    """Every element depends on all others along one dimension."""
    call.info.source = True
    x = call.values()[0]
    dim = call.get("dim", 1)
    kept = []
    for layer in x.layers:
        if dim is None or int(dim) % len(x.shape) in varying(layer):
            call.ids.protect(layer, f"passes through {call.where} over channels")
        else:
            kept.append(layer)
    return call.result(kept)


@rule("layer_norm rms_norm")
def layer_norm(call):
    call.info.source = True
    x = call.values()[0]
    first = len(x.shape) - len(call.get("normalized_shape", 1))
    kept = []
    for layer in x.layers:
        if any(d >= first for d in varying(layer)):
            call.protect(layer, "is normalised over channels in")
        else:
            kept.append(layer)
    return call.result(kept, f"is normalised over channels in {call.where}")


@rule("_weight_norm")
def weight_norm(call):
    """g v / |v|, the norm over all dimensions but one: g makes up for what the norm loses in a cut."""
    v, g, dim = call.get("v", 0), call.get("g", 1), int(call.get("dim", 2, 0))
    dim = dim if dim == -1 else dim % len(v.shape)  # -1: over all
    stored = [node.target for node, value in call.operands if node.op == "get_attr" and value.tensor is None]
    if len(stored) < 2:
        return call.unknown()
    call.ids.norms[stored[0]] = stored[1], dim
    own = call.ids.vector(g, dim) if g.shape else None
    if own is not None:
        call.ids.unite(own, call.ids.vector(v, dim))
    return call.result(v.layers)


def per_channel(call, names, dim=1):
    """Ids of the channels along `dim`, united with those of the tensors `names` {argument: position}, one value a channel."""
    call.info.source = True
    ids = call.ids.vector(call.values()[0], dim)
    if ids is not None:
        call.ids.settings.setdefault(call.node.meta["module"], ids)
    for name, position in names.items():
        call.ids.attach(call.get(name, position), ids, f"meets a tensor of fixed size in {call.where}")
    return ids


def along_channels(call, x):
    """The layers that vary along dimension 1 alone; others are protected, as the normalisation runs along them."""
    kept = []
    for layer in x.layers:
        if set(varying(layer)) <= {1}:
            kept.append(layer)
        else:
            call.protect(layer, "is normalised over channels in")
    return kept


@rule("batch_norm", linear="each")
def batch_norm(call):
    x = call.values()[0]
    per_channel(call, {"running_mean": 1, "running_var": 2, "weight": 3, "bias": 4})
    batch_statistics = call.get("running_mean", 1) is None
    if (batch_statistics or call.get("training", 5)) and not call.info.constant:  # it divides by those of the batch
        call.info.nonlinear = f"{call.name} without running statistics"
    return call.result(along_channels(call, x) if batch_statistics else x.layers)


@rule("instance_norm")
def instance_norm(call):
    x = call.values()[0]
    per_channel(call, {"running_mean": 1, "running_var": 2, "weight": 3, "bias": 4})
    return call.result(along_channels(call, x))


@rule("group_norm")
def group_norm(call):
    """The channels of a group are normalised together, so that they are removed together, and the group with them."""
    x, groups = call.values()[0], call.get("num_groups", 1)
    ids = per_channel(call, {"weight": 2, "bias": 3})
    if ids is not None:
        table = ids.view(int(groups), -1)
        call.ids.unite(table[:, :1], table)
        reason = f"is normalised over channels in {call.where}"
        if int(groups) == 1:
            call.ids.protect(ids, reason)
        else:
            call.ids.bind(groups, table[:, 0], reason)
    return call.result(along_channels(call, x))
