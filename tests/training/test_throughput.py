"""Images a second: of which batch sizes, and how the model comes back."""

import time

import pytest
import torch
from torch import nn
from toys import toy_model

from taylor_pruning.training.throughput import RUNS, throughput


class Slow(nn.Module):
    """Takes `seconds` an image by the clock, and hands every batch to `note`: what it keeps itself would be taken back."""

    def __init__(self, clock, seconds, note=len):
        super().__init__()
        self.clock, self.seconds, self.note = clock, seconds, note

    def forward(self, images):
        assert not self.training and not torch.is_grad_enabled()
        self.note(images)
        self.clock.append(self.clock[-1] + self.seconds * len(images))
        return images


@pytest.fixture
def clock(monkeypatch):
    """The times that a clock has shown, whatever else the machine does."""
    times = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: times[-1])
    return times


def test_it_is_images_over_seconds(clock):
    seen = []
    model = Slow(clock, 0.002, seen.append).train()
    found = throughput(model, torch.zeros(1, 3, 2, 2), (8, 2))
    assert list(found) == ["2", "8"] and list(found.values()) == pytest.approx([500, 500])
    assert [len(images) for images in seen] == [2] * (1 + RUNS) + [8] * (1 + RUNS)
    assert model.training


def test_what_would_take_too_long_is_left_out(clock):
    seen = []
    found = throughput(Slow(clock, 0.02, seen.append), torch.zeros(1, 3, 2, 2), (1, 4, 16), seconds=0.1)
    assert list(found) == ["1", "4"] and [len(images) for images in seen].count(4) == 2
    assert list(throughput(Slow(clock, 0.02), torch.zeros(1, 3, 2, 2), (8,), seconds=0.1)) == ["8"]  # one in any case


def test_a_network():
    model = toy_model()
    model[1].eval()
    modes = [module.training for module in model]
    assert all(value > 0 for value in throughput(model, torch.zeros(1, 3, 6, 6)).values())
    assert [module.training for module in model] == modes
