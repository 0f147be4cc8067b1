"""Zeroed gates are removed channels, on networks of every kind of block; and what surgery promises besides."""

import copy
import random

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.prune
from torch import nn
from torchvision.ops import FrozenBatchNorm2d, SqueezeExcitation

from taylor_pruning.errors import InputError
from taylor_pruning.surgery.cut import cut
from taylor_pruning.surgery.graph import ChannelGraph

SIZE = 12


# -- what every network is checked for -------------------------------------------------------------------------------


def randomise(model, seed=0):
    """Weights and statistics away from their initial ones and zeros, so that nothing cancels by accident."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if not tensor.is_floating_point():
            continue
        noise = torch.rand(tensor.shape, generator=generator, dtype=torch.double).to(tensor)
        if name.endswith("running_var"):
            tensor.data = 0.5 + noise
        elif sum(size > 1 for size in tensor.shape) < 2:
            tensor.data = tensor.data + noise - 0.3
    return model


def random_units(graph, fraction, seed):
    """A random share of the units that leaves every layer a filter."""
    order = torch.randperm(len(graph.units), generator=torch.Generator().manual_seed(seed)).tolist()
    left = {name: info.filters for name, info in graph.layers.items()}
    chosen = []
    for unit in (graph.units[i] for i in order):
        names = [name for name, _ in unit.filters]
        if len(chosen) < fraction * len(order) and all(left[n] > names.count(n) for n in names):
            chosen.append(unit)
            for name in names:
                left[name] -= 1
    return chosen


def check_law(model, x, seeds=(0, 1), fractions=(0.3, 0.6), train=True, example=None, **options):
    """Closing gates gives the logits of the cut network, which shrinks, keeps its keys, and trains."""
    graph = ChannelGraph(model, x[:1] if example is None else example, **options)
    model.eval()
    dense = sum(p.numel() for p in model.parameters())
    for seed, fraction in [(s, f) for s in seeds for f in fractions]:
        units = random_units(graph, fraction, seed)
        gates = torch.ones(len(graph.units), dtype=x.dtype)
        gates[[unit.index for unit in units]] = 0
        smaller = graph.remove(units)
        with torch.no_grad(), graph.gated(gates):
            expected = model(x)
        logits = smaller(x)
        assert (logits - expected).norm() <= 1e-5 * expected.norm()
        assert smaller.state_dict().keys() == model.state_dict().keys()
        if units:
            assert sum(p.numel() for p in smaller.parameters()) < dense
        used = [p for p in smaller.parameters() if p.requires_grad]
        gradients = torch.autograd.grad(logits.square().mean(), used, allow_unused=True)
        assert all(torch.isfinite(g).all() for g in gradients if g is not None)
        assert any(g is not None for g in gradients)
    if train:
        output = smaller.train()(x)
        for logits in output if isinstance(output, tuple) else [output]:
            assert torch.isfinite(logits).all()
            logits.sum().backward(retain_graph=True)
    return graph


@torch.fx.wrap
def double_zeros(*sizes):
    return torch.zeros(*sizes, dtype=torch.double)


@torch.fx.wrap
def centre_if_bright(x):
    """Control flow that depends on the data; its name is nobody's."""
    return x - x.mean() if x.mean() > 0 else x


# -- blocks: each takes [N, c, h, w] and gives [N, out, h', w'] -------------------------------------------------------


def conv_bn(c_in, c_out, kernel=3, **options):
    return nn.Sequential(nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2, **options), nn.BatchNorm2d(c_out))


class Block(nn.Module):
    """A block with two conv - BatchNorm pairs at hand; `out` is its number of output channels."""

    def __init__(self, c):
        super().__init__()
        self.out = c
        self.a, self.b = conv_bn(c, c), conv_bn(c, c)


class Plain(Block):
    def forward(self, x):
        return F.relu(self.b(F.relu(self.a(x), inplace=True)))


class Residual(Block):
    def forward(self, x):
        x = torch.relu(x)
        return F.relu(self.b(F.leaky_relu(self.a(x), 0.1)) + x)


class AddInPlace(Block):
    """The sum's result is not taken: later readers see it through the tensor that it changed."""

    def forward(self, x):
        out = self.b(F.relu(self.a(x)))
        out.add_(x)
        return out.relu()


class AliasInPlace(Block):
    def forward(self, x):
        out = alias = self.a(x)
        out += self.b(x)
        return torch.cat([out, alias], 1)

    def __init__(self, c):
        super().__init__(c)
        self.out = 2 * c


class Projection(Block):
    def __init__(self, c):
        super().__init__(c)
        self.shortcut = nn.Conv2d(c, c, 1, bias=False)

    def forward(self, x):
        return torch.add(self.b(F.relu(self.a(x))), self.shortcut(x)).relu_()


class PreActivation(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.out = c
        self.bn1, self.conv1 = nn.BatchNorm2d(c), nn.Conv2d(c, c, 3, padding=1)
        self.bn2, self.conv2 = nn.BatchNorm2d(c), nn.Conv2d(c, c, 3, padding=1)

    def forward(self, x):
        out = self.conv1(F.relu(self.bn1(x)))
        return self.conv2(F.relu(self.bn2(out))) + x


class OptionA(Block):
    """Shortcut without weights: a stride and channels of zeros."""

    def __init__(self, c):
        super().__init__(c)
        self.out = 2 * c
        self.b = conv_bn(c, 2 * c)

    def forward(self, x):
        pad = self.out // 4
        return F.relu(self.b(F.relu(self.a(x))) + F.pad(x, (0, 0, 0, 0, pad, pad)))


class FixedOptionA(OptionA):
    """As many zeros as the code says, which no cut changes."""

    def forward(self, x):
        return F.relu(self.b(F.relu(self.a(x))) + F.pad(x, (0, 0, 0, 0, 4, 4)))


class ZerosConcat(Block):
    """The same with a tensor of zeros, which fx can only trace in a function kept whole."""

    def __init__(self, c):
        super().__init__(c)
        self.out = 2 * c
        self.b = conv_bn(c, 2 * c)

    def forward(self, x):
        zeros = double_zeros(x.size(0), x.size(1), x.size(2), x.size(3))
        return F.relu(self.b(F.relu(self.a(x))) + torch.cat([x, zeros], 1))


class UNet(Block):
    """Down, up by a transposed conv, concat with what came before."""

    def __init__(self, c):
        super().__init__(c)
        self.out = 2 * c
        self.up = nn.ConvTranspose2d(c, c, 2, stride=2)

    def forward(self, x):
        x = self.a(x)
        up = F.relu(self.up(self.b(F.max_pool2d(x, 2))))
        up = F.interpolate(up, size=x.shape[2:])
        return torch.cat((x, up), dim=1)


class Dense(Block):
    def forward(self, x):
        return torch.cat([x, F.relu(self.a(x))], 1)

    def __init__(self, c):
        super().__init__(c)
        self.out = 2 * c


class Grouped(Block):
    def __init__(self, c):
        super().__init__(c)
        self.b = conv_bn(c, c, groups=2)

    def forward(self, x):
        return self.b(F.relu(self.a(x))).relu()


class Depthwise(Block):
    def __init__(self, c):
        super().__init__(c)
        self.b = conv_bn(c, 2 * c, groups=c)
        self.c = conv_bn(2 * c, c)

    def forward(self, x):
        return x + self.c(F.relu6(self.b(F.relu6(self.a(x)))))


class TransposedGrouped(Block):
    def __init__(self, c):
        super().__init__(c)
        self.up, self.each = nn.ConvTranspose2d(c, c, 3, padding=1, groups=2), nn.ConvTranspose2d(c, c, 1, groups=c)

    def forward(self, x):
        return self.each(self.up(self.b(self.a(x)).relu(), output_size=x.shape[2:]))


class Excitation(Block):
    def __init__(self, c):
        super().__init__(c)
        self.se = SqueezeExcitation(c, 2, scale_activation=nn.Hardsigmoid)

    def forward(self, x):
        return F.hardswish(self.b(self.se(self.a(x))))


class ExpandedExcitation(Block):
    """Linear layers, literal reshapes by sizes read off another tensor, expand_as."""

    def __init__(self, c):
        super().__init__(c)
        self.fc = nn.Sequential(nn.Linear(c, 3), nn.ReLU(inplace=True), nn.Linear(3, c), nn.Sigmoid())

    def forward(self, x):
        x = self.a(x)
        b, c, _, _ = x.size()
        y = self.fc(F.adaptive_avg_pool2d(x, 1).view(b, c)).view(b, c, 1, 1)
        return self.b(x * y.expand_as(x))


class ConvExcitation(Block):
    """A channel gate from a conv whose output takes its size from the tensor that it will gate."""

    def __init__(self, c):
        super().__init__(c)
        self.squeeze = nn.Conv1d(1, 1, 3, padding=1)

    def forward(self, x):
        x = self.a(x)
        y = x.mean((2, 3)).unsqueeze(1)
        y = torch.sigmoid(self.squeeze(y)).squeeze(1)
        return self.b(x * y[:, :, None, None])


class SpatialAttention(Block):
    def __init__(self, c):
        super().__init__(c)
        self.map = nn.Conv2d(2, 1, 3, padding=1)

    def forward(self, x):
        x = self.a(x)
        pooled = torch.cat([torch.mean(x, 1, keepdim=True), torch.max(x, dim=1, keepdim=True)[0]], 1)
        return self.b(x) * self.map(pooled).sigmoid()


class ChannelTimesSpace(Block):
    """[N, c, 1, 1] x [N, 1, h, w]: the larger factor is not the one that carries the channels."""

    def __init__(self, c):
        super().__init__(c)
        self.channel, self.map = nn.Conv2d(c, c, 1), nn.Conv2d(c, 1, 3, padding=1)

    def forward(self, x):
        attention = self.channel(F.adaptive_avg_pool2d(x, 1)) * self.map(x)
        return self.b(attention.relu()) + self.a(x)


class Highway(Block):
    def forward(self, x):
        t = torch.sigmoid(self.a(x))
        return t * F.relu(self.b(x)) + (1 - t) * x


class SplitShuffle(Block):
    def forward(self, x):
        one, two = x.chunk(2, dim=1)
        x = torch.cat([self.side(one), two], 1)
        b, c, h, w = x.shape
        x = x.view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, -1, h, w)
        return self.b(torch.relu(self.a(x)))

    def __init__(self, c):
        super().__init__(c)
        self.side = conv_bn(c // 2, c // 2)


class SplitByNumber(Block):
    def forward(self, x):
        x = self.a(x)
        one, two = torch.split(x, x.size(1) // 2, dim=1)
        three = self.b(x)[:, : self.out // 2]
        return torch.cat([one * torch.tanh(two), three], 1)


class PixelShuffled(Block):
    def __init__(self, c):
        super().__init__(c)
        self.up, self.down = nn.Conv2d(c, 4 * c, 1), nn.PixelUnshuffle(2)
        self.merge = nn.Conv2d(4 * c, c, 1)

    def forward(self, x):
        x = F.relu(F.pixel_shuffle(self.up(x), 2))
        return self.merge(self.down(x))


class LiteralView(Block):
    def forward(self, x):
        x = self.a(x)
        x = x.view(x.size(0), self.out, x.size(2), -1)
        return self.b(x)


class GroupedBatch(Block):
    """Groups moved into the batch and back."""

    def forward(self, x):
        x = self.a(x)
        b, c, h, w = x.shape
        x = x.reshape(b * 2, c // 2, h, w).relu()
        return self.b(x.reshape(b, c, h, w))


class ForeignSize(Block):
    """A view by a number of channels of another tensor."""

    def forward(self, x):
        y = self.b(x)
        b, c, h, w = self.a(x).shape
        return y.view(b, c, h, w).relu()


class SplitInTwoWays(Block):
    """No number in the code says which of two dimensions shrinks."""

    def forward(self, x):
        x = self.a(x)
        b, c, h, w = x.shape
        return self.b(x.view(b, c // 4, -1, h, w).transpose(1, 2).reshape(b, c, h, w))


class ForeignSplit(Block):
    """Parts as long as another tensor has channels."""

    def forward(self, x):
        one, two = torch.cat([self.b(x), x.abs()], 1).split(self.a(x).size(1), dim=1)
        return one - two


class TimesCount(Block):
    def forward(self, x):
        return self.b(F.relu(self.a(x)) * x.size(1))


class Power(Block):
    def forward(self, x):
        return self.b(2 ** torch.tanh(self.a(x)))


class ScaledByCount(Block):
    def forward(self, x):
        x = F.relu(self.a(x))
        return self.b(x / x.size(1) ** 0.5)


class ParametricRelu(Block):
    def __init__(self, c):
        super().__init__(c)
        self.act, self.one = nn.PReLU(c), nn.PReLU()

    def forward(self, x):
        return self.one(self.b(self.act(self.a(x))))


class Norms(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.out = c
        self.convs = nn.ModuleList(nn.Conv2d(c, c, 3, padding=1) for _ in range(6))
        self.norms = nn.ModuleList(
            [nn.GroupNorm(c, c), nn.InstanceNorm2d(c), nn.InstanceNorm2d(c, affine=True, track_running_stats=True),
             FrozenBatchNorm2d(c), nn.GroupNorm(2, c), nn.GroupNorm(c, c, affine=False)]
        )  # fmt: skip

    def forward(self, x):
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.relu(norm(conv(x)))
        return x


class ChannelsLast(nn.Module):
    """As in ConvNeXt: LayerNorm and linear layers over the last dimension, a layer scale."""

    def __init__(self, c):
        super().__init__()
        self.out = c
        self.mix, self.norm = nn.Conv2d(c, c, 3, padding=1, groups=c), nn.LayerNorm(c)
        self.up, self.down = nn.Linear(c, 2 * c), nn.Linear(2 * c, c)
        self.scale = nn.Parameter(torch.ones(c))

    def forward(self, x):
        y = self.norm(self.mix(x).permute(0, 2, 3, 1))
        y = self.scale * self.down(F.gelu(self.up(y)))
        return x + y.permute(0, 3, 1, 2)


class Shared(Block):
    """One conv, one BatchNorm and one ReLU, each used twice."""

    def forward(self, x):
        return self.b(F.relu(self.a(F.relu(self.a(x)))))


class Tied(Block):
    def __init__(self, c):
        super().__init__(c)
        self.b[0].weight = self.a[0].weight

    def forward(self, x):
        return self.b(F.relu(self.a(x)))


class RawParameters(Block):
    def __init__(self, c):
        super().__init__(c)
        self.scale, self.gamma = nn.Parameter(torch.ones(c, 1, 1)), nn.Parameter(torch.ones(1))
        self.register_buffer("deviation", torch.ones(c))

    def forward(self, x):
        x = F.relu(self.a(x) * self.scale)
        x = self.gamma * self.b(x) / self.deviation.view(1, -1, 1, 1)
        return torch.maximum(x, self.a(x))


class RawShift(Block):
    """A shift that no gate closes, and a tensor that is neither parameter nor buffer."""

    def __init__(self, c):
        super().__init__(c)
        self.shift, self.loose = nn.Parameter(torch.zeros(1, c, 1, 1)), torch.ones(c, 1, 1, dtype=torch.double)

    def forward(self, x):
        return self.b(self.a(x) + self.shift) * self.loose


class FunctionalConv(Block):
    """A weight that a layer and a function both read."""

    def forward(self, x):
        x = F.relu(self.a(x))
        return self.b(F.conv2d(x, self.a[0].weight, padding=1))


class Parametrized(Block):
    def __init__(self, c):
        super().__init__(c)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Conv2d(c, c, 3, padding=1))

    def forward(self, x):
        return self.b(self.normed(F.relu(self.a(x))))


class SelfAttention(Block):
    def forward(self, x):
        b, c, h, w = x.size()
        q, k = self.a(x).view(b, c, -1), self.b(x).view(b, c, h * w)
        return torch.bmm(q, torch.softmax(torch.bmm(k.transpose(1, 2), q), -1)).view(b, c, h, w) + x


class Nested(Block):
    def __init__(self, c):
        super().__init__(c)
        self.nest = nn.Sequential(nn.Sequential(self.a, nn.ReLU()), nn.Sequential(nn.Sequential(self.b), nn.Hardtanh()))

    def forward(self, x):
        return F.avg_pool2d(F.pad(F.dropout(self.nest(x), 0.1, self.training), (1, 1, 1, 1), mode="reflect"), 3, 1)


class Siamese(Block):
    """Two streams side by side in the batch."""

    def forward(self, x):
        y = F.relu(self.a(torch.cat([x, x.flip(3)], 0)))
        one, two = y.chunk(2, 0)
        return self.b(one + two)


class Broadcast(Block):
    """One channel repeated over all, by expand, and a sum with a map."""

    def __init__(self, c):
        super().__init__(c)
        self.one = nn.Conv2d(c, 1, 1)

    def forward(self, x):
        x = self.a(x)
        one = self.one(x)
        return self.b(one.expand(-1, x.size(1), -1, -1) + x.relu()) + one


class InPlaceBreaking(Block):
    """Operations in place, their results dropped, that do not keep zeros."""

    def forward(self, x):
        x = self.a(x)
        x.sigmoid_()
        y = self.b(x)
        y.add_(1.0)
        y.mul_(2.0)
        return y


class Wrapped(Block):
    def forward(self, x):
        return self.b(centre_if_bright(F.relu(self.a(x))))


class NewZeros(Block):
    def forward(self, x):
        x = self.a(x)
        return self.b(torch.stack([x, x.new_zeros(x.shape)], 1).sum(1))


class Clamped(Block):
    """Functions that do not keep zeros, in front of a conv and in front of a BatchNorm."""

    def __init__(self, c):
        super().__init__(c)
        self.norm, self.soft = nn.BatchNorm2d(c), nn.Softplus()

    def forward(self, x):
        x = self.norm(F.softplus(self.a(x)) ** 2)
        return self.b(2 - self.soft(x)) + 2 ** torch.clamp(x, 0.5, 1)


class Indices(Block):
    """Pooling that gives two tensors, and attention that gives a pair."""

    def __init__(self, c):
        super().__init__(c)
        self.pool, self.unpool = nn.MaxPool2d(2, return_indices=True), nn.MaxUnpool2d(2)
        self.attention = nn.MultiheadAttention(c, 2, batch_first=True)

    def forward(self, x):
        x = self.a(x)
        y, indices = self.pool(x)
        x = self.unpool(y, indices, output_size=x.shape[2:])
        x = x.flatten(2).transpose(1, 2)
        y, _ = self.attention(x, x, x)
        return self.b(y.transpose(1, 2).reshape(x.size(0), self.out, 6, -1).relu())


BLOCKS = [
    kind for kind in vars().copy().values()
    if isinstance(kind, type) and issubclass(kind, nn.Module) and kind.__module__ == __name__ and kind is not Block
]  # fmt: skip


class Net(nn.Module):
    """A stem, blocks, and a head of one of two kinds."""

    def __init__(self, kinds, c=8, head="pool", classes=5):
        super().__init__()
        self.stem = conv_bn(3, c)
        blocks = []
        for kind in kinds:
            blocks.append(kind(c))
            if blocks[-1].out > 16:
                blocks.append(nn.Conv2d(blocks[-1].out, c, 1))
            else:
                c = blocks[-1].out
        self.blocks, self.tail = nn.Sequential(*blocks), conv_bn(c, 6)
        self.head, self.classifier = head, nn.Linear(6 if head == "pool" else 6 * 16, classes)

    def forward(self, x, features=False):
        x = F.relu(self.tail(self.blocks(F.relu(self.stem(x)))))
        if features:
            return x
        x = x.mean([2, 3]) if self.head == "pool" else F.adaptive_max_pool2d(x, 4)
        return self.classifier(x.reshape(x.size(0), -1))


def net(*kinds, seed=0, **options):
    torch.manual_seed(seed)
    return randomise(Net(kinds, **options).double().eval(), seed)


def images(n=3):
    return torch.randn(n, 3, SIZE, SIZE, dtype=torch.double, generator=torch.Generator().manual_seed(5))


# -- the law ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", BLOCKS, ids=lambda kind: kind.__name__)
def test_zeroed_gates_are_removed_channels(kind):
    graph = check_law(net(kind), images())
    assert graph.layers["tail.0"].reason is None  # the block protects no more than itself


@pytest.mark.parametrize("seed", range(16))
def test_random_networks(seed):
    draw = random.Random(seed)
    kinds = [draw.choice(BLOCKS) for _ in range(draw.randint(2, 5))]
    model = net(*kinds, seed=seed, c=draw.choice([4, 8, 12]), head=draw.choice(["pool", "flatten"]))
    check_law(model, images(2), seeds=(seed,), prune_linear=draw.random() < 0.5)


def removable(graph, *names):
    return [int(graph.layers[f"blocks.0.{name}"].removable.sum()) for name in names]


@pytest.mark.parametrize(
    ("kind", "names", "expected"),
    [
        (Plain, ["a.0", "b.0"], [8, 8]),
        (Residual, ["a.0", "b.0"], [8, 8]),
        (AddInPlace, ["a.0", "b.0"], [8, 8]),
        (OptionA, ["a.0", "b.0"], [8, 16]),
        (FixedOptionA, ["a.0", "b.0"], [8, 8]),  # of 16: those that meet padding stay
        (UNet, ["a.0", "b.0", "up"], [8, 8, 8]),
        (Grouped, ["a.0", "b.0"], [8, 8]),
        (Excitation, ["a.0", "se.fc1", "b.0"], [8, 2, 8]),
        (
            ExpandedExcitation,
            ["a.0", "b.0"],
            [8, 8],
        ),  # its gate comes from linear layers, whose outputs go with the filters
        (SpatialAttention, ["a.0", "b.0", "map"], [0, 8, 0]),
        (ChannelTimesSpace, ["channel", "a.0", "map"], [8, 8, 0]),
        (Highway, ["a.0", "b.0"], [8, 8]),
        (SplitShuffle, ["a.0", "b.0"], [8, 8]),
        (PixelShuffled, ["up", "merge"], [32, 8]),
        (LiteralView, ["a.0", "b.0"], [8, 8]),
        (ParametricRelu, ["a.0", "b.0"], [8, 8]),
        (Norms, ["convs.0", "convs.1", "convs.2", "convs.3", "convs.4", "convs.5"], [8, 8, 8, 8, 8, 8]),
        (Shared, ["a.0", "b.0"], [8, 8]),
        (FunctionalConv, ["a.0", "b.0"], [8, 8]),
        (Parametrized, ["a.0", "normed", "b.0"], [8, 8, 8]),
        (Nested, ["nest.0.0.0", "nest.1.0.0.0"], [8, 8]),
        (Wrapped, ["a.0", "b.0"], [0, 8]),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_what_may_go(kind, names, expected):
    graph = ChannelGraph(net(kind), images(1))
    names = ["a.0" if (kind, n) == (Nested, "nest.0.0.0") else "b.0" if kind is Nested else n for n in names]
    assert removable(graph, *names) == expected
    for name, number in zip(names, expected, strict=True):
        assert (graph.layers[f"blocks.0.{name}"].reason is None) == (number == graph.layers[f"blocks.0.{name}"].filters)


def test_coupled_filters_share_a_unit():
    graph = ChannelGraph(net(Residual), images(1))
    assert {("stem.0", 3), ("blocks.0.b.0", 3)} in [set(unit.filters) for unit in graph.units]
    graph = ChannelGraph(net(Grouped), images(1))
    assert {("blocks.0.b.0", 1), ("blocks.0.b.0", 5)} in [set(unit.filters) for unit in graph.units]


# -- the cut ---------------------------------------------------------------------------------------------------------


def test_shapes_and_attributes_shrink():
    model = net(Depthwise, Grouped, Norms, ParametricRelu)
    graph = ChannelGraph(model, images(1))
    smaller = graph.remove(random_units(graph, 0.5, 0))
    for name, module in smaller.named_modules():
        if isinstance(module, nn.Conv2d):
            assert module.weight.shape[:2] == (module.out_channels, module.in_channels // module.groups)
        if isinstance(module, (nn.BatchNorm2d, nn.InstanceNorm2d)) and module.running_mean is not None:
            assert module.num_features == len(module.running_mean)
        if isinstance(module, nn.PReLU):
            assert module.num_parameters == len(module.weight)
        assert type(module) is type(model.get_submodule(name))
    kept = smaller.get_submodule("blocks.2.convs.1").out_channels
    assert kept < 8 and smaller.get_submodule("blocks.2.norms.1").num_features == kept
    depthwise = smaller.blocks[0].b[0]
    assert depthwise.out_channels == 2 * depthwise.groups < 16 and depthwise.groups == depthwise.in_channels


class Folded(nn.Module):
    """A conv that is applied with the scale and shift of its norm folded into the kernel; the norm itself is not called."""

    def __init__(self):
        super().__init__()
        self.a, self.n, self.b = nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.Conv2d(6, 4, 3)

    def forward(self, x):
        scale = self.n.weight / (self.n.running_var + self.n.eps).sqrt()
        x = F.conv2d(x, self.a.weight * scale[:, None, None, None], self.n.bias - self.n.running_mean * scale)
        return self.b(F.relu(x))


def test_a_norm_that_is_not_called_knows_its_channels():
    graph = check_law(randomise(Folded()).double(), images())
    smaller = graph.remove({"a": [0, 4]})
    assert smaller.n.num_features == len(smaller.n.weight) == 4 and graph.model.n.num_features == 6


class Scale(nn.Module):
    """A scale by channel, divided by a number that is of the function and no width."""

    def __init__(self):
        super().__init__()
        self.weight, self.num_features = nn.Parameter(torch.rand(6)), 6

    def forward(self, x):
        return x * self.weight[:, None, None] / self.num_features**0.5


def test_a_number_that_enters_the_forward_stays():
    graph = check_law(randomise(nn.Sequential(nn.Conv2d(3, 6, 3), Scale(), nn.Conv2d(6, 4, 3))).double(), images())
    assert graph.layers["0"].reason is None
    assert graph.remove({"0": [0, 4]})[1].num_features == 6


def test_weights_keep_their_memory_format():
    model = net(Plain, Depthwise).to(memory_format=torch.channels_last)
    graph = ChannelGraph(model, images(1))
    smaller = graph.remove(random_units(graph, 0.4, 0))
    weights = [p for p in smaller.parameters() if p.dim() == 4]
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in weights)
    assert not all(p.is_contiguous() for p in weights)


def test_kept_filters_keep_their_weights():
    model = net(Plain)
    model.stem[0].weight.requires_grad_(False)
    model.classifier.weight.grad = torch.ones_like(model.classifier.weight)
    graph = ChannelGraph(model, images(1))
    smaller = graph.remove({"stem.0": [0, 2], "blocks.0.a.0": [7]})
    assert torch.equal(smaller.stem[0].weight, model.stem[0].weight[[1, 3, 4, 5, 6, 7]])
    assert torch.equal(smaller.blocks[0].a[0].weight, model.blocks[0].a[0].weight[:7, [1, 3, 4, 5, 6, 7]])
    assert torch.equal(smaller.stem[1].running_var, model.stem[1].running_var[[1, 3, 4, 5, 6, 7]])
    assert not smaller.stem[0].weight.requires_grad and smaller.stem[0].bias.requires_grad
    assert all(p.grad is None for p in smaller.parameters())  # those of the dense network fit no more
    assert smaller.classifier.weight.data_ptr() != model.classifier.weight.data_ptr()


def test_tied_weights_stay_tied():
    model = net(Tied)
    graph = ChannelGraph(model, images(1))
    block = graph.remove(random_units(graph, 0.3, 0)).blocks[0]
    assert block.a[0].weight is block.b[0].weight and len(block.a[0].weight) < 8


def test_cutting_twice():
    model, x = net(Residual, Dense, Excitation), images()
    graph = ChannelGraph(model, x[:1])
    check_law(graph.remove(random_units(graph, 0.4, 0)), x)


def test_plan_and_units_are_one():
    graph = ChannelGraph(net(Residual, Grouped), images(1))
    units = random_units(graph, 0.4, 0)
    plan = graph.plan_of([unit.index for unit in units])
    assert graph.units_of(plan) == graph.units_of(units) == sorted(unit.index for unit in units)
    assert all(indices == sorted(indices) for indices in plan.values())


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"blocks.0.b.0": [1]}, "must go together"),
        ({"blocks.0.a.0": range(8)}, "last channel"),
        ({"blocks.0.a.0": [8]}, "no such filter"),
        ({"blocks.0.a.0": [-1]}, "no such filter"),
        ({"blocks.9": [0]}, "not a prunable layer"),
        ({"classifier": [0]}, "not a prunable layer"),
        ({"blocks.0.a.0": torch.arange(8) > 4}, "list of filter indices"),  # not the filters 0 and 1
        ({"blocks.0.a.0": [0.5]}, "list of filter indices"),
        ({"blocks.0.a.0": 3}, "list of filter indices"),
        ({"blocks.0.a.0": "3"}, "list of filter indices"),
        ({"blocks.0.a.0": [[3]]}, "list of filter indices"),
        (None, "the plan is None"),
        ({"blocks.2.b.0": [0], "blocks.2.a.0": [1]}, "meets padding"),
    ],
)
def test_impossible_plans(plan, message):
    graph = ChannelGraph(net(Residual, Plain, FixedOptionA), images(1))
    with pytest.raises(InputError, match=message):
        graph.remove(plan)


class ShiftOfSome(Block):
    """A root parameter that runs along the first four channels."""

    def __init__(self, c):
        super().__init__(c)
        self.shift, self.rest = nn.Parameter(torch.randn(4)), c - 4

    def forward(self, x):
        return self.b(self.a(x) + F.pad(self.shift, (0, self.rest)).view(1, -1, 1, 1))


def test_a_parameter_along_some_filters_keeps_a_channel():
    graph = check_law(net(ShiftOfSome), images())
    info = graph.layers["blocks.0.a.0"]
    assert info.removable.tolist() == [False] + [True] * 7
    assert graph.remove([u for u in graph.units if u.filters[0][0] == "blocks.0.a.0"]).blocks[0].shift.shape == (1,)


def test_a_tensor_of_the_network_itself_is_named_where_it_would_be_emptied():
    graph = ChannelGraph(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 3)), torch.zeros(1, 3, 8, 8))
    tensors = {("scale", 0): torch.arange(4)}
    with pytest.raises(InputError, match="^scale would lose its last channel"):
        cut(graph.model, tensors, {}, {}, {}, {}, torch.tensor([False] * 4 + [True]))


def test_units_of_another_graph():
    with pytest.raises(InputError, match="no unit of this graph"):
        ChannelGraph(net(Plain), images(1)).remove(ChannelGraph(net(Residual), images(1)).units[:1])


def test_gates_are_one_a_unit(plain_network, images):
    """One less would be taken for that of the channels which have none."""
    graph = ChannelGraph(plain_network, images)
    for gates, kind in (
        (torch.ones(10), "a tensor .10"),
        (torch.ones(11, 1), "a tensor"),
        ([1.0] * 11, "a list of 11"),
    ):
        with pytest.raises(InputError, match=rf"the gates are {kind}.*give a tensor \[11\], one"), graph.gated(gates):
            pass


def test_exclude():
    model = net(Plain, Residual, Depthwise)
    graph = ChannelGraph(model, images(1), exclude=["stem.*", "blocks.2.b.0"])
    assert graph.layers["stem.0"].reason == "excluded by stem.*" and not graph.layers["stem.0"].removable.any()
    assert removable(graph, "a.0", "b.0") == [8, 8]
    assert graph.layers["blocks.2.a.0"].reason == "excluded by blocks.2.b.0"  # by its depthwise conv
    with pytest.raises(InputError, match="no_such matches no layer"):
        ChannelGraph(model, images(1), exclude=["no_such"])
    for word in ("stem.0", 3):
        with pytest.raises(InputError, match=f"exclude must be a list of names or patterns, not {word!r}"):
            ChannelGraph(model, images(1), exclude=word)


@pytest.mark.parametrize("name", ["verify", "prune_linear", "prune_heads"])
def test_a_switch_is_on_or_off(name):
    """None would leave the proofs out."""
    with pytest.raises(InputError, match=f"{name} must be True or False, not None"):
        ChannelGraph(net(Plain), images(1), **{name: None})


def test_indices_of_torch_and_numpy_are_indices():
    graph = ChannelGraph(net(Residual), images(1))
    for indices in (torch.tensor([1, 5]), torch.tensor([1, 5]).numpy(), [torch.tensor(1), 5], {1, 5}):
        assert graph.units_of({"blocks.0.a.0": indices}) == graph.units_of({"blocks.0.a.0": [1, 5]})


# -- gates -----------------------------------------------------------------------------------------------------------


def test_gates_of_every_sample():
    model, x = net(Residual, Shared, ChannelsLast, Siamese), images(3)
    graph = ChannelGraph(model, x[:1], prune_linear=True)
    gates = torch.rand(3, len(graph.units), dtype=torch.double)
    with torch.no_grad():
        with graph.gated(gates):
            together = model(x)
        for i in range(3):
            with graph.gated(gates[i]):
                torch.testing.assert_close(model(x[i : i + 1]), together[i : i + 1])
    assert any(site.dim == 3 for site in graph.sites)


def test_open_gates_change_nothing_and_give_gradients():
    model, x = net(Plain, Residual), images()
    graph = ChannelGraph(model, x[:1])
    gates = torch.ones(len(graph.units), dtype=torch.double, requires_grad=True)
    seen = []
    with graph.gated(gates, on_activation=lambda site, output: seen.append((site, output.shape))):
        logits = model(x)
    assert torch.equal(logits, model(x))
    assert [site for site, _ in seen] == list(graph.activations)
    assert all(shape[site.dim] == len(site.units) for site, shape in seen)
    (gradient,) = torch.autograd.grad(logits.square().sum(), gates)
    assert (gradient != 0).double().mean() > 0.8  # some filters are dead behind their ReLU


def test_the_forward_comes_back_when_it_raises():
    model = net(Shared)
    graph = ChannelGraph(model, images(1))
    gates = torch.rand(len(graph.units), dtype=torch.double)
    before = dict(vars(model))
    with pytest.raises(InputError, match="to have 3 channels"), graph.gated(gates):
        model(torch.zeros(1, 7, SIZE, SIZE, dtype=torch.double))
    assert vars(model) == before and not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("mode", ["pre-hook", "scale", "roll", "norm"])
def test_forward_hooks_that_compute_are_traced(mode):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
    )
    scale = torch.rand(1, 8, 1, 1, dtype=torch.double)
    if mode == "pre-hook":
        model[2].register_forward_pre_hook(lambda module, inputs: (inputs[0] + 0.5,))
    elif mode == "scale":
        model[0].register_forward_hook(lambda module, inputs, output: output * scale)
    elif mode == "roll":
        model[1].register_forward_hook(lambda module, inputs, output: output.roll(1, 1))
    else:
        model[1].register_forward_hook(lambda module, inputs, output: F.layer_norm(output, output.shape[1:]))
    graph = check_law(randomise(model.double()), images())
    assert int(graph.layers["0"].removable.sum()) == (8 if mode == "pre-hook" else 0)
    assert graph.layers["2"].reason is None


def test_hooks_that_only_look_take_nothing_away():
    model, seen = net(Plain), []
    model.blocks[0].a.register_forward_hook(lambda module, inputs, output: seen.append(output.mean().item()))
    assert all(info.reason is None for info in check_law(model, images()).layers.values())


# -- the caller's model ----------------------------------------------------------------------------------------------


class Remembering(Net):
    """A forward that leaves something behind."""

    def forward(self, x):
        self.last = self.stem(x)
        return super().forward(x + torch.ones(1, dtype=torch.double))


def test_the_model_comes_back_as_it_was():
    torch.manual_seed(0)
    model = randomise(Remembering([Plain, Nested, ChannelsLast, Parametrized]).double()).train()
    model.blocks[0].a.eval()
    model.stem[0].weight.requires_grad_(False)
    seen = []  # hooks run in copies: what they change can only be seen by calling them
    for module in (model.blocks[0], model.stem[0], model):
        module.register_forward_hook(lambda module, *_: seen.append(module))
        module.register_forward_pre_hook(lambda module, *_: seen.append(module))
    own = set(model.modules())

    def state():
        random_state = torch.get_rng_state()
        hooks = [(dict(m._forward_hooks), dict(m._forward_pre_hooks)) for m in model.modules()]
        modules = [(m, m.training, list(vars(m))) for m in model.modules()]
        tensors = [(n, t.clone(), t.requires_grad) for n, t in [*model.named_parameters(), *model.named_buffers()]]
        return random_state, [modules, hooks], tensors

    before = state()
    graph = ChannelGraph(model, images(1))
    graph.remove(random_units(graph, 0.3, 0))
    after = state()
    same_random_state, same_modules = torch.equal(before[0], after[0]), before[1] == after[1]
    none_seen = not own.intersection(seen)
    assert none_seen and same_random_state and same_modules  # plain flags: pytest takes minutes to print networks
    for (name, old, grad), (_, new, new_grad) in zip(before[2], after[2], strict=True):
        assert torch.equal(old, new) and grad == new_grad, name
    assert not hasattr(model, "last")


def test_a_model_in_train_mode_gives_the_same_graph():
    model = net(Nested, Excitation)
    graph = ChannelGraph(model, images(1))
    trained = ChannelGraph(model.train(), images(1))
    assert model.training and trained.units == graph.units
    assert [site.module for site in trained.sites] == [site.module for site in graph.sites]


def test_custom_batchnorm_does_not_count_while_traced():
    class Counting(nn.BatchNorm2d):
        def forward(self, x):
            self.num_batches_tracked.add_(1)
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training)

    model = net(Plain).train()
    model.stem[1] = Counting(8).double()
    graph = ChannelGraph(model, images(1))
    assert model.stem[1].num_batches_tracked == 0
    assert graph.layers["stem.0"].reason is None and graph.layers["blocks.0.a.0"].reason is None


class Auxiliary(Net):
    """A second head in training alone."""

    def __init__(self, kinds):
        super().__init__(kinds)
        self.aux_conv, self.aux = nn.Conv2d(8, 4, 1), nn.Linear(4, 5)

    def forward(self, x):
        if self.training:
            y = self.blocks(F.relu(self.stem(x)))
            return super().forward(x), self.aux(self.aux_conv(y).mean((2, 3)))
        return super().forward(x)


def test_heads_used_in_training_alone_follow():
    torch.manual_seed(0)
    graph = check_law(randomise(Auxiliary([Plain]).double()), images())
    assert graph.layers["aux_conv"].reason == "used in training only"
    assert graph.remove({"blocks.0.b.0": [0, 1]}).aux_conv.in_channels == 6


def test_graph_can_be_copied():
    graph = ChannelGraph(net(Residual), images(1))
    twin = copy.deepcopy(graph)
    assert twin.units == graph.units and twin.model is not graph.model
    assert twin.remove(twin.units[:1]).state_dict().keys() == graph.model.state_dict().keys()


@pytest.mark.parametrize("dtype", [torch.float, torch.bfloat16])
def test_other_types_of_numbers(dtype):
    model = net(Excitation, ChannelsLast).to(dtype)
    graph = ChannelGraph(model, torch.zeros(1, 3, SIZE, SIZE))  # of another type than the model
    smaller = graph.remove(random_units(graph, 0.3, 0))
    assert smaller(images().to(dtype)).dtype == dtype and smaller.stem[0].weight.dtype == dtype


def test_smooth_operations_are_named():
    assert ChannelGraph(net(Residual, UNet, RawParameters, Grouped), images(1)).smooth_operations == ()
    assert ChannelGraph(net(Highway), images(1)).smooth_operations == ("mul", "sigmoid")


@pytest.mark.parametrize("kind", [Plain, UNet, Depthwise, Grouped, TransposedGrouped])
def test_costs_add_up(kind):
    """Against a count by hooks: weight elements x output positions, of a transposed conv input positions."""
    model, count = net(kind), []

    def hook(module, inputs, output):
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
            x = inputs[0] if isinstance(module, nn.ConvTranspose2d) else output
            count.append(module.weight.numel() * x[0, 0].numel())

    graph = ChannelGraph(model, images(1))
    for module in model.modules():
        module.register_forward_hook(hook)
    model(images(1))
    sizes = [(t, torch.Size(t.sizes).numel()) for t in graph.cost_terms()]
    assert sum(t.macs * n for t, n in sizes) == sum(count)
    assert sum(t.parameters * n for t, n in sizes) == sum(p.numel() for p in model.parameters())


# -- what cannot be done ---------------------------------------------------------------------------------------------


class Branching(Net):
    def forward(self, x):
        if x.mean() > 0:  # the offending line
            x = -x
        return super().forward(x)


class TwoInputs(Net):
    def forward(self, x, y):
        return super().forward(x + y)


class Asserting(Net):
    def forward(self, x):
        assert isinstance(x, torch.Tensor)
        return super().forward(x)


def test_a_network_that_cannot_be_traced_names_the_line():
    with pytest.raises(InputError, match=r'test_surgery.py, line \d+: "if x.mean\(\) > 0.*a module of their own'):
        ChannelGraph(Branching([Plain]), images(1))
    with pytest.raises(InputError, match="argument: 'y'.*a tuple of several inputs"):
        ChannelGraph(TwoInputs([Plain]), images(1))
    assert ChannelGraph(Asserting([Plain]).double(), images(1)).units


@pytest.mark.parametrize(
    ("model", "shape", "message"),
    [
        (nn.Sequential(nn.Conv2d(3, 2, 3)), (1, 4, 9, 9), "to have 3 channels, but got 4 channels"),
        (nn.Sequential(nn.Conv2d(3, 2, 3)), (1, 3, 2, 2), "greater than actual input size"),
        (nn.Sequential(nn.MaxPool2d(4)), (1, 3, 2, 2), "too small"),
        (nn.Sequential(nn.Flatten(), nn.Linear(98, 4)), (1, 3, 9, 10), "x270 and 98x4"),
    ],
)
def test_an_example_that_the_network_cannot_process(model, shape, message):
    with pytest.raises(InputError, match=message) as error:
        ChannelGraph(model, torch.zeros(shape))
    assert "example" in str(error.value) and "\n" not in str(error.value)


def test_weights_computed_by_pre_hooks_are_cut():
    model = net(Plain)
    nn.utils.prune.random_unstructured(model.stem[0], "weight", 0.5)
    model(images())
    graph = check_law(model, images())
    assert graph.layers["stem.0"].reason is None


class Uncopyable:
    def __deepcopy__(self, memo):
        raise TypeError("no copy of me")


def test_a_model_that_cannot_be_copied_is_refused():
    model = net(Plain)
    model.stem.extra = Uncopyable()
    with pytest.raises(InputError, match=r"Net cannot be copied, for its stem.extra \(no copy of me\); make it"):
        ChannelGraph(model, images(1))
