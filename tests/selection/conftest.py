"""Graphs and directions that tests of selection share."""

import pytest
import torch
import torchvision

from taylor_pruning.scoring.collecting import Wanted, collect_directions
from taylor_pruning.surgery.graph import ChannelGraph


@pytest.fixture
def graph(plain_network, images):
    return ChannelGraph(plain_network, images)


@pytest.fixture
def directions(plain_network, graph, batches):
    return collect_directions(plain_network, graph, batches, Wanted(3), progress=False)


@pytest.fixture(scope="module")
def resnet():
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=10).eval()
    return model, ChannelGraph(model, torch.randn(1, 3, 64, 64))
