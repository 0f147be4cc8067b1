"""Derivatives along every gate for the outputs of any task, behind compensation.

The loss that compensation keeps small is the task's divergence D from the network's own outputs z. It has no slope there, so
that its second derivative along a gate is exactly that of the outputs' change v = dz/dg in the metric of D:

    h = v^T F v = E[(w.v)^2],        w a random direction of the task (tasks.directions), one backward pass each.

phi is the slope of the loss with labels, which order 1 goes by. The third derivative t of D is probed (scoring.probes).
"""

from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from functools import partial

import torch
from torch import nn

from taylor_pruning.memory import Portions
from taylor_pruning.modes import frozen
from taylor_pruning.scoring.gates import gated_outputs, open_gates
from taylor_pruning.scoring.layer_costs import OutputFisher
from taylor_pruning.scoring.passes import over_batches
from taylor_pruning.scoring.probes import check_third_derivative, probed_third, twice_differentiable
from taylor_pruning.surgery.graph import ChannelGraph
from taylor_pruning.surgery.nested import map_tensors
from taylor_pruning.tasks.batches import size
from taylor_pruning.tasks.directions import DRAWS, random_signs
from taylor_pruning.tasks.task import Task, flatten


def output_derivatives(
    model: nn.Module,
    graph: ChannelGraph,
    batches: Iterable,
    task: Task,
    *,
    order: int = 2,
    directions: int = 12,
    probes: int = 8,
    estimates: Mapping | None = None,
    fisher: OutputFisher | None = None,
    first: int = 0,
    portions: Portions | None = None,
    seed: int = 0,
    progress: bool = True,
) -> dict:
    """Derivatives of every sample along every gate.

    Args:
        batches: the task's batches on the model's device. Under torch.distributed every process takes its share, and all
            get the same result.
        order: 1 leaves out h, 3 adds t. directions, probes: random draws a sample.
        estimates: see ChannelGraph.gated; derivatives are then of what the repair of the layers behind cannot replace.
        fisher: sums up the Fisher matrices of the readers' outputs, along the first direction or, at order 1, along the
            slope of the loss.
        first: number of the first sample, for random draws.
        portions: parts of batches that fit into memory; None: what is free.

    Returns:
        {"phi", "h" (of no meaning at order 1), "t" (from order 3 on)}: [N, units] float64 on the CPU.

    Raises:
        InputError: a batch that cannot be scored, or order 3 of a network whose third derivative PyTorch has not.
    """
    batches = list(batches)
    if order == 3:
        check_third_derivative(graph)
    derivatives = partial(
        _derivatives, graph, task, order, directions if order > 1 else 0, probes, estimates, fisher, seed
    )
    portions = portions or Portions(next(model.parameters()).device)
    with frozen(model), torch.enable_grad(), twice_differentiable() if order == 3 else nullcontext():
        parts = over_batches(derivatives, batches, portions, first=first, progress=progress)
    return {name: torch.cat([found[name] for found in parts]) for name in parts[0]}


def _derivatives(graph, task, order, directions, probes, estimates, fisher, seed, batch, where, first):
    gates, part = open_gates(graph, batch), None if fisher is None else fisher.part(first)
    watched = None if part is None else part.outputs()
    outputs = gated_outputs(graph, task, batch, gates, where, estimates=estimates, outputs=watched, once=order < 3)
    with part if part is not None and order == 1 else nullcontext():
        (phi,) = torch.autograd.grad(task.loss(outputs, batch).sum(), gates, retain_graph=True)
    h = torch.zeros_like(phi, dtype=torch.float64)
    for draw in range(directions):
        signs = random_signs(DRAWS * seed + draw, first, *flatten(outputs).shape)
        with part if part is not None and draw == 0 else nullcontext():
            (along,) = torch.autograd.grad(task.projection(outputs, signs).sum(), gates, retain_graph=True)
        h += along.double().square() / directions
    if part is not None:
        part.commit(size(batch))
    found = {"phi": phi.double().cpu(), "h": h.cpu()}
    if order == 3:
        divergence = task.divergence(outputs, map_tensors(outputs, torch.Tensor.detach)).sum()
        (gamma,) = torch.autograd.grad(divergence, gates, create_graph=True)
        found["t"] = probed_third(gamma, gates, probes, seed, first).cpu()
    return found
