"""Collects the per-sample logit directions of every unit from calibration images, in one or several processes."""

import itertools
from collections.abc import Iterable, Mapping
from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.nn import functional as F
from tqdm import tqdm

from taylor_pruning.distributed import gather_objects, is_main, rank, world_size
from taylor_pruning.errors import InputError
from taylor_pruning.modes import frozen
from taylor_pruning.scoring.directions import random_signs
from taylor_pruning.scoring.flow import unit_gradient_norms
from taylor_pruning.scoring.gates import gated_logits, open_gates
from taylor_pruning.scoring.gradient_check import check_gradients
from taylor_pruning.scoring.taylor import Directions, class_basis
from taylor_pruning.surgery.graph import ChannelGraph


def collect_directions(
    model: nn.Module,
    graph: ChannelGraph,
    batches: Iterable[tuple[Tensor, Tensor]],
    probes: int,
    *,
    progress: bool = True,
    want_flow: bool = False,
    estimates: Mapping | None = None,
    reference: nn.Module | None = None,
    seed: int = 0,
) -> Directions:
    """Per-sample logit directions of every unit by class-direction backward passes through the gates.

    One forward and R backward passes a batch; no weight gradients. Under torch.distributed every process takes its
    share of the batches and all get the same result, in the order of the batches. A batch that does not fit into GPU
    memory is halved: the result does not depend on the split.

    Args:
        batches: sequence of (images [B, ...], labels [B]) on the model's device.
        probes: R, directions a sample.
        want_flow: also collect the gradient flow (one more backward pass).
        estimates: see ChannelGraph.gated; directions are then of removing a unit and repairing the layers that read it.
        reference: network whose probabilities `Directions.reference` takes, or None.
        seed: of the random directions (`class_basis`).

    Returns:
        Directions.

    Raises:
        InputError: no batches, NaN images or logits, labels outside the logits' range.
    """
    batches = list(enumerate(batches))
    if not batches:
        raise InputError("there are no calibration images; pass at least one batch")
    options = {"want_flow": want_flow, "estimates": estimates, "reference": reference, "seed": seed}
    collect = partial(_collect, model, graph, probes, **options)
    mine, parts = batches[rank() :: world_size()], []
    firsts = [0, *itertools.accumulate(len(images) for _, (images, _) in batches)]
    with frozen(model), frozen(model if reference is None else reference):
        check_gradients(graph, *batches[0][1])
        for number, (images, labels) in tqdm(mine, desc="score", leave=False, disable=not progress or not is_main()):
            parts.append((number, _collect_batch(collect, images, labels, number, firsts[number])))
    return Directions.join(_of_all_processes(parts)).to(batches[0][1][0].device)


def _of_all_processes(parts):
    """The parts [(batch number, Directions)] of all processes by batch number, on the CPU where there are several."""
    if world_size() > 1:  # a tensor that is sent keeps its device, which is another one in every process
        parts = [(number, part.to("cpu")) for number, part in parts]
    parts = [part for share in gather_objects(parts) for part in share]
    return [part for _, part in sorted(parts, key=lambda part: part[0])]


def _collect_batch(collect, images, labels, number, first):
    """`first`: how many images of the pass come before these."""
    try:
        return collect(images, labels, number, first)
    except torch.OutOfMemoryError as error:
        if len(images) == 1:
            raise InputError("one image does not fit into GPU memory for scoring; lower --image-size") from error
    half = len(images) // 2  # outside of the except block, which would keep the failed pass alive
    split = ((images[:half], labels[:half], first), (images[half:], labels[half:], first + half))
    return Directions.join([_collect_batch(collect, x, y, number, start) for x, y, start in split])


def _collect(model, graph, probes, images, labels, number, first, *, want_flow, estimates, reference, seed):
    gates, gated = open_gates(graph, images), []

    def record(site, output):
        if want_flow and output.requires_grad:
            gated.append((site, get_gradient_edge(output)))

    logits = gated_logits(graph, images, labels, gates, f"calibration batch {number}", record, estimates)
    signs = random_signs(seed, first, *logits.shape)
    basis, sampled = class_basis(logits.detach(), labels, probes, signs)
    flow = None
    if want_flow:
        flow = unit_gradient_norms(F.cross_entropy(logits, labels, reduction="sum"), gated, len(graph.units))
    coordinates = torch.empty(*gates.shape, basis.shape[2], dtype=gates.dtype, device=gates.device)
    for r in range(basis.shape[2]):
        (coordinates[:, :, r],) = torch.autograd.grad(logits, gates, basis[:, :, r], retain_graph=True)
    logits = logits.detach()
    probabilities = None
    if reference is not None:
        with torch.no_grad():
            probabilities = logits.softmax(1) if reference is model else reference(images).to(logits).softmax(1)
    return Directions(coordinates, basis, logits, labels, sampled, flow, reference=probabilities)
