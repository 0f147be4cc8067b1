"""A proof runs on small images where the network runs on them, and on the example's size where it does not."""

import torch
from conftest import randomise
from torch import nn

from taylor_pruning.surgery.graph import ChannelGraph
from taylor_pruning.surgery.trial_inputs import random_inputs, trial_examples


def network(pool, features):
    """Maps of a sixteenth of the image, whose narrowest is 6 pixels wide at 96."""
    layers = [nn.Conv2d(3, 6, 3, 4, 1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3, 4, 1), nn.ReLU()]
    torch.manual_seed(0)
    model = nn.Sequential(*layers)
    model.add_module("conv", nn.Conv2d(8, 8, 3, padding=1))  # whose kernel is smaller than the map and no map
    return randomise(nn.Sequential(model, pool, nn.Flatten(), nn.Linear(features, 4)))


def sides(graph):
    return [example.shape[-1] for example in trial_examples(graph._example, graph.executions[False].trace.graph)]


def test_the_smallest_map_keeps_two_pixels():
    model = network(nn.AdaptiveAvgPool2d(1), 8)
    assert sides(ChannelGraph(model, torch.zeros(1, 3, 96, 96).double())) == [32, 96]
    assert sides(ChannelGraph(model, torch.zeros(1, 3, 32, 32).double())) == [32], "no smaller one"
    long = ChannelGraph(model, torch.zeros(1, 3, 96, 480).double())
    shapes = [tuple(e.shape[-2:]) for e in trial_examples(long._example, long.executions[False].trace.graph)]
    assert shapes == [(32, 160), (96, 480)]


def test_a_network_of_one_size_is_proved_on_that_size():
    """Its linear layer reads 6 x 6 positions; a fault is found although small images say nothing."""
    model = network(nn.Identity(), 8 * 36)
    graph = ChannelGraph(model, torch.zeros(1, 3, 96, 96).double(), verify=False)
    proof = graph._proof()
    assert len(proof.examples) == 2 and len(graph.units) == 6 + 8 + 8
    assert proof.failure(graph.units[::2]) is None and len(proof.examples) == 1
    cut = proof.cut

    def wrong(model, units):
        smaller = cut(model, units)
        smaller[0][0].bias.data += 1
        return smaller

    proof.cut = wrong
    assert "other outputs" in proof.failure(graph.units[::2])


def test_inputs_are_random_with_a_batch_of_their_own():
    example = {"image": torch.zeros(1, 3, 4, 4), "index": torch.tensor([3]), "scale": torch.tensor(2)}
    drawn = random_inputs(example, 3, torch.float64, torch.device("cpu"))
    assert drawn["image"].shape == (3, 3, 4, 4) and drawn["image"].std() > 0.5
    assert drawn["index"].tolist() == [3, 3, 3] and drawn["scale"] == 2
