"""Widths that are multiples: what happens where a layer has none."""

import pytest
import torch
from torch import nn

from taylor_pruning.errors import InputError
from taylor_pruning.selection.constraints import Constraints, Selection
from taylor_pruning.selection.greedy import select_by_score
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


def test_a_multiple_above_every_layer_is_refused(graph):
    with pytest.raises(InputError, match="no layer has more than 40 filters.*multiple of 40; lower --round-to"):
        Selection(graph, 40, Constraints(round_to=40))
