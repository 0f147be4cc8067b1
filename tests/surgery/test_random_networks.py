"""Random networks of idioms that mislead a trace: every cut is exact, protected by name, or refused with InputError.

The suite draws a fixed few. For more:

    RANDOM_NETWORKS=500 pytest tests/surgery/test_random_networks.py
"""

import math
import os
import random
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from test_surgery import conv_bn, random_units, randomise
from torch import nn

from taylor_pruning.errors import InputError
from taylor_pruning.surgery.graph import ChannelGraph

DRAWS = int(os.environ.get("RANDOM_NETWORKS", 24))

# A vector p [C] made to fit the map x [N, C, H, W], with numbers, types and devices read off x.
CONSTANTS = {
    "view": lambda p, x: p.view(1, -1, 1, 1),
    "index": lambda p, x: p[:, None, None],
    "view, shape": lambda p, x: p.view(1, x.shape[1], 1, 1),
    "view, negative shape": lambda p, x: p.view(1, x.shape[-3], 1, 1),
    "reshape, size": lambda p, x: p.reshape(1, x.size(1), 1, 1),
    "view, ndim": lambda p, x: p.view(*(1, -1), *(1,) * 2).expand(x.shape[0], -1, -1, -1),
    "expand_as": lambda p, x: p.view(1, -1, 1, 1).expand_as(x),
    "expand, shape": lambda p, x: p.view(1, -1, 1, 1).expand(x.shape),
    "expand, sizes": lambda p, x: p.view(1, -1, 1, 1).expand(x.size(0), x.size(1), x.size(2), x.size(3)),
    "repeat": lambda p, x: p.view(1, -1, 1, 1).repeat(x.shape[0], 1, x.shape[2], x.shape[3]),
    "to dtype": lambda p, x: p.view(1, -1, 1, 1).to(x.dtype),
    "to device and dtype": lambda p, x: p.view(1, -1, 1, 1).to(device=x.device, dtype=x.dtype),
    "to tensor": lambda p, x: p[None, :, None, None].to(x),
    "type_as": lambda p, x: p.view(1, -1, 1, 1).type_as(x),
    "times height": lambda p, x: p.view(1, -1, 1, 1) * x.shape[2],
    "over root of height": lambda p, x: p.view(1, -1, 1, 1) / math.sqrt(x.size(2)),
    "times channels": lambda p, x: p.view(1, -1, 1, 1) * x.shape[1],
    "over root of channels": lambda p, x: p.view(1, -1, 1, 1) / math.sqrt(x.shape[1]),
    "ones_like": lambda p, x: torch.ones_like(x) * 0.3,
    "zeros_like": lambda p, x: torch.zeros_like(x) + p.view(1, -1, 1, 1),
    "full, shape": lambda p, x: torch.full(x.shape, 0.7, dtype=x.dtype),
    "full, channels": lambda p, x: torch.full((1, x.shape[1], 1, 1), 0.7, dtype=x.dtype, device=x.device),
    "full, number": lambda p, x: torch.full((1, 8, 1, 1), 0.7, dtype=x.dtype),
    "new_ones": lambda p, x: x.new_ones(1, x.shape[1], 1, 1) * 0.4,
    "new_tensor": lambda p, x: x.new_tensor([0.3]),
    "linspace": lambda p, x: torch.linspace(0, 1, 8, dtype=torch.double).view(1, -1, 1, 1),
    "softmax": lambda p, x: p.softmax(0).view(1, -1, 1, 1),
    "clamped": lambda p, x: p.clamp(min=0.1).view(1, x.shape[1], 1, 1),
}
USES = {
    "add": lambda s, x, k: x + k,
    "subtract from": lambda s, x, k: k - x,
    "multiply": lambda s, x, k: x * k,
    "divide": lambda s, x, k: x / (k + 2),
    "maximum": lambda s, x, k: torch.maximum(x, k.to(x)),
    "normalised": lambda s, x, k: s.norm(x + k),
    "concatenate": lambda s, x, k: s.merge(torch.cat([x, k.expand(x.shape)], 1)),
    "lerp": lambda s, x, k: torch.lerp(x, s.b(x), k.to(x)),
    "in place": lambda s, x, k: x.add_(k),
}
# Operations that change y = conv(x) in place; y and the result are both read afterwards.
IN_PLACE = {
    "ReLU": nn.ReLU(inplace=True),
    "LeakyReLU": nn.LeakyReLU(0.2, inplace=True),
    "SiLU": nn.SiLU(inplace=True),
    "Hardsigmoid": nn.Hardsigmoid(inplace=True),
    "Hardtanh": nn.Hardtanh(-1, 1, inplace=True),
    "ELU": nn.ELU(inplace=True),
    "Threshold": nn.Threshold(0.1, 0.5, inplace=True),
    "Dropout": nn.Dropout(0.5, inplace=True),
    "relu_": lambda y: y.relu_(),
    "sigmoid_": lambda y: y.sigmoid_(),
    "mul_": lambda y: y.mul_(0.5),
    "add_": lambda y: y.add_(0.5),
    "F.relu": lambda y: F.relu(y, inplace=True),
    "F.relu, positional": lambda y: F.relu(y, True),
    "F.leaky_relu, positional": lambda y: F.leaky_relu(y, 0.3, True),
    "F.threshold": lambda y: F.threshold(y, 0.1, 1.0, inplace=True),
    "F.hardswish": lambda y: F.hardswish(y, inplace=True),
    "out": lambda y: torch.mul(y, 2.0, out=y),
    "through a view": lambda y: y.flatten(2).add_(0.5).view_as(y),
}
BOTH = {
    "concatenated": lambda s, y, z: s.merge(torch.cat([y, z], 1)),
    "added": lambda s, y, z: y + z,
    "first alone": lambda s, y, z: y,
}


def two(parts):
    """Product of the first two of several parts, taken by index: a trace cannot iterate."""
    return parts[0] * parts[1]


def swapped(parts):
    return torch.cat([parts[1], parts[0]], 1)


def attention(s, x):
    q, v = s.a(x).flatten(2), s.b(x).flatten(2)
    return ((q @ v.transpose(1, 2) / x.shape[1] ** 0.5).softmax(-1) @ v).view_as(x)


def shuffled(s, x):
    n, c, h, w = x.size()
    return s.a(x).view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


SHAPES = {
    "groups": lambda s, x: F.conv2d(s.a(x), s.kernel.expand(x.shape[1], 1, 3, 3), padding=1, groups=x.shape[1]),
    "half by shape": lambda s, x: s.widen(s.a(x)[:, : x.shape[1] // 2]),
    "split by shape": lambda s, x: swapped(s.a(x).split(x.shape[1] // 2, 1)),
    "split by number": lambda s, x: swapped(s.a(x).split(4, 1)),
    "split by widths": lambda s, x: two(torch.cat([s.a(x), s.b(x)], 1).split([x.shape[1], x.shape[1]], 1)),
    "chunk": lambda s, x: s.widen(two(s.a(x).chunk(2, 1))),
    "iterated": lambda s, x: sum(s.a(x).chunk(2, 1)).repeat(1, 2, 1, 1),
    "shuffle": shuffled,
    "flatten and back": lambda s, x: s.a(x).flatten(2).view(x.shape[0], -1, x.shape[2], x.shape[3]),
    "view with the number": lambda s, x: s.a(x).view(x.shape[0], 8, -1).view_as(x),
    "mean over channels": lambda s, x: s.a(x) - s.b(x).mean(1, keepdim=True),
    "sum over channels by number": lambda s, x: s.a(x) + s.b(x).sum(1, keepdim=True) / x.shape[1],
    "divide by channels": lambda s, x: s.a(x) / x.shape[1],
    "divide by positions": lambda s, x: s.a(x) / (x.shape[2] * x.shape[3]),
    "divide by elements": lambda s, x: s.a(x) * (x.shape[0] / x.numel()),
    "attention": attention,
    "layer norm": lambda s, x: F.layer_norm(s.a(x), s.a(x).shape[1:]),
    "group norm": lambda s, x: F.group_norm(s.a(x), 2),
    "positions": lambda s, x: s.a(x) + torch.arange(x.shape[3], dtype=x.dtype, device=x.device),
}
WIDTHS = {
    "fan in": lambda s, x: s.a(x) * (2 / (s.b.in_channels * 9)) ** 0.5,
    "fan in by math": lambda s, x: s.b(s.a(x) / math.sqrt(s.b.in_channels)),
    "fan out": lambda s, x: s.b(x) * s.b.out_channels**-0.5,
    "own width": lambda s, x: s.a(x) * s.c**-0.5,
    "own width in view": lambda s, x: s.a(x).view(-1, s.c, x.shape[2], x.shape[3]),
    "width in view": lambda s, x: s.b(x).flatten(2).view(-1, s.b.out_channels, x.shape[2], x.shape[3]),
    "norm's width": lambda s, x: s.norm(s.b(x)) / s.norm.num_features,
    "groups": lambda s, x: F.avg_pool2d(F.conv2d(s.b(x), s.kernels, padding=1, groups=s.b.out_channels), 1),
    "split": lambda s, x: two(torch.cat([s.b(x), x], 1).split([s.b.out_channels, s.b.in_channels], 1)),
    "zeros": lambda s, x: s.b(x) + torch.zeros(1, s.b.out_channels, 1, 1, dtype=torch.double),
    "ones": lambda s, x: s.b(x) + torch.ones(1, s.b.out_channels, 1, 1, dtype=torch.double),
    "index": lambda s, x: s.widen(torch.cat([x, s.b(x)], 1)[:, s.b.in_channels // 2 : s.b.in_channels]),
    "if": lambda s, x: s.b(x) + x if s.b.in_channels == s.b.out_channels else s.b(x),
}
TRAINING = {
    "dropout": lambda s, x: F.dropout(s.a(x), 0.3, s.training),
    "drop path": lambda s, x: (
        x + s.a(x) * x.new_empty(x.shape[0], 1, 1, 1).bernoulli_(0.8) if s.training else s.a(x) + x
    ),
    "noise": lambda s, x: s.a(x) + 0.1 * torch.randn_like(x) if s.training else s.a(x),
    "other scale": lambda s, x: s.a(x) * (0.5 if s.training else 1.0),
    "bias": lambda s, x: s.a(x) + s.p.view(1, x.shape[1], 1, 1) if s.training else s.a(x),
    "by channels": lambda s, x: s.a(x) / x.shape[1] if s.training else s.a(x),
}
# Forward hooks and pre-hooks: f(tensor) -> tensor, on the output (input) of the module of that name.
HOOKS = {
    "scale": lambda t: t * 1.5,
    "shift": lambda t: t + 0.5,
    "a scale a channel": lambda t: t * torch.linspace(0.5, 1.5, 8, dtype=t.dtype).view(1, 8, 1, 1),
    "roll": lambda t: t.roll(1, 1),
    "layer norm": lambda t: F.layer_norm(t, t.shape[1:]),
    "clamp": lambda t: t.clamp(-1, 1),
    "in place": lambda t: t.add_(0.5),
    "look": lambda t: None,
}


class Block(nn.Module):
    """Layers at hand for the forms above; 8 channels in and out."""

    c = 8

    def __init__(self, form):
        super().__init__()
        c = self.c
        self.form, self.a, self.b = form, conv_bn(c, c), nn.Conv2d(c, c, 3, padding=1)
        self.merge, self.widen, self.norm = nn.Conv2d(2 * c, c, 1), nn.Conv2d(c // 2, c, 1), nn.BatchNorm2d(c)
        self.p = nn.Parameter(torch.ones(c))
        self.register_buffer("kernel", torch.rand(1, 1, 3, 3))
        self.kernels = nn.Parameter(torch.rand(c, 1, 3, 3))
        self.operation = None

    def forward(self, x):
        return self.form(self, x)


def constant(shape, use):
    return lambda s, x: USES[use](s, y := s.a(x), CONSTANTS[shape](s.p, y))


def in_place(operation, both):
    def form(s, x):
        y = s.b(x)
        z = s.operation(y)
        return BOTH[both](s, y, z)

    block = Block(form)
    block.operation = IN_PLACE[operation]
    return block


def hooked(what, where, kind):
    block = Block(lambda s, x: s.norm(s.b(F.relu(s.a(x)))))
    module, hook = block.get_submodule(where), HOOKS[what]
    if kind == "pre":
        module.register_forward_pre_hook(lambda module, inputs: hook(inputs[0]))
    else:
        module.register_forward_hook(lambda module, inputs, output: hook(output))
    return block


FORMS = {
    **{f"constant: {k}, {u}": (lambda k=k, u=u: Block(constant(k, u))) for k in CONSTANTS for u in USES},
    **{f"in place: {o}, {b}": (lambda o=o, b=b: in_place(o, b)) for o in IN_PLACE for b in BOTH},
    **{f"shape: {k}": (lambda f=f: Block(f)) for k, f in SHAPES.items()},
    **{f"width: {k}": (lambda f=f: Block(f)) for k, f in WIDTHS.items()},
    **{f"training: {k}": (lambda f=f: Block(f)) for k, f in TRAINING.items()},
    **{
        f"{p} hook: {k}, {w}": (lambda k=k, w=w, p=p: hooked(k, w, p))
        for k in HOOKS for w in ("a", "a.0", "b", "norm", "") for p in ("forward", "pre")
    },
}  # fmt: skip
KINDS = sorted({name.split(":")[0] for name in FORMS})


@dataclass
class Outputs:
    logits: torch.Tensor
    others: dict


class Net(nn.Module):
    """A stem, the blocks, plain or residual or concatenated, and a head of some kind."""

    def __init__(self, names, joins, head):
        super().__init__()
        self.stem, self.blocks, self.tail = conv_bn(3, 8), nn.ModuleList(FORMS[name]() for name in names), conv_bn(8, 6)
        self.joined = nn.ModuleList(nn.Conv2d(16, 8, 1) if join == "concatenated" else nn.Identity() for join in joins)
        self.joins, self.head, self.fc, self.second = joins, head, nn.Linear(6, 5), nn.Linear(8, 3)

    def forward(self, x):
        x = F.relu(self.stem(x))
        for block, join, joined in zip(self.blocks, self.joins, self.joined, strict=True):
            y = block(x.clone())
            x = F.relu(x + y if join == "residual" else joined(torch.cat([x, y], 1)) if join == "concatenated" else y)
        logits = self.fc(F.relu(self.tail(x)).mean((2, 3)))
        if self.head == "one":
            return logits
        second = self.second(x.mean((2, 3)))
        if self.head == "dataclass":
            return Outputs(logits, {"second": second})
        return {"out": logits, "second": second} if self.head == "dict" else (logits, [second])


def flat(outputs):
    if torch.is_tensor(outputs):
        return [outputs]
    if isinstance(outputs, Outputs):
        return [outputs.logits, *outputs.others.values()]
    return [t for o in (outputs.values() if isinstance(outputs, dict) else outputs) for t in flat(o)]


def check(names, joins=None, head="one", seed=0):
    """Number of removable units, or None if refused. Fails on a wrong cut, a traceback, or a nameless protection."""
    torch.manual_seed(seed)
    model = randomise(Net(names, joins or ["plain"] * len(names), head).double().eval(), seed)
    x = torch.randn(3, 3, 6, 6, dtype=torch.double)
    try:
        graph = ChannelGraph(model, x[:1])
    except InputError as error:
        assert "\n" not in str(error)
        return None
    for name, info in graph.layers.items():
        assert info.removable.all() or info.reason, name
    for fraction in (0.3, 0.6):
        units = random_units(graph, fraction, seed)
        gates = torch.ones(len(graph.units), dtype=torch.double)
        gates[[unit.index for unit in units]] = 0
        try:
            smaller = graph.remove(units)
        except InputError as error:
            assert "cannot be removed" in str(error)
            return None
        with torch.no_grad():
            with graph.gated(gates):
                expected = flat(model(x))
            got = flat(smaller(x))
        assert [t.shape for t in got] == [t.shape for t in expected]
        for a, b in zip(got, expected, strict=True):
            assert (a - b).norm() <= 1e-8 * b.norm(), names
    return len(graph.units)


def drawn(seed):
    draw = random.Random(seed)
    kinds = [draw.choice(KINDS) for _ in range(draw.randint(1, 3))]
    names = [draw.choice([name for name in FORMS if name.split(":")[0] == kind]) for kind in kinds]
    joins = [draw.choice(["plain", "residual", "concatenated"]) for _ in names]
    return names, joins, draw.choice(["one", "tuple", "dict", "dataclass"])


@pytest.mark.parametrize(
    "name",
    [
        *(f"constant: {shape}, concatenate" for shape in CONSTANTS),
        *(f"pre hook: {hook}, b" for hook in HOOKS),
        "in place: Hardsigmoid, added",
        "in place: Threshold, first alone",
        "width: fan out",
        "width: norm's width",
    ],
)
def test_what_once_misled(name):
    assert check([name])  # the other layers stay prunable


@pytest.mark.parametrize("seed", range(DRAWS))
def test_exact_protected_or_refused(seed):
    check(*drawn(seed), seed=seed)
