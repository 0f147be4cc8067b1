"""A conv or linear layer that is fitted: its tensors, and its inputs and outputs as rows of a regression."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from taylor_pruning.repair.batchnorm import BatchNorm


@dataclass
class FittedLayer:
    """A layer to fit: where it is in the graph and what follows it before its output meets a stream."""

    name: str
    position: int  # in the plan's order
    weight: torch.Tensor  # of the smaller network
    bias: torch.Tensor | None
    geometry: dict | None  # stride, padding (before and behind), dilation along space, groups; None: fully connected
    kept: torch.Tensor  # [filters] indices of the dense layer's filters
    batchnorm: BatchNorm | None  # of the smaller network
    stream: int | None  # position of the other operand of the sum
    gives_logits: bool = False  # whether its output [B, classes] is the network's, and linear
    has_own_bias: bool = False  # a bias that nothing else reads
    sample_dim: int = 0  # of its input and output, see surgery.units.sample_dim

    @property
    def groups(self):
        return self.geometry["groups"] if self.geometry else 1

    @property
    def scale(self):
        """[filters] factor between this layer's output and the sum."""
        norm = self.batchnorm
        if norm is None:
            return self.weight.new_ones(len(self.kept))
        scale = (norm.running_var + norm.eps).rsqrt()
        return scale if norm.weight is None else scale * norm.weight

    @property
    def has_intercept(self):
        return self.has_own_bias or self.batchnorm is not None


def argument(node, name, position, default=None):
    """The argument of a call, given by name or by position."""
    return node.kwargs.get(name, node.args[position] if len(node.args) > position else default)


def conv_geometry(node, weight):
    """Stride, padding and dilation of a conv, along every dimension of space."""

    space = weight.dim() - 2

    def tuple_of(given):
        return tuple(map(int, given)) if isinstance(given, (tuple, list)) else (int(given),) * space

    dilation, padding = tuple_of(argument(node, "dilation", 5, 1)), argument(node, "padding", 4, 0)
    if padding == "same":
        extents = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
        sides = [(extent // 2, extent - extent // 2) for extent in extents]
    else:
        sides = [(p, p) for p in tuple_of(0 if padding == "valid" else padding)]
    padding = [side for pair in reversed(sides) for side in pair]
    return {"stride": tuple_of(argument(node, "stride", 3, 1)), "padding": padding, "dilation": dilation}


def as_columns(groups, weight):
    """A layer's weight [filters, channels of a group, *kernel] as [groups, kernel positions x channels, filters of a group]."""
    return weight.flatten(2).mT.reshape(groups, len(weight) // groups, -1).mT if weight.dim() > 2 else weight.T[None]


def by_position(layer, output):
    """A layer's output as [batch, positions, filters]."""
    if layer.geometry is None:
        return output.reshape(len(output), -1, output.shape[-1])
    return output.flatten(2).mT


def patches_at(layer, x, drawn):
    """What the layer sees at the drawn output positions [images, each]: [groups, images x each, columns]."""
    if layer.geometry is None:
        x = x.reshape(len(x), -1, x.shape[-1])
        return x.gather(1, drawn[..., None].expand(-1, -1, x.shape[-1])).flatten(0, 1)[None]
    x = F.pad(x, layer.geometry["padding"])
    space, device = x.shape[2:], x.device
    geometry = [space, layer.weight.shape[2:], layer.geometry["stride"], layer.geometry["dilation"]]
    corner, offset = drawn.new_zeros(drawn.shape), drawn.new_zeros(1)
    outputs = [(n - d * (k - 1) - 1) // s + 1 for n, k, s, d in zip(*geometry, strict=True)]
    for axis, (length, kernel, stride, dilation) in enumerate(zip(*geometry, strict=True)):
        index = drawn // math.prod(outputs[axis + 1 :]) % outputs[axis]
        corner = corner * length + index * stride
        offset = (offset[:, None] * length + torch.arange(kernel, device=device) * dilation).flatten()
    corner = corner + torch.arange(len(x), device=device)[:, None] * math.prod(space)
    rows = x.movedim(1, -1).reshape(-1, x.shape[1])[corner.flatten()[:, None] + offset]
    channels = x.shape[1] // layer.groups
    return rows.unflatten(2, (layer.groups, channels)).permute(2, 0, 1, 3).flatten(2)
