"""Layers are those of the network: a convolution by what another layer computes is none."""

import torch
import torch.nn.functional as F
from conftest import randomise
from test_surgery import check_law
from torch import nn

from taylor_pruning.surgery.graph import ChannelGraph


class Modulated(nn.Module):
    """A kernel that every sample scales (StyleGAN 2)."""

    def __init__(self):
        super().__init__()
        self.a, self.scale, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8, 8), nn.Linear(6, 4)
        self.kernel = nn.Parameter(torch.randn(1, 6, 8, 3, 3))

    def forward(self, x):
        x = F.relu(self.a(x))
        b, c, h, w = x.shape
        kernel = self.kernel * self.scale(x.mean((2, 3))).view(b, 1, c, 1, 1)
        y = F.conv2d(x.view(1, b * c, h, w), kernel.flatten(0, 1), padding=1, groups=b)
        return self.fc(y.view(b, -1, h, w).mean((2, 3)))


class Correlated(nn.Module):
    """The features of a second image are the kernel (a Siamese tracker)."""

    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3)

    def forward(self, x, z):
        x, z = F.relu(self.a(x)), F.relu(self.a(z))
        return F.conv2d(x.reshape(1, -1, *x.shape[2:]), z, groups=x.shape[0]).transpose(0, 1)


class Coverage(nn.Module):
    """A window of ones in the type of the activations (partial convolution)."""

    def __init__(self):
        super().__init__()
        self.a, self.fc, self.window = nn.Conv2d(3, 8, 3), nn.Linear(8, 4), torch.ones(1, 1, 3, 3)

    def forward(self, x):
        x = F.relu(self.a(x))
        seen = F.conv2d(torch.ones(1, 1, *x.shape[2:]).to(x), self.window.to(x), padding=1)
        return self.fc((x * 9 / seen).mean((2, 3)))


class Mixed(nn.Module):
    """The kernel of every image is mixed of three by a matrix product (CondConv)."""

    def __init__(self):
        super().__init__()
        self.a, self.route, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8, 3), nn.Linear(6, 4)
        self.kernels, self.shifts = nn.Parameter(torch.randn(3, 6, 8, 3, 3)), nn.Parameter(torch.randn(3, 6))

    def forward(self, x):
        x = F.relu(self.a(x))
        b, _, h, w = x.shape
        route = self.route(x.mean((2, 3))).sigmoid()
        kernels, shifts = torch.einsum("be,eoikl->boikl", route, self.kernels), route @ self.shifts
        y = F.conv2d(x.reshape(1, -1, h, w), kernels.flatten(0, 1), shifts.flatten(), padding=1, groups=b)
        return self.fc(F.relu(y.view(b, -1, h, w)).mean((2, 3)))


def images(size=9):
    return torch.randn(3, 3, size, size, dtype=torch.double, generator=torch.Generator().manual_seed(size))


def test_a_kernel_that_samples_scale_has_its_own_filters():
    torch.manual_seed(0)
    graph = check_law(randomise(Modulated()), images(), seeds=(0,))
    assert {name: (info.filters, len(info.unit_of)) for name, info in graph.layers.items()} == {
        "a": (8, 8), "scale": (8, 8), "kernel": (6, 6)
    }  # fmt: skip
    assert (7 * 7 * 6 * 8 * 3 * 3, 2) in [(number, len(dims)) for number, dims in graph.products]


def test_kernels_that_are_mixed_by_a_product_are_those_of_a_conv():
    torch.manual_seed(0)
    graph = check_law(randomise(Mixed()), images(), seeds=(0,))
    assert {name: int(info.removable.sum()) for name, info in graph.layers.items()} == {
        "a": 8,
        "kernels": 6,
        "shifts": 6,
    }


def test_features_and_windows_are_no_layers():
    torch.manual_seed(0)
    graph = ChannelGraph(randomise(Correlated()), (images(), images(5)))
    assert list(graph.layers) == ["a"] and len(graph.units) == 8
    assert list(check_law(randomise(Coverage()), images(), seeds=(0,)).layers) == ["a"]
