"""The forward is recorded a second time, in training mode, only where it asks for the mode."""

import copy

import pytest
import torch
from conftest import randomise
from torch import fx, nn
from torchvision.models.feature_extraction import create_feature_extractor

from taylor_pruning.experiment.head import reduced_head
from taylor_pruning.surgery import graph as graphs
from taylor_pruning.surgery.graph import ChannelGraph
from taylor_pruning.surgery.recording import record
from taylor_pruning.training.averaging import WeightAverage


class Doubling(nn.Module):
    def forward(self, x):
        return x * 2 if self.training else x


class Passing(Doubling):
    """Attributes by a method of its own."""

    def __getattr__(self, name):
        return super().__getattr__(name)


class Freezing(nn.Sequential):
    """Sets the mode of a part before it runs it."""

    def forward(self, x):
        self[0].eval()
        return super().forward(x)


def hooked():
    module = nn.ReLU()
    module.register_forward_hook(lambda module, args, output: output * 2 if module.training else output)
    return module


PARTS = {
    "norm and dropout": (lambda: nn.Sequential(nn.BatchNorm2d(6), nn.Dropout(0.5), nn.ReLU()), False, 1),
    "a branch": (Doubling, True, 2),
    "own attributes": (Passing, True, 2),
    "a hook": (hooked, True, 2),
    "sets the mode": (lambda: Freezing(nn.BatchNorm2d(6)), True, 1),
}


@pytest.mark.parametrize("name", PARTS)
def test_the_mode_is_recorded_where_it_is_asked_for(name, monkeypatch):
    part, reads, graphs_kept = PARTS[name]
    torch.manual_seed(0)
    model = randomise(nn.Sequential(nn.Conv2d(3, 6, 1), part(), nn.Conv2d(6, 2, 1)))
    x = torch.randn(2, 3, 4, 4, dtype=torch.double)
    modes = []
    monkeypatch.setattr(graphs, "record", lambda *args, **more: modes.append(more) or record(*args, **more))
    graph = ChannelGraph(model, x[:1])
    assert len(modes) == 1 + reads and len(graph.executions) == graphs_kept
    assert all(not module.training for module in model.modules())
    before = torch.nn.Module.__getattr__
    model.train()
    expected = graph.remove(graph.units[:2]).train()(x)
    gates = torch.ones(6, dtype=torch.double).index_fill(0, torch.arange(2), 0)
    if graphs_kept == 2:
        with graph.gated(gates):
            torch.testing.assert_close(model(x), expected)
    assert torch.nn.Module.__getattr__ is before


class Scaling(nn.Module):
    """Computes its scales when its mode is set: one in evaluation mode, another of every channel in training."""

    def __init__(self):
        super().__init__()
        self.train()

    def train(self, mode=True):
        self.scales = torch.rand(6, 1, 1).double() if mode else torch.full((1,), 2.0).double()
        return super().train(mode)

    def forward(self, x):
        return x * self.scales


def test_what_is_computed_for_a_mode_is_that_of_the_mode():
    torch.manual_seed(0)
    model = randomise(nn.Sequential(nn.Conv2d(3, 6, 1), Scaling(), nn.Conv2d(6, 2, 1)))
    x = torch.randn(2, 3, 4, 4, dtype=torch.double)
    graph = ChannelGraph(model, x[:1])
    for mode in (False, True):
        model.train(mode)
        with graph.gated(torch.ones(len(graph.units), dtype=torch.double)):
            gated = model(x)
        torch.testing.assert_close(gated, model(x))
    assert graph.layers["0"].reason == "meets a tensor that is neither parameter nor buffer"


class OnGrid(nn.Module):
    """Computes a grid when its mode is set, and anew for images of another size."""

    def __init__(self):
        super().__init__()
        self.train()

    def train(self, mode=True):
        self.grid = torch.linspace(1, 2 if mode else 3, 6).double()
        return super().train(mode)

    def forward(self, x):
        if len(self.grid) != x.shape[-1]:
            self.grid = torch.linspace(1, 2 if self.training else 3, x.shape[-1]).to(x)
        return x * self.grid


def test_what_the_network_keeps_from_images_of_another_size_is_not_read():
    model = nn.Sequential(nn.Conv2d(3, 6, 1), OnGrid(), nn.Conv2d(6, 2, 1)).double().eval()
    x = torch.randn(2, 3, 6, 6, dtype=torch.double)
    graph, expected = ChannelGraph(model, x[:1]), model(x)
    model(torch.randn(2, 3, 9, 9, dtype=torch.double))
    with graph.gated(torch.ones(len(graph.units), dtype=torch.double)):
        torch.testing.assert_close(model(x), expected)


class Indexed(nn.Module):
    """Keeps for evaluation what it computes from a parameter, and drops it in training (LeViT, TinyViT, EfficientFormer)."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.table = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1), nn.Parameter(torch.zeros(5))
        self.register_buffer("places", torch.arange(16) % 5)

    @torch.no_grad()
    def train(self, mode=True):
        super().train(mode)
        if mode and hasattr(self, "kept"):
            del self.kept
        else:
            self.kept = self.table[self.places]
        return self

    def forward(self, x):
        kept = self.table[self.places] if self.training else self.kept
        return self.b((self.a(x) * kept.view(4, 4)).relu()).mean((2, 3))


def test_what_a_module_keeps_for_evaluation_is_that_of_its_parameters_now():
    torch.manual_seed(0)
    model, x = randomise(Indexed()), torch.randn(2, 3, 4, 4, dtype=torch.double)
    graph = ChannelGraph(model, x)
    assert len(graph.units) == 8
    model.table.data = torch.randn(5).double()
    gates = torch.arange(8).double() % 2
    smaller = graph.remove(graph.units[::2])
    with graph.gated(gates):
        torch.testing.assert_close(model.eval()(x), smaller(x))
    assert not smaller.training


class Masked(nn.Conv2d):
    """A kernel times a mask that is kept for evaluation."""

    def train(self, mode=True):
        super().train(mode)
        self.mask = None if mode else torch.tensor([0.5, 0, 2]).to(self.weight)
        return self

    def forward(self, x):
        mask = torch.ones(3).to(x) if self.mask is None else self.mask
        return nn.functional.conv2d(x, self.weight * mask[:, None, None])


def test_weights_are_those_of_evaluation_in_either_mode():
    model = nn.Sequential(Masked(3, 6, 1), nn.Conv2d(6, 2, 1))
    graph = ChannelGraph(model, torch.randn(1, 3, 4, 4))
    for mode in (False, True):
        model.train(mode)
        expected = model[0].weight * torch.tensor([0.5, 0, 2])[:, None, None]
        torch.testing.assert_close(graph.filter_weights()["0"], expected.detach())


class Scaled(nn.Module):
    """Keeps what it computes of the size of the images until they have another."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.rows = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1), None

    def forward(self, x):
        if self.rows != x.shape[2]:
            self.rows, self.scale = x.shape[2], torch.tensor([float(x.shape[2])])
        return self.b((self.a(x) * self.scale).relu()).mean((2, 3))


def test_what_a_forward_keeps_of_other_images_counts_for_nothing():
    torch.manual_seed(0)
    model, x = Scaled(), torch.randn(2, 3, 4, 4)
    expected = model(x)
    graph = ChannelGraph(model, x)
    model(torch.randn(2, 3, 6, 6))
    with graph.gated(torch.ones(8)):
        torch.testing.assert_close(model(x), expected)


class Extracted(nn.Module):
    """Features of two layers, and a head."""

    def __init__(self):
        super().__init__()
        layers = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 1), nn.BatchNorm2d(6)
        self.body = create_feature_extractor(nn.Sequential(*layers), {"2": "low", "4": "high"})
        self.head = nn.Conv2d(14, 4, 1)

    def forward(self, x):
        return self.head(torch.cat([*self.body(x).values()], 1)).mean((2, 3))


def test_a_cut_network_is_in_the_mode_of_the_dense_one_where_a_copy_by_torch_is_not():
    torch.manual_seed(0)
    model, x = randomise(Extracted()), torch.randn(5, 3, 4, 4, dtype=torch.double)
    graph = ChannelGraph(model, x)
    smaller = graph.remove(graph.units[::2])
    assert not any(module.training for module in smaller.modules())
    with graph.gated(torch.arange(14).double() % 2):
        torch.testing.assert_close(smaller(x), model(x))
    model.train()
    assert all(module.training for module in graph.remove(graph.units[::2]).modules())


def test_hooks_of_a_graph_module_count_in_the_graph_and_in_the_cut_network():
    torch.manual_seed(0)
    model = fx.symbolic_trace(nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1)))
    model.register_forward_hook(lambda module, args, output: output * 2)
    x = torch.randn(2, 3, 4, 4)
    graph = ChannelGraph(model, x)
    smaller = graph.remove(graph.units[::2])
    with graph.gated(torch.arange(8) % 2.0):
        torch.testing.assert_close(smaller(x), model(x))
    with graph.gated(torch.ones(8)):
        gated = model(x)
    torch.testing.assert_close(gated, model(x))


COPIES = {
    "average of training": lambda model, graph: WeightAverage(model, 0.9).model,
    "fewer classes": lambda model, graph: reduced_head(model, [0, 1, 2, 3]),
    "graph": lambda model, graph: copy.deepcopy(graph).model,
}


@pytest.mark.parametrize("name", COPIES)
def test_other_copies_keep_hooks_and_the_mode_of_a_graph_module_too(name):
    torch.manual_seed(0)
    model, x = Extracted().eval(), torch.randn(5, 3, 4, 4)
    model.body.register_forward_hook(lambda module, args, out: {key: value * 2 for key, value in out.items()})
    copied = COPIES[name](model, ChannelGraph(model, x, verify=False))
    assert copied is not model and not any(module.training for module in copied.modules())
    torch.testing.assert_close(copied(x), model(x))


def test_a_copy_of_a_graph_and_its_model_is_of_one_model():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1))
    graph = ChannelGraph(model, torch.randn(1, 3, 4, 4))
    for both in ((model, graph), (graph, model)):
        first, second = copy.deepcopy(both)
        assert getattr(first, "model", first) is getattr(second, "model", second) is not model
