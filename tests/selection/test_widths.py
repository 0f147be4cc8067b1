"""Widths that are multiples, or alike: what happens where a layer has none."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from taylor_pruning.errors import InputError, OutOfReachError
from taylor_pruning.selection.constraints import Constraints, Ledger, Selection
from taylor_pruning.selection.greedy import select_behind_repair, select_by_score, select_uniformly
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


def left_out(selection, layer, scores):
    """(scores of the chosen filters of a layer, of the others)."""
    units = selection.graph.layers[layer].unit_of
    gone = torch.isin(units, torch.tensor(selection.chosen))
    return scores[units][gone], scores[units][~gone]


@pytest.mark.parametrize("select", [select_by_score, select_uniformly])
@pytest.mark.parametrize("percentage", [25, 45, 70])  # more go, some come back
def test_rounding_removes_the_lowest_scores_and_gives_the_highest_back(graph, select, percentage):
    scores = torch.rand(len(graph.units), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    selection = Selection(graph, percentage, Constraints(round_to=16, layer_bound=math.inf))
    select(selection, scores)
    gone, left = left_out(selection, "2", scores)
    assert len(left) in (16, 32) and gone.max() < left.min()


def test_rounding_goes_by_the_costs_behind_the_choice(graph):
    """Costs behind repair grow as units go: those of the end count, the lowest first."""
    scores = torch.rand(len(graph.units), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    costs = SimpleNamespace(marginal=scores.clone())
    costs.remove = lambda unit: costs.marginal.copy_(2 - scores)
    selection = Selection(graph, 45, Constraints(round_to=16, layer_bound=math.inf))
    select_behind_repair(selection, costs)
    gone, left = left_out(selection, "2", scores)
    assert len(gone) == 24 and (gone > left.max()).sum() >= 23  # all but the one with which it began


def test_uniform_shares_are_rounded_to_the_nearest_filter(graph):
    """5 % of 46 filters are two of the 40, and none of the 6."""
    selection = Selection(graph, 5, Constraints(layer_bound=math.inf))
    assert {name: len(gone) for name, gone in graph.plan_of(select_uniformly(selection, torch.rand(46))).items()} == {
        "2": 2
    }


def test_what_went_in_earlier_rounds_counts_in_the_least_share(graph):
    ledger = Ledger({"0": 8, "2": 50}, 58, {"0": 2, "2": 10})
    selection = Selection(graph, 40, Constraints(min_share=0.5, layer_bound=math.inf), ledger)
    assert selection.room == {"0": 2, "2": 15}


def test_a_layer_may_lose_the_filter_that_the_bound_ends_in(graph):
    assert Selection(graph, 40, Constraints()).room == {"0": 3, "2": 17}  # 1.03 x 40 % are 2.5 and 16.5


@pytest.mark.parametrize("missing, fits", [(4.0, 0), (5.0, 40), (21.0, 40), (23.0, 46)])
def test_a_unit_fits_where_it_leads_closer_to_the_budget(graph, monkeypatch, missing, fits):
    """Units save 44 parameters or 9."""
    selection = Selection(graph, 40, Constraints("params"))
    monkeypatch.setattr(selection, "missing", lambda: missing)
    assert selection.fitting().sum() == fits


def test_a_bound_that_yields_opens_no_chosen_unit_again(graph):
    """The lowest scores were taken while it held."""
    selection = Selection(graph, 50, Constraints(layer_bound=math.inf, min_share=0.9))
    chosen = select_by_score(selection, torch.arange(46.0))
    assert not selection.bound_held and len(chosen) == len(set(chosen)) == 23


def test_units_that_save_nothing_have_numbers_to_choose_by(graph, monkeypatch):
    """As where a narrower layer takes as long."""
    selection = Selection(graph, 50, Constraints("macs"))
    monkeypatch.setattr(selection.costs, "savings", lambda units=slice(None): torch.zeros(46)[units])
    assert selection.per_saving(torch.tensor([0.0, 1.0, -1.0]).repeat(16)[:46]).isfinite().all()


class Joined(nn.Module):
    """The channels of two convs, one behind the other, are added to those of a third, which shares some filters with each."""

    def __init__(self):
        super().__init__()
        self.one, self.other = nn.Conv2d(3, 20, 1), nn.Conv2d(3, 20, 1)
        self.third, self.head = nn.Conv2d(3, 40, 1), nn.Linear(40, 2)

    def forward(self, x):
        x = self.third(x) + torch.cat([self.one(x), self.other(x)], 1)
        return self.head(x.relu().mean((2, 3)))


def test_layers_that_share_some_filters_are_cut_as_the_scores_say():
    graph, plans = ChannelGraph(Joined().eval(), torch.zeros(1, 3, 2, 2)), []
    scores = torch.rand(len(graph.units), generator=torch.Generator().manual_seed(0))
    for step in (1, 8):
        selection = Selection(graph, 45, Constraints(round_to=step, layer_bound=math.inf))
        plans.append(graph.plan_of(select_by_score(selection, scores)))
    assert plans[0] == plans[1] and len(plans[0]["third"]) == 18


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
        assert abs(left.missing() / whole) < (0.01 if round_to == 8 else 0.05)
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
