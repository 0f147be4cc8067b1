"""What the plan of a repair takes for a sum, and for the BatchNorm of a layer."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from taylor_pruning.repair.compensation import compensate
from taylor_pruning.repair.plan import RepairPlan
from taylor_pruning.surgery.graph import ChannelGraph


class Between(nn.Module):
    """Two filters of the first conv are multiples of others, so that what is behind it can be repaired exactly."""

    def __init__(self, behind, **layers):
        super().__init__()
        self.first, self.behind, self.layers = nn.Conv2d(3, 8, 3, padding=1), behind, nn.ModuleDict(layers)
        for index, source, factor in ((4, 0, 2.0), (7, 3, -0.5)):
            for tensor in (self.first.weight.data, self.first.bias.data):
                tensor[index] = factor * tensor[source]

    def forward(self, x):
        return self.behind(self.layers, self.first(x))


def repaired(behind, **layers):
    """({layer: what it matches}, relative distance from the dense outputs, the network) behind a cut of the two filters."""
    torch.manual_seed(0)
    model, x = Between(behind, **layers).double().eval(), torch.randn(24, 3, 8, 8, dtype=torch.double)
    smaller = ChannelGraph(model, x[:1]).remove({"first": [4, 7]})
    dense = model(x)
    assert (smaller(x) - dense).norm() > 0.01 * dense.norm()
    kept = {"first": [0, 1, 2, 3, 5, 6]}
    report = compensate(copy.deepcopy(model), smaller, [(x, None)], kept, progress=False, to_predictions=False)
    found = {fit.name: fit.matches for fit in report.layers}
    return found, ((smaller(x) - dense).norm() / dense.norm()).item(), smaller


def clipped_meanwhile(layers, x):
    y = layers["a"](x)
    view = x[:, :3]
    view.clamp_(max=0.5)
    return y + layers["b"](x)


def viewed_before(layers, x):
    view = x.view_as(x)
    y = layers["a"](view)
    return y + layers["b"](x.mul_(2) + view)


SUMS = {  # what follows, and what "a" matches
    "doubled meanwhile": (lambda layers, x: layers["a"](x) + layers["b"](x.mul_(2)), "layer"),
    "doubled before": (lambda layers, x: layers["a"](y := x.mul_(2)) + layers["b"](y), "sum"),
    "a branch of its own in place": (lambda layers, x: layers["a"](x) + layers["b"](x).mul_(2).add_(1), "sum"),
    "twice the other part": (lambda layers, x: torch.add(layers["a"](x), layers["b"](x), alpha=2), "layer"),
    "a view is written to": (clipped_meanwhile, "layer"),
    "a view is read": (viewed_before, "layer"),
}


@pytest.mark.parametrize("name", SUMS)
def test_a_sum_is_matched_only_if_its_other_part_can_be_computed_before(name):
    behind, matches = SUMS[name]
    found, distance, _ = repaired(behind, a=nn.Conv2d(8, 6, 3, padding=1), b=nn.Conv2d(8, 6, 1))
    assert found["layers.a"] == matches
    if name != "a view is written to":  # what is clipped is no multiple
        assert distance < 1e-6


@pytest.mark.parametrize("features", [6, 64])
def test_a_norm_over_the_positions_of_a_linear_layer_takes_no_intercept(features):
    def behind(layers, x):
        return F.relu(layers["norm"](layers["a"](x.flatten(2).mT)))

    found, distance, _ = repaired(behind, a=nn.Linear(8, features), norm=nn.BatchNorm1d(64))
    assert found == {"layers.a": "layer"} and distance < 1e-6


def test_a_norm_by_the_statistics_of_the_batch_takes_no_intercept():
    def behind(layers, x):
        norm = layers["norm"]
        y = F.batch_norm(layers["a"](x), norm.running_mean, norm.running_var, norm.weight, norm.bias, training=True)
        return layers["b"](y)

    found, distance, _ = repaired(behind, a=nn.Conv2d(8, 6, 3), norm=nn.BatchNorm2d(6), b=nn.Conv2d(6, 4, 1))
    assert "layers.a" in found and distance < 1e-6


def test_a_norm_of_torch_takes_its_arguments_in_another_order_than_that_of_the_functional():
    def behind(layers, x):
        norm = layers["norm"]
        fixed = {"training": False, "momentum": 0.1, "eps": norm.eps, "cudnn_enabled": False}
        y = torch.batch_norm(layers["a"](x), norm.weight, norm.bias, norm.running_mean, norm.running_var, **fixed)
        return layers["b"](y)

    found, distance, _ = repaired(behind, a=nn.Conv2d(8, 6, 3), norm=nn.BatchNorm2d(6), b=nn.Conv2d(6, 4, 1))
    assert "layers.a" in found and distance < 1e-6


def test_a_bias_that_something_else_reads_takes_no_intercept():
    def behind(layers, x):
        return layers["b"](layers["a"](x + 1).tanh() * layers["a"].bias.view(-1, 1, 1))

    a = nn.Conv2d(8, 6, 1)
    before = a.bias.detach().double()
    found, _, smaller = repaired(behind, a=a, b=nn.Conv2d(6, 4, 1))
    assert "layers.a" in found and torch.equal(smaller.layers["a"].bias, before)


def test_a_part_without_gradients_switches_none_on_behind_it():
    def behind(layers, x):
        with torch.no_grad():
            scale = x.mean((2, 3), keepdim=True).abs()
        return layers["a"](x / (1 + scale))

    found, distance, _ = repaired(behind, a=nn.Conv2d(8, 6, 3))
    assert found == {"layers.a": "layer"} and distance < 1


def plan_of(behind, **layers):
    """The plan of a network that lost no filter."""
    model, x = Between(behind, **layers).eval(), torch.randn(4, 3, 8, 8)
    return RepairPlan(model, copy.deepcopy(model), {}, x)


@pytest.mark.parametrize("normed", [False, True])
def test_a_linear_layer_behind_which_a_norm_is_returned_gives_no_predictions(normed):
    """The norm is folded into what the layer is fitted to; only without it are the layer's outputs the network's."""

    def behind(layers, x):
        y = layers["a"](F.dropout(x.mean((2, 3)), training=False))
        return F.batch_norm(y, layers["norm"].running_mean, layers["norm"].running_var) if normed else y

    plan = plan_of(behind, a=nn.Linear(8, 6), norm=nn.BatchNorm1d(6))
    (layer,) = (layer for layer in plan.layers if layer.name == "layers.a")
    assert layer.gives_logits != normed and (layer.batchnorm is not None) == normed
    assert not normed or layer.batchnorm.eps == 1e-5  # that of F.batch_norm, which is told no other


def test_what_cannot_be_fitted_is_left_alone_and_named():
    def behind(layers, x):
        layers["unread"](x)
        return F.conv2d(x, layers["a"].weight, 2 * layers["a"].bias)

    plan = plan_of(behind, a=nn.Conv2d(8, 6, 3), unread=nn.Conv2d(8, 6, 3))
    assert plan.left_alone["layers.a"] == "its bias is computed from other tensors"
    assert "layers.unread" not in [layer.name for layer in plan.layers]
