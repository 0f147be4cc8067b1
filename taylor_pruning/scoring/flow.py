"""Gradient flow of every unit of one batch, and the weights that it gives to scores.

The flow of unit u on sample n is the L2 norm of the gradient of that sample's loss with respect to the unit's channels
a after the last affine operation, before the activation function:

    F[n, u] = sqrt( sum over channels c of u and positions x of (d loss_n / d a[n, c, x])^2 )
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from taylor_pruning.surgery.graph import ChannelGraph
from taylor_pruning.surgery.units import by_layers, by_sample

WEIGHT_FLOOR = 0.1  # no weight is smaller, so that a weight alone divides no score by more than 10


def unit_gradient_norms(
    loss: Tensor, gated: Sequence[tuple], images: int, units: int, *, retain_graph: bool = True
) -> Tensor:
    """The flow F of one batch of `images` images (module docstring).

    Where a forward folds space or time into the batch, an image has several rows there; their squares
    add up.

    Args:
        loss: scalar, the sum over the batch of the samples' losses (so that samples do not mix; eval mode).
        gated: list of (GateSite, activation) as `ChannelGraph.gated(..., on_activation=...)` gives them. An activation is its
            `torch.autograd.graph.get_gradient_edge`, taken inside `on_activation`, or the tensor itself where nothing
            overwrites it.
        units: number of units.
        retain_graph: keep the graph for further backward passes.

    Returns:
        [images, units] tensor.

    Raises:
        ValueError: an activation was overwritten by an in-place ReLU, so that its gradient is the one behind the ReLU.
    """
    for site, activation in gated:
        if isinstance(activation, torch.Tensor) and activation._version:
            raise ValueError(f"{site.module}: its activation was changed in place; pass get_gradient_edge(activation)")
    grads = torch.autograd.grad(loss, [a for _, a in gated], retain_graph=retain_graph, allow_unused=True)
    # no gradient: computed but not used for the logits
    used = [(site, grad) for (site, _), grad in zip(gated, grads, strict=True) if grad is not None]
    first = used[0][1]
    # float64: squares of a vanishing gradient underflow in float32
    squares = torch.zeros(images, units, dtype=torch.float64, device=first.device)
    for site, grad in used:
        rows = by_sample(grad.movedim((site.batch_dim, site.dim), (0, 1)), images, site.blocks)
        channels = rows.reshape(images, -1, rows.shape[1], rows[0, 0].numel())
        norms = torch.linalg.vector_norm(channels, dim=(1, 3), dtype=torch.float64)
        has_gate = site.units >= 0
        squares.index_add_(1, site.units[has_gate].to(grad.device), norms[:, has_gate.to(grad.device)].square())
    return squares.sqrt().to(first.dtype)


def _groups(graph):
    """[units] group index and number of groups: units that have filters in exactly the same layers are one group."""
    groups, index = by_layers(graph.units), torch.empty(len(graph.units), dtype=torch.long)
    for number, units in enumerate(groups.values()):
        index[units] = number
    return index, len(groups)


def group_mean(graph: ChannelGraph, values: Tensor) -> Tensor:
    """[units] mean of the values [units] over the units that have filters in exactly the same layers."""
    groups, count = _groups(graph)
    groups = groups.to(values.device)
    sums = values.new_zeros(count).index_add_(0, groups, values)
    return (sums / torch.bincount(groups, minlength=count))[groups]


def normalised(graph: ChannelGraph, raw: Tensor) -> Tensor:
    """floor + (1 - floor) raw / (mean of raw in the layer): positive, mean 1 in each layer, 1 where all raw are 0.

    The mean is over the units that have filters in the same layers, so that it is 1 in each layer also where a layer
    has units of several kinds.
    """
    mean = group_mean(graph, raw)
    shares = torch.where(mean > 0, raw / mean.clamp_min(torch.finfo(raw.dtype).tiny), 1.0)
    return WEIGHT_FLOOR + (1 - WEIGHT_FLOOR) * shares


def relative_flow(graph: ChannelGraph, flow: Tensor) -> Tensor:
    """[units] weights from the mean flow relative to the layer, r_u = mean_n F[n, u], as `normalised` scales them.

    The layer-wise normalisation of Molchanov et al. 2017 (arXiv:1611.06440, section 2.2) with the mean as norm.

    Args:
        flow: [N, units].
    """
    return normalised(graph, flow.double().mean(0))


def weigh(scores: Tensor, weights: Tensor) -> Tensor:
    """Scores (signed loss changes, small ones are removed first) under weights: s w where s > 0, s / w where s <= 0.

    Monotone in both: a weight above 1 raises every score, i.e. makes the removal less likely whatever the sign;
    the sign itself, and with it whether removal helps the loss, stays. NaN (protected) stays NaN.
    """
    weights = weights.to(scores)
    return torch.where(scores > 0, scores * weights, scores / weights)
