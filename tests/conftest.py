"""Small networks and data that the tests share, all in float64 and drawn from fixed seeds."""

import gc
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported; tensors of tests are too small for threads

import pytest
import torch
from quick import quick_reports
from torch import nn

import run_enhanced_pruning  # noqa: F401

# The collector, and the search for who holds a tensor, leave out what the runner has loaded: half a million objects, of which
# none becomes free. What test modules hold themselves comes later, also where one of them imports this file a second time.
if not gc.get_freeze_count():
    gc.freeze()


def randomise(model):
    """Biases, BatchNorm parameters and statistics away from their trivial initial values; eval mode, float64."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data = 0.5 + torch.rand(module.num_features, generator=generator)
            module.running_var = 0.5 + torch.rand(module.num_features, generator=generator)
            module.running_mean = 0.3 * torch.randn(module.num_features, generator=generator)
        if getattr(module, "bias", None) is not None:
            module.bias.data = 0.3 * torch.randn(len(module.bias), generator=generator)
    return model.double().eval()


class Residual(nn.Module):
    """Stem, one block with an identity shortcut, pooling, head."""

    def __init__(self, activation=nn.ReLU):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), activation())
        self.conv1 = nn.Conv2d(4, 5, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(5)
        self.conv2 = nn.Conv2d(5, 4, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(4)
        self.act = activation()
        self.head = nn.Linear(4, 4)

    def forward(self, x):
        x = self.stem(x)
        x = self.act(x + self.bn2(self.conv2(self.act(self.bn1(self.conv1(x))))))
        return self.head(x.mean((2, 3)))


def plain(activation=nn.ReLU):
    """conv - BatchNorm - activation - max-pool - conv - activation - linear."""
    return nn.Sequential(
        nn.Conv2d(3, 5, 3, padding=1),
        nn.BatchNorm2d(5),
        activation(),
        nn.MaxPool2d(2),
        nn.Conv2d(5, 6, 3, padding=1),
        activation(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(24, 4),
    )


NETWORKS = {"plain": plain, "residual": Residual}


@pytest.fixture(params=NETWORKS)
def relu_network(request):
    torch.manual_seed(0)
    return randomise(NETWORKS[request.param](nn.ReLU))


@pytest.fixture
def plain_network():
    torch.manual_seed(0)
    return randomise(plain(nn.ReLU))


@pytest.fixture
def silu_network():
    torch.manual_seed(0)
    return randomise(plain(nn.SiLU))


@pytest.fixture
def images():
    return torch.randn(12, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def labels():
    return torch.arange(12) % 4


@pytest.fixture
def batches(images, labels):
    return [(images[:7], labels[:7]), (images[7:], labels[7:])]


@pytest.fixture(scope="session", autouse=True)
def reports_are_quick():
    with pytest.MonkeyPatch.context() as patch:
        quick_reports(patch)
        yield


@pytest.fixture
def costs_count(monkeypatch):
    """Costs choose the widths although a random network's answers hardly depend on the image."""
    from taylor_pruning.scoring import collected

    monkeypatch.setattr(collected, "LEAST_INFORMATION", -1.0)
