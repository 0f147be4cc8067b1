"""Forwards that keep tensors outside of modules: what a recording or a proof leaves there is taken out again."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from taylor_pruning.surgery.graph import ChannelGraph

TABLE, ITEMS, LAST = {}, [], None


def by_table(x):
    if x.shape[-2:] not in TABLE:
        TABLE[x.shape[-2:]] = {"border": (F.avg_pool2d(x.new_ones(1, 1, *x.shape[-2:]), 3, 1, 1),)}
    return TABLE[x.shape[-2:]]["border"][0]


def by_list(x):
    if not ITEMS:
        ITEMS.append(x.new_ones(1) * 2)
    return ITEMS[0]


def by_variable(x):
    global LAST
    if LAST is None:
        LAST = x.new_ones(1) * 2
    return LAST


class OfClass:
    kept = None

    def __call__(self, x):
        if OfClass.kept is None:
            OfClass.kept = x.new_ones(1) * 2
        return OfClass.kept


class OfInstance:
    def __init__(self):
        self.kept = None

    def __call__(self, x):
        if self.kept is None:
            self.kept = x.new_ones(1) * 2
        return self.kept

    def __deepcopy__(self, memo):
        return self


@functools.lru_cache
def grid(height, dtype):
    return torch.linspace(1, 2, int(height), dtype=dtype) * torch.ones(1, dtype=dtype)


def by_function(x):
    return grid(int(x.shape[-1]), x.dtype)


def in_closure():
    kept = None

    def by_closure(x):
        nonlocal kept
        if kept is None:
            kept = x.new_ones(1) * 2
        return kept

    return by_closure


SCALES = {
    "table": by_table,
    "list": by_list,
    "variable": by_variable,
    "class": OfClass(),
    "instance": OfInstance(),
    "lru_cache": by_function,
    "closure": in_closure(),
}


class Keeping(nn.Module):
    def __init__(self, scale):
        super().__init__()
        self.a, self.b, self.fc, self.scale = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 3), nn.Linear(6, 4), scale

    def forward(self, x):
        x = self.a(x)
        x = F.relu(x / self.scale(x))
        return self.fc(F.relu(self.b(x)).mean((2, 3))) * (1 if self.training else 2)


@pytest.mark.parametrize("name", SCALES)
def test_the_network_runs_as_before(name):
    torch.manual_seed(0)
    model, x = Keeping(SCALES[name]).eval(), torch.randn(4, 3, 9, 9)
    for _ in range(2):
        graph = ChannelGraph(model, x)
        assert all(info.reason is None for info in graph.layers.values())
        smaller = graph.remove(graph.units[:3])
        gates = torch.ones(len(graph.units)).index_fill(0, torch.arange(3), 0)
        with graph.gated(gates):
            torch.testing.assert_close(model(x), smaller(x))
        assert model(x).dtype == torch.float32


MEAN, PLACES = torch.tensor(2.0), {"list": [torch.tensor(2.0)], "dict": {"mean": torch.tensor(2.0)}}


class OfCaller(nn.Module):
    """Its constants are tensors of the caller, which calls give back as they are."""

    own = torch.tensor(2.0)

    def __init__(self):
        super().__init__()
        self.a, self.b, self.fc = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 3), nn.Linear(6, 4)
        self.plain = torch.tensor(2.0)

    def forward(self, x):
        for mean in (self.own, self.plain, MEAN, PLACES["list"][0], PLACES["dict"]["mean"]):
            x = x - torch.as_tensor(mean.to(x.device).float().contiguous())
        return self.fc(F.relu(self.b(F.relu(self.a(x)))).mean((2, 3))) * (1 if self.training else 2)


def test_tensors_of_the_caller_stay_where_they_are():
    model = OfCaller().eval()
    before = model(torch.zeros(2, 3, 9, 9))
    assert len(ChannelGraph(model, torch.zeros(1, 3, 9, 9)).units) == 14
    assert MEAN == model.own == model.plain == PLACES["list"][0] == PLACES["dict"]["mean"] == 2
    assert torch.equal(model(torch.zeros(2, 3, 9, 9)), before)


KEPT, FEATURES = {}, {"seen": [], "calls": 0}


class OwnScale(nn.Module):
    """Keeps a value of its weights for every size, and all features in a list."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.fc = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 3), nn.Linear(6, 4)

    def forward(self, x):
        x = self.a(x)
        if x.shape[-2:] not in KEPT:
            KEPT[x.shape[-2:]] = self.fc.bias.detach().mean() * x.new_ones(1) + 2
        FEATURES["seen"].append(x)
        return self.fc(F.relu(self.b(F.relu(x / KEPT[x.shape[-2:]]))).mean((2, 3)))


def test_what_the_caller_keeps_is_what_it_was():
    """No value of the randomised copies of a proof stays in a cache; lists that get empty stay."""
    KEPT.clear()
    FEATURES["seen"].clear()
    torch.manual_seed(0)
    model = OwnScale().eval()
    graph = ChannelGraph(model, torch.zeros(1, 3, 9, 9))
    smaller = graph.remove([graph.units[0], graph.units[3]])
    assert KEPT == {} and FEATURES == {"seen": [], "calls": 0}
    with graph.gated(torch.ones(len(graph.units)).index_fill(0, torch.tensor([0, 3]), 0)):
        expected = model(torch.ones(2, 3, 9, 9))
    KEPT.clear()
    torch.testing.assert_close(smaller(torch.ones(2, 3, 9, 9)), expected)


def test_a_cache_that_is_filled_does_not_make_another_size_a_stranger():
    KEPT.clear()
    torch.manual_seed(0)
    model, x = OwnScale().eval(), torch.randn(2, 3, 14, 14)
    graph = ChannelGraph(model, torch.zeros(1, 3, 9, 9))
    expected = model(x)
    with graph.gated(torch.ones(len(graph.units))):
        torch.testing.assert_close(model(x), expected)


def test_a_hook_that_keeps_activations_keeps_none_of_the_recording():
    torch.manual_seed(0)
    seen = {"before": 1}
    model = Keeping(lambda x: 2).eval()
    model.b.register_forward_hook(lambda module, args, output: seen.update(b=output.detach()))
    graph = ChannelGraph(model, torch.zeros(1, 3, 9, 9))
    assert len(graph.units) == 14 and seen == {"before": 1}
