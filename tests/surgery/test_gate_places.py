"""Where gates stand: behind a smooth function, if nothing else reads what it reads."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from taylor_pruning.surgery.graph import ChannelGraph


class Net(nn.Module):
    def __init__(self, between):
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(3, 5, 3, padding=1), nn.BatchNorm2d(5), nn.Conv2d(5, 5, 3, padding=1)
        self.c, self.head, self.between = nn.Conv2d(5, 6, 1), nn.Linear(6, 4), between

    def forward(self, x):
        return self.head(self.c(self.between(self, self.norm(self.a(x)))).mean((2, 3)))


@pytest.mark.parametrize("between, places", [
    (lambda net, x: F.relu(x), ["batch_norm"]),
    (lambda net, x: F.silu(x), ["silu"]),
    (lambda net, x: F.silu(x, inplace=True), ["silu"]),
    (lambda net, x: x * x.sigmoid(), ["mul"]),
    (lambda net, x: x / (1 + torch.exp(-x)), ["div"]),
    (lambda net, x: torch.div(x, 1 + x.abs()), ["div"]),
    (lambda net, x: x / (x.square().mean((2, 3), keepdim=True) + 1), ["div"]),
    (lambda net, x: x / x.shape[0], ["batch_norm"]),
    (lambda net, x: F.gelu(F.max_pool2d(x, 2)), ["gelu"]),
    (lambda net, x: x.square().tanh(), ["tanh"]),
    (lambda net, x: F.silu(x + net.b(F.relu(x))), ["batch_norm", "conv2d"]),  # the stream goes on
    (lambda net, x: F.silu(x) + F.relu(x), ["batch_norm"]),
    (lambda net, x: F.silu(x) + 1, ["add"]),
])  # fmt: skip
def test_along_a_gate_results_of_smooth_functions_go_to_zero_on_a_straight_line(between, places):
    torch.manual_seed(0)
    model, x = Net(between).double().eval(), torch.randn(2, 3, 6, 6, dtype=torch.float64)
    model.norm.running_mean.normal_()
    graph = ChannelGraph(model, x)
    found = [site.node.name.rstrip("_0123456789") for site in graph.sites]
    assert found[: len(places)] == places and found[len(places) :] in (["conv2d"], [])
    read = [site.node.name.rstrip("_0123456789") for site in graph.activations]
    assert read[0] == ("add" if places == ["add"] else "batch_norm")
    smaller, gates = graph.remove(graph.units[:2]), torch.ones(len(graph.units), dtype=torch.float64)
    gates[:2] = 0
    with torch.no_grad(), graph.gated(gates):
        torch.testing.assert_close(model(x), smaller(x))


@pytest.mark.parametrize("curves", [1, 2, 3])
def test_smooth_functions_where_channels_have_no_axis_leave_the_gate_before_them(curves):
    def along_the_batch(net, x):
        y = x.transpose(0, 1).flatten(0, 1)
        for _ in range(curves):
            y = y.tanh()
        return y.view(x.shape[1], x.shape[0], *x.shape[2:]).transpose(0, 1)

    graph = ChannelGraph(Net(along_the_batch).double().eval(), torch.randn(2, 3, 6, 6, dtype=torch.float64))
    assert graph.layers["a"].reason is None
    assert [site.node.name for site in graph.sites] == ["batch_norm", "conv2d_1"]
