"""Forwards under gates that require gradients, as every score takes them."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from taylor_pruning.errors import InputError
from taylor_pruning.surgery.graph import ChannelGraph
from taylor_pruning.surgery.nested import map_tensors, tensors_in
from taylor_pruning.tasks import batches
from taylor_pruning.tasks.task import Task


def open_gates(graph: ChannelGraph, batch) -> Tensor:
    """[B, units] ones that require a gradient, at least in float32: half precision has too few digits for scores."""
    parameter = next(graph.model.parameters())
    dtype = torch.promote_types(parameter.dtype, torch.float32)
    shape = batches.size(batch), len(graph.units)
    return torch.ones(shape, dtype=dtype, device=parameter.device, requires_grad=True)


def gated_outputs(
    graph: ChannelGraph,
    task: Task,
    batch,
    gates: Tensor,
    where: str,
    on_activation: Callable | None = None,
    estimates: Mapping | None = None,
    outputs: Mapping | None = None,
    once: bool = False,
):
    """The task's outputs under the gates, in the dtype of the gates; logits [B, K] of a classifier.

    Args:
        where: what error messages call the batch. on_activation, estimates, outputs, once: see ChannelGraph.gated.

    Raises:
        InputError: inputs or outputs are not finite, labels out of range, or no gradient leads from the outputs to a gate.
    """
    with torch.enable_grad(), graph.gated(gates, on_activation, estimates, outputs, once):
        found = task.forward(graph.model, batch)
    return checked_outputs(found, task, batch, gates, where)


def checked_outputs(found, task: Task, batch, gates: Tensor, where: str):
    """The outputs that a forward under the gates has found, checked as `gated_outputs` does and in the dtype of the gates."""
    task.check(found, batch, where)
    if not any(tensor.requires_grad for tensor in tensors_in(found)):
        raise InputError("no gradient leads from the outputs to any filter; take no_grad and detach out of the forward")
    return map_tensors(found, lambda t: t.to(gates.dtype) if t.is_floating_point() else t)
