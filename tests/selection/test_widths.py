"""Widths that are multiples, or alike: what happens where a layer has none."""

import math

import pytest
import torch
from torch import nn

from taylor_pruning.errors import InputError, OutOfReachError
from taylor_pruning.selection.constraints import Constraints, Selection
from taylor_pruning.selection.greedy import select_by_score, select_uniformly
from taylor_pruning.surgery.graph import ChannelGraph


@pytest.fixture(scope="module")
def graph():
    """Layers of 6 and 40 filters."""
    model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU(), nn.Conv2d(6, 40, 1), nn.ReLU(), nn.Flatten(), nn.Linear(40, 2))
    return ChannelGraph(model.eval(), torch.zeros(1, 3, 1, 1))


@pytest.mark.parametrize("constraints", [Constraints(round_to=8), Constraints(round_to=16, min_filters=4)])
def test_a_layer_without_a_multiple_stays_whole(graph, constraints):
    plan = graph.plan_of(select_by_score(Selection(graph, 40, constraints), torch.arange(len(graph.units)).double()))
    left = {name: info.filters - len(plan.get(name, [])) for name, info in graph.layers.items()}
    assert left["0"] == 6 and left["2"] < 40 and left["2"] % constraints.round_to == 0


class Separable(nn.Module):
    """A dear layer, and pairs of pointwise and depthwise convs of which the later are cheap."""

    def __init__(self):
        super().__init__()
        layers, width = [nn.Conv2d(3, 32, 3, padding=1), nn.ReLU()], 32
        for wider, stride in ((64, 1), (96, 2), (160, 2)):
            layers += [nn.Conv2d(width, wider, 1), nn.Conv2d(wider, wider, 3, stride, 1, groups=wider), nn.ReLU()]
            width = wider
        self.features, self.head = nn.Sequential(*layers), nn.Linear(width, 5)

    def forward(self, x):
        return self.head(self.features(x).mean((2, 3)))


@pytest.mark.parametrize("budget", ["filters", "params", "macs"])
@pytest.mark.parametrize("round_to", [8, 32])
def test_the_budget_is_met_with_multiples_too(budget, round_to):
    """Filters of early layers cost more multiply-accumulates: as many of late ones do not make up for them."""
    graph = ChannelGraph(Separable().eval(), torch.zeros(1, 3, 16, 16), verify=False)
    for seed in range(4):
        scores = torch.rand(len(graph.units), generator=torch.Generator().manual_seed(seed))
        selection = Selection(graph, 50, Constraints(budget=budget, round_to=round_to))
        plan = graph.plan_of(select_by_score(selection, scores))
        left = Selection(graph, 50, Constraints(budget=budget, layer_bound=math.inf))  # counts anew
        for unit in selection.chosen:
            left.take(unit)
        whole = left.ledger.total
        assert abs(left.missing() / whole) < (0.03 if round_to == 8 else 0.05)
        widths = [graph.layers[name].filters - len(gone) for name, gone in plan.items()]
        assert all(width % round_to == 0 for width in widths)


def test_filters_that_must_stay_count_in_the_width():
    model = nn.Sequential(nn.Conv2d(3, 40, 1), nn.ReLU(), nn.Flatten(), nn.Linear(40, 2)).eval()
    graph = ChannelGraph(model, torch.zeros(1, 3, 1, 1))
    units = graph.units[:20]  # as where the others are protected
    graph.units = units
    selection = Selection(graph, 45, Constraints(round_to=16))
    assert 40 - len(select_by_score(selection, torch.arange(20.0))) == 32


def test_a_multiple_above_every_layer_is_refused(graph):
    with pytest.raises(InputError, match="no layer has more than 40 filters.*multiple of 40; lower --round-to"):
        Selection(graph, 40, Constraints(round_to=40))


def test_uniform_widths_that_reach_no_target_say_so(plain_network, images):
    """The filters of an excluded layer stay, where the bound on layers yields in vain."""
    graph = ChannelGraph(plain_network, images, exclude=["0"])
    scores = torch.arange(len(graph.units), dtype=torch.float64)
    with pytest.raises(OutOfReachError, match="at most"):
        select_uniformly(Selection(graph, 95, Constraints("macs")), scores)
