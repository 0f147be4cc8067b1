"""Grouped convs lose the same filters of every group, or whole groups where something else ties the filters of a group."""

import pytest
import torch
from test_operations import Block, C, around, images
from test_surgery import check_law
from torch import nn

from EnhancedPruning import load_pruned, save_pruned
from taylor_pruning.surgery.graph import ChannelGraph

GROUPS = 4


def grouped(norm):
    """A 1x1 conv and a grouped one, each with a norm."""
    more = {"c": nn.Conv2d(C, C, 3, padding=1, groups=GROUPS), "n1": norm(), "n2": norm()}
    return around(Block(lambda s, x: s.b(s.n2(s.c(s.n1(s.a(x)).relu())).relu()), **more))


@pytest.mark.parametrize("norm", [lambda: nn.BatchNorm2d(C), lambda: nn.GroupNorm(GROUPS, C)], ids=["batch", "group"])
def test_every_filter_can_go(norm):
    graph = check_law(grouped(norm), images(), seeds=(0,))
    assert graph.layers["block.a"].reason is None and graph.layers["block.c"].reason is None


def test_whole_groups_go_where_a_norm_ties_their_channels():
    graph = ChannelGraph(grouped(lambda: nn.GroupNorm(GROUPS, C)), images(1))
    members = next(unit.filters for unit in graph.units if ("block.c", 0) in unit.filters)
    assert members == tuple((f"block.{layer}", index) for layer in "ac" for index in range(C // GROUPS))
    smaller = graph.remove({"block.a": [2, 3], "block.c": [2, 3]}).block
    assert smaller.c.groups == smaller.n1.num_groups == smaller.n2.num_groups == GROUPS - 1
    assert smaller.c.weight.shape == (6, C // GROUPS, 3, 3) and smaller.c.in_channels == 6


def test_fewer_groups_are_saved_and_loaded(tmp_path):
    network, x = grouped(lambda: nn.GroupNorm(GROUPS, C)), images()
    graph = ChannelGraph(network, x[:1])
    smaller = graph.remove(graph.units[::3])
    save_pruned(tmp_path / "pruned.pt", smaller)
    loaded = load_pruned(tmp_path / "pruned.pt", lambda: grouped(lambda: nn.GroupNorm(GROUPS, C)))
    with torch.no_grad():
        assert torch.equal(loaded(x), smaller(x)) and loaded.block.c.groups < GROUPS


def test_a_fixed_number_of_groups_protects_them():
    block = Block(lambda s, x: s.b(torch.conv2d(s.n(s.a(x)), s.w, groups=GROUPS)), n=nn.GroupNorm(GROUPS, C),
                  w=nn.Parameter(torch.randn(C, C // GROUPS, 3, 3)))  # fmt: skip
    graph = check_law(around(block), images(), seeds=(0,))
    assert "go together" in graph.layers["block.a"].reason and graph.layers["stem.0"].reason is None


def test_filters_of_which_a_shuffle_makes_one_unit_are_said_to_go_together():
    block = Block(lambda s, x: s.b(nn.functional.channel_shuffle(s.a(x), C)))
    graph = check_law(around(block), images(), seeds=(0,))
    assert graph.layers["block.a"].reason == "all filters of block.a go together"


def test_transposed_convs_in_groups():
    block = Block(lambda s, x: s.b(s.c(s.a(x)).relu()), c=nn.ConvTranspose2d(C, 12, 4, 2, 1, groups=GROUPS))
    block.b = nn.Conv2d(12, C, 3, padding=1)
    graph = check_law(around(block), images(), seeds=(0,))
    assert graph.layers["block.a"].reason is None and graph.layers["block.c"].reason is None
    first = next(unit.filters for unit in graph.units if ("block.c", 0) in unit.filters)
    assert first == tuple(("block.c", 3 * group) for group in range(GROUPS))
    smaller = graph.remove([unit for unit in graph.units if unit.filters == first]).block.c
    assert smaller.weight.shape[:2] == (C, 2) and smaller.out_channels == 8 and smaller.groups == GROUPS
