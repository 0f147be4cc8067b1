"""Predicted costs that trials correct: what a choice takes from layers whose costs were wrong."""

import itertools
from functools import partial

import pytest
import torch
from conftest import Residual, randomise
from torch import nn

from EnhancedFilterPruner import EnhancedFilterPruner
from EnhancedPruning import EnhancedPruning, PruningSettings
from taylor_pruning.experiment.loaders import make_loader
from taylor_pruning.scoring.layer_costs import removal_costs
from taylor_pruning.scoring.trials import trial_divergences
from taylor_pruning.selection.constraints import Constraints, Selection
from taylor_pruning.selection.corrected import (
    LARGEST,
    GroupTrial,
    correction,
    group_trials,
    ratios_of,
    select_corrected,
)
from taylor_pruning.selection.greedy import select_behind_repair
from taylor_pruning.surgery.units import by_layers


@pytest.fixture
def pruner(images, batches):
    """Of four convs with ten filters each."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 10, 3, padding=1), nn.ReLU()]
    for _ in range(3):
        layers += [nn.Conv2d(10, 10, 3, padding=1), nn.ReLU()]
    model = randomise(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(40, 4)))
    pruner = EnhancedFilterPruner(model, images, 2, budget="macs", progress=False)
    return pruner.rank(batches, batches)


@pytest.fixture
def held_out():
    images = torch.randn(20, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    return [(images, torch.arange(20) % 4)]


def parts_of(pruner, percentage=50, **constraints):
    """Functions that give a new selection and new costs."""
    found, graph = pruner.behind_repair, pruner.graph
    selection_of = partial(Selection, graph, percentage, Constraints("macs", **constraints))
    return selection_of, partial(removal_costs, pruner.model, found.moments, found.fisher, len(graph.units))


def measure_of(pruner, held_out):
    moments = pruner.behind_repair.moments
    return partial(trial_divergences, pruner.model, pruner.graph, moments, held_out, pruner.task, progress=False)


@pytest.mark.parametrize("layer,factor", [("2", 10.0), ("4", 0.1)])
@pytest.mark.usefixtures("costs_count")
def test_a_layer_whose_cost_was_predicted_wrong_gets_its_share(pruner, held_out, layer, factor):
    """Ten times too dear it loses too little, ten times too cheap too much."""
    selection_of, costs_of = parts_of(pruner)
    measure, units = measure_of(pruner, held_out), pruner.graph.layers[layer].unit_of

    def taken(levels, measure):
        found = select_corrected(selection_of, costs_of, lambda _: levels, measure)
        return len({*units.tolist()} & {*found.selection.chosen})

    levels = pruner.levels().clone()
    right = taken(levels, measure)
    levels[units] *= factor
    before, after = taken(levels, None), taken(levels, measure)
    assert right >= after > before > 0 if factor > 1 else right <= after < before


@pytest.mark.usefixtures("costs_count")
def test_nothing_changes_where_all_predictions_are_wrong_alike(pruner):
    selection_of, costs_of = parts_of(pruner)
    levels = pruner.levels()
    first = select_corrected(selection_of, costs_of, lambda _: levels)
    cost = dict(first.costs.history)
    again = select_corrected(
        selection_of, costs_of, lambda _: levels, lambda sets: [0.25 * sum(cost[u] for u in units) for units in sets]
    )
    assert first.trials == [] and len(again.trials) > 1
    assert again.selection.chosen == first.selection.chosen and again.costs.history == first.costs.history
    assert set(ratios_of(again.trials).values()) == {0.25}


@pytest.mark.usefixtures("costs_count")
def test_a_trial_takes_what_was_chosen_and_leaves_the_weights_of_gradient_flow_out(pruner):
    selection_of, costs_of = parts_of(pruner)
    weights = torch.linspace(0.5, 2, len(pruner.graph.units), dtype=torch.float64)
    seen = []

    def measure(sets):
        seen.extend(sets)
        return [1.0] * len(sets)

    levels = pruner.levels()
    found = select_corrected(selection_of, costs_of, lambda _: levels, measure, weights)
    selection, costs = selection_of(), costs_of()
    costs.start_at(levels * weights)
    chosen = select_behind_repair(selection, costs)
    groups = by_layers(pruner.graph.units).values()
    assert seen == [[u for u in units if u in chosen] for units in groups if set(units) & set(chosen)]
    for trial, units in zip(found.trials, seen, strict=True):
        expected = sum(cost / weights[unit].item() for unit, cost in costs.history if unit in units)
        assert trial.predicted == pytest.approx(expected) and trial.measured == 1 and set(units) <= set(trial.units)


@pytest.mark.usefixtures("costs_count")
@pytest.mark.parametrize("measured", [False, True])
def test_what_is_predicted_of_rounded_widths_is_of_the_filters_that_go(pruner, measured):
    """Not of those that were chosen before widths became multiples, which gives some back and adds others."""
    plain_of, costs_of = parts_of(pruner)
    rounded_of, levels, tried = parts_of(pruner, round_to=4)[0], pruner.levels(), []

    def measure(sets):
        tried.extend(sets)
        return [1.0] * len(sets)

    def started(trials):
        costs = costs_of()
        costs.start_at(levels * correction(trials, len(levels)))
        return costs

    found = select_corrected(rounded_of, costs_of, lambda _: levels, measure if measured else None)
    chosen, removed = set(found.selection.chosen), [unit for unit, _ in found.costs.history]
    widths = [info.filters - len(chosen & {*info.unit_of.tolist()}) for info in pruner.graph.layers.values()]
    assert all(width % 4 == 0 for width in widths if width < 10) and sorted(removed) == sorted(chosen)

    before, costs = started(found.trials), started(found.trials)
    first = select_behind_repair(plain_of(), before)
    assert {*first} - chosen and chosen - {*first}  # rounding did both
    kept = [unit for unit, _ in before.history if unit in chosen]
    assert removed[: len(kept)] == kept
    for unit in removed:
        costs.remove(unit)
    assert found.costs.total == pytest.approx(costs.total) and found.costs.total != pytest.approx(before.total)
    if measured:
        uncorrected = select_corrected(rounded_of, costs_of, lambda _: levels)
        assert sorted(itertools.chain(*tried)) == sorted(uncorrected.selection.chosen)
        assert sum(trial.predicted for trial in found.trials) == pytest.approx(uncorrected.costs.total)


def test_levels_follow_the_ratios_to_their_median_within_bounds():
    """The median is that of the groups that matter, 2.5."""
    trials = [
        GroupTrial("a", [0, 1], 1.0, 2.0),
        GroupTrial("b", [2], 1.0, 3.0),
        GroupTrial("c", [3], 1.0, 1e3),
        GroupTrial("d", [5], 1.0, 0.0),
        GroupTrial("e", [6], 0.01, 0.001),  # hardly costs anything
        GroupTrial("f", [7], 0.0, 1.0),
        GroupTrial("g", [8], 0.5, 1.0),
    ]
    expected = torch.ones(9, dtype=torch.float64)
    expected[[0, 1, 2, 3, 5, 7, 8]] = torch.tensor([0.8, 0.8, 1.2, LARGEST, 1 / LARGEST, LARGEST, 0.8]).double()
    assert torch.allclose(correction(trials, 9), expected)
    assert torch.equal(correction([], 3), torch.ones(3, dtype=torch.float64))
    assert torch.equal(correction([GroupTrial("a", [0], 1.0, 0.0)], 1), torch.ones(1, dtype=torch.float64))
    merged = ratios_of([*trials[:2], GroupTrial("a", [4], 3.0, 2.0), trials[5]])
    assert merged == {"a": 1.0, "b": 3.0}


@pytest.mark.usefixtures("costs_count")
@pytest.mark.parametrize("wanted", [True, False])
def test_the_pipeline_tries_the_choice_on_its_held_out_images(images, labels, held_out, wanted):
    torch.manual_seed(0)
    loader, model = make_loader(torch.utils.data.TensorDataset(images, labels), 6), randomise(Residual())

    def run(**arguments):
        settings = PruningSettings(rounds=2, budget="macs", guard=False, correct_levels=wanted)
        pruning = EnhancedPruning(model, loader, loader, calibration=[(images, labels)], settings=settings,
                                  progress=False, **arguments)  # fmt: skip
        return pruning, pruning.prune(50, 2)

    pruning, result = run(held_out=held_out)
    ratios = [record["measured_over_predicted"] for record in result.rounds]
    assert [bool(found) for found in ratios] == [wanted, wanted]
    pruner = pruning.rankings.of(model, 2, repairs=True)
    chosen = pruner.select(25)
    if wanted:
        selection_of, costs_of = parts_of(pruner, 25)
        first = select_corrected(selection_of, costs_of, lambda _: pruner.levels())
        expected = ratios_of(group_trials(first.selection, first.costs, measure_of(pruner, held_out)))
        assert ratios[0] == pytest.approx(expected) == pruner.chosen.measured_over_predicted
        assert set(ratios[0]) <= set(pruner.graph.layers)
    assert pruner.chosen.predicted_loss_change == pytest.approx(sum(cost for _, cost in pruner.chosen.removal_history))
    assert len(chosen) == len(pruner.chosen.removal_history)
    without = run()[1]
    assert [record["measured_over_predicted"] for record in without.rounds] == [{}, {}]
    if not wanted:
        assert without.plan == result.plan
