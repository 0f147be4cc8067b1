"""The units that go, and what is predicted of them: one function for every way to choose."""

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from taylor_pruning.scoring.collected import Collected
from taylor_pruning.scoring.layer_costs import RemovalCosts
from taylor_pruning.selection.constraints import Selection
from taylor_pruning.selection.corrected import ratios_of, select_corrected
from taylor_pruning.selection.greedy import select_by_score, select_jointly, select_uniformly


@dataclass(frozen=True)
class Chosen:
    """What a selection chose.

    Attributes:
        units: indices of the units.
        predicted_loss_change: of removing all of them, in nats; None where the criterion predicts none.
        layer_bound_held: False where the percentage could not be reached within the layer bound.
        uniform_widths: every layer loses the same share.
        removal_history: [(unit, cost in nats)] in the order of removal, of a choice behind compensation.
        measured_over_predicted: {layer: ratio} of the trials that corrected it (selection.corrected); {} without any.
    """

    units: list[int]
    predicted_loss_change: float | None
    layer_bound_held: bool
    uniform_widths: bool = False
    removal_history: list[tuple[int, float]] = field(default_factory=list)
    measured_over_predicted: dict[str, float] = field(default_factory=dict)


def chosen_uniformly(selection: Selection, scores: Tensor) -> Chosen:
    """See greedy.select_uniformly."""
    return Chosen(select_uniformly(selection, scores), None, selection.bound_held, uniform_widths=True)


def chosen_behind_repair(
    selection_of: Callable[[], Selection],
    costs_of: Callable[[], RemovalCosts],
    levels_of: Callable[[Tensor], Tensor],
    measure: Callable | None,
    weights: Tensor | None,
) -> Chosen:
    """See corrected.select_corrected, whose arguments these are."""
    found = select_corrected(selection_of, costs_of, levels_of, measure, weights)
    return Chosen(
        found.selection.chosen,
        found.costs.total,
        found.selection.bound_held,
        removal_history=found.costs.history,
        measured_over_predicted=ratios_of(found.trials),
    )


def chosen_jointly(selection: Selection, collected: Collected, order: int, weights: Tensor | None) -> Chosen:
    """See greedy.select_jointly; order 2 or 3."""
    units = select_jointly(selection, collected.of_order(order), order, collected.correction(order), weights)
    return Chosen(units, collected.predicted_loss_change(units, order), selection.bound_held)


def chosen_by_score(selection: Selection, scores: Tensor, collected: Collected, order: int) -> Chosen:
    """See greedy.select_by_score."""
    units = select_by_score(selection, scores)
    return Chosen(units, collected.predicted_loss_change(units, order), selection.bound_held)
