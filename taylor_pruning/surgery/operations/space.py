"""Pooling, resizing and shuffling of space and channels."""

import torch

from taylor_pruning.surgery.ids import varying
from taylor_pruning.surgery.operations.elementwise import align
from taylor_pruning.surgery.operations.registry import rule
from taylor_pruning.surgery.operations.views import moved

_DIMENSIONS = "1d 2d 3d".split()
_KINDS = "max_pool{} adaptive_max_pool{} avg_pool{} adaptive_avg_pool{}"
_KINDS += " max_pool{}_with_indices adaptive_max_pool{}_with_indices"
POOLS = " ".join(_KINDS.replace("{}", d) for d in _DIMENSIONS)


@rule("lp_pool1d lp_pool2d lp_pool3d")
@rule(POOLS + " interpolate upsample fractional_max_pool2d", linear=True)
def spatial(call):
    """Pooling and resizing of space: the same channels at another size."""
    x = call.values()[0]
    digit = [int(c) for c in call.name if c.isdigit()]
    rank = len(x.shape)
    first = rank - digit[0] if digit else 2
    call.keep_numbers()
    kept = []
    for layer in x.layers:
        if any(d >= first for d in varying(layer)):
            call.protect(layer, "passes through")
        else:
            kept.append(layer)
    if "shapes" in call.node.meta:
        return tuple(_resized(call, kept, shape, first) for shape in call.node.meta["shapes"])
    return _resized(call, kept, call.shape, first)


@rule("max_unpool1d max_unpool2d max_unpool3d", linear=True)
def unpool(call):
    """Values at the places that a max-pool found, in the same channels, perhaps of other filters (SegNet)."""
    values, size = call.values()[:2], call.kwargs.get("output_size") or ()
    align(call.ids, values, values[0].shape, call.where)
    call.info.mains = (call.operands[0][0],)
    if len(size) == len(values[0].shape):  # what it names besides space is not looked at
        call.kwargs = {**call.kwargs, "output_size": size[2:]}
    return spatial(call)


@rule("grid_sample", linear=True)
def grid_sample(call):
    """Linear in the maps, not in the places where they are read."""
    if not call.is_constant(1):
        call.info.nonlinear = call.name
    return spatial(call)


@rule("roi_align", linear=True)
def roi_align(call):
    """Pooled windows of the maps, whose places depend on no channels."""
    if not call.is_constant(1):
        call.info.nonlinear = call.name
    for layer in call.values()[1].layers:
        call.protect(layer, "enters")
    call.info.mains = (call.operands[0][0],)
    layers = [layer for layer in call.values()[0].layers if varying(layer) == [1]]
    for layer in call.values()[0].layers:
        if varying(layer) != [1]:
            call.protect(layer, "passes through")
    return call.result([layer[:1, :, :1, :1].expand(call.shape) for layer in layers])


@rule("affine_grid", linear=True)
def affine_grid(call):
    """Places of the pixels of a size, in which the number of channels does not matter."""
    call.info.reads = call.info.source = True
    for layer in call.values()[0].layers:
        call.protect(layer, "passes through")
    for d, size in enumerate(call.get("size", 1)):
        if d != 1:
            call.ids.keep_number(size, f"their number enters {call.where}")
    return call.result((), f"passes through {call.where}")


@rule("fft_fft fft_ifft fft_rfft fft_irfft fft_fft2 fft_ifft2 fft_rfft2 fft_irfft2 fft_fftn fft_ifftn fft_rfftn fft_irfftn",
      linear=True)  # fmt: skip
def fourier(call):
    call.keep_numbers()
    dims = call.get("dim", 2, {"2": (-2, -1), "n": None}.get(call.name[-1], -1))
    return moved(call, (dims,) if isinstance(dims, int) else dims, "passes through")


def _resized(call, layers, shape, first):
    result = []
    for layer in layers:
        for d in range(first, layer.dim()):
            layer = layer.narrow(d, 0, 1)
        result.append(layer.expand(shape))
    return call.result(result, shape=shape)


@rule("channel_shuffle native_channel_shuffle", linear=True)
def channel_shuffle(call):
    x, groups = call.values()[0], int(call.get("groups", 1))
    layers = []
    for layer in x.layers:
        grouped = layer.unflatten(1, (groups, -1))
        layers.append(call.ids.together(grouped, 1).transpose(1, 2).flatten(1, 2))
    return call.result(layers)


@rule("pixel_shuffle", linear=True)
def pixel_shuffle(call):
    x, factor = call.values()[0], int(call.get("upscale_factor", 1))
    layers = []
    for layer in x.layers:
        grouped = layer.unflatten(-3, (-1, factor * factor))
        grouped = call.ids.together(grouped, grouped.dim() - 3)
        layers.append(torch.nn.functional.pixel_shuffle(grouped.flatten(-4, -3), factor))
    return call.result(layers)


@rule("pixel_unshuffle", linear=True)
def pixel_unshuffle(call):
    factor = int(call.get("downscale_factor", 1))
    return call.result([torch.nn.functional.pixel_unshuffle(layer, factor) for layer in call.values()[0].layers])


@rule("unfold im2col", linear=True)
def unfold(call):
    """F.unfold [N, C, ...] -> [N, C * k, L]: every channel becomes k; Tensor.unfold appends windows of one dimension."""
    x = call.values()[0]
    if isinstance(call.node.target, str):
        dim, layers = int(call.get("dimension", 1)) % len(x.shape), []
        for layer in x.layers:
            if dim in varying(layer):
                return call.unknown()
            layers.append(layer.narrow(dim, 0, 1)[..., None].expand(call.shape))
        return call.result(layers)
    layers = []
    for layer in x.layers:
        if set(varying(layer)) - {0, 1}:
            return call.unknown()
        small = layer.flatten(2)[:, :, :1].repeat_interleave(call.shape[1] // x.shape[1], 1)
        layers.append(small.expand(call.shape))
    return call.result(layers)


@rule("col2im", linear=True)
def fold(call):
    """F.fold [N, C * k, L] -> [N, C, H, W]: k channels become one."""
    x, channels = call.values()[0], call.shape[-3]
    layers = []
    for layer in x.layers:
        if varying(layer) != [len(x.shape) - 2]:
            return call.unknown()
        grouped = call.ids.together(layer.unflatten(-2, (channels, -1)), layer.dim() - 1)
        layers.append(grouped[..., :1, :1].expand(call.shape))
    call.keep_numbers()
    return call.result(layers)
