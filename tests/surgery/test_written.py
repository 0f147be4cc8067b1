"""Forwards that write to their own parameters and buffers: the caller's network keeps what it holds."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_surgery import check_law, images
from torch import nn

from EnhancedFilterPruner import EnhancedFilterPruner
from taylor_pruning.surgery.graph import ChannelGraph


class Coding(nn.Module):
    """A codebook that follows the data in training, as in a VQ-VAE."""

    def __init__(self):
        super().__init__()
        self.codebook = nn.Parameter(torch.randn(10, 8), requires_grad=False)

    def forward(self, x):
        rows = x.movedim(1, -1).reshape(-1, 8)
        nearest = torch.cdist(rows, self.codebook).argmin(1)
        if self.training:
            of_code = F.one_hot(nearest, 10).to(rows)
            with torch.no_grad():
                self.codebook.mul_(0.9).add_(0.1 * (of_code.t() @ rows) / (of_code.sum(0)[:, None] + 1))
        coded = F.embedding(nearest, self.codebook).view(x.movedim(1, -1).shape).movedim(-1, 1)
        return x + (coded - x).detach()


class Bounded(nn.Conv2d):
    """Filters of bounded norm, in evaluation too, as in EEGNet."""

    def forward(self, x):
        with torch.no_grad():
            self.weight.renorm_(2, 0, 0.5)
        return super().forward(x)


class Scaled(nn.Conv2d):
    """Writes through a view without history."""

    def forward(self, x):
        self.weight.data[:4].mul_(0.9)
        return super().forward(x)


class Masked(nn.Conv2d):
    """Replaces its weight, so that it runs as a whole."""

    def forward(self, x):
        self.weight.data *= 0.9
        return super().forward(x)


class Doubling(nn.BatchNorm2d):
    """In training its graph is another one."""

    def forward(self, x):
        x = super().forward(x)
        return x * 2 if self.training else x


PARTS = {
    "codebook": Coding,
    "norm": lambda: Bounded(8, 8, 1),
    "view": lambda: Scaled(8, 8, 1),
    "whole": lambda: Masked(8, 8, 1),
    "statistics": lambda: Doubling(8),
}


def network(part):
    layers = nn.Conv2d(3, 8, 3), PARTS[part](), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU()
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4))


@pytest.mark.parametrize("part", PARTS)
def test_the_tensors_of_the_network_stay_as_they_are(part):
    torch.manual_seed(0)
    model, x = network(part).eval(), torch.randn(4, 3, 9, 9)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def check():
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())

    graph = ChannelGraph(model, x)
    check()
    smaller = graph.remove(graph.units[:2])
    check()
    gates = torch.ones(len(graph.units)).index_fill(0, torch.arange(2), 0)
    for training in (False, True):
        model.train(training)
        with graph.gated(gates), torch.no_grad():
            gated = model(x)
        check()
        torch.testing.assert_close(gated, copy.deepcopy(smaller).train(training)(x))
    model.eval()
    EnhancedFilterPruner(model, x).rank([(x, torch.arange(4))])
    check()


def test_copies_of_what_is_written_have_gradients():
    torch.manual_seed(0)
    model, x = network("norm").eval(), torch.randn(4, 3, 9, 9)
    graph = ChannelGraph(model, x)
    with graph.gated(torch.ones(len(graph.units))):
        gated = torch.autograd.grad(model(x).square().sum(), model[1].weight)
    torch.testing.assert_close(gated, torch.autograd.grad(model(x).square().sum(), model[1].weight))


class Counted(nn.Module):
    """A result is written into a buffer by `out`."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.fc = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 3), nn.Linear(6, 4)
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x):
        torch.add(self.calls, 1, out=self.calls)
        x = self.a(x).relu() * self.calls.clamp(max=1)
        return self.fc(self.b(x).relu().mean((2, 3)))


def test_a_result_that_goes_into_a_buffer_is_a_write():
    torch.manual_seed(0)
    model = Counted().eval()
    graph = ChannelGraph(model, torch.zeros(1, 3, 9, 9))
    graph.remove(graph.units[:2])
    assert len(graph.units) == 14 and model.calls == 0


class Literal(nn.Module):
    """A constant that no call of torch makes, and that the forward writes to."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.fc = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 4)

    def forward(self, x):
        scale = torch.from_numpy(np.array([2.0]))
        scale.mul_(1.5)
        scale[:1].add_(1)
        return self.fc(F.relu(self.b(F.relu(self.a(x)) * scale)).mean((2, 3)))


def test_constants_are_written_to_once_in_every_run(images):
    torch.manual_seed(0)
    model = Literal().double().eval()
    graph = ChannelGraph(model, images)
    assert [info.reason for info in graph.layers.values()] == [None, None]
    for _ in range(2):
        with torch.no_grad(), graph.gated(torch.ones(16, dtype=torch.double)):
            torch.testing.assert_close(model(images), Literal.forward(model, images))


def test_sparse_constants_are_taken():
    class Mixing(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fc, self.mix = nn.Conv2d(3, 8, 3), nn.Linear(8, 4), torch.eye(8).double().to_sparse()

        def forward(self, x):
            x = self.conv(x).relu_().mean((2, 3))
            return self.fc(torch.sparse.mm(self.mix, x.t()).t())

    assert not check_law(Mixing().double().eval(), images()).units
