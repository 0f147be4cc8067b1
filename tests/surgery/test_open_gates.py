"""Derivatives along open gates that are taken once: fused with BatchNorm, they are those of the multiplication."""

import pytest
import torch
from torch import nn

from taylor_pruning.surgery.graph import ChannelGraph


class Net(nn.Module):
    """BatchNorms before ReLUs and sums in place, without weights, and without running statistics."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(3, 6, 3, bias=False), *(nn.Conv2d(6, 6, 3, padding=1) for _ in range(3))])
        norms = nn.BatchNorm2d(6), nn.BatchNorm2d(6, affine=False), nn.BatchNorm2d(6)
        self.norms = nn.ModuleList([*norms, nn.BatchNorm2d(6, track_running_stats=False)])
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        x = torch.relu_(self.norms[0](self.convs[0](x)))
        y = torch.nn.functional.relu6(self.norms[1](self.convs[1](x)), inplace=True)
        y = self.norms[2](self.convs[2](y))
        y += x
        return self.head(torch.relu(self.norms[3](self.convs[3](y))).mean((2, 3)))


class Folded(nn.Module):
    """Two rows of the batch for every image."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Linear(6, 4)

    def forward(self, x):
        x = torch.relu_(self.norm(self.conv(x.reshape(-1, 3, *x.shape[2:]))))
        return self.head(x.mean((2, 3))).reshape(-1, 2, 4).sum(1)


class Neck(nn.Module):
    """A BatchNorm of vectors behind the pooling, as networks for faces have it."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 6, 3), nn.BatchNorm1d(6), nn.Linear(6, 4)

    def forward(self, x):
        return self.head(self.norm(self.conv(x).relu().mean((2, 3))))


@pytest.mark.parametrize(("build", "channels"), [(Net, 3), (Folded, 6), (Neck, 3)])
def test_derivatives_along_open_gates_are_those_of_the_multiplication(build, channels):
    torch.manual_seed(0)
    model = build().double().eval().requires_grad_(False)
    for norm in model.modules():
        if isinstance(norm, (nn.BatchNorm1d, nn.BatchNorm2d)):
            for tensor in (norm.running_mean, norm.running_var, norm.weight, norm.bias):
                if tensor is not None:
                    tensor.uniform_(0.5, 1.5)
    images = torch.randn(5, channels, 9, 9, dtype=torch.float64)
    graph, found, kept = ChannelGraph(model, images[:1]), [], [[], []]
    assert graph.units
    for once in (False, True):
        gates = torch.ones(5, len(graph.units), dtype=torch.float64, requires_grad=True)
        with (
            graph.gated(gates, once=once),
            torch.autograd.graph.saved_tensors_hooks(lambda t, once=once: kept[once].append(t) or t, lambda t: t),
        ):
            logits = model(images)
        columns = torch.eye(4, dtype=torch.float64)
        rows = [torch.autograd.grad(logits, gates, c.expand(5, 4), retain_graph=True)[0] for c in columns]
        found.append([logits.detach(), *rows])
    torch.testing.assert_close(found[0], found[1], rtol=1e-10, atol=1e-12)
    assert all(row.any() for row in found[1])
    sizes = [
        sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in part}.values()) for part in kept
    ]
    assert build is not Net or sizes[True] < sizes[False]  # the products are not kept


def test_what_is_fused_is_differentiated_once():
    model = Net().eval().requires_grad_(False)
    images = torch.randn(2, 3, 9, 9)
    graph = ChannelGraph(model, images[:1])
    gates = torch.ones(2, len(graph.units), requires_grad=True)
    with graph.gated(gates, once=True), pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(model(images).square().sum(), gates, create_graph=True)
