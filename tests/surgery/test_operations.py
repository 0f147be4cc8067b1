"""Zeroed gates are removed channels for every family of operations, whatever class or function carries it."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from test_surgery import check_law, random_units, randomise
from torch import nn

from taylor_pruning.errors import InputError
from taylor_pruning.surgery.graph import ChannelGraph
from taylor_pruning.surgery.proof import tensors_of

C = 8


class Around(nn.Module):
    """A stem, one block [N, 8, h, w] -> [N, out, h', w'], a conv behind it, a head."""

    def __init__(self, block, out=C):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, C, 3, padding=1), nn.BatchNorm2d(C), nn.ReLU())
        self.block, self.mid, self.head = block, nn.Conv2d(out, 6, 3, padding=1), nn.Linear(6, 5)

    def forward(self, x):
        return self.head(F.relu(self.mid(self.block(self.stem(x)))).mean((2, 3)))


def around(block, out=C):
    torch.manual_seed(0)
    return randomise(Around(block, out).double().eval())


def images(n=3, size=12):
    return torch.randn(n, 3, size, size, dtype=torch.double, generator=torch.Generator().manual_seed(5))


class Block(nn.Module):
    """A forward given as a function of (block, x), with two convs and what `more` adds."""

    def __init__(self, function, **more):
        super().__init__()
        self.a, self.b = nn.Conv2d(C, C, 3, padding=1), nn.Conv2d(C, C, 3, padding=1)
        for name, value in more.items():
            setattr(self, name, value)
        self.function = function

    def forward(self, x):
        return self.function(self, x)


def parameter(*shape):
    return nn.Parameter(torch.randn(*shape))


# -- classes that nobody has heard of ---------------------------------------------------------------------------------


class NormAct(nn.BatchNorm2d):
    def forward(self, x):
        return F.silu(super().forward(x))


class SamePadded(nn.Conv2d):
    def forward(self, x):
        extent = (-(-x.shape[-1] // self.stride[0]) - 1) * self.stride[0] + self.kernel_size[0] - x.shape[-1]
        pad = max(extent, 0)
        return F.conv2d(F.pad(x, [pad // 2, pad - pad // 2] * 2), self.weight, self.bias, self.stride)


class LargestNorm(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(x, self.weight.renorm(2, 0, 0.5), self.bias, padding=self.padding, groups=self.groups)


class Standardised(nn.Conv2d):
    def forward(self, x):
        w = self.weight.reshape(1, self.out_channels, -1)
        w = F.batch_norm(w, None, None, training=True, momentum=0.0).reshape_as(self.weight)
        return F.conv2d(x, w, self.bias, padding=1)


class Affine(nn.Module):
    """An affine map from four buffers."""

    def __init__(self):
        super().__init__()
        for name in ("w", "b", "m", "v"):
            self.register_buffer(name, torch.rand(C) + 0.5)

    def forward(self, x):
        scale = self.w * (self.v + 1e-5).rsqrt()
        return x * scale.reshape(1, -1, 1, 1) + (self.b - self.m * scale).reshape(1, -1, 1, 1)


class DropPath(nn.Module):
    def forward(self, x):
        if not self.training:
            return x
        mask = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(0.8)
        return x * mask / 0.8


class Heads(nn.Module):
    """Self-attention over space: heads of a stored number and size."""

    def __init__(self, fused):
        super().__init__()
        self.num_heads, self.head_dim, self.fused = 2, 4, fused
        self.qkv, self.proj = nn.Conv2d(C, 3 * C, 1), nn.Conv2d(C, C, 1)

    def forward(self, x):
        b, _, h, w = x.shape
        qkv = self.qkv(x).reshape(b, 3, self.num_heads, self.head_dim, h * w).transpose(3, 4)
        q, k, v = qkv.unbind(1)
        scores = q @ k.transpose(-2, -1) * 0.5
        y = F.scaled_dot_product_attention(q, k, v) if self.fused else scores.softmax(-1) @ v
        return self.proj(y.transpose(2, 3).reshape(b, -1, h, w))


class Brightness(nn.Module):
    """Control flow on values, in a module of its own."""

    def forward(self, x):
        return x * 2 if x.mean() > 0 else x


def res2(block, x):
    one, two = torch.split(block.a(x), block.width, 1)
    return torch.cat([one, block.c(two)], 1)


def c2f(block, x):
    y = list(block.a(x).chunk(2, 1))
    y.append(block.c(y[-1]))
    return torch.cat(y, 1)


def coordinates(block, x):
    h, w = x.shape[2:]
    y = F.relu(block.a(torch.cat([x.mean(3, keepdim=True), x.mean(2, keepdim=True).transpose(2, 3)], 2)))
    rows, columns = torch.split(y, [h, w], dim=2)
    return x * block.b(rows).sigmoid() * columns.transpose(2, 3).sigmoid()


def normed(block, x):
    y = F.gelu(block.a(x))
    return block.b(y + block.gamma * y * torch.norm(y, p=2, dim=(2, 3), keepdim=True))


def conv(*shape, **options):
    return nn.Conv2d(*shape, **options)


BLOCKS = {  # name: (block, its output channels, removable filters of the stem, of a, of b; None: not looked at)
    "norm that activates": (Block(lambda s, x: s.b(s.n(s.a(x))), n=NormAct(C)), C, 8, 8, 8),
    "conv by another class": (Block(lambda s, x: s.b(s.c(x)), c=SamePadded(C, C, 3, stride=2)), C, 8, None, 8),
    "standardised weight": (Block(lambda s, x: s.b(s.c(s.a(x))), c=Standardised(C, C, 3)), C, 8, 0, 8),
    "weights of a largest norm": (Block(lambda s, x: s.b(s.c(s.a(x))), c=LargestNorm(C, C, 3, padding=1)), C, 8, 0, 8),
    "depthwise weights of a largest norm": (
        Block(lambda s, x: s.b(s.c(s.a(x))), c=LargestNorm(C, C, 3, padding=1, groups=C)),
        C,
        8,
        8,
        8,
    ),
    "affine from buffers": (Block(lambda s, x: s.b(F.relu(s.n(s.a(x)))), n=Affine()), C, 8, 8, 8),
    "constants of the activation's width": (
        Block(lambda s, x: s.b(s.a(x) + torch.full_like(x, 0.3) + x.new_full((1, x.shape[1], 1, 1), 0.2))),
        C,
        8,
        8,
        8,
    ),
    "tensors made of tensors": (
        Block(lambda s, x: torch.as_tensor(s.b(torch.as_tensor(s.a(x))))),
        C,
        8,
        8,
        8,
    ),
    "drop path": (Block(lambda s, x: x + s.d(s.b(s.a(x))), d=DropPath()), C, 8, 8, 8),
    "blur of a buffer": (
        Block(
            lambda s, x: s.b(F.conv2d(x, s.k.expand(x.shape[1], 1, 3, 3), groups=x.shape[1])), k=parameter(1, 1, 3, 3)
        ),
        C,
        8,
        None,
        8,
    ),
    "depthwise of a raw weight": (
        Block(lambda s, x: s.b(F.conv2d(x, s.k, groups=x.shape[1])), k=parameter(C, 1, 3, 3)),
        C,
        8,
        None,
        8,
    ),
    "batch norm of raw tensors": (
        Block(lambda s, x: s.b(F.batch_norm(s.a(x), s.n.m, s.n.v, s.w)), n=Affine(), w=parameter(C)),
        C,
        8,
        8,
        8,
    ),
    "linear over the last dimension": (
        Block(lambda s, x: F.linear(s.a(x).permute(0, 2, 3, 1), s.w).permute(0, 3, 1, 2), w=parameter(C, C)),
        C,
        8,
        8,
        None,
    ),
    "einsum with a matrix": (
        Block(lambda s, x: s.b(torch.einsum("bchw,cd->bdhw", s.a(x), s.w)), w=parameter(C, C)),
        C,
        8,
        8,
        8,
    ),
    "einsum with a scale": (
        Block(lambda s, x: s.b(torch.einsum("bchw,c->bchw", s.a(x), s.w)), w=parameter(C)),
        C,
        8,
        8,
        8,
    ),
    "groups normalised": (Block(lambda s, x: s.b(F.relu(s.n(s.a(x)))), n=nn.GroupNorm(4, C)), C, 8, 8, 8),
    "all normalised": (Block(lambda s, x: s.b(F.relu(s.n(s.a(x)))), n=nn.GroupNorm(1, C)), C, 8, 0, 8),
    "layer norm": (Block(lambda s, x: s.b(s.n(s.a(x).transpose(1, 3)).transpose(1, 3)), n=nn.LayerNorm(C)), C, 8, 0, 8),
    "instance norm": (
        Block(lambda s, x: s.b(s.n(s.a(x))), n=nn.InstanceNorm2d(C, affine=True, track_running_stats=True)),
        C,
        8,
        8,
        8,
    ),
    "response norm": (Block(normed, gamma=parameter(1, C, 1, 1)), C, 8, 8, 8),
    "shift by a parameter": (Block(lambda s, x: s.b(s.a(x) + s.t), t=parameter(C, 1, 1)), C, 8, 8, 8),
    "shift of another type": (
        Block(lambda s, x: s.b(s.a(x) + s.t.view(1, -1, 1, 1).to(x.dtype)), t=parameter(C)),
        C,
        8,
        8,
        8,
    ),
    "shift of the shape of x": (
        Block(lambda s, x: s.b(x + s.t.view(1, x.shape[1], 1, 1).expand_as(x)), t=parameter(C)),
        C,
        8,
        None,
        8,
    ),
    "split by a stored width": (Block(res2, width=4, c=conv(4, 4, 3, padding=1)), C, 8, 8, None),
    "parts in a list": (Block(c2f, c=conv(4, 4, 3, padding=1)), 12, 8, 8, None),
    "slices by a stored width": (Block(lambda s, x: s.a(x)[:, : s.width] * s.b(x)[:, s.width :], width=4), 4, 8, 8, 8),
    "slice by a literal": (Block(lambda s, x: s.a(x)[:, 2:]), 6, 8, 5, None),  # its reader keeps a channel
    "halves by a shape": (
        Block(lambda s, x: torch.max(s.a(x)[:, : x.shape[1] // 2], s.b(x)[:, x.shape[1] // 2 :])),
        4,
        8,
        None,
        None,
    ),
    "split by space": (Block(coordinates), C, 8, 8, 8),
    "roll and flip of space": (Block(lambda s, x: s.b(s.a(x).roll((1, 2), (2, 3)).flip(3))), C, 8, 8, 8),
    "roll of channels": (Block(lambda s, x: s.b(s.a(x).roll(1, 1))), C, 8, 0, 8),
    "where": (Block(lambda s, x: s.b(torch.where(s.a(x) > 0, s.a(x), 0.1 * x))), C, 8, 8, 8),
    "repeat": (Block(lambda s, x: s.a(x).repeat(1, 2, 1, 1)), 2 * C, 8, 8, None),
    "reshape_as": (Block(lambda s, x: s.b(s.a(x).flatten(2).reshape_as(x))), C, 8, 8, 8),
    "addcmul": (Block(lambda s, x: torch.addcmul(s.a(x), s.b(x), s.t), t=parameter(C, 1, 1)), C, 8, 8, 8),
    "gated linear unit": (Block(lambda s, x: F.glu(torch.cat([s.a(x), s.b(x)], 1), 1)), C, 8, 8, 8),
    "gated linear unit over space": (Block(lambda s, x: s.b(nn.GLU()(s.a(x)))), C, 8, 8, 8),
    "logarithm of a sigmoid": (Block(lambda s, x: s.b(nn.LogSigmoid()(s.a(x)))), C, 8, 8, 8),
    "pad of channels": (Block(lambda s, x: s.b(x) + F.pad(s.c(x), (0, 0, 0, 0, 2, 2)), c=conv(C, 4, 1)), C, 8, None, 4),
    "maximum of padded space": (
        Block(lambda s, x: s.b(F.max_pool2d(F.pad(s.a(x).relu(), (0, 1, 0, 1), value=float("-inf")), 3, 2))),
        C,
        8,
        8,
        8,
    ),
    "softmax over branches": (
        Block(
            lambda s, x: (lambda y: (y * y.mean((3, 4), keepdim=True).softmax(1)).sum(1))(
                torch.stack([s.a(x), s.b(x)], 1)
            )
        ),
        C,
        8,
        8,
        8,
    ),
    "conv over channels": (
        Block(
            lambda s, x: x * s.c(x.mean((2, 3))[:, None]).transpose(1, 2)[..., None].sigmoid(),
            c=nn.Conv1d(1, 1, 3, padding=1),
        ),
        C,
        0,
        None,
        None,
    ),
    "attention": (Heads(fused=False), C, 8, None, None),
    "fused attention": (Heads(fused=True), C, 8, None, None),
    "values decide in a module": (Block(lambda s, x: s.b(s.c(s.a(x))), c=Brightness()), C, 8, 0, 8),
    "values decide between convs": (Block(lambda s, x: s.b(s.c(x)), c=Brightness()), C, 0, None, 8),
    "divided by its sum": (Block(lambda s, x: s.b((y := s.a(x).exp()) / y.sum((2, 3), keepdim=True))), C, 8, 8, 8),
    "standardised over space": (
        Block(
            lambda s, x: s.b(
                ((y := s.a(x)) - y.mean((2, 3), keepdim=True)) / y.var((2, 3), keepdim=True).sqrt().expand_as(y)
            )
        ),
        C,
        8,
        8,
        8,
    ),
    "times the inverse of its norm": (
        Block(lambda s, x: s.b((y := s.a(x)) * y.square().mean((2, 3), keepdim=True).rsqrt())),
        C,
        8,
        8,
        8,
    ),
    "times one over its maximum": (
        Block(lambda s, x: s.b((1 / (y := s.a(x).exp()).amax((2, 3), keepdim=True)) * y)),
        C,
        8,
        8,
        8,
    ),
    "to the power of -1/2": (
        Block(lambda s, x: s.b((y := s.a(x)) * y.square().sum((2, 3), keepdim=True) ** -0.5)),
        C,
        8,
        8,
        8,
    ),
    "width computed with": (Block(lambda s, x: s.b(s.a(x) * math.sqrt(2) / s.b.in_channels**0.5)), C, 8, 0, 8),
    "if on a size": (Block(lambda s, x: s.b(s.a(x) if x.shape[-1] % 2 else F.max_pool2d(s.a(x), 2))), C, 8, 8, 8),
    "sum over channels of a weight": (
        Block(lambda s, x: s.a(x) * F.normalize(s.t, dim=0)[:, None, None], t=parameter(C)),
        C,
        8,
        0,
        None,
    ),
    "recurrent": (
        Block(
            lambda s, x: s.b(
                s.g(s.a(x).flatten(2).transpose(1, 2))[0].transpose(1, 2).reshape(len(x), C, *x.shape[2:])
            ),
            g=nn.GRU(C, C, batch_first=True),
        ),
        C,
        8,
        8,
        8,
    ),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_zeroed_gates_are_removed_channels(name):
    block, out, *expected = BLOCKS[name]
    graph = check_law(around(block, out), images(), seeds=(0,))
    for layer, number in zip(("stem.0", "block.a", "block.b"), expected, strict=True):
        if number is not None:
            assert int(graph.layers[layer].removable.sum()) == number, graph.layers[layer].reason
    assert graph.layers["mid"].reason is None  # the block protects no more than itself


SMOOTH = {  # name: (block, its smooth operations)
    "pooling by a norm": (Block(lambda s, x: s.b(F.lp_pool2d(s.a(x), 2, 2))), {"lp_pool2d"}),
    "three factors": (
        Block(lambda s, x: s.b(torch.einsum("bchw,bc,c->bchw", s.a(x), x.mean((2, 3)), s.t)), t=parameter(C)),
        {"einsum"},
    ),
    "one factor that depends on the input": (
        Block(lambda s, x: s.b(torch.einsum("bchw,c,c->bchw", s.a(x), s.t, s.t)), t=parameter(C)),
        set(),
    ),
    "places from the input": (
        Block(lambda s, x: s.b(F.grid_sample(x, 0.2 * s.c(x).movedim(1, -1), align_corners=False)), c=conv(C, 2, 1)),
        {"grid_sample"},
    ),
    "places that are given": (
        Block(
            lambda s, x: s.b(F.grid_sample(s.a(x), s.t.expand(len(x), -1, -1, -1), align_corners=False)),
            t=parameter(1, 5, 5, 2),
        ),
        set(),
    ),
    "kernels from the input": (
        Block(lambda s, x: F.conv2d(s.a(x).mean(0, keepdim=True), s.c(x.mean((0, 2, 3))).view(C, C, 1, 1)).expand_as(x),
              c=nn.Linear(C, C * C)),
        {"conv2d"},
    ),
    "matrix from the input": (
        Block(lambda s, x: F.linear(s.a(x), s.b(x).mean((0, 1)), s.t), t=parameter(12)),
        {"linear"},
    ),
    "slopes from the input": (Block(lambda s, x: F.prelu(s.a(x), s.b(x).mean((0, 2, 3)))), {"prelu"}),
    "scales from the input": (
        Block(lambda s, x: F.batch_norm(s.a(x), s.n.m, s.n.v, s.b(x).mean((0, 2, 3))), n=Affine()),
        {"batch_norm"},
    ),
    "statistics of the batch": (
        Block(lambda s, x: F.batch_norm(s.a(x), s.n.m.clone(), s.n.v.clone(), training=True), n=Affine()),
        {"batch_norm without running statistics"},
    ),
    "bilinear form": (
        Block(lambda s, x: F.bilinear(s.a(x).movedim(1, -1), s.b(x).movedim(1, -1), s.t).movedim(-1, 1),
              t=parameter(C, C, C)),
        {"bilinear"},
    ),
    "over the input": (Block(lambda s, x: s.b(s.t / (2 + s.a(x).relu())), t=parameter(C, 1, 1)), {"div"}),
    "over a parameter": (Block(lambda s, x: s.b(s.a(x) / s.t * (1 / s.t)), t=parameter(C, 1, 1)), set()),
    "standardised weight": (Block(lambda s, x: s.b(s.c(s.a(x))), c=Standardised(C, C, 3)), set()),
    "lengths of complex numbers": (Block(lambda s, x: s.b((torch.fft.fft2(s.a(x)) + 1).abs())), {"abs"}),
    "parts of complex numbers": (Block(lambda s, x: s.b(torch.fft.fft2(s.a(x)).imag.abs())), set()),
}  # fmt: skip


@pytest.mark.parametrize("name", SMOOTH)
def test_what_is_not_piecewise_linear_is_named(name):
    """Without smooth operations there is no second derivative along a change of activations."""
    block, expected = SMOOTH[name]
    model, x = around(block), images()
    graph = ChannelGraph(model, x[:1], verify=False)
    assert set(graph.smooth_operations) == expected
    stem = next(n for n in graph.executions[False].trace.graph.nodes if n.meta.get("module") == "stem.2")
    direction = torch.randn(C, 1, 1, dtype=torch.double, generator=torch.Generator().manual_seed(0))

    def total(step):
        with graph.executed({stem: lambda output: output * (1 + step * direction)}):
            return model(x).sum()

    try:
        second = torch.func.grad(torch.func.grad(total))(torch.zeros((), dtype=torch.double))
    except RuntimeError as error:  # of grid_sample until torch 2.12
        pytest.skip(str(error))
    assert bool(second.abs() > 1e-9) == bool(expected)


def test_a_division_by_zero_is_named_where_a_gate_before_it_is_needed():
    without = Block(lambda s, x: s.b((y := s.a(x)) / y.sum((2, 3), keepdim=True)) + s.c(y), c=conv(C, C, 1))
    graph = check_law(around(without), images(), seeds=(0,))
    assert "a division by zero behind them gives; an epsilon helps" in graph.layers["block.a"].reason
    with_epsilon = Block(lambda s, x: s.b((y := s.a(x).relu()) / (y.sum((2, 3), keepdim=True) + 1e-3)) + y)
    graph = check_law(around(with_epsilon), images(), seeds=(0,))
    assert graph.layers["block.a"].reason is None


def test_heads_are_units_where_the_scale_depends_on_their_size():
    graph = ChannelGraph(around(Heads(fused=True)), images(1))
    sizes = {len([f for f in unit.filters if f[0] == "block.qkv"]) for unit in graph.units}
    assert sizes == {0, 12}  # a head's four channels of q, k and v
    smaller = graph.remove([next(unit for unit in graph.units if ("block.qkv", 0) in unit.filters)])
    assert smaller.block.num_heads == 1 and smaller.block.head_dim == 4 and smaller.block.qkv.out_channels == 12


def test_channels_inside_heads_go_where_nothing_depends_on_their_number():
    graph = ChannelGraph(around(Heads(fused=False)), images(1))
    smaller = graph.remove([next(unit for unit in graph.units if ("block.qkv", 16) in unit.filters)])
    assert smaller.block.num_heads == 2 and smaller.block.head_dim == 3
    graph = ChannelGraph(around(Heads(fused=False)), images(1), prune_heads=True)
    assert graph.layers["block.qkv"].reason is None
    with pytest.raises(InputError, match="must go together"):
        graph.remove({"block.qkv": [0]})


def test_stored_widths_follow():
    block = Block(lambda s, x: torch.cat(list(s.a(x).split(s.sizes, 1)), 1), sizes=[2, 6])
    graph = ChannelGraph(around(block), images(1))
    smaller = graph.remove({"block.a": [0, 3, 4]})
    assert smaller.block.sizes == [1, 4] and block.sizes == [2, 6]
    assert type(smaller.block.sizes[0]) is int


HALVES_OF_A_LAYER = {
    "filters": lambda s, x: (s.a(x), s.a.out_channels // 2),
    "of the layer behind": lambda s, x: (s.a(x), s.b.in_channels // 2),
    "of a norm": lambda s, x: (s.n(s.a(x)), s.n.num_features // 2),
    "transposed": lambda s, x: (s.t(s.a(x)), s.t.out_channels // 2),
    "in groups": lambda s, x: (s.a(x), s.g.in_channels // 2),
}


@pytest.mark.parametrize("name", HALVES_OF_A_LAYER)
def test_halves_counted_by_a_layer_lose_the_same_channels(name):
    def halves(s, x):
        y, half = HALVES_OF_A_LAYER[name](s, x)
        return s.b(torch.cat([y[:, :half] * 2, s.g(y)[:, half:]], 1))

    groups = 2 if name == "in groups" else 1  # groups alone keep the halves alike
    more = {"n": nn.BatchNorm2d(C), "t": nn.ConvTranspose2d(C, C, 3, padding=1), "g": nn.Conv2d(C, C, 1, groups=groups)}
    graph = check_law(around(Block(halves, **more)), images(), seeds=(0, 1, 2))
    assert all(info.removable.all() for layer, info in graph.layers.items() if layer != "head")


class Experts(nn.Module):
    """A conv whose weight is a mixture of experts by the image, as CondConv has it; `weight` is [experts, elements]."""

    def __init__(self):
        super().__init__()
        self.in_channels, self.out_channels = C, 5
        self.weight, self.route = nn.Parameter(torch.randn(3, 5 * C)), nn.Linear(C, 3)

    def forward(self, x):
        images = x.shape[0]
        mixed = self.route(x.mean((2, 3))).sigmoid() @ self.weight
        kernels = mixed.view(images * self.out_channels, self.in_channels, 1, 1)
        y = F.conv2d(x.reshape(1, images * x.shape[1], *x.shape[2:]), kernels, groups=images)
        return y.permute(1, 0, 2, 3).view(images, self.out_channels, *x.shape[2:])


def test_the_number_of_a_layer_whose_weight_holds_experts_counts_none_of_its_channels():
    block = Block(lambda s, x: s.b(x) + s.e(s.a(x)).mean(1, keepdim=True), e=Experts())
    assert check_law(around(block), images()).layers["block.a"].removable.all()


def asserted(block, x):
    x = block.a(x)
    assert x.shape[1] == block.channels
    assert block.wanted == x.size(1)
    block.seen = x.shape[1]  # which is compared with what was there once the forward has ended
    return block.b(x)


def test_a_stored_number_to_which_that_of_the_channels_is_compared_follows_it():
    graph = check_law(around(Block(asserted, channels=C, wanted=C, seen=C)), images())
    assert graph.layers["block.a"].removable.all()
    smaller = graph.remove({"block.a": [0, 3]}).block
    assert smaller.channels == smaller.wanted == C - 2


NUMBERS_IN_NEW_TENSORS = {
    "arange": lambda c: torch.arange(0, c)[:, None, None] / 8,
    "full": lambda c: torch.full((1,), 1 / c),
    "tensor": lambda c: torch.tensor([c]).sqrt(),
}


@pytest.mark.parametrize("name", NUMBERS_IN_NEW_TENSORS)
def test_a_number_of_channels_in_a_new_tensor_is_named(name):
    block = Block(lambda s, x: s.b(s.a(x) * NUMBERS_IN_NEW_TENSORS[name](x.shape[1])))
    reason = ChannelGraph(around(block), images(1)).layers["stem.0"].reason
    assert reason == f"their number enters {name} (block)"


# -- inputs and outputs ------------------------------------------------------------------------------------------------


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.fc = nn.Conv2d(3, 8, 3), nn.Conv2d(1, 8, 3), nn.Linear(16, 5)

    def forward(self, x, y):
        return self.fc(torch.cat([F.relu(self.a(x)), F.relu(self.b(y))], 1).mean((2, 3)))


class Listed(Two):
    def forward(self, both):
        return super().forward(*both)


@dataclasses.dataclass
class Pair:
    x: torch.Tensor
    y: torch.Tensor


class Paired(Two):
    def forward(self, both):
        return super().forward(both.x, both.y)


@dataclasses.dataclass
class Answer:
    logits: torch.Tensor
    features: torch.Tensor
    name: str = "answer"


class Several(Around):
    """Outputs of several kinds; features that go out cannot be cut, those behind the conv can."""

    def __init__(self, kind):
        super().__init__(nn.Identity())
        self.kind = kind

    def forward(self, x):
        features = F.relu(self.mid(self.stem(x)))
        logits = self.head(features.mean((2, 3)))
        kinds = {
            "tuple": (logits, [features]),
            "dict": {"out": logits, "aux": features},
            "class": Answer(logits, features),
        }
        return kinds[self.kind]


@pytest.mark.parametrize(
    ("model", "example"),
    [
        (Two, lambda x: (x, x[:, :1] * 2)),
        (Two, lambda x: {"x": x, "y": x[:, :1] * 2}),
        (Listed, lambda x: [x, x[:, :1] * 2]),
        (Paired, lambda x: Pair(x, x[:, :1] * 2)),
    ],
    ids=["tuple", "dict", "list", "dataclass"],
)
def test_several_inputs(model, example):
    torch.manual_seed(0)
    model, inputs = model().double().eval(), example(images())
    graph = ChannelGraph(model, inputs)
    assert len(graph.units) == 16
    units = random_units(graph, 0.4, 0)
    gates = torch.ones(16, dtype=torch.double).index_fill(0, torch.tensor([u.index for u in units]), 0)

    def run(network):
        return (
            network(**inputs)
            if isinstance(inputs, dict)
            else network(*inputs)
            if type(inputs) is tuple
            else network(inputs)
        )

    with torch.no_grad(), graph.gated(gates):
        expected = run(model)
    torch.testing.assert_close(run(graph.remove(units)), expected, rtol=1e-9, atol=1e-9)
    with graph.gated(gates), pytest.raises(InputError, match="other arguments than its example_input"):
        model(images(), images(), images())


@pytest.mark.parametrize("kind", ["tuple", "dict", "class"])
def test_several_outputs(kind):
    torch.manual_seed(0)
    model = randomise(Several(kind).double().eval())
    graph = ChannelGraph(model, images(1))
    assert graph.layers["mid"].reason == "output of the network" and graph.layers["stem.0"].reason is None
    gates = torch.ones(len(graph.units), dtype=torch.double)
    gates[:3] = 0
    with torch.no_grad(), graph.gated(gates):
        expected = model(images())
    got = graph.remove(graph.units[:3])(images())
    assert type(got) is type(expected) and (kind != "class" or got.name == "answer")
    torch.testing.assert_close([*tensors_of(got)][:2], [*tensors_of(expected)][:2], rtol=1e-9, atol=1e-9)


# -- what cannot be done -----------------------------------------------------------------------------------------------


class SampleBySample(nn.Module):
    def forward(self, x):
        return torch.stack([sample * 2 for sample in x])


def test_a_loop_over_samples_is_one_operation():
    graph = check_law(around(Block(lambda s, x: s.b(s.c(s.a(x))), c=SampleBySample())), images(), seeds=(0,))
    assert graph.layers["block.a"].reason and graph.layers["block.b"].reason is None


def test_gates_of_samples_inside_windows():
    """Windows lie in the batch; every sample has gates of its own."""

    def windows(block, x):
        b, c, h, w = x.shape
        y = block.a(x).view(b, c, h // 4, 4, w // 4, 4).permute(0, 2, 4, 1, 3, 5).reshape(-1, c, 4, 4)
        y = block.b(F.relu(y)).view(b, h // 4, w // 4, c, 4, 4).permute(0, 3, 1, 4, 2, 5)
        return y.reshape(b, c, h, w)

    model, x = around(Block(windows)), images()
    graph = check_law(model, x, seeds=(0,))
    assert graph.layers["block.b"].reason is None
    gates = torch.rand(3, len(graph.units), dtype=torch.double)
    with torch.no_grad():
        with graph.gated(gates):
            together = model(x)
        for i in range(3):
            with graph.gated(gates[i]):
                torch.testing.assert_close(model(x[i : i + 1]), together[i : i + 1])
