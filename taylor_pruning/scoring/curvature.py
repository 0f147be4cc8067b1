"""Which way the second and third derivatives of the scores are computed, and the report on it."""

from taylor_pruning.errors import InputError
from taylor_pruning.options import check_argument
from taylor_pruning.scoring.collected import Collected
from taylor_pruning.scoring.probes import mean_and_error, wrong_third_derivative
from taylor_pruning.surgery.graph import ChannelGraph
from taylor_pruning.tasks.classification import Classification, is_classification
from taylor_pruning.tasks.task import Task

BEHIND_REPAIR = (
    "behind compensation the loss is the divergence from the network's own predictions, whose second derivative along one "
    "gate directions of the logits give in any network"
)
BY_DIRECTIONS = (
    "behind compensation the loss is the task's divergence from the network's own outputs, whose second derivative along one "
    "gate random directions of the outputs give in any network"
)


def choose_curvature(graph: ChannelGraph, curvature: str, task: Task | None = None) -> tuple[str, str]:
    """How second and third derivatives are computed without compensation, and why (see PruningSettings).

    "exact", by class directions; "gauss-newton", by them in a network that is not piecewise linear; or "hvp".
    """
    if curvature == "hvp":
        return "hvp", "as asked"
    if curvature == "auto" and not is_classification(task or Classification()):
        return "hvp", "the loss is not cross-entropy"
    if graph.smooth_operations:
        return "gauss-newton", f"the network has {', '.join(graph.smooth_operations)}"
    return "exact", "the network is piecewise linear"


def curvature_report(collected: Collected, order: int, path: str, reason: str) -> dict:
    """How the second and third derivatives of an order's scores were computed.

    Args:
        collected: what the scores come from.
        path, reason: of `choose_curvature`. They do not count behind compensation.

    Returns:
        {"path": "exact", by class directions; "directions", where random directions of the outputs stand for some or all of the
        curvature; "gauss-newton", by either of them without that of the network; "hvp"; or None at order 1,
        "reason": text,
        "sampled": share of the curvature for which random directions stand (scoring.taylor.class_basis), None of "hvp",
        "h_error": mean standard error, over the images and random draws, of second derivatives that are sampled or behind
        compensation, NaN of one image; else None}.
    """
    if order == 1:
        return {"path": None, "reason": "order 1 uses no second derivative", "sampled": None, "h_error": None}
    directions, behind_repair, error = collected.directions, collected.behind_repair, None
    if behind_repair:
        path, reason = ("directions", BY_DIRECTIONS) if directions is None else ("exact", BEHIND_REPAIR)
    if path in ("exact", "gauss-newton"):
        sampled = directions.sampled_curvature
        path = "directions" if sampled > 0 and path == "exact" else path
        if sampled > 0 or behind_repair:
            error = mean_and_error(directions.moments(order=2)[1].double())[1]
    else:
        sampled, error = 1.0 if behind_repair else None, collected.probed.h_error
    return {
        "path": path,
        "reason": reason,
        "sampled": sampled,
        "h_error": error if error is None else error.mean().item(),
    }


def no_third_order(graph: ChannelGraph, curvature: str, task: Task) -> str | None:
    """Why there are no scores of order 3 without compensation; None where there are (see `choose_curvature`)."""
    path, _ = choose_curvature(graph, curvature, task)
    return wrong_third_derivative(graph) if path == "hvp" else None


def check_scoring(task: Task, settings, repairs: bool, use_gradient_flow: bool) -> None:
    """Raises InputError naming what the scores take that the task does not define, or that only class logits have.

    Args:
        settings: PruningSettings. repairs: whether scores are of what compensation cannot repair.
    """
    check_argument("use_gradient_flow", use_gradient_flow, bool)
    task.require("loss", "the scores need")
    if repairs:
        task.require("divergence", "compensation needs")
    if is_classification(task):
        return
    needs_logits = {
        "use_gradient_flow": use_gradient_flow,
        "selection='joint' without compensation": settings.selection == "joint" and not repairs,
        "curvature='exact' without compensation": settings.curvature == "exact" and not repairs,
    }
    for what, asked in needs_logits.items():
        if asked:
            raise InputError(
                f"{what} needs class logits and the cross-entropy, which the task {task.name} has not; leave it out"
            )
