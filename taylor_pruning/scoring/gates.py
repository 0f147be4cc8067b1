"""Forwards under gates that require gradients, as every score takes them."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from taylor_pruning.checks import check_batch
from taylor_pruning.errors import InputError
from taylor_pruning.surgery.graph import ChannelGraph


def open_gates(graph: ChannelGraph, images: Tensor) -> Tensor:
    """[B, units] ones that require a gradient, at least in float32: half precision has too few digits for scores."""
    dtype = torch.promote_types(next(graph.model.parameters()).dtype, torch.float32)
    return torch.ones(len(images), len(graph.units), dtype=dtype, device=images.device, requires_grad=True)


def gated_logits(
    graph: ChannelGraph,
    images: Tensor,
    labels: Tensor,
    gates: Tensor,
    where: str,
    on_gate: Callable | None = None,
    estimates: Mapping | None = None,
    outputs: Mapping | None = None,
) -> Tensor:
    """Logits [B, K] under the gates, in the dtype of the gates.

    Args:
        where: what error messages call the batch. on_gate, estimates, outputs: see ChannelGraph.gated.

    Raises:
        InputError: pixels or logits are not finite, labels out of range, or no gradient leads from the logits to a gate.
    """
    with torch.enable_grad(), graph.gated(gates, on_gate, estimates, outputs):
        logits = graph.model(images)
    check_batch(images, labels, logits, where)
    if not torch.isfinite(logits).all():
        raise InputError(f"the network gives NaN or infinite logits for {where}; check its weights")
    if not logits.requires_grad:
        raise InputError("no gradient leads from the logits to any filter; take no_grad and detach out of the forward")
    return logits.to(gates.dtype)
