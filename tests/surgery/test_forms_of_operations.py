"""Zeroed gates are removed channels where an operation is called in a form that is seldom met, or along the channels."""

import pickle

import pytest
import torch
import torch.nn.functional as F
from test_operations import Block, C, Heads, around, conv, images, parameter
from test_surgery import centre_if_bright, check_law
from torch import nn
from torchvision.ops import DeformConv2d, roi_align

from taylor_pruning.surgery.graph import ChannelGraph

MASK = torch.zeros(12, 12, dtype=torch.bool)
MASK[2:5, 3:9] = True


class Biased(Heads):
    """Attention whose scores have a learned part, of each head and pair of positions."""

    def __init__(self):
        super().__init__(fused=True)
        self.bias = parameter(2, 144, 144)

    def forward(self, x):
        b, _, h, w = x.shape
        q, k, v = self.qkv(x).reshape(b, 3, self.num_heads, self.head_dim, h * w).transpose(3, 4).unbind(1)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias)
        return self.proj(y.transpose(2, 3).reshape(b, -1, h, w))


def scaled(x, of):
    """An activation times one number of each image, made of what is left of another."""
    return x * of.flatten(1).mean(1)[:, None, None, None]


def rows(x):
    return x.flatten(2).transpose(1, 2)


def maps(y):
    return y.transpose(1, 2).unflatten(2, (12, 12))


def packed(s, x):
    steps = nn.utils.rnn.pack_padded_sequence(s.a(x).mean(3), torch.full((len(x),), C), batch_first=True)
    return s.b(scaled(x, nn.utils.rnn.pad_packed_sequence(s.g(steps)[0], batch_first=True)[0]))


def windows(x, box, y):
    numbers = torch.arange(x.shape[0], dtype=x.dtype)[:, None]
    return roi_align(y, torch.cat([numbers, box], 1), 6)


def turned(s, x):
    rows = s.l(x.mean((2, 3)))
    return s.b(F.grid_sample(s.a(x), F.affine_grid(torch.stack([rows, rows], 1), x.size(), align_corners=False)))


def in_heads(s, x, y, mix):
    n, c, h, w = x.shape
    return s.b(mix(y.view(n, s.heads, c // s.heads, h * w)).reshape(n, -1, h, w))


def softly(s, x):
    return in_heads(s, x, s.a(x), lambda y: (2 * y).softmax(2))


def two_steps(s, x):
    return in_heads(s, x, s.a(x), lambda y: y.relu() + 1)


def other_number(s, x):
    y = s.c(x)
    return s.b(s.a(x).view(x.shape[0], 2 * y.shape[1], 12, 12)) + y.mean(1, keepdim=True)


def flat_weights(s, x):
    kernels = torch.cat([s.u.flatten(), s.v.flatten()]).view(2 * C, C, 1, 1)
    return F.conv2d(x, kernels) + F.conv2d(s.a(x), s.u[..., None, None]).sum(1, keepdim=True)


def blur(s, x):
    y = s.a(x)
    return s.b(F.conv2d(y, torch.full((C, 1, 3, 3), 0.1, dtype=x.dtype), groups=y.shape[1]))


FORMS = {  # name: (function of (block, x), what the block has more, output channels, removable of stem, of a, of b)
    "clamp by tensors": (lambda s, x: s.b(torch.clamp(s.a(x), s.t, s.t + 2)), {"t": parameter(C, 1, 1)}, C, 8, 8, 8),
    "power of a tensor": (lambda s, x: s.b(s.t.exp() ** s.a(x)), {"t": parameter(C, 1, 1)}, C, 8, 8, 8),
    "narrow from a tensor": (lambda s, x: s.b(s.a(x).narrow(2, torch.tensor(1), 9)), {}, C, 8, 0, 8),
    "positions and a new axis": (lambda s, x: s.b(s.a(x)[:, :, None, [3, 1, 2]].squeeze(2)), {}, C, 8, 8, 8),
    "mask": (lambda s, x: s.b(s.a(x)[:, :, MASK].unflatten(2, (3, 6))), {}, C, 8, 0, 8),
    "mask and positions": (lambda s, x: s.b(scaled(x, s.a(x)[[0], :, MASK][None])), {}, C, 8, 0, 8),
    "embedding that writes": (lambda s, x: s.a(x) * s.e((x[:, 0, 0, 0] > 0).long())[..., None, None],
                              {"e": nn.Embedding(2, C, max_norm=1.0)}, C, 7, 0, None),
    "embedding of channels": (lambda s, x: s.b(scaled(x, s.e((s.a(x).mean((2, 3)) > 0).long()))), {"e": nn.Embedding(2, C)},
                              C, 8, 0, 8),
    "index_select of channels": (lambda s, x: torch.index_select(s.a(x), 1, torch.tensor([1, 3, 5])), {}, 3, 8, 0, None),
    "gather of channels": (lambda s, x: s.b(s.a(x).gather(1, (x > 0).long())), {}, C, 0, 0, 8),
    "dstack of rows": (lambda s, x: x * torch.dstack([s.a(x).mean((2, 3)), s.b(x).mean((2, 3))]).mean(2)[..., None, None],
                       {}, C, 8, 8, 8),
    "vstack of vectors": (lambda s, x: s.a(x) * torch.vstack([s.t, s.u, s.u[None]]).mean(0)[:, None, None],
                          {"t": parameter(C), "u": parameter(C)}, C, 8, 8, None),
    "hstack of vectors": (lambda s, x: s.a(x) * torch.hstack([s.t, s.u])[:, None, None],
                          {"t": parameter(4), "u": parameter(4)}, C, 8, 6, None),  # each part keeps a channel
    "flattened weights": (flat_weights, {"u": parameter(C, C), "v": parameter(C, C)}, 2 * C, 0, 0, None),
    "weights in the shape of flattened ones": (
        lambda s, x: s.b(F.conv2d(s.a(x), s.u.reshape_as(s.v.flatten()).view(C, C, 1, 1))),
        {"u": parameter(C, C), "v": parameter(C, C)}, C, 8, 0, 8),
    "circular pad of channels": (lambda s, x: s.b(scaled(x, F.pad(rows(s.a(x)), (1, 1), mode="circular"))), {}, C, 8, 0, 8),
    "tensor_split by literals": (lambda s, x: s.b(torch.cat(torch.tensor_split(s.a(x), (3, 5), 1)[::-1], 1)), {}, C, 8, 3, 8),
    "tensor_split by a width": (lambda s, x: torch.mul(*(torch.tensor_split(c(x), (s.width,), 1)[i] for i, c in
                                                         enumerate([s.a, s.b]))), {"width": 4}, 4, 8, 8, 8),
    "tensor_split by a share": (lambda s, x: torch.mul(*(y := s.a(x)).tensor_split((y.shape[1] // 2,), 1)), {}, 4, 8, 8, None),
    "split into shares": (lambda s, x: s.b(torch.cat((y := s.a(x)).split([y.shape[1] // 2] * 2, 1)[::-1], 1)), {}, C, 8, 8, 8),
    "split into a rounded share": (lambda s, x: torch.mul(*s.a(x).split(-(-x.shape[1] // 2), 1)), {}, 4, 0, 0, None),
    "split into a width with a rest": (lambda s, x: s.a(torch.cat(x.split(s.n, 1)[::-1], 1)) + s.b(x)[:, : s.n].sum(1, True),
                                       {"n": 3}, C, 0, 8, 5),
    "split with a rest": (lambda s, x: s.b(torch.cat(s.a(x).split(3, 1)[::-1], 1)), {}, C, 8, 0, 8),
    "unbind of channels": (lambda s, x: s.b(torch.stack(s.a(x).unbind(1)[::-1], 1)), {}, C, 8, 0, 8),
    "depthwise of a new weight": (blur, {}, C, 8, 0, 8),
    "deformable depthwise": (lambda s, x: s.b(s.d(s.a(x), s.places(x))), {
        "places": conv(C, 18, 3, padding=1), "d": DeformConv2d(C, C, 3, padding=1, groups=C)}, C, 8, 8, 8),
    "channels as steps": (packed, {"g": nn.GRU(12, 4, batch_first=True)}, C, 8, 0, 8),
    "einsum with no result named": (lambda s, x: s.b(torch.einsum("ayxb,bz", s.a(x).movedim(1, -1), s.w).movedim(-1, 1)),
                                    {"w": parameter(C, C)}, C, 8, 8, 8),
    "einsum of all others with no result named": (lambda s, x: s.b(torch.einsum("...b, bz", s.a(x).movedim(1, -1), s.w)
                                                                   .movedim(-1, 1)), {"w": parameter(C, C)}, C, 8, 8, 8),
    "einsum of a diagonal": (lambda s, x: s.b(scaled(x, torch.einsum("bcii->bc", s.a(x)))), {}, C, 8, 0, 8),
    "attention of fewer dimensions": (lambda s, x: s.b(maps(F.scaled_dot_product_attention(rows(s.a(x)), s.k, s.v, scale=0.3))),
                                      {"k": parameter(5, C), "v": parameter(5, C)}, C, 8, 8, 8),
    "attention with a mask for all": (lambda s, x: s.b(F.scaled_dot_product_attention(s.a(x), s.a(x), s.b(x), s.m)),
                                      {"m": parameter(12)}, C, 8, 8, 8),
    "attention over channels": (lambda s, x: s.b(scaled(x, F.scaled_dot_product_attention(*[s.a(x).flatten(2)] * 3,
                                                                                          scale=0.1))), {}, C, 8, 0, 8),
    "several quantiles": (lambda s, x: s.b(x * s.a(x).flatten(2).quantile(torch.tensor([0.2, 0.7], dtype=x.dtype), -1)
                                           .sum(0)[..., None, None]), {}, C, 8, 8, 8),
    "layer norm of space": (lambda s, x: s.b(s.n(s.a(x))), {"n": nn.LayerNorm([12, 12])}, C, 8, 8, 8),
    "group norm of rows": (lambda s, x: s.b(F.group_norm(s.a(x).transpose(1, 2), 4).transpose(1, 2)), {}, C, 8, 0, 8),
    "pool of channels": (lambda s, x: s.b(maps(F.max_pool1d(rows(s.a(x)), 3, 1, 1))), {}, C, 8, 0, 8),
    "windows of computed boxes": (lambda s, x: s.b(windows(x, s.l(x.mean((2, 3))).sigmoid() * 6, s.a(x))),
                                  {"l": nn.Linear(C, 4)}, C, 8, 8, 8),
    "windows over channels": (lambda s, x: s.b(scaled(x, windows(x, x.new_full((x.shape[0], 4), 5.0), s.a(x).transpose(1, 2)))),
                              {}, C, 8, 0, 8),
    "affine grid of one row": (turned, {"l": nn.Linear(C, 3)}, C, 8, 8, 8),
    "windows of one dimension": (lambda s, x: s.b(s.a(x).unfold(2, 3, 2).amax(-1)), {}, C, 8, 8, 8),
    "windows of channels": (lambda s, x: s.a(x).unfold(1, 2, 2).amax(-1), {}, 4, 8, 0, None),
    "unfold of other dimensions": (lambda s, x: s.b(scaled(x, F.unfold(s.a(x).transpose(1, 2), 2))), {}, C, 8, 0, 8),
    "fold of channels": (lambda s, x: s.b(F.fold(rows(s.a(x)), (4, 6), 3)[:, :C]), {}, C, 8, 0, 8),
    "pixel_unshuffle of channels": (lambda s, x: s.b(scaled(x, F.pixel_unshuffle(s.a(x).transpose(1, 2), 2))), {}, C, 8, 0, 8),
    "views by keyword": (lambda s, x: s.b(torch.reshape(s.a(x), shape=(x.shape[0], -1, 144)).view(size=x.size())), {},
                         C, 8, 8, 8),
    "view as another type": (lambda s, x: s.b(s.a(x).view(torch.int64).view(torch.float64)), {}, C, 8, 0, 8),
    "view to another number": (other_number, {"c": conv(C, 4, 1)}, C, 8, 0, 8),
    "expand to a multiple": (lambda s, x: s.c(x).expand(-1, 2 * x.shape[1], -1, -1), {"c": conv(C, 1, 1)},
                             2 * C, 0, None, None),
    "repeat to a number": (lambda s, x: s.b(s.c(x).repeat(1, x.shape[1], 1, 1) * x), {"c": conv(C, 1, 1)}, C, 8, None, 8),
    "repeat to a multiple": (lambda s, x: s.c(x).repeat(1, 2 * x.shape[1], 1, 1), {"c": conv(C, 1, 1)}, 2 * C, 0, None, None),
    "every channel twice": (lambda s, x: s.a(x).repeat_interleave(2, 1), {}, 2 * C, 8, 8, None),
    "pickled numbers": (lambda s, x: s.b(s.a(x) * sum(pickle.loads(pickle.dumps((x.shape[2], x.shape[2] / 2))))), {},
                        C, 8, 8, 8),
    "to the processor": (lambda s, x: s.b(s.a(x).cpu() + torch.zeros_like(x, device=None)), {}, C, 8, 8, 8),
    "number of channels times a tensor": (lambda s, x: s.b((y := s.a(x)).shape[1] * y), {}, C, 8, 0, 8),
    "parts of other shares of a width": (lambda s, x: s.b(torch.cat(s.a(x).split([3 * s.n, 2 * s.n, 3 * s.n], 1), 1)), {"n": 1},
                                         C, 8, 0, 8),
    "rows so many times": (lambda s, x: s.b(s.a(x).repeat_interleave(torch.tensor([1] * 11 + [2]), 2)), {}, C, 8, 0, 8),
}  # fmt: skip


REASONS = {  # of some of them: a layer and why its filters stay
    "unbind of channels": ("block.a", "is unbound in unbind (block)"),
    "flattened weights": ("block.a", "is joined along two axes in cat (block)"),
    "index_select of channels": ("block.a", "is indexed by position in index_select (block)"),
    "windows of channels": ("block.a", "passes through unfold (block)"),
    "windows of computed boxes": ("block.l", "enters roi_align (block)"),
    "affine grid of one row": ("block.l", "passes through affine_grid (block)"),
}


@pytest.mark.parametrize("name", FORMS)
def test_zeroed_gates_are_removed_channels_whatever_the_form(name):
    function, more, out, *expected = FORMS[name]
    graph = check_law(around(Block(function, **more), out), images(), seeds=(0,), prune_linear=True)
    for layer, number in zip(("stem.0", "block.a", "block.b"), expected, strict=True):
        if number is not None:
            assert int(graph.layers[layer].removable.sum()) == number, graph.layers[layer].reason
    assert graph.layers["mid"].reason is None  # the block protects no more than itself
    if name in REASONS:
        layer, reason = REASONS[name]
        assert graph.layers[layer].reason == reason
    assert ("roi_align" in graph.smooth_operations) == (name == "windows of computed boxes")
    reasons = [info.reason or "" for info in graph.layers.values()]
    assert not any("removing them" in reason for reason in reasons)  # nothing is left to the proof


class Sized(Heads):
    """The size of all heads is a product of two stored numbers, or that of one is a quotient of two."""

    def __init__(self, sizes):
        super().__init__(fused=False)
        self.width, self.sizes = C, sizes

    def forward(self, x):
        b, _, h, w = x.shape
        width, size = self.sizes(self)
        q, k, v = self.qkv(x).reshape(b, 3, self.num_heads, size, h * w).unbind(1)
        y = v @ (q.transpose(2, 3) @ k * 0.5).softmax(-1).transpose(2, 3)
        return self.proj(y.reshape(b, width, h, w))


HEADS = {  # name: (block, its layer in heads, filters of it in a unit, in one where heads are chosen)
    "attention with a learned part": (Biased(), "block.qkv", 12, 12),
    "a product of stored numbers": (Sized(lambda s: (s.num_heads * s.head_dim, s.head_dim)), "block.qkv", 6, 12),
    "a quotient of stored numbers": (Sized(lambda s: (s.width, s.width // s.num_heads)), "block.qkv", 6, 0),
    "heads of the number of other channels": (Block(two_steps, heads=2), "block.a", 2, 4),
    "heads with a softmax inside": (Block(softly, heads=2), "block.a", 4, 4),
}


@pytest.mark.parametrize("prune_heads", [False, True])
@pytest.mark.parametrize("name", HEADS)
def test_heads_or_channels_of_every_head_are_units(name, prune_heads):
    block, layer, *sizes = HEADS[name]
    graph = check_law(around(block), images(), seeds=(0,), fractions=(0.5,), prune_heads=prune_heads)
    found = [[f for f in unit.filters if f[0] == layer] for unit in graph.units]
    assert max(map(len, found)) == sizes[prune_heads] and bool(graph.layers[layer].reason) == (not sizes[prune_heads])


class Named(nn.Module):
    """Decides by values, and returns a dictionary."""

    def forward(self, x):
        return {"out": x * 2 if x.mean() > 0 else x}


def test_the_gradient_of_an_activation_may_be_replaced():
    def cleared(s, x):
        y = s.a(x).detach()
        y.grad, y.requires_grad = None, True
        return s.b(y)

    assert ChannelGraph(around(Block(cleared)), images(1)).layers["block.a"].reason is None


def test_a_module_whose_hook_computes_with_values_runs_as_a_whole():
    layer = conv(C, C, 1)
    layer.register_forward_hook(lambda module, args, output: output * 2 if output.mean() > -9 else output)
    graph = check_law(around(Block(lambda s, x: s.b(s.c(s.a(x))), c=layer)), images(), seeds=(0,), train=False)
    assert graph.layers["block.a"].reason and graph.layers["block.b"].reason is None


def test_what_calls_a_module_that_cannot_be_traced_and_returns_no_tensors_stays():
    graph = check_law(around(Block(lambda s, x: s.b(s.c(s.a(x))["out"]), c=Named())), images(), seeds=(0,))
    assert graph.layers.keys() == {"stem.0", "mid"} and graph.layers["stem.0"].reason


class Marked(nn.Module):
    """Decides by values, and calls a function that is marked to run as a whole."""

    def forward(self, x):
        return centre_if_bright(x) if x.mean() > -9 else x


def test_a_marked_function_runs_inside_a_module_that_cannot_be_traced():
    graph = check_law(around(Block(lambda s, x: s.b(s.c(s.a(x))), c=Marked())), images(), seeds=(0,))
    assert graph.layers["block.a"].reason and graph.layers["block.b"].reason is None
