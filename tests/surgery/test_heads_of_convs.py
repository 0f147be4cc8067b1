"""Attention by convs: shared keys and values, heads in the batch."""

import pytest
import torch
import torch.nn.functional as F
from test_operations import Block, C, around, images
from test_surgery import check_law
from torch import nn

HEADS, SIZE, VALUES = 2, 4, 3


def shared(block, x):
    """Every head has queries of its own; keys and values are the same for all."""
    b, _, h, w = x.shape
    q = block.q(x).reshape(b, block.heads, block.size, -1).transpose(2, 3)
    k, v = (conv(x).flatten(2).transpose(1, 2)[:, None] for conv in (block.k, block.v))
    y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    return block.o(y.reshape(b, h, w, y.shape[-1] * block.heads).permute(0, 3, 1, 2))


def test_heads_go_where_their_size_may_not_change():
    block = Block(shared, heads=HEADS, size=SIZE, q=nn.Conv2d(C, HEADS * SIZE, 1), k=nn.Conv2d(C, SIZE, 1),
                  v=nn.Conv2d(C, VALUES, 1), o=nn.Conv2d(HEADS * VALUES, C, 1))  # fmt: skip
    graph = check_law(around(block), images(), seeds=(0,))
    removable = {name: int(info.removable.sum()) for name, info in graph.layers.items()}
    assert removable["block.q"] == HEADS * SIZE, "whole heads"
    assert removable["block.k"] == removable["block.v"] == 0
    assert graph.layers["block.v"].reason.startswith("is merged with other channels in reshape")
    smaller = graph.remove({"block.q": range(SIZE)}).block
    assert smaller.heads == HEADS - 1 and smaller.o.in_channels == (HEADS - 1) * VALUES


def folded(block, x):
    """Heads lie in the batch, before or behind -1; the size of a head is stored."""
    b, _, h, w = x.shape
    q = block.q(x).reshape(-1, block.size, h * w).transpose(1, 2)
    k, v = block.k(x).reshape(b * block.heads, block.size, -1), block.v(x).reshape(b * block.heads, -1, h * w)
    y = ((q * 0.5) @ k).softmax(-1) @ v.transpose(1, 2)
    return block.o(y.transpose(1, 2).reshape(b, -1, h, w))


def test_channels_of_heads_that_lie_in_the_batch():
    convs = {name: nn.Conv2d(C, C, 1) for name in "qkvo"}
    graph = check_law(around(Block(folded, heads=HEADS, size=SIZE, **convs)), images(), seeds=(0,))
    assert [graph.layers[f"block.{name}"].reason for name in "qkvo"] == [None] * 4


def size_of_heads(block, x, inner, end):
    """The size of a head is computed once, and given to every view."""
    x = block.q(x)
    b, c, h, w = x.shape
    d = c // 6
    if inner:
        y = x.reshape(b, d, 3, 2, h, w).permute(2, 0, 3, 4, 5, 1)
    else:
        y = x.reshape(b, 3, 2, d, h, w).permute(1, 0, 2, 4, 5, 3)
    q, k, v = y.reshape(3, b, 2, h * w, d)
    y = ((q @ k.transpose(2, 3)).softmax(3) @ v).permute(0, 1, 3, 2)
    return block.o(y.reshape(b, end(d), h, w))


@pytest.mark.parametrize("inner", [False, True])
@pytest.mark.parametrize("end", [lambda d: 2 * d, lambda d: d * 2, lambda d: -1])
def test_a_size_of_heads_that_is_used_twice(inner, end):
    block = Block(lambda s, x: size_of_heads(s, x, inner, end), q=nn.Conv2d(C, 24, 1), o=nn.Conv2d(C, C, 1))
    graph = check_law(around(block), images(), seeds=(0,))
    assert [graph.layers[f"block.{name}"].reason for name in "qo"] == [None] * 2
    assert {len([f for f in unit.filters if f[0] == "block.q"]) for unit in graph.units} == {0, 6}


def test_an_outer_product_loses_channels_of_one_factor():
    """[N, 8, 8] flattened: the next layer can lose the columns of a channel of one factor, not of both."""

    class Bilinear(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.fc = nn.Conv2d(3, C, 3), nn.Conv2d(3, C, 3), nn.Linear(C * C, 5)

        def forward(self, x):
            a, b = (F.relu(conv(x)).mean((2, 3)) for conv in (self.a, self.b))
            return self.fc((a[:, :, None] * b[:, None]).flatten(1))

    torch.manual_seed(0)
    graph = check_law(Bilinear().double().eval(), images(), seeds=(0,))
    assert [int(graph.layers[name].removable.sum()) for name in "ab"] == [0, C]


def test_a_weight_that_is_flattened_for_a_while_keeps_rows_and_columns():
    block = Block(
        lambda s, x: s.b(F.conv2d(s.a(x), s.w.flatten().tanh().view_as(s.w))), w=nn.Parameter(torch.randn(C, C, 1, 1))
    )
    graph = check_law(around(block), images(), seeds=(0,))
    assert all(graph.layers[name].reason is None for name in ("stem.0", "block.a", "block.w", "block.b"))
