"""Collects the per-sample logit directions of every unit from calibration images, in one or several processes."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from taylor_pruning.errors import InputError
from taylor_pruning.first_batch import Batches, checked_batches, device_of
from taylor_pruning.memory import Portions, merged
from taylor_pruning.modes import frozen
from taylor_pruning.scoring.flow import unit_gradient_norms
from taylor_pruning.scoring.gates import gated_outputs, open_gates
from taylor_pruning.scoring.layer_costs import OutputFisher
from taylor_pruning.scoring.passes import over_batches
from taylor_pruning.scoring.taylor import Directions, class_basis
from taylor_pruning.surgery.graph import ChannelGraph
from taylor_pruning.tasks.batches import split
from taylor_pruning.tasks.classification import Classification, is_classification
from taylor_pruning.tasks.directions import adding_to_zero, random_directions, random_signs
from taylor_pruning.tasks.task import Task

CLASS_PROBES = 12  # directions of every sample: enough for three orders with up to 1,000 classes


@dataclass(frozen=True)
class Wanted:
    """What the directions of every sample are for, and how many there may be.

    Attributes:
        probes: R, directions a sample. `gradient`, `curvature`: the basis holds the gradient of the cross-entropy,
            the curvature of the predictions (scoring.taylor.class_basis).
        flow: also collect the gradient flow, by one more backward pass.
        seed: of the random directions.
    """

    probes: int
    gradient: bool = True
    curvature: bool = True
    flow: bool = False
    seed: int = 0


def read_batches(task: Task, model: nn.Module, batches: Iterable, purpose: str) -> list:
    """The batches as scoring takes them: on the model's device, one sample each where the task's samples are not apart.

    Raises InputError if there is none, as of a generator that was read before, or if task or model cannot take one.
    """
    if not isinstance(batches, Iterable):
        raise InputError(f"the {purpose} images are of type {type(batches).__name__}; give a list of batches")
    batches, device = list(batches), device_of(model)
    if not batches:
        raise InputError(f"there are no {purpose} images; pass at least one batch, in a list that can be read again")
    batches = checked_batches(model, Batches(batches, f"the {purpose} images", device, task))
    if not task.samples_apart:
        return [one for batch in batches for one in split(batch, 1)]
    return merged(batches, device) if is_classification(task) else batches


def collect_directions(
    model: nn.Module,
    graph: ChannelGraph,
    batches: Sequence[tuple[Tensor, Tensor]],
    wanted: Wanted,
    *,
    progress: bool = True,
    estimates: Mapping | None = None,
    fisher: OutputFisher | None = None,
    first: int = 0,
    portions: Portions | None = None,
) -> Directions:
    """Per-sample logit directions of every unit by backward passes through the gates.

    One forward and R backward passes a batch; no weight gradients. Under torch.distributed every process takes its
    share of the batches and all get the same result, in the order of the batches. Batches that do not fit into memory are
    split: the result does not depend on it.

    Args:
        batches: (images [B, ...], labels [B]) on the model's device, at least one.
        estimates: see ChannelGraph.gated; directions are then of removing a unit and repairing the layers that read it.
        fisher: sums up the Fisher matrices of the readers' outputs: along a random direction or, where no curvature is
            wanted, along p - e_y. That is one more backward pass, unless it is the only direction.
        first: number of the first image, for random draws; other numbers give other draws.
        portions: parts of batches that fit into memory; None: what is free.

    Returns:
        Directions.

    Raises:
        InputError: NaN images or logits, labels outside the logits' range.
    """
    collect = partial(_collect, graph, wanted, estimates, fisher)
    portions = portions or Portions(batches[0][0].device)
    with frozen(model):
        parts = over_batches(collect, batches, portions, first=first, progress=progress)
    return Directions.join(parts).to(batches[0][0].device)


def _collect(graph, wanted, estimates, fisher, batch, where, first):
    images, labels = batch
    gates, gated = open_gates(graph, images), []
    part = None if fisher is None else fisher.part(first)

    def record(site, output):
        if output.requires_grad:
            gated.append((site, get_gradient_edge(output)))

    outputs = None if part is None else part.outputs()
    on_activation = record if wanted.flow else None
    logits = gated_outputs(graph, Classification(), batch, gates, where, on_activation, estimates, outputs, once=True)
    fixed, signs = logits.detach(), random_signs(wanted.seed, first, *logits.shape)
    if wanted.curvature:
        vector = random_directions(fixed, signs)
    else:  # in double precision: single has no digits of it where the network is sure
        vector = adding_to_zero(fixed.double().softmax(1), labels).to(fixed)
    basis, sampled = class_basis(
        fixed, labels if wanted.gradient else None, wanted.probes, signs if wanted.curvature else None
    )
    flow = None
    if wanted.flow:
        flow = unit_gradient_norms(Classification().loss(logits, batch).sum(), gated, *gates.shape)
    columns, scale = [*basis.unbind(2)], None
    if part is not None and len(columns) == 1 and wanted.curvature != wanted.gradient and basis.shape[1] > 2:
        # the one direction is the vector but for its length, which matters to the Fisher matrices
        scale = (columns[0] * vector).sum(1) / vector.square().sum(1).clamp_min(torch.finfo(vector.dtype).tiny)
        columns = []
    found = []
    if part is not None:
        with part:
            (along,) = torch.autograd.grad(logits, gates, vector, retain_graph=bool(columns))
        found = [] if scale is None else [along * scale[:, None]]
    for index, column in enumerate(columns, 1):
        found += torch.autograd.grad(logits, gates, column, retain_graph=index < len(columns))
    if part is not None:
        part.commit(len(images))
    return Directions(torch.stack(found, 2), basis, fixed, labels, sampled, flow)
