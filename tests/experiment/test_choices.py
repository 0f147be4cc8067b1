"""What a choice by a published criterion leaves of every layer."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from taylor_pruning.experiment.choices import LEAST_SHARE, BaselineChoice
from taylor_pruning.selection.constraints import Constraints, Ledger
from taylor_pruning.surgery.graph import ChannelGraph


@pytest.mark.parametrize(("asked", "percentage"), [(0.0, 65), (0.1, 65), (0.6, 50)])
@pytest.mark.parametrize("widths", ["own", "uniform"])
def test_every_layer_keeps_the_larger_of_the_asked_and_the_usual_share(images, widths, asked, percentage):
    """The criterion would empty the second of three layers; the share that is asked for is not lowered to the usual one."""
    layers = [nn.Conv2d(3, 20, 3), nn.ReLU(), nn.Conv2d(20, 20, 3), nn.ReLU(), nn.Conv2d(20, 20, 3), nn.ReLU()]
    graph = ChannelGraph(nn.Sequential(*layers, nn.Flatten(), nn.Linear(80, 4)).double().eval(), images)
    constraints = Constraints("macs", min_share=asked)
    scores = torch.tensor([1e-6 if unit.filters[0][0] == "2" else 1.0 for unit in graph.units], dtype=torch.float64)
    rankings = SimpleNamespace(graph_of=lambda model: graph)
    choose = BaselineChoice(rankings, lambda graph: scores, widths, constraints, seed=0)
    plan = choose(graph.model, percentage, Ledger.open(graph, constraints), lambda step: None).plan
    least = min(20 - len(filters) for filters in plan.values())
    if widths == "own":
        assert least == 20 * max(asked, LEAST_SHARE)
    else:
        assert least >= 20 * asked and least > 20 * LEAST_SHARE
