"""How near a selection comes to its goal where the units that it would take next are large."""

import math

import pytest
import torch

from taylor_pruning.scoring.layer_costs import RemovalCosts
from taylor_pruning.selection.constraints import Constraints, Selection
from taylor_pruning.selection.greedy import select_behind_repair, select_by_score, select_jointly


class Watched(Selection):
    """No unit goes further beyond the goal than was missing before."""

    def take(self, unit):
        before = self.missing()
        taken = super().take(unit)
        assert abs(self.missing()) <= before * (1 + 1e-6)
        return taken


@pytest.mark.parametrize("budget", ["filters", "params", "macs"])
@pytest.mark.parametrize("behind_repair", [False, True])
def test_no_unit_goes_that_leaves_the_budget_further_from_its_goal(resnet, budget, behind_repair):
    """The cheapest unit may save many times what is still missing."""
    _, graph = resnet
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        scores = torch.rand(len(graph.units), dtype=torch.float64, generator=generator)
        selection = Watched(graph, 40, Constraints(budget=budget, layer_bound=math.inf))
        if behind_repair:
            costs = RemovalCosts([], len(graph.units))
            costs.start_at(scores)
            select_behind_repair(selection, costs)
        else:
            select_by_score(selection, scores)


@pytest.mark.parametrize("bound", [1.0, math.inf])
def test_a_joint_selection_does_so_too(graph, directions, bound):
    for percentage in range(5, 60, 10):
        select_jointly(Watched(graph, percentage, Constraints(budget="macs", layer_bound=bound)), directions, 2)
