"""What scores behind compensation are made of, from two forwards and one backward pass over the calibration images.

1. One forward collects the moments of every layer's inputs (scoring.estimates).
2. A second one, fold by fold, scores every image with the estimates that the other folds gave. At order 2 there is one
   backward pass, along one random direction w of the logits (scoring.directions): the derivatives along the gates are one
   unbiased sample of all second derivatives, and the gradients at the layers' outputs give the Fisher matrices of the
   closed form (scoring.layer_costs). Order 1 takes the direction p - e_y besides, for its first-order terms, and order 3
   all class directions, because a third moment needs them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from taylor_pruning.memory import Portions
from taylor_pruning.scoring.collecting import CLASS_PROBES, Wanted, collect_directions
from taylor_pruning.scoring.estimates import InputMoments, by_fold, channel_estimates, input_moments
from taylor_pruning.scoring.layer_costs import OutputFisher
from taylor_pruning.scoring.taylor import Directions
from taylor_pruning.surgery.graph import ChannelGraph


@dataclass
class BehindRepair:
    """What `collect_behind_repair` found.

    Attributes:
        directions: of removing a unit and repairing the layers that read it.
        orders: which the directions serve.
        moments: {layer: InputMoments}. fisher: {layer: G [outputs, outputs]}, None where it was not asked for.
    """

    directions: Directions
    orders: tuple
    moments: dict[str, InputMoments]
    fisher: dict[str, Tensor] | None


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
    reference: nn.Module | None = None,
    flow: bool = False,
    seed: int = 0,
    memory_limit: int | None = None,
    progress: bool = True,
) -> BehindRepair:
    """Collects moments on the compensation images and directions on the calibration images (module docstring).

    Args:
        batches, compensation: lists of (images, labels).
        class_probes: directions of every sample at orders 2 and 3; None: 1 at order 2, CLASS_PROBES at order 3.
        joint: also collect the Fisher matrices of the closed form.
        reference, flow, seed: see scoring.collecting.
        memory_limit: bytes, see memory.Portions.

    Raises:
        InputError: see scoring.collecting.collect_directions.
    """
    wanted, orders = wanted_of(order, class_probes, flow=flow, seed=seed)
    device = batches[0][0].device
    moments = input_moments(model, graph, compensation, Portions(device, memory_limit))
    images = sum(len(x) for x, _ in batches)
    fisher = OutputFisher((m.reader for m in moments.values()), images) if joint else None
    parts, first, portions = [], 0, Portions(device, memory_limit)
    for fold, part in by_fold(batches):
        estimates = channel_estimates(moments, without=fold)
        parts.append(collect_directions(model, graph, part, wanted, progress=progress, estimates=estimates,
                                        reference=reference, fisher=fisher, first=first, portions=portions))  # fmt: skip
        first += sum(len(x) for x, _ in part)
    return BehindRepair(Directions.join(parts), orders, moments, fisher.mean() if joint else None)
