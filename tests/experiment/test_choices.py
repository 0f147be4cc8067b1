"""What a choice by a published criterion leaves of every layer."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from taylor_pruning.errors import OutOfReachError
from taylor_pruning.experiment.choices import LEAST_SHARE, BaselineChoice, Choice, TimedChoice
from taylor_pruning.selection.chosen import Chosen
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


class Timed(TimedChoice):
    """A network that takes `start` of the dense one's time by the layers' times of all of it; every cut leaves 0.9."""

    def __init__(self, start, least):
        self.start, self.least, self.aims = start, least, []
        super().__init__(self.at, SimpleNamespace(graph_of=lambda model: None), None)

    def at(self, model, percentage, ledger, lap):
        self.aims.append(round(1 - percentage / 100, 3))
        if self.aims[-1] < self.least:
            raise OutOfReachError("too little")
        graph = SimpleNamespace(remove=lambda plan, verify: None)
        return Choice(graph, {"aim": self.aims[-1]}, {}, Chosen([], None, layer_bound_held=True))

    def _measured(self, model):
        return 0.9 if self.aims else self.start

    def _predicted(self, graph, units, ledger):
        return self.aims[-1] if self.aims else 1.0


@pytest.mark.parametrize(
    ("start", "least", "aims"), [(1.0, 0.4, [0.5, 0.278]), (2.0, 0.4, [0.25, 0.5, 0.278]), (1.0, 0.6, [0.5])]
)
def test_where_layers_cannot_shrink_as_far_the_choice_made_before_counts(start, least, aims):
    """A time that is only out of reach once the error is taken into account is aimed at without it."""
    choose = Timed(start, least)
    if least > 0.5:
        with pytest.raises(OutOfReachError):
            choose(None, 50, None, lambda step: None)
    else:
        assert choose(None, 50, None, lambda step: None).plan == {"aim": 0.5}
    assert choose.aims == aims
