"""Which way the second and third derivatives of the scores are computed, and the report on it."""

from collections.abc import Callable

from taylor_pruning.scoring.collected import Collected
from taylor_pruning.scoring.probes import cross_entropy
from taylor_pruning.surgery.graph import ChannelGraph

BEHIND_REPAIR = (
    "behind compensation the loss is the divergence from the network's own predictions, whose second derivative along one "
    "gate the class directions give in any network"
)


def choose_curvature(graph: ChannelGraph, curvature: str, loss: Callable = cross_entropy) -> tuple[str, str]:
    """How second and third derivatives are computed, "exact" or "hvp", and why (see PruningSettings)."""
    smooth = ", ".join(graph.smooth_operations)
    if curvature != "auto":
        return curvature, "as asked"
    if loss is not cross_entropy:
        return "hvp", "the loss is not cross-entropy"
    return ("hvp", f"the network has {smooth}") if smooth else ("exact", "the network is piecewise linear")


def curvature_report(collected: Collected, path: str, reason: str) -> dict:
    """How the second and third derivatives of scores were computed.

    Args:
        collected: what the scores come from.
        path, reason: of `choose_curvature`.

    Returns:
        {"path": "exact" or "hvp", "reason": text, "sampled": share of the curvature for which random directions stand
        (scoring.taylor.class_basis), "h_error": mean standard error of probed second derivatives}.
    """
    if collected.behind_repair:
        path, reason = "exact", BEHIND_REPAIR
    return {
        "path": path,
        "reason": reason,
        "sampled": collected.directions.sampled_curvature if collected.directions else None,
        "h_error": collected.probed.h_error.mean().item() if path == "hvp" else None,
    }
