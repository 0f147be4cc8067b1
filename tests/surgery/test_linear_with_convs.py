"""Outputs of linear layers that scale, shift or join the channels of convs: they go with the filters, exactly."""

import math

import pytest
import torch
import torch.nn.functional as F
from test_operations import Block, around, images, parameter
from test_surgery import check_law
from torch import nn

from EnhancedPruning import EnhancedPruning, PruningSettings
from taylor_pruning.surgery.graph import ChannelGraph

C = 8


def excited(block, x):
    """Squeeze-and-excitation on a residual stream."""
    y = F.relu(block.a(x))
    scale = block.out(F.relu(block.squeeze(y.mean((2, 3))))).sigmoid().view(x.shape[0], -1, 1, 1)
    return block.b(x + y * scale)


def modulated(block, x):
    """Scales and shifts of all channels from one layer, behind a norm without its own."""
    scale, shift = block.both(x.mean((2, 3))).chunk(2, 1)
    return block.b(F.instance_norm(block.a(x)) * (1 + scale[..., None, None]) + shift[..., None, None])


def low_rank(block, x):
    return block.b(block.a(x) + torch.einsum("cr,rd,bdhw->bchw", block.up, block.down, x))


def joined(block, x):
    """A linear layer over the channels of every pixel adds to a stream of convs."""
    return block.b(block.a(x) + block.pixel(x.movedim(1, -1)).movedim(-1, 1))


BLOCKS = {
    "squeeze-and-excitation": (excited, {"squeeze": nn.Linear(C, 4), "out": nn.Linear(4, C)}),
    "modulation": (modulated, {"both": nn.Linear(C, 2 * C)}),
    "low rank": (low_rank, {"up": parameter(C, 2), "down": parameter(2, C)}),
    "joined": (joined, {"pixel": nn.Linear(C, C)}),
}


JOINING = {  # layers whose outputs are in units with filters of convs
    "squeeze-and-excitation": {"block.out"},
    "modulation": {"block.both"},
    "low rank": {"block.up"},
    "joined": {"block.pixel"},
}


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("prune_linear", [False, True])
def test_they_go_with_the_filters(name, prune_linear):
    function, layers = BLOCKS[name]
    model = around(Block(function, **layers))
    graph = check_law(model, images(), prune_linear=prune_linear)
    assert graph.layers["stem.0"].reason is None and graph.layers["block.a"].reason is None
    assert ("block.squeeze" in graph.layers) == (prune_linear and name == "squeeze-and-excitation")
    assert {layer for unit in graph.units for layer, _ in unit.filters} >= JOINING[name]
    units = graph.units[::2]
    smaller = graph.remove(graph.plan_of([unit.index for unit in units]))
    gone = {unit.index for unit in units}
    left = 0
    for term in graph.cost_terms():
        kept = [sum(index not in gone for index in dim.tolist()) for dim in term.dims]
        left += term.parameters * math.prod(kept)
    assert left == sum(p.numel() for p in smaller.parameters())


def test_linear_layers_alone_stay_unless_asked_for():
    graph = ChannelGraph(around(Block(excited, **BLOCKS["squeeze-and-excitation"][1])), images(1))
    smaller = graph.remove(graph.units[::2])
    assert smaller.block.squeeze.out_features == 4 and smaller.block.out.out_features < C


@pytest.mark.parametrize("prune_linear", [False, True])
def test_a_run_repairs_them(prune_linear):
    torch.manual_seed(0)
    function, layers = BLOCKS["squeeze-and-excitation"]
    model = around(Block(function, **layers))
    x = images(24)
    data = [(x[:12], torch.arange(12) % 5), (x[12:], torch.arange(12) % 5)]
    settings = PruningSettings(rounds=1, prune_linear=prune_linear)
    result = EnhancedPruning(model, data, data, settings=settings, progress=False).prune(30, 2)
    assert result.model.block.out.out_features == result.model.block.a.out_channels < C
    assert result.layers["block.a"]["kept"] == result.model.block.a.out_channels
    assert result.stages[-1]["parameters"] == sum(p.numel() for p in result.model.parameters())
    fits = {fit["name"]: fit for of_round in result.rounds for fit in of_round["compensation"]["layers"]}
    assert {"block.b", "block.squeeze"} <= fits.keys()
    assert all(fit["error_after"] <= fit["error_before"] for fit in fits.values())
