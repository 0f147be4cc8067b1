"""Scores behind compensation from one random direction: unbiased, and no more passes than promised."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from EnhancedFilterPruner import EnhancedFilterPruner
from taylor_pruning import positions
from taylor_pruning.scoring import estimates
from taylor_pruning.scoring.behind_repair import collect_behind_repair
from taylor_pruning.scoring.oracle import spearman
from taylor_pruning.surgery.graph import ChannelGraph


@pytest.fixture(scope="module")
def ten_classes():
    """A small network that has learned to tell ten noisy patterns apart, and 200 of its images."""
    generator = torch.Generator().manual_seed(3)
    patterns = torch.randn(10, 3, 8, 8, generator=generator)
    labels = torch.arange(200) % 10
    images = patterns[labels] + torch.randn(200, 3, 8, 8, generator=generator)
    torch.manual_seed(0)
    convs = nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 24, 3), nn.ReLU()
    model = nn.Sequential(*convs, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 10))
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(40):
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
    return model.double().eval(), images.double(), labels


def collected(ten_classes, order=2, batch=50, **options):
    model, images, labels = ten_classes
    batches = list(zip(images.split(batch), labels.split(batch), strict=True))
    return collect_behind_repair(model, ChannelGraph(model, images), batches, batches, order, progress=False, **options)


def test_one_random_direction_ranks_as_the_exact_curvature_does(ten_classes):
    exact = collected(ten_classes, class_probes=9).directions.moments(order=2)[1].mean(0)
    few = collected(ten_classes).directions
    assert few.coordinates.shape[2] == 1
    h = few.moments(order=2)[1]
    assert spearman(h.mean(0), exact) > 0.85
    z = (h.mean(0) - exact) / (h.std(0) / len(h) ** 0.5)
    assert z.abs().mean() < 1.2 and z.abs().max() < 5  # unbiased: off by what its spread explains


def test_the_fisher_matrices_do_not_depend_on_how_many_directions_the_scores_take(ten_classes):
    one, nine, third = (
        collected(ten_classes, order, class_probes=n).fisher for order, n in ((2, 1), (2, 9), (3, None))
    )
    for name, gram in one.items():
        torch.testing.assert_close(gram, nine[name])
        torch.testing.assert_close(gram, third[name])


@pytest.fixture
def few_positions(monkeypatch):
    """Of the 36 and 16 positions of an image some are drawn."""
    monkeypatch.setattr(positions, "ENOUGH_ROWS", 0)
    monkeypatch.setattr(positions, "POSITIONS", 8)
    monkeypatch.setattr(estimates, "ROWS_PER_CHANNEL", 1)


def test_drawn_positions_stand_for_all(ten_classes, request):
    everything = collected(ten_classes)
    request.getfixturevalue("few_positions")
    some = collected(ten_classes)
    for name in ("2", "6"):
        found, wanted = some.fisher[name], everything.fisher[name]
        assert (found - wanted).norm() < 0.2 * wanted.norm()
    moments, wanted = some.moments["2"], everything.moments["2"]
    assert sum(moments.rows) == 200 * 8 and sum(wanted.rows) == 200 * 36
    found, wanted = (torch.linalg.inv(m.precision()[0]) for m in (moments, wanted))
    assert 0 < (found - wanted).norm() < 0.1 * wanted.norm()


@pytest.mark.usefixtures("few_positions")
@pytest.mark.parametrize("order", [1, 2, 3])
def test_nothing_depends_on_the_batches(ten_classes, order):
    whole, split = (collected(ten_classes, order, batch) for batch in (200, 7))
    torch.testing.assert_close(whole.directions.coordinates, split.directions.coordinates, rtol=1e-7, atol=1e-10)
    for name, gram in whole.fisher.items():
        torch.testing.assert_close(gram, split.fisher[name])


@pytest.mark.parametrize(("order", "backward"), [(1, 1), (2, 1), (3, 6)])
def test_an_order_takes_the_passes_that_it_needs(ten_classes, order, backward, monkeypatch):
    """Images that go forward and backward, the check of gradients on a few images apart."""
    model, images, labels = ten_classes
    batches, count = [(images, labels)], {"forward": 0, "backward": 0}
    pruner = EnhancedFilterPruner(model, images, order, class_probes=5, progress=False)
    if order == 2:
        pruner = EnhancedFilterPruner(model, images, order, progress=False)
    monkeypatch.setattr("EnhancedFilterPruner.check_gradients", lambda *arguments: None)

    original = torch.autograd.grad

    def grad(outputs, *arguments, **keywords):
        count["backward"] += len(outputs)
        return original(outputs, *arguments, **keywords)

    run = pruner.graph.executions[False].run

    def counted(arguments, *others):
        count["forward"] += len(arguments[0])
        return run(arguments, *others)

    monkeypatch.setattr(pruner.graph.executions[False], "run", counted)
    monkeypatch.setattr(torch.autograd, "grad", grad)
    pruner.rank(batches, batches)
    pruner.select(30)
    assert count == {"forward": 2 * len(images), "backward": backward * len(images)}


class Tokens(nn.Module):
    """An MLP on tokens [N, L, C] or, as nn.TransformerEncoder has them by default, [L, N, C]."""

    def __init__(self, order):
        super().__init__()
        self.order, self.conv = order, nn.Conv2d(3, 8, 4, 4)
        self.a, self.b, self.head = nn.Linear(8, 10), nn.Linear(10, 8), nn.Linear(8, 4)

    def forward(self, x):
        x = self.conv(x).flatten(2).permute(self.order)
        return self.head((x + self.b(torch.tanh(self.a(x)))).mean(self.order.index(2)))


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("size", [4, 6])  # as many images as tokens, and more
def test_scores_of_tokens_do_not_depend_on_which_dimension_comes_first(order, size):
    generator, found = torch.Generator().manual_seed(0), []
    pictures = [torch.randn(size, 3, 8, 8, generator=generator, dtype=torch.double) for _ in range(6)]
    batches = [(x, torch.arange(size) % 4) for x in pictures]
    for dims in ((0, 2, 1), (2, 0, 1)):
        torch.manual_seed(0)
        network = Tokens(dims).double().eval()
        pruner = EnhancedFilterPruner(network, pictures[0][:1], order, prune_linear=True, progress=False)
        found.append(pruner.rank(batches, batches).scores())
        plan = pruner.get_pruning_plan(30)
        assert sum(map(len, plan.values())) > 0
    torch.testing.assert_close(*found)


class Named(nn.Module):
    """A conv and a linear layer that are given what they read by name."""

    def __init__(self, by_name):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 4)
        self.by_name = by_name

    def forward(self, x):
        y = self.a(x).relu()
        b, c = self.b, self.c
        if not self.by_name:
            return c(b(y).relu().mean((2, 3)))
        y = F.conv2d(input=y, weight=b.weight, bias=b.bias).relu().mean((2, 3))
        return F.linear(weight=c.weight, bias=c.bias, input=y)


def test_layers_may_be_given_what_they_read_by_name():
    batches, found = [(torch.randn(8, 3, 8, 8), torch.arange(8) % 4)], []
    for by_name in (False, True):
        torch.manual_seed(0)
        found.append(EnhancedFilterPruner(Named(by_name), batches[0][0][:1]).rank(batches, batches).scores())
    assert torch.equal(*found)
