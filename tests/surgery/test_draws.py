"""Forwards that draw random numbers outside of torch, as layers that are left out at random do."""

import random

import numpy as np
import pytest
import torch
from test_surgery import Net, Plain, images, random_units, randomise

from taylor_pruning.errors import InputError
from taylor_pruning.surgery.draws import fixed_draws
from taylor_pruning.surgery.graph import ChannelGraph


class Dropping(Plain):
    """Leaves its layers out, in training, where `draw` says so."""

    draw = staticmethod(random.random)

    def forward(self, x):
        return x if self.training and self.draw() < 0.5 else x + super().forward(x)


class DroppingByNumPy(Dropping):
    draw = staticmethod(np.random.rand)


@pytest.mark.parametrize("kind", [Dropping, DroppingByNumPy])
def test_layers_left_out_at_random_are_cut(kind):
    model = randomise(Net([kind]).double().eval())
    for seed in range(8):
        random.seed(seed)
        np.random.seed(seed)
        graph = ChannelGraph(model, images(1))
        graph.remove(random_units(graph, 0.5, seed))
        assert all(info.reason is None for info in graph.layers.values())


def test_the_generators_go_on_where_they_were():
    random.seed(3)
    np.random.seed(3)
    wanted = random.random(), np.random.rand()
    random.seed(3)
    np.random.seed(3)
    with fixed_draws():
        first = random.random(), np.random.rand()
    assert (random.random(), np.random.rand()) == wanted
    with fixed_draws():
        assert (random.random(), np.random.rand()) == first != wanted


def test_comparisons_that_contradict_each_other_name_the_layers(monkeypatch):
    torch.manual_seed(0)
    graph = ChannelGraph(randomise(Net([Dropping]).double().eval()), images(1), verify=False)
    answers = iter(["removing them gives other outputs than closing their gates", None])
    monkeypatch.setattr("taylor_pruning.surgery.graph.CutProof.failure", lambda *_: next(answers))
    with pytest.raises(InputError, match=r"filters of blocks.0.a.0 cannot be removed: .* differs from run to run"):
        graph.remove([unit for unit in graph.units if unit.filters[0][0] == "blocks.0.a.0"][:2])
