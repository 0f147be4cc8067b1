"""No choice takes a unit that saves more than twice what is missing: the budget is met as closely as single units can."""

import pytest
import torch

from taylor_pruning.scoring.layer_costs import RemovalCosts
from taylor_pruning.scoring.taylor import Directions
from taylor_pruning.selection.constraints import Constraints, Selection
from taylor_pruning.selection.greedy import select_behind_repair, select_by_score, select_jointly, select_uniformly


class Watched(Selection):
    """Notes what is missing before a unit is taken, and what the unit saves."""

    def __init__(self, *args):
        super().__init__(*args)
        self.steps = []

    def take(self, unit):
        self.steps.append((self.missing(), self.savings(unit).item()))
        return super().take(unit)


def by_score(selection, scores):
    return select_by_score(selection, scores)


def uniformly(selection, scores):
    return select_uniformly(selection, scores)


def behind_repair(selection, scores):
    costs = RemovalCosts([], len(scores))
    costs.start_at(scores)
    return select_behind_repair(selection, costs)


def jointly(selection, scores):
    """Two samples of two classes each, so that a unit's loss change follows its score alone."""
    basis = torch.tensor([[1.0], [-1.0]], dtype=torch.float64).expand(2, 2, 1) / 2**0.5
    coordinates = (1e-3 * scores)[None, :, None].expand(2, -1, 1)
    directions = Directions(coordinates, basis, torch.zeros(2, 2).double(), torch.tensor([0, 0]), 0.0)
    return select_jointly(selection, directions, 2)


@pytest.mark.parametrize("select", [by_score, uniformly, behind_repair, jointly], ids=lambda f: f.__name__)
@pytest.mark.parametrize("size", [0.2, 3.3])
def test_no_choice_takes_more_than_twice_what_is_missing(many_units, select, size):
    """The units that save most score lowest: hundreds of them come first that do not fit, at once or after three of them."""
    selection = Selection(many_units, 1, Constraints("macs"))
    selection = Watched(many_units, 100 * size * selection.largest.item() / selection.ledger.total, Constraints("macs"))
    scores = torch.rand(len(many_units.units), dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 0.5
    scores = scores / selection.savings().double() ** 2 * 1e9
    assert select(selection, scores)
    assert selection.steps and all(saved <= 2 * missing * (1 + 1e-6) for missing, saved in selection.steps)
    assert abs(selection.missing()) <= min(missing for missing, _ in selection.steps)
