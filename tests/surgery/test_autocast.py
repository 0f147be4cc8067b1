"""Regions of a forward under torch.autocast: gated and cut networks compute in the same types as the network itself."""

import copy

import pytest
import torch
from torch import nn

from EnhancedPruning import EnhancedPruning, PruningSettings
from taylor_pruning.surgery.graph import ChannelGraph


class Mixed(nn.Module):
    """Convs under autocast, but for one in the middle."""

    def __init__(self, outer):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 6, 3)
        self.head, self.outer = nn.Linear(6, 4), outer

    def convs(self, x):
        x = torch.relu(self.a(x))
        with torch.autocast("cpu", enabled=False):
            x = torch.relu(self.b(x.float()))
        return torch.relu(self.c(x))

    def forward(self, x):
        if not self.outer:
            return self.head(self.convs(x).mean((2, 3)))
        with torch.autocast("cpu", torch.bfloat16):
            x = self.convs(x)
        return self.head(x.float().mean((2, 3)))


@pytest.mark.parametrize("outer", [True, False], ids=["of the forward", "of the caller"])
def test_gates_run_in_the_types_of_the_forward(outer):
    torch.manual_seed(0)
    model, x = Mixed(outer).eval(), torch.randn(4, 3, 12, 12)
    graph = ChannelGraph(model, x[:1])
    assert len(graph.units) == 22
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=not outer):
        dense = model(x)
        gates = torch.ones(22)
        with graph.gated(gates):
            assert torch.equal(model(x), dense)
        gates[::2] = 0
        with graph.gated(gates):
            closed = model(x)
        torch.testing.assert_close(graph.remove(graph.units[::2])(x), closed, rtol=1e-2, atol=1e-4)
        plain = copy.deepcopy(model)
        plain.outer = False
        with torch.autocast("cpu", enabled=False):
            assert not torch.equal(plain(x), dense)  # the types matter
    assert not torch.is_autocast_enabled("cpu")


def test_a_run_on_a_network_with_such_a_region():
    torch.manual_seed(0)
    model, x = Mixed(True), torch.randn(8, 3, 12, 12)
    data = [(x, torch.arange(8) % 4)] * 2
    result = EnhancedPruning(model, data, data, settings=PruningSettings(rounds=1), progress=False).prune(40, 2)
    assert result.model.b.out_channels < 8
