"""Modules of a network that are cut, each by itself."""

import pytest
import torch
from conftest import plain, randomise
from torch import nn

from taylor_pruning.errors import InputError
from taylor_pruning.surgery.parts import PartsGraph, recorded_inputs


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3)

    def forward(self, x, scale=1):
        return self.conv(x) * scale


class Whole(nn.Module):
    """`part` is called as `how` says."""

    def __init__(self, how):
        super().__init__()
        self.part, self.body, self.how = Scaled(), plain(), how

    def forward(self, x):
        self.how(self.part, x)
        return self.body(x)


LEFT = {
    "is called with positional and named arguments together": lambda part, x: part(x, scale=2),
    "does not read tensors whose rows are the images of a batch": lambda part, x: part(x[0]),
    "runs 2 times in a forward": lambda part, x: part(part(x)),
    "the forward does not call it": lambda part, x: x,
}


@pytest.mark.parametrize("reason", LEFT)
def test_a_part_that_cannot_be_traced_as_it_is_called_is_left_whole_and_named(reason, images):
    graph = PartsGraph(randomise(Whole(LEFT[reason])), ["part", "body"], lambda network: network(images), len(images))
    assert list(graph.parts) == ["body"] and reason in graph.left_whole["part"]


def parts(images, **options):
    model = nn.Sequential(randomise(plain()), nn.Flatten())
    return PartsGraph(model, ["0"], lambda network: network(images), len(images), **options)


def test_patterns_leave_out_layers_of_parts_and_one_that_matches_none_is_named(images):
    graph = parts(images, exclude=["0.4"])
    assert not graph.layers["0.4"].removable.any() and graph.layers["0.0"].removable.all()
    with pytest.raises(InputError, match="exclude 1.* matches no layer; layers are: 0.0, 0.4"):
        parts(images, exclude=["0.4", "1.*"])


def test_activations_of_parts_come_with_the_units_of_the_whole(images):
    model = nn.Sequential(randomise(plain()), nn.Unflatten(1, (4, 1, 1)), randomise(nn.Sequential(nn.Conv2d(4, 6, 1),
                                                                                       nn.Conv2d(6, 4, 1))))  # fmt: skip
    graph, seen = PartsGraph(model, ["0", "2"], lambda network: network(images), len(images)), []
    gates = torch.ones(len(graph.units), dtype=torch.double)
    with torch.no_grad(), graph.gated(gates, lambda site, output: seen.append(site.units)):
        model(images)
    assert torch.cat(seen).unique().tolist() == [*range(len(graph.units))]
    assert recorded_inputs(model, "2", lambda network: network(images)).shape == (12, 4, 1, 1)
