"""The choice behind compensation: greedy by predicted costs, and once more after trials have corrected the predictions.

A prediction starts from derivatives (scoring.collected.Collected.levels) and grows by a closed form (scoring.layer_costs).
Whole groups of coupled layers come out too cheap or too dear, where a cut is too large for derivatives or where errors add up
along a residual stream. So what the first choice takes from each group is tried alone (scoring.trials), and

    level of every unit of the group  <-  level * (measured / predicted) / (median of that ratio over the groups that matter)

Only ratios to the median count: a choice under a budget does not depend on what all costs have in common.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from taylor_pruning.scoring.flow import weigh
from taylor_pruning.scoring.layer_costs import RemovalCosts
from taylor_pruning.selection.constraints import Selection
from taylor_pruning.selection.greedy import select_behind_repair
from taylor_pruning.surgery.units import by_layers

LARGEST = 3.0  # change of a level, up or down
MATTERS = 0.01  # share of the whole predicted cost up to which a group's ratio is noise


@dataclass(frozen=True)
class GroupTrial:
    """What was predicted, and what a trial measured, of the units that a choice takes from one group of coupled layers.

    Attributes:
        layer: first layer of the group. units: all units of the group, also those that stay.
        predicted, measured: cost in nats (of another task in the units of its divergence).
    """

    layer: str
    units: list[int]
    predicted: float
    measured: float


@dataclass(frozen=True)
class CorrectedChoice:
    """The last choice, the costs that its removals had, and the trials of the first one; no trials without images."""

    selection: Selection
    costs: RemovalCosts
    trials: list[GroupTrial]


def select_corrected(
    selection_of: Callable[[], Selection],
    costs_of: Callable[[], RemovalCosts],
    levels_of: Callable[[Tensor], Tensor],
    measure: Callable[[Sequence[list[int]]], list[float]] | None = None,
    weights: Tensor | None = None,
) -> CorrectedChoice:
    """Chooses by the costs, tries what was chosen, and chooses again by corrected costs.

    Args:
        selection_of: gives a new Selection. costs_of: gives new RemovalCosts, by the closed form alone.
        levels_of: gives [units] the predicted cost (nats) of removing each unit alone, from its cost by the closed form.
        measure: gives the measured cost of each of several sets of units, see scoring.trials; None: the first choice stays.
        weights: [units] of gradient flow, which multiply the levels but are no part of what a trial can measure.
    """

    def started(trials):
        costs = costs_of()
        levels = levels_of(costs.marginal)
        levels = levels * correction(trials, len(levels)).to(levels)
        costs.start_at(levels if weights is None else weigh(levels, weights))
        return costs

    def choose(trials):
        selection, costs = selection_of(), started(trials)
        chosen, before = dict.fromkeys(select_behind_repair(selection, costs)), dict(costs.history)
        if chosen.keys() != before.keys():  # rounding gave some back or added some, and no removal can be taken back
            costs = started(trials)
            for unit in [*(u for u in before if u in chosen), *(u for u in chosen if u not in before)]:
                costs.remove(unit)
        return selection, costs

    selection, costs = choose([])
    if measure is None:
        return CorrectedChoice(selection, costs, [])
    trials = group_trials(selection, costs, measure, weights)
    return CorrectedChoice(*choose(trials), trials)


def group_trials(selection, costs, measure, weights=None) -> list[GroupTrial]:
    """A trial of every group of which the selection took a unit; `costs` are after all removals, see `select_corrected`."""
    cost = {unit: nats if weights is None else nats / weights[unit].item() for unit, nats in costs.history}
    chosen, units = set(selection.chosen), selection.graph.units
    groups = [members for members in by_layers(units).values() if not chosen.isdisjoint(members)]
    taken = [[unit for unit in members if unit in chosen] for members in groups]
    predicted = [sum(cost[unit] for unit in some) for some in taken]
    measured = measure(taken)
    names = [units[members[0]].filters[0][0] for members in groups]
    return [GroupTrial(*trial) for trial in zip(names, groups, predicted, measured, strict=True)]


def correction(trials: Sequence[GroupTrial], units: int) -> Tensor:
    """[units] factors of the levels, float64: 1 for units of groups that were not tried or that hardly cost anything."""
    factors, total = torch.ones(units, dtype=torch.float64), sum(trial.predicted for trial in trials)
    ratios = {
        index: trial.measured / trial.predicted if trial.predicted > 0 else math.inf
        for index, trial in enumerate(trials)
        if max(trial.predicted, trial.measured) > MATTERS * total
    }
    middle = median(ratios.values()) if ratios else 0.0
    if 0 < middle < math.inf:
        for index, ratio in ratios.items():
            factors[trials[index].units] = min(LARGEST, max(1 / LARGEST, ratio / middle))
    return factors


def ratios_of(trials: Sequence[GroupTrial]) -> dict[str, float]:
    """{first layer of a group: measured / predicted cost}, of groups for which any cost was predicted.

    Groups that have the first layer in common are summed up.
    """
    sums = {}
    for trial in trials:
        predicted, measured = sums.get(trial.layer, (0.0, 0.0))
        sums[trial.layer] = predicted + trial.predicted, measured + trial.measured
    return {layer: measured / predicted for layer, (predicted, measured) in sums.items() if predicted > 0}
