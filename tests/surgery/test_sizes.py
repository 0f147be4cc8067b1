"""Sizes that a forward reads off tensors: kept between calls, turned into constants, computed by others."""

from functools import lru_cache

import pytest
import torch
import torch.nn.functional as F
from conftest import randomise
from test_surgery import check_law
from torch import nn


class Around(nn.Module):
    """conv - `middle` - conv - head."""

    def __init__(self, middle, width=8, **more):
        super().__init__()
        self.a, self.b, self.fc = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(width, 6, 3, padding=1), nn.Linear(6, 4)
        self.middle = middle
        for name, value in more.items():
            setattr(self, name, value)

    def forward(self, x):
        return self.fc(F.relu(self.b(self.middle(self, F.relu(self.a(x))))).mean((2, 3)))


def around(middle, *args, **more):
    torch.manual_seed(0)
    return randomise(Around(middle, *args, **more))


def images(number=3, *size):
    size = size or (12, 12)
    return torch.randn(number, 3, *size, dtype=torch.double, generator=torch.Generator().manual_seed(0))


@lru_cache
def kept_plan(shape):
    return [shape[0], shape[1] // 2, 2, shape[2] * shape[3]]


KEPT = {}


def kept_by_name(name, size):
    return KEPT.setdefault(name, size)


@pytest.mark.parametrize(
    "plan", [kept_plan, lambda shape: [*kept_plan(shape)[:3], kept_by_name("hw", shape[2] * shape[3])]]
)
def test_sizes_that_are_kept_between_calls_belong_to_one_trace(plan):
    kept_plan.cache_clear()
    KEPT.clear()

    def middle(block, x):
        y = x.reshape(plan(x.shape)).mean(2)
        return y.reshape(len(x), -1, *x.shape[2:]) * (0.5 if block.training else 1)  # it is traced twice

    model = around(middle, 4)
    for _ in range(2):
        graph = check_law(model, images(), seeds=(0,))
        assert graph.layers["a"].reason is None and len(graph.units) == 10
        nodes = len(graph.executions[False].trace.graph.nodes)
        model(images())
        assert len(graph.executions[False].trace.graph.nodes) == nodes  # nor does a call add to an old graph
