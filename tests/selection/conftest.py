"""Networks, graphs and directions that tests of selection share."""

import pytest
import torch
import torchvision
from torch import nn

from taylor_pruning.scoring.collecting import Wanted, collect_directions
from taylor_pruning.surgery.graph import ChannelGraph


@pytest.fixture
def graph(plain_network, images):
    return ChannelGraph(plain_network, images)


@pytest.fixture
def directions(plain_network, graph, batches):
    return collect_directions(plain_network, graph, batches, Wanted(3), progress=False)


def half_resnet(classes):
    """The stem and the first two of ResNet-18's four stages: two residual streams, nine convs of 64 and 128 filters."""
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=classes)
    model.layer3 = model.layer4 = nn.Identity()
    model.fc = nn.Linear(128, classes)
    return model.eval()


@pytest.fixture(scope="module")
def half_resnet_of_4():
    return half_resnet(4)


@pytest.fixture(scope="module")
def resnet():
    model = half_resnet(10)
    return model, ChannelGraph(model, torch.randn(1, 3, 64, 64))


@pytest.fixture(scope="module")
def many_units():
    """A graph of 2,880 units."""
    torch.manual_seed(0)
    return ChannelGraph(torchvision.models.resnet18(num_classes=10).eval(), torch.randn(1, 3, 32, 32))
