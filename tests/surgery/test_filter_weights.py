"""The weight of every layer by filter, as the network computes it."""

import pytest
import torch
from test_operations import Block, C, around, images, parameter
from torch import nn
from torch.nn import functional as F

from taylor_pruning.surgery.graph import ChannelGraph


@pytest.mark.parametrize("groups", [1, 4])
def test_a_transposed_filter_s_weights_are_those_that_compute_its_channel(groups):
    """In groups too, whose filters lie side by side in one dimension of the weight."""
    conv = nn.ConvTranspose2d(C, 12, 1, groups=groups, bias=False)
    block = Block(lambda s, x: s.b(s.c(s.a(x)).relu()), c=conv)
    block.b = nn.Conv2d(12, C, 3, padding=1)
    weight = ChannelGraph(around(block), images(1)).filter_weights()["block.c"]
    x = images(2, 3)[:, :1].repeat(1, C, 1, 1) * torch.arange(1.0, C + 1).view(-1, 1, 1)
    inputs = x.view(2, groups, C // groups, 3, 3).repeat_interleave(12 // groups, 1)
    assert weight.shape == (12, C // groups, 1, 1)
    torch.testing.assert_close((inputs * weight).sum(2), conv(x))


PRODUCTS = {  # of channels x [B, C, H, W] and a weight w [C, 12] or [12, C]: its shape, and the product
    "einsum": ((C, 12), lambda x, w: torch.einsum("bchw,cd->bdhw", x, w)),
    "matmul": ((C, 12), lambda x, w: (x.permute(0, 2, 3, 1) @ w).permute(0, 3, 1, 2)),
    "matmul, transposed": ((12, C), lambda x, w: (x.permute(0, 2, 3, 1) @ w.T).permute(0, 3, 1, 2)),
    "linear": ((12, C), lambda x, w: F.linear(x.movedim(1, -1), w).movedim(-1, 1)),
}


@pytest.mark.parametrize("kind", PRODUCTS)
def test_the_weight_of_a_matrix_product_is_given_by_filter(kind):
    shape, product = PRODUCTS[kind]
    block = Block(lambda s, x: s.b(product(s.a(x), s.w).relu()), w=parameter(*shape))
    block.b = nn.Conv2d(12, C, 3, padding=1)
    graph = ChannelGraph(around(block), images(1), prune_linear=True)
    assert torch.equal(graph.filter_weights()["block.w"], block.w if shape[0] == 12 else block.w.T)


def test_layers_that_lose_no_filter_have_no_entry():
    graph = ChannelGraph(around(Block(lambda s, x: s.b(s.a(x)))), images(1), exclude=["block.a"])
    assert graph.filter_weights().keys() == {"stem.0", "block.b", "mid"}


def test_what_depends_on_an_input_has_no_value_without_it():
    block = Block(lambda s, x: s.b(F.conv2d(s.a(x), s.w * x.mean() + s.w.exp())), w=parameter(C, C, 3, 3))
    execution = ChannelGraph(around(block), images(1)).executions[False]
    nodes = {node.name: node for node in execution.trace.graph.nodes if node.op != "output"}
    found = execution.without_inputs(nodes.values())
    assert torch.equal(found[nodes["exp"]], block.w.exp()) and torch.equal(found[nodes["block_w"]], block.w)
    assert not {nodes[name] for name in ("mean", "mul", "add")} & found.keys()
    assert not any(node.op == "placeholder" for node in found)


@pytest.mark.parametrize(("kind", "where"), [(nn.Linear, "renorm (4)"), (nn.Conv2d, "renorm (2)")])
def test_what_reads_by_a_weight_of_a_largest_norm_names_the_norm(kind, where):
    class Limited(kind):
        def forward(self, x):
            w = self.weight.renorm(2, 0, 0.5) * 2
            return F.linear(x, w, self.bias) if kind is nn.Linear else F.conv2d(x, w, self.bias)

    last = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), Limited(8, 4)] if kind is nn.Linear else [Limited(8, 4, 1)]
    graph = ChannelGraph(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), *last).double(), images())
    assert graph.layers["0"].reason == f"is normalised over channels in {where}"
