"""Gates while a network trains: open ones change nothing, closed ones are removed channels, statistics included."""

import copy

import pytest
import torch
from conftest import NETWORKS, randomise
from torch import nn

from taylor_pruning.surgery.graph import ChannelGraph
from taylor_pruning.surgery.training_gates import for_training


class Auxiliary(nn.Module):
    """Runs another branch in training mode."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)
        self.more, self.head = nn.Conv2d(6, 6, 3), nn.Linear(6, 4)

    def forward(self, x):
        x = torch.relu(self.norm(self.stem(x)))
        if self.training:
            x = x + torch.relu(self.more(x)).mean((2, 3), keepdim=True)
        return self.head(x.mean((2, 3)))


@pytest.fixture(params=[*NETWORKS, "auxiliary"])
def network(request):
    torch.manual_seed(0)
    return randomise(Auxiliary() if request.param == "auxiliary" else NETWORKS[request.param]())


def test_open_gates_train_as_the_network_does(network, images):
    graph, alone = ChannelGraph(network, images[:1]), copy.deepcopy(network).train()
    trained = for_training(graph, network.train(), images[:1])
    with trained.gated(torch.ones(len(graph.units), dtype=torch.float64)):
        found = network(images)
    torch.testing.assert_close(found, alone(images))
    found.square().sum().backward()
    alone(images).square().sum().backward()
    for one, other in zip(network.parameters(), alone.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None)
        if one.grad is not None:
            torch.testing.assert_close(one.grad, other.grad)


def test_closed_gates_are_removed_channels_in_training_too(network, images):
    graph = ChannelGraph(network, images[:1])
    trained = for_training(graph, network, images[:1])
    smaller = graph.remove(graph.units[:2]).train()
    gates = torch.ones(len(graph.units), dtype=torch.float64)
    gates[:2] = 0
    network.train()
    with trained.gated(gates):
        torch.testing.assert_close(network(images), smaller(images))
    kept = dict(smaller.named_buffers())
    for name, buffer in network.named_buffers():
        if buffer.dim() and len(buffer) == len(kept[name]):
            torch.testing.assert_close(buffer, kept[name])
    smaller = graph.remove(graph.units[:2]).eval()
    network.eval()
    with trained.gated(gates):
        torch.testing.assert_close(network(images), smaller(images))
