"""Forwards that look at buffers of one number, and functions whose operations are not seen."""

import pytest
import torch
from test_surgery import Net, Plain, check_law, images, randomise
from torch import nn

from taylor_pruning.errors import InputError
from taylor_pruning.surgery.graph import ChannelGraph


class Deciding(Net):
    """A forward that `decide` changes by a flag and a number in buffers."""

    def __init__(self, decide, flag=True):
        super().__init__([Plain])
        self.decide = decide
        self.register_buffer("flag", torch.tensor(flag))
        self.register_buffer("number", torch.tensor([2.0]))

    def forward(self, x):
        return super().forward(self.decide(self, x))


def count(network, x):
    network.number.add_(1)
    return x if network.number.item() > 2.5 else -x


def count_anew(network, x):
    network.number += 1
    return x if network.number.item() > 2.5 else -x


def deciding(decide, **options):
    torch.manual_seed(0)
    return randomise(Deciding(decide, **options).double().eval())


@pytest.mark.parametrize("flag", [True, False])
def test_a_flag_in_a_buffer_decides(flag):
    graph = check_law(deciding(lambda network, x: 2 * x if network.flag else x * x, flag=flag), images(), train=False)
    assert all(info.reason is None for info in graph.layers.values())


def test_a_number_in_a_buffer_is_taken_as_it_is():
    graph = check_law(deciding(lambda network, x: x * network.number.item() + int(network.flag)), images())
    assert all(info.reason is None for info in graph.layers.values())


@pytest.mark.parametrize("decide", [count, count_anew])
def test_a_buffer_that_the_forward_changes_decides_nothing(decide):
    model = deciding(decide)
    before = model.number.clone()
    with pytest.raises(InputError, match=r"depends on the values of a tensor \(item\)"):
        ChannelGraph(model, images(1))
    assert torch.equal(model.number, before)


@torch.jit.script
def scripted_swish(x):
    return x.mul(x.sigmoid())


class Scripted(Plain):
    def forward(self, x):
        return self.b(scripted_swish(self.a(x)))


def test_a_scripted_function_protects_what_passes_through_it_in_every_call():
    torch.manual_seed(0)
    model = randomise(Net([Scripted]).double().eval())
    for _ in range(3):  # the first calls of a scripted function run otherwise than later ones
        graph = check_law(model, images(), seeds=(0,))
        assert graph.layers["blocks.0.a.0"].reason == "passes through scripted_swish (blocks.0)"
        assert graph.layers["stem.0"].reason is None and graph.layers["blocks.0.b.0"].reason is None


class Undecided(nn.Module):
    """Decides by the values of activations, and calls a scripted function while it does."""

    def forward(self, x):
        return scripted_swish(2 * x) if x.sum() > 0 else x


def test_a_scripted_function_in_a_module_that_runs_as_a_whole():
    torch.manual_seed(0)
    model = randomise(Net([Plain]).double().eval())
    model.blocks.append(Undecided())
    graph = ChannelGraph(model, images(1))
    assert "whose forward no graph can repeat" in graph.layers["blocks.0.b.0"].reason
    assert graph.layers["stem.0"].reason is None
