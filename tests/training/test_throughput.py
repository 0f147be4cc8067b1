"""Images a second: of which batch sizes, and how the model comes back."""

import time

import torch
from torch import nn
from toys import toy_model

from taylor_pruning.training.throughput import RUNS, throughput


class Slow(nn.Module):
    """Takes `seconds` an image."""

    def __init__(self, seconds):
        super().__init__()
        self.seconds, self.sizes = seconds, []

    def forward(self, images):
        assert not self.training and not torch.is_grad_enabled()
        self.sizes.append(len(images))
        time.sleep(self.seconds * len(images))
        return images


def test_it_is_images_over_seconds():
    model = Slow(0.002).train()
    found = throughput(model, torch.zeros(1, 3, 2, 2), (8, 2))
    assert list(found) == ["2", "8"] and all(50 < value <= 500 for value in found.values())
    assert model.sizes == [2] * (1 + RUNS) + [8] * (1 + RUNS)
    assert model.training


def test_what_would_take_too_long_is_left_out():
    model = Slow(0.02)
    found = throughput(model, torch.zeros(1, 3, 2, 2), (1, 4, 16), seconds=0.1)
    assert list(found) == ["1", "4"] and model.sizes.count(4) <= 3
    assert list(throughput(Slow(0.02), torch.zeros(1, 3, 2, 2), (8,), seconds=0.1)) == ["8"]  # one in any case


def test_a_network():
    model = toy_model()
    model[1].eval()
    modes = [module.training for module in model]
    assert all(value > 0 for value in throughput(model, torch.zeros(1, 3, 6, 6)).values())
    assert [module.training for module in model] == modes
