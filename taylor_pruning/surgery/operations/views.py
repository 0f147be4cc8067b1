"""Views: splitting and merging dimensions, repeating and moving elements."""

import math

import torch

from taylor_pruning.surgery.ids import flat, normal, spread, squash, varying
from taylor_pruning.surgery.numbers import is_tracked, number
from taylor_pruning.surgery.operations.registry import rule
from taylor_pruning.surgery.recorded_calls import operation_name


@rule(
    "permute transpose swapaxes swapdims movedim moveaxis squeeze unsqueeze T mT t H adjoint narrow_copy", linear=True
)
def moves(call):
    """Acts on ids as on data."""
    x = call.values()[0]
    if call.name in ("T", "mT", "H"):
        return call.result([getattr(layer, call.name) for layer in x.layers])
    arguments = [int(a) if is_tracked(a) else a for a in call.args[1:]]
    function = getattr(torch.Tensor, call.name)
    return call.result([function(layer, *arguments, **call.kwargs) for layer in x.layers])


@rule("flip fliplr flipud", linear=True)
def flips(call):
    """Flips of space act on data alone; channels that are flipped must be removed in pairs."""
    x = call.values()[0]
    dims = call.rest(1) if call.name == "flip" else [1 if call.name == "fliplr" else 0]
    dims = call.kwargs.get("dims", dims)
    return call.result(
        [layer.flip([int(d) for d in ([dims] if isinstance(dims, int) else dims)]) for layer in x.layers]
    )


@rule("roll rot90", linear=True)
def roll(call):
    dims = call.get("dims", 2, (0, 1) if call.name == "rot90" else None)
    return moved(call, (dims,) if isinstance(dims, int) else dims, "is moved by positions in")


def moved(call, dims, reason):
    """The result of an operation that keeps zeros and mixes elements along some dimensions, all where none are given."""
    x, kept = call.values()[0], []
    for layer in x.layers:
        if not dims or set(varying(layer)) & {int(d) % len(x.shape) for d in dims}:
            call.protect(layer, reason)
            continue
        for d in dims:
            layer = layer.narrow(d, 0, 1)
        kept.append(layer.expand(call.shape))
    return call.result(kept)


@rule("renorm")
def renorm(call):
    """Slices along one dimension, each shortened to a largest norm, which is over all other dimensions."""
    rank = len(call.values()[0].shape)
    kept = int(call.get("dim", 2)) % rank
    return moved(call, [d for d in range(rank) if d != kept], "is normalised over channels in")


@rule("view reshape unflatten _reshape_alias", linear=True)
def view(call):
    x = call.values()[0]
    if call.name == "unflatten":
        dim, sizes = int(call.get("dim", 1)) % len(x.shape), list(call.get("sizes", 2))
        sizes = [*x.shape[:dim], *sizes, *x.shape[dim + 1 :]]
        free = {d for d in range(len(sizes)) if not dim <= d < len(sizes) - len(x.shape) + dim + 1}
    else:
        sizes, free = call.rest(1), set()
        if "shape" in call.kwargs or "size" in call.kwargs:
            sizes = list(call.kwargs.get("shape", call.kwargs.get("size")))
    return viewed(call, x, sizes, free)


@rule("reshape_as view_as", linear=True)
def view_as(call):
    x, other = call.values()[:2]
    return viewed(call, x, sizes_of(call.ids, other), set())


@rule("flatten ravel", linear=True)
def flatten(call):
    x = call.values()[0]
    return call.result([layer.reshape(call.shape) for layer in _one_of_each(call, x.layers)])


def sizes_of(ids, value):
    """The shape of a tensor, with a Number of ids where channels run."""
    sizes = []
    for d, size in enumerate(value.shape):
        if any(d in varying(layer) for layer in value.layers):
            sizes.append(number(int(size), ids=_counted(ids, value, d)))
        else:
            sizes.append(int(size))
    return sizes


def _counted(ids, value, dim):
    layers = [layer for layer in value.layers if dim in varying(layer)]
    if len(layers) == 1 and varying(layers[0]) == [dim]:
        return ids.vector(value, dim)
    return torch.cat([layer.unique() for layer in layers])


def viewed(call, x, sizes, free):
    """A view to `sizes`: dimensions of a fixed size must keep it, one dimension follows the channels.

    Args:
        free: dimensions whose size follows in any case.
    """
    ids, shape, layers = call.ids, call.shape, []
    followed = set()
    for layer in _one_of_each(call, x.layers):
        if not call.info.constant and _depends_on_size(call, layer, sizes):
            call.protect(layer, "is mixed with positions in")
            continue
        new = normal(layer.reshape(shape))
        dims = varying(new)
        open_dims = [d for d in dims if d in free or _is_open(sizes[d])]
        if len(open_dims) > 1:
            chosen = _choose(call, sizes, open_dims)
            for d in set(open_dims).difference(chosen) if chosen else ():
                if _counts_the_same(ids, layer, sizes[d]):
                    followed.add(d)
            open_dims = chosen
        for d in dims:
            if d not in open_dims:
                new = ids.together(new, d)
        for d in open_dims:
            _follow(call, layer, new, d, sizes[d], d in free)
            followed.add(d)
        if open_dims and max(open_dims) < dims[-1]:
            ids.heads.append(squash(new)[0].reshape(-1))
        if not varying(new):
            call.protect(layer, "is viewed at a fixed size in")
        layers.append(new)
    for d, size in enumerate(sizes):
        if is_tracked(size) and d not in followed:
            ids.keep_number(size, f"their number is a size in {call.where}")
    return call.result(layers)


def _depends_on_size(call, layer, sizes):
    """Whether it depends on the size of the image which elements of a view to `sizes` a channel has.

    So it does where a dimension of the view has a part of the channels beside other elements, as in a view of [positions,
    channels] to [channels, height, width]: which part, the sizes behind that dimension say.
    """
    spans, fixed = _spans(call.shape), _fixed(call, sizes)
    low, high = _span(layer)
    starts = any(start == low for start, _ in spans)
    samples = high * layer.shape[0] == layer.numel()  # nothing else lies before the channels
    for d, (start, end) in enumerate(spans):
        apart = start >= high or end <= low
        inside = low <= start and end <= high
        around = start <= low and end >= high and low % start == 0 and end % high == 0
        behind = [i for i in range(d + 1, len(spans)) if spans[i][0] >= low]
        follows = starts and (d == 0 and samples or all(fixed[i] for i in behind))
        if not (apart or inside or around or follows):
            return True
    return False


def _spans(shape):
    """[(elements from one index to the next, elements of the whole dimension)] of every dimension of a contiguous tensor."""
    found, step = [], 1
    for size in reversed(shape):
        found.append((step, step * size))
        step *= size
    return found[::-1]


def _span(layer):
    """The elements from one channel to the next, and those of all channels."""
    low, ids = math.prod(layer.shape[varying(layer)[0] + 1 :]), flat(layer)
    alike = math.gcd(*ids.unique_consecutive(return_counts=True)[1].tolist())  # merged with positions behind them
    count = next(n for n in range(1, len(ids) + 1) if len(ids) % n == 0 and bool((ids.view(-1, n) == ids[:n]).all()))
    return low * alike, low * count


def _fixed(call, sizes):
    """For every dimension of a view, whether its size is a number in the code or of channels, not of an image."""
    given = [None] * len(sizes)
    if call.name in ("view", "reshape"):
        written = call.node.kwargs.get("shape", call.node.kwargs.get("size", call.node.args[1:]))
        given = written[0] if len(written) == 1 and isinstance(written[0], (tuple, list)) else written
    return [
        n == 1 or is_tracked(size) and _is_open(size) or isinstance(item, int) and item >= 0
        for n, size, item in zip(call.shape, sizes, given, strict=True)
    ]


def _one_of_each(call, layers):
    """Of two axes of channels that the view merges into one (heads by values), the one that may shrink; the other is protected.

    The product of both cannot: the next layer would have to lose rows and columns of a table.
    """
    if len(layers) < 2 or call.info.constant:  # the rows and columns of a weight are told apart again behind it
        return layers
    kept = {}
    for layer in sorted(layers, key=varying, reverse=not call.ways.heads):
        dims = tuple(varying(layer.reshape(call.shape)))
        alike = kept.setdefault(dims, [])
        if dims and alike and not bool(torch.isin(squash(alike[0])[0], squash(layer)[0]).any()):
            call.ids.choices += 1
            call.protect(layer, "is merged with other channels in")
        else:
            alike.append(layer)
    return [layer for layers in kept.values() for layer in layers]


def _is_open(size):
    return is_tracked(size) and (size.ids is not None or bool(size.widths)) or size == -1


def _choose(call, sizes, dims):
    """Of several dimensions that could shrink, the one that does."""
    call.ids.choices += 1
    named = [d for d in dims if is_tracked(sizes[d])]
    if len(named) < len(dims) and any(sizes[d].ids is not None for d in named):
        return []  # -1 and a size of other channels: no number in the code says which
    heads = call.ways.heads or _is_mixed(call.node, dims[-1])
    return [dims[0] if heads else dims[-1]]


MIXING = set("mean var std var_mean std_mean norm softmax layer_norm amax amin".split())


def _is_mixed(node, dim, depth=3):
    """Whether the dimension is reduced or normalised right after the node: then it cannot shrink."""
    for user in node.users:
        name = operation_name(user)
        if name in MIXING:
            dims = user.kwargs.get("dim", user.args[1] if len(user.args) > 1 else None)
            rank = len(node.meta["shape"])
            dims = range(rank) if dims is None else [dims] if isinstance(dims, int) else dims
            if name == "layer_norm" or any(isinstance(d, int) and d % rank == dim for d in dims):
                return True
        elif depth and user.meta.get("shape") == node.meta["shape"] and _is_mixed(user, dim, depth - 1):
            return True
    return False


def _counts_the_same(ids, layer, size):
    """Whether a size is computed from the number of the layer's channels alone, or of channels that go with them."""
    counted = getattr(size, "ids", None)
    if counted is None:
        return False
    if size.factor is not None and len(counted) == len(flat(layer)):
        ids.unite(flat(layer), counted)
        return True
    return bool(torch.isin(counted, layer).all())


def _follow(call, layer, new, dim, size, free):
    """`size` is that of a dimension of the view `new` of `layer` along which channels run."""
    ids, reason = call.ids, f"meets another number of channels in {call.where}"
    if free or not is_tracked(size):
        return
    along = flat(new)
    if size.ids is None or size.terms or size.whole and not size.widths and len(size.ids) == len(along):
        ids.bind(size, along, reason)
        return
    if size.factor is not None and len(flat(layer)) == len(size.ids):
        ids.unite(flat(layer), size.ids)
        ids.keep_widths(size, reason)
    elif ids.counts(size, along):
        ids.keep_widths(size, reason)
    elif not size.widths and not bool(torch.isin(size.ids, layer).all()):
        ids.protect(layer, reason)
        ids.protect(size.ids, reason)


@rule("view_as_real view_as_complex", linear=True)
def parts_of_complex(call):
    """Real and imaginary part along a last dimension, and back."""
    x = call.values()[0]
    if call.name == "view_as_real":
        return call.result([layer[..., None].expand(call.shape) for layer in x.layers])
    return call.result([call.ids.together(layer, layer.dim() - 1)[..., 0] for layer in x.layers])


@rule("expand expand_as broadcast_to", linear=True)
def expand(call):
    x = call.values()[0]
    sizes = sizes_of(call.ids, call.values()[1]) if call.name == "expand_as" else call.rest(1)
    sizes = list(call.kwargs.get("size", sizes))
    layers = [layer[(None,) * (len(call.shape) - layer.dim())].expand(call.shape) for layer in x.layers]
    shift = len(call.shape) - len(x.shape)
    for d, size in enumerate(sizes):
        if not is_tracked(size) or (size.ids is None and not size.widths):
            continue
        if d >= shift and x.shape[d - shift] > 1 or call.shape[d] == 1:
            for layer in layers:
                if d in varying(layer):
                    _follow(call, layer, layer, d, size, False)
        elif size.whole and size.ids is not None and len(size.ids) == call.shape[d]:
            layers.append(spread(size.ids, d, call.shape))
            call.info.source = True
        else:
            call.ids.keep_number(size, f"is repeated over channels in {call.where}")
    return call.result(layers)


@rule("repeat tile", linear=True)
def repeat(call):
    x, times = call.values()[0], call.rest(1) or list(call.kwargs.get("dims", call.kwargs.get("repeats", ())))
    times = [1] * (len(x.shape) - len(times)) + times  # only `tile` may name fewer dimensions
    layers = [layer.repeat(*map(int, times)) if layer.numel() else layer for layer in x.layers]
    shift = len(call.shape) - len(x.shape)
    for d, n in enumerate(times):
        if is_tracked(n) and n.ids is not None:
            if n.whole and len(n.ids) == call.shape[d] and (d < shift or x.shape[d - shift] == 1):
                layers.append(spread(n.ids, d, call.shape))
                call.info.source = True
            else:
                call.ids.keep_number(n, f"is repeated over channels in {call.where}")
    return call.result(layers)


@rule("repeat_interleave", linear=True)
def repeat_interleave(call):
    x, times, dim = call.values()[0], call.get("repeats", 1), call.get("dim", 2)
    call.keep_numbers()
    return call.result([layer.repeat_interleave(int(times), int(dim)) for layer in x.layers])
