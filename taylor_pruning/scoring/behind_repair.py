"""What scores behind compensation are made of, from two forwards and one backward pass over the calibration images.

1. One forward collects the moments of every layer's inputs (scoring.estimates).
2. A second one, fold by fold, scores every image with the estimates that the other folds gave. At order 2 there is one
   backward pass, along one random direction w of the logits (tasks.directions): the derivatives along the gates are one
   unbiased sample of all second derivatives, and the gradients at the layers' outputs give the Fisher matrices of the
   closed form (scoring.layer_costs). Order 1 has the direction p - e_y in its place: it knows the slope of the loss alone,
   also in the Fisher matrices. Order 3 takes all class directions, because a third moment needs them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from taylor_pruning.checks import too_large
from taylor_pruning.errors import InputError
from taylor_pruning.memory import Portions
from taylor_pruning.scoring.collecting import CLASS_PROBES, Wanted, collect_directions
from taylor_pruning.scoring.estimates import InputMoments, channel_estimates, input_moments
from taylor_pruning.scoring.folds import by_fold
from taylor_pruning.scoring.layer_costs import OutputFisher
from taylor_pruning.scoring.output_curvature import output_derivatives
from taylor_pruning.scoring.probes import ProbedDerivatives
from taylor_pruning.scoring.taylor import Directions
from taylor_pruning.surgery.graph import ChannelGraph
from taylor_pruning.tasks.batches import size
from taylor_pruning.tasks.classification import is_classification, task_of
from taylor_pruning.tasks.task import Task

TASK_DIRECTIONS = 4  # random directions of every sample of another task


@dataclass
class BehindRepair:
    """What `collect_behind_repair` found.

    Attributes:
        directions: of removing a unit and repairing the layers that read it; None for another task than classification.
        orders: which the directions serve.
        moments: {layer: InputMoments}. fisher: {layer: G [outputs, outputs]}, None where it was not asked for.
        probed: derivatives of another task's divergence (scoring.output_curvature).
    """

    directions: Directions | None
    orders: tuple
    moments: dict[str, InputMoments]
    fisher: dict[str, Tensor] | None
    probed: ProbedDerivatives | None = None


def wanted_of(order: int, class_probes: int | None, **options) -> tuple[Wanted, tuple]:
    """The directions that an order takes behind compensation, and the orders that they serve."""
    if order == 1:
        return Wanted(1, curvature=False, **options), (1,)
    if order == 2:
        return Wanted(class_probes or 1, gradient=False, **options), (2,)
    return Wanted(class_probes or CLASS_PROBES, gradient=False, **options), (2, 3)


def collect_behind_repair(
    model: nn.Module,
    graph: ChannelGraph,
    batches: Sequence,
    compensation: Sequence,
    order: int,
    *,
    class_probes: int | None = None,
    joint: bool = True,
    flow: bool = False,
    seed: int = 0,
    memory_limit: int | None = None,
    progress: bool = True,
    task: Task | None = None,
    third_probes: int = 8,
) -> BehindRepair:
    """Collects moments on the compensation images and directions on the calibration images (module docstring).

    Args:
        batches, compensation: lists of (images, labels), or of the batches of `task`.
        class_probes: directions of every sample at orders 2 and 3; None: 1 at order 2, CLASS_PROBES at order 3.
        joint: also collect the Fisher matrices of the closed form.
        flow, seed: see scoring.collecting.
        memory_limit: bytes, see memory.Portions.
        task: default classification. Another one takes TASK_DIRECTIONS random directions where `class_probes` is None, and
            `third_probes` probes at order 3; flow is not used.

    Raises:
        InputError: see scoring.collecting.collect_directions; sums of squares overflow at a layer.
    """
    task, device = task_of(task), next(model.parameters()).device
    wanted, orders = wanted_of(order, class_probes, flow=flow, seed=seed)
    moments = input_moments(model, graph, compensation, Portions(device, memory_limit, backward=False), task)
    _check_range(moments)
    images = sum(map(size, batches))
    fisher = OutputFisher((m.reader for m in moments.values()), images) if joint else None
    parts, first, portions = [], 0, Portions(device, memory_limit)
    for fold, part in by_fold(batches, task):
        estimates = channel_estimates(moments, without=fold)
        shared = {"estimates": estimates, "fisher": fisher, "first": first, "portions": portions, "progress": progress}
        if is_classification(task):
            parts.append(collect_directions(model, graph, part, wanted, **shared))
        else:
            draws = {"directions": class_probes or TASK_DIRECTIONS, "probes": third_probes, "seed": seed}
            parts.append(output_derivatives(model, graph, part, task, order=order, **draws, **shared))
        first += sum(map(size, part))
    fisher = fisher.mean() if joint else None
    if is_classification(task):
        return BehindRepair(Directions.join(parts), orders, moments, fisher)
    orders = tuple(range(1, order + 1))
    return BehindRepair(None, orders, moments, fisher, ProbedDerivatives.of_parts(parts))


def _check_range(moments):
    for layer, found in moments.items():
        if not found.products.isfinite().all():
            raise InputError(f"scores: {too_large(layer)}")
