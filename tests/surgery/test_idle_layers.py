"""Layers that run although the outputs do not depend on them: their tensors go with what they read."""

import pytest
import torch
import torch.nn.functional as F
from test_operations import Block, C, around, conv, images
from test_surgery import check_law
from torch import nn

from taylor_pruning.surgery.graph import ChannelGraph


def last_residual(s, x):
    """As a WaveNet's: the stream behind the last block goes nowhere, the sum of the skips does."""
    skips = 0
    for gate, skip, residual in zip(s.gates, s.skips, s.residuals, strict=True):
        y = gate(x).tanh()
        skips, x = skips + skip(y), x + residual(y)
    return s.b(F.relu(skips))


def low_is_left(s, x):
    """As a last octave convolution's."""
    high, low = s.a(x), s.low(F.avg_pool2d(x, 2))
    return (s.b(high) + F.interpolate(s.up(low), scale_factor=2), s.c(low) + F.avg_pool2d(s.down(high), 2))[0]


def norm_is_left(s, x):
    y = s.a(x)
    s.norm(y).softmax(1)
    return s.b(y)


def three(**options):
    return nn.ModuleList(conv(C, C, 1, **options) for _ in range(3))


def separable():
    """With a number of groups that follows its channels, as in a Conv-TasNet."""
    return nn.ModuleList(nn.Sequential(conv(C, C, 1), conv(C, C, 3, padding=1, groups=C)) for _ in range(3))


BLOCKS = {  # name: (block, layers whose filters stay)
    "stream": (Block(last_residual, gates=three(), skips=three(), residuals=three()), {"block.a"}),
    "separable stream": (Block(last_residual, gates=separable(), skips=three(), residuals=three()), {"block.a"}),
    "octave": (Block(low_is_left, low=conv(C, C, 1), up=conv(C, C, 1), down=conv(C, C, 1), c=conv(C, C, 1)),
               {"block.down", "block.c"}),
    "norm": (Block(norm_is_left, norm=nn.BatchNorm2d(C)), set()),
}  # fmt: skip


@pytest.mark.parametrize("name", BLOCKS)
def test_channels_that_idle_layers_read_can_go(name):
    block, idle = BLOCKS[name]
    graph = check_law(around(block), images(), seeds=(0,))
    stays = {layer: info.reason for layer, info in graph.layers.items() if info.reason and layer != "head"}
    assert stays == dict.fromkeys(idle & graph.layers.keys(), "its result is not used")
    assert all(info.removable.all() for layer, info in graph.layers.items() if layer not in (*stays, "head"))
    smaller = graph.remove(graph.units[:3])
    assert torch.isfinite(smaller(images())).all()


def test_channels_that_idle_layers_read_in_training_alone_can_go():
    def auxiliary(s, x):
        y = s.a(x)
        if s.training:
            s.loss = s.aux(s.norm(s.c(y))).mean()
        return s.b(y)

    block = Block(auxiliary, c=conv(C, C, 1), norm=nn.BatchNorm2d(C), aux=conv(C, 2, 1))
    graph = check_law(around(block), images(), seeds=(0,), train=False)
    assert graph.layers["block.a"].reason is None
    smaller = graph.remove(graph.units[::2])
    assert torch.isfinite(smaller.train()(images())).all()


def test_idle_layers_of_training_cost_nothing():
    def auxiliary(s, x):
        y = s.a(x)
        if s.training:
            s.loss = s.aux(y).mean()
        return s.b(y)

    with_loss, without = (Block(function, aux=conv(C, 2, 1)) for function in (auxiliary, lambda s, x: s.b(s.a(x))))
    first, second = (ChannelGraph(around(block), images(1)) for block in (with_loss, without))
    assert sum(number for number, _ in first.products) == sum(number for number, _ in second.products)
