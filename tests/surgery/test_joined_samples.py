"""Inputs joined along the batch: two views of a sample run through one encoder, each in a block of its own."""

import pytest
import torch
import torch.nn.functional as F
from conftest import randomise
from test_surgery import check_law
from torch import nn

from taylor_pruning.scoring.estimates import channel_estimates, input_moments
from taylor_pruning.scoring.flow import unit_gradient_norms
from taylor_pruning.surgery.graph import ChannelGraph


class Views(nn.Module):
    """Features of an image, of its mirror image, and of `windows` parts of both; `blocks`: all views of one kind together."""

    def __init__(self, blocks, windows):
        super().__init__()
        self.a, self.n, self.b, self.fc = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 5, 3), nn.Linear(5, 4)
        self.blocks, self.windows = blocks, windows

    def forward(self, x):
        views = torch.stack([x, x.flip(3)], 0 if self.blocks else 1).flatten(0, 1)
        if self.windows:
            views = torch.stack(views.chunk(2, 2), 1).flatten(0, 1)
        y = self.fc(F.relu(self.b(F.relu(self.n(self.a(views))))).mean((2, 3)))
        if self.windows:
            y = y.unflatten(0, (-1, 2)).mul(y.new_tensor([[1.0], [0.5]])).sum(1)
        first, second = y.chunk(2) if self.blocks else y.unflatten(0, (-1, 2)).unbind(1)
        return first - 2 * second


class Kinds(nn.Module):
    """Whole numbers beside the images, of which there are two views."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.fc, self.kinds = (
            nn.Conv2d(3, 6, 3),
            nn.Conv2d(6, 5, 3),
            nn.Linear(5, 4),
            nn.Embedding(3, 6),
        )

    def forward(self, x, kind):
        y = self.a(torch.cat([x, x.flip(3)])) + self.kinds(kind.repeat(2))[..., None, None]
        first, second = self.b(F.relu(y)).chunk(2)
        return self.fc((first - 2 * second).abs().mean((2, 3)))


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.fc = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 5, 3), nn.Linear(5, 4)

    def forward(self, x, y):
        x, y = F.relu(self.b(F.relu(self.a(torch.cat([x, y]))))).chunk(2)
        return self.fc((x - y).abs().mean((2, 3)))


def images(seed=0):
    return torch.randn(5, 3, 12, 12, dtype=torch.double, generator=torch.Generator().manual_seed(seed))


def views(blocks, windows):
    torch.manual_seed(0)
    return randomise(Views(blocks, windows))


@pytest.mark.parametrize("windows", [False, True])
def test_views_of_a_sample_have_its_gates(windows):
    model, x = views(True, windows), images()
    graph = check_law(model, x, seeds=(0,))
    assert len(graph.units) == 11 and {site.blocks for site in graph.sites} == {2}
    gates = torch.rand(5, 11, dtype=torch.double, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        with graph.gated(gates):
            together = model(x)
        for i in range(5):
            with graph.gated(gates[i]):
                torch.testing.assert_close(model(x[i : i + 1]), together[i : i + 1])


def test_views_beside_whole_numbers_have_the_gates_of_their_sample():
    torch.manual_seed(0)
    model, inputs = randomise(Kinds()), (images(), torch.tensor([0, 1, 2, 1, 0]))
    graph = ChannelGraph(model, inputs)
    assert len(graph.units) == 11 and {site.blocks for site in graph.sites} == {2}
    with torch.no_grad(), graph.gated(torch.ones(5, 11, dtype=torch.double).index_fill(1, torch.tensor([0, 7]), 0)):
        expected = model(*inputs)
    torch.testing.assert_close(graph.remove([graph.units[0], graph.units[7]])(*inputs), expected)


def test_two_inputs_in_one_encoder():
    torch.manual_seed(0)
    model, inputs = randomise(TwoInputs()), (images(), images(1))
    graph = ChannelGraph(model, inputs)
    assert len(graph.units) == 11
    gates = torch.ones(11, dtype=torch.double)
    gates[[0, 7]] = 0
    with torch.no_grad(), graph.gated(gates):
        expected = model(*inputs)
    torch.testing.assert_close(graph.remove([graph.units[0], graph.units[7]])(*inputs), expected)


@pytest.mark.parametrize("windows", [False, True])
def test_scores_do_not_depend_on_the_order_of_the_rows(windows):
    found, x, labels = [], images(), torch.arange(5) % 4
    for blocks in (True, False):
        model, activations = views(blocks, windows), []
        graph = ChannelGraph(model, x)
        estimates = channel_estimates(input_moments(model, graph, [(x, labels)]))
        gates = torch.rand(5, 11, dtype=torch.double, generator=torch.Generator().manual_seed(1)).requires_grad_()
        with graph.gated(gates, lambda *pair, found=activations: found.append(pair), estimates=estimates):
            logits = model(x)
        loss = F.cross_entropy(logits, labels, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, gates, retain_graph=True)
        found.append((logits, gradient, unit_gradient_norms(loss, activations, 5, 11)))
    torch.testing.assert_close(*found)
    assert found[0][1].abs().min() > 0
