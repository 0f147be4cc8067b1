"""Zeroed gates are removed channels where an everyday operation lies between the layers."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import randomise
from test_operations import Block, C, around, conv, images, parameter
from test_surgery import check_law
from torch import nn
from torchvision.ops import DeformConv2d, roi_align

from taylor_pruning.surgery.graph import ChannelGraph


def transformed(s, x):
    """A spatial transformer."""
    places = F.affine_grid(s.places(x.mean((2, 3))).view(-1, 2, 3), x.size(), align_corners=False)
    return s.b(F.grid_sample(s.a(x), places, align_corners=False))


def weighed(s, x):
    y = s.a(x)
    return s.b(s.d(y, s.places(x), s.weights(x).sigmoid()))


def windows(s, x):
    box = torch.tensor([1.0, 2.0, 9.0, 8.0], dtype=x.dtype).expand(x.shape[0], 4)
    return s.b(roi_align(s.a(x), torch.cat([torch.arange(x.shape[0], dtype=x.dtype)[:, None], box], 1), 6))


def broadcast(s, x):
    y, mean, scale = torch.broadcast_tensors(s.a(x), x.mean((2, 3), keepdim=True), s.scale)
    return s.b((y - mean) * scale)


def fake_quantised(s, x):
    scale, points = s.scale.detach().square().float() / 20 + 0.01, torch.zeros_like(s.scale, dtype=torch.int32)
    weight = torch.fake_quantize_per_channel_affine(s.a.weight.float(), scale, points, 0, -128, 127)
    y = torch.fake_quantize_per_tensor_affine(F.relu(F.conv2d(x, weight.to(x), s.a.bias)).float(), 0.05, 3, 0, 255)
    return s.b(y.to(x))


def strongest(s, x):
    y = s.a(x).flatten(2)
    values, _ = y.topk(5, 2)
    values = values.mean(2) + y.sort().values[..., -1] + y.kthvalue(3).values + y.quantile(0.3, -1)
    return s.b(x * values[..., None, None])


def gathered(s, x):
    """Features at the strongest places of another map."""
    y = s.a(x).flatten(2)
    places = x.flatten(2).sum(1).topk(9).indices
    y = y.transpose(1, 2).gather(1, places[..., None].expand(-1, -1, y.shape[1]))
    return s.b(y.transpose(1, 2).unflatten(2, (3, 3)))


def unpooled(s, x):
    """Other filters' values at the places of a pool (SegNet)."""
    y, places = F.max_pool2d(s.a(x), 2, return_indices=True)
    return F.max_unpool2d(s.b(y), places, 2, output_size=x.size())


def unpooled_rows(s, x):
    y, places = F.max_pool1d(s.a(x).flatten(2), 2, return_indices=True)
    return F.max_unpool1d(s.b(y[..., None]).squeeze(3), places, 2).unflatten(2, x.shape[2:])


def likeness(s, x):
    """Of two activations, over space and over channels."""
    y, z = s.a(x), s.b(x)
    over_space = F.cosine_similarity(y.flatten(2), z.flatten(2), dim=-1)
    return y * F.cosine_similarity(y, z)[:, None] + z * over_space[..., None, None]


def added_product(s, x):
    y = s.a(x).movedim(1, -1)
    y = torch.addmm(s.shift, y.flatten(0, 2), s.w).view(*y.shape[:3], -1).movedim(-1, 1)
    return s.b(torch.baddbmm(y.flatten(2), s.c(x).flatten(2), s.mixing.expand(len(x), -1, -1)).view(y.shape))


def named_as_in_numpy(s, x):
    y, z = s.a(x).mean(axis=2, keepdims=True).mean(axis=-1, keepdims=True) * x, s.b(x)
    z = torch.stack(z.chunk(2, axis=1), axis=2).sum(axis=2)
    z = z * z.amax(axis=(2, 3), keepdims=True)
    return torch.cat([y, z.softmax(axis=3)], axis=1)


def masked(s, x):
    """A ReLU as a product with its mask, and the values that are the largest of their channel."""
    y = s.a(x)
    y = y * (y > 0).to(y.dtype)
    return s.b(y * (y == y.amax((2, 3), keepdim=True)) + x)


def shuffled(y, n, c, h, w):
    return y.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


class KernelOfEverySample(nn.Module):
    """A modulated convolution without bias: the samples lie in groups of channels."""

    def __init__(self, number=lambda weight: weight.shape[1]):
        super().__init__()
        self.weight, self.scales, self.number = parameter(1, C, C, 3, 3), nn.Linear(C, C), number

    def forward(self, x):
        (n, c, h, w), out = x.shape, self.number(self.weight)
        kernels = (self.weight * self.scales(x.mean((2, 3)))[:, None, :, None, None]).view(n * out, c, 3, 3)
        return F.conv2d(x.view(1, n * c, h, w), kernels, padding=1, groups=n).view(n, out, h, w)


BLOCKS = {  # name: (block, its output channels, removable filters of the stem, of a, of b; None: not looked at)
    "learned column beside those of the input": (
        Block(lambda s, x: s.b(torch.cat([y := s.a(x), s.t.expand(len(x), -1, y.shape[2], -1)], 3)), t=parameter(1, C, 1, 1)),
        C,
        8,
        8,
        8,
    ),
    "learned map in a stack": (
        Block(lambda s, x: s.b(torch.stack([y := s.a(x), s.t.expand_as(y)], 4).flatten(3)), t=parameter(1, C, 1, 1)),
        C,
        8,
        8,
        8,
    ),
    "fake quantised": (Block(fake_quantised, scale=parameter(C)), C, 8, 8, 8),
    "affine grid": (Block(transformed, places=nn.Linear(C, 6)), C, 8, 8, 8),
    "deformable": (Block(weighed, d=DeformConv2d(C, C, 3, padding=1), places=conv(C, 18, 3, padding=1),
                         weights=conv(C, 9, 3, padding=1)), C, 8, 8, 8),
    "deformable in groups": (Block(lambda s, x: s.b(s.d(s.a(x), s.places(x))), places=conv(C, 18, 3, padding=1),
                                   d=DeformConv2d(C, C, 3, padding=1, groups=2, bias=False)), C, 8, 8, 8),
    "deformable at places of groups": (Block(lambda s, x: s.b(s.d(s.a(x), s.places(x))), places=conv(C, 36, 3, padding=1),
                                             d=DeformConv2d(C, C, 3, padding=1)), C, 8, 8, 8),
    "windows": (Block(windows), C, 8, 8, 8),
    "numpy's names": (Block(named_as_in_numpy), C + 4, 8, 8, 8),
    "einsum of all other dimensions": (
        Block(lambda s, x: s.b(torch.einsum("dc,bc...->bd...", s.w, torch.einsum("...hw,...w->...hw", s.a(x), x.mean(2)))),
              w=parameter(C, C)), C, 8, 8, 8),
    "hstack": (Block(lambda s, x: torch.hstack([s.a(x), s.b(x)])), 2 * C, 8, 8, 8),
    "vstack": (Block(lambda s, x: sum(torch.vstack([s.a(x), s.b(x)]).chunk(2))), C, 8, 8, 8),
    "dstack": (Block(lambda s, x: torch.dstack([s.a(x), s.b(x)])), C, 8, 8, 8),
    "broadcast tensors": (Block(broadcast, scale=parameter(C, 1, 1)), C, 8, 8, 8),
    "broadcast number": (
        Block(lambda s, x: s.b(torch.mul(*torch.broadcast_tensors(s.a(x), torch.tensor(0.5))))), C, 8, 8, 8),
    "quarter turn": (Block(lambda s, x: s.b(torch.rot90(s.a(x)[..., :-1], 1, (2, 3)))), C, 8, 8, 8),
    "quarter turn of channels": (Block(lambda s, x: s.b(torch.rot90(s.a(x)[:, :, :8], 2, (1, 2)))), C, 8, 0, 8),
    "tensordot": (Block(lambda s, x: s.b(torch.tensordot(s.a(x), s.w, ([1], [0])).movedim(3, 1)), w=parameter(C, C)),
                  C, 8, 8, 8),
    "tensordot over the last": (Block(lambda s, x: s.b(torch.tensordot(s.a(x).movedim(1, 3), s.w, 1).movedim(3, 1)),
                                      w=parameter(C, C)), C, 8, 8, 8),
    "product that is added": (Block(added_product, w=parameter(C, C), shift=parameter(C), c=conv(C, C, 1),
                                    mixing=parameter(1, 144, 144)), C, 8, 8, 8),
    "strongest places": (Block(strongest), C, 8, 8, 8),
    "sorted channels": (Block(lambda s, x: s.b(s.a(x).sort(1).values)), C, 8, 0, 8),
    "places of the strongest": (Block(lambda s, x: s.b(s.a(x).flatten(2).topk(4, 2).indices.double()[..., None])),
                                C, 8, 0, 8),
    "gathered": (Block(gathered), C, 8, 8, 8),
    "unpooled": (Block(unpooled), C, 8, 8, 8),
    "unpooled rows": (Block(unpooled_rows), C, 8, 8, 8),
    "gathered at as many places": (Block(lambda s, x: s.b(s.a(x).gather(2, torch.arange(12).view(1, 1, -1, 1).expand(
        len(x), C, 12, 12)))), C, 8, 0, 8),
    "cosine": (Block(likeness), C, 8, 8, 8),
    "cosine to a parameter": (Block(lambda s, x: s.b(x * F.cosine_similarity(s.a(x), s.w, dim=1)[:, None]),
                                    w=parameter(C, 1, 1)), C, 8, 0, 8),
    "Fourier": (Block(lambda s, x: s.b(torch.fft.irfft2(torch.fft.rfft2(s.a(x)) * 0.5, s=x.shape[2:]))), C, 8, 8, 8),
    "Fourier over channels": (Block(lambda s, x: s.b(torch.fft.fft(s.a(x), dim=1).abs())), C, 8, 0, 8),
    "masked by itself": (Block(masked), C, 8, 8, 8),
    "a kernel of every sample": (Block(lambda s, x: s.b(s.a(x)), b=KernelOfEverySample()), C, 8, 8, 8),
    "every second": (Block(lambda s, x: torch.cat([s.a(x)[:, ::2].sigmoid() * s.b(x)[:, 1::2], s.b(x)[:, 0::2]], 1)),
                     C, 8, 8, 8),
    "every second from a number on": (Block(lambda s, x: s.b(torch.cat([s.a(x)[:, x.shape[1] - 7::2]] * 2, 1))), C, 0, 0, 8),
    "every second of some": (Block(lambda s, x: s.b(torch.cat([s.a(x)[:, :6:2], s.a(x)[:, 3:]], 1))), C, 8, 0, 8),
    "cropped in front": (Block(lambda s, x: F.pad(s.b(s.a(x)), (0, 0, 0, 0, -2, 0))), C - 2, 8, 8, 5),  # one of mid's stays
    "cropped behind": (Block(lambda s, x: F.pad(s.b(s.a(x)), (0, 0, 0, 0, 1, -2))), C - 1, 8, 8, 6),
    "shuffle": (Block(lambda s, x: s.b(shuffled(s.a(x), *x.shape))), C, 8, 8, 8),
    "unfold and fold": (Block(lambda s, x: s.b(F.fold(F.unfold(s.a(x), 2, stride=2).relu(), x.shape[2:], 2, stride=2))),
                        C, 8, 8, 8),
}  # fmt: skip


@pytest.mark.parametrize("name", BLOCKS)
def test_zeroed_gates_are_removed_channels(name):
    block, out, *expected = BLOCKS[name]
    graph = check_law(around(block, out), images(), seeds=(0,))
    found = [graph.layers[layer] for layer in ("stem.0", "block.a", "block.b")]
    assert [int(info.removable.sum()) for info in found] == expected, [info.reason for info in found]
    assert graph.layers["mid"].reason is None


def test_a_crop_to_the_width_of_another_is_named():
    def cropped(s, x):
        return s.c(x) + F.pad(s.a(s.b(x)), (0, 0, 0, 0, 0, s.c(x).shape[1] - x.shape[1]))

    graph = check_law(around(Block(cropped, c=conv(C, C - 2, 1)), C - 2), images(), seeds=(0,))
    reasons = {layer: info.reason for layer, info in graph.layers.items() if layer != "head"}
    named = "their number is a padding in pad (block)"
    assert reasons == {"stem.0": named, "block.a": named, "block.b": None, "block.c": named, "mid": None}


def test_places_of_an_unpooling_need_no_gates():
    """They are anywhere where the values are zero."""

    def unpooled_elsewhere(s, x):
        _, places = F.max_pool2d(s.a(x), 2, return_indices=True)
        return F.max_unpool2d(F.max_pool2d(s.b(x), 2), places, 2)

    block = Block(unpooled_elsewhere)
    graph = check_law(around(block), images(), seeds=(0,))
    both = next(unit for unit in graph.units if {name for name, _ in unit.filters} == {"block.a", "block.b"})
    assert sum(both.index in site.units.tolist() for site in graph.sites) == 1


class ClassConditional(nn.Module):
    """A scale and a shift for every class, from one table."""

    def __init__(self):
        super().__init__()
        self.a, self.n, self.o = nn.Conv2d(3, C, 3), nn.BatchNorm2d(C, affine=False), nn.Conv2d(C, 3, 1)
        self.table = nn.Embedding(10, 2 * C)

    def forward(self, x, label):
        table = torch.embedding(self.table.weight, label) if self.by_torch else self.table(label)
        scale, shift = table[..., None, None].chunk(2, 1)
        return self.o(F.relu(self.n(self.a(x)) * scale + shift))


@pytest.mark.parametrize("by_torch", [False, True])
def test_columns_of_a_table_go_with_the_channels_that_they_scale(by_torch):
    """`torch.embedding` takes the table first, the functional the indices."""
    torch.manual_seed(0)
    model = ClassConditional().double().eval()
    model.by_torch = by_torch
    model.n.running_mean.normal_()
    inputs = images(), torch.tensor([1, 2, 7])
    graph = ChannelGraph(model, inputs)
    assert len(graph.units) == C and list(graph.layers) == ["a", "o"]
    gates = torch.ones(C, dtype=torch.double)
    gates[[1, 6]] = 0
    with torch.no_grad(), graph.gated(gates):
        expected = model(*inputs)
    smaller = graph.remove([graph.units[1], graph.units[6]])
    torch.testing.assert_close(smaller(*inputs), expected)
    assert smaller.table.embedding_dim == 2 * C - 4 == smaller.table.weight.shape[1]


def test_a_product_that_is_added_is_a_layer_of_its_factor():
    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.w, self.fc = nn.Conv2d(3, C, 3), parameter(6, C), nn.Linear(6, 4)

        def forward(self, x):
            return self.fc(
                torch.addmm(torch.zeros(6, dtype=x.dtype), F.relu(self.a(x)).mean((2, 3)), self.w.t()).relu()
            )

    torch.manual_seed(0)
    graph = check_law(randomise(Head()), images(), seeds=(0,), prune_linear=True)
    assert {name: info.filters for name, info in graph.layers.items()} == {"a": C, "w": 6, "fc": 4}
    assert graph.layers["a"].reason is None


HALVES = {
    "floor": lambda c: math.floor(c / 2),
    "ceil": lambda c: math.ceil(c / 2),
    "round": lambda c: round(c / 2),
    "trunc": lambda c: math.trunc(c / 2),
    "shift": lambda c: (c << 1) >> 2,
    "divmod": lambda c: divmod(c, 2)[0],
    "int": lambda c: int(c / 2),
    "int of a half": lambda c: int(c // 2),
    "int of a share": lambda c: int(c * 0.5),
    "int of a quotient of a width": lambda c, block: int(c // block.parts),
}


@pytest.mark.parametrize("name", HALVES)
def test_half_of_the_channels(name):
    def swapped(s, x):
        y = s.a(x)
        half = HALVES[name]
        first, second = y.split(half(y.shape[1], s) if "width" in name else half(y.shape[1]), 1)
        return s.b(torch.cat([second, first], 1) * round(y.shape[2] / 7, 2))

    graph = check_law(around(Block(swapped, parts=2)), images(), seeds=(0,))
    assert graph.layers["block.a"].removable.all() and graph.layers["stem.0"].removable.all()


def test_sizes_in_plain_numbers():
    def viewed(s, x):
        n, c, h, w = map(int, (y := s.a(x)).shape)
        return s.b(torch.cat([y.view(n, c, h * w).view(n, c, h, w), torch.zeros(n, c, h, w).to(y)], 1)[:, :c])

    graph = check_law(around(Block(viewed)), images(), seeds=(0,))
    assert graph.layers["block.a"].removable.all()


@pytest.mark.parametrize(("share", "divisor"), [(1, 4), (1, 2), (2, 2), (2, 4), (1, 3)])
def test_a_number_of_channels_that_must_be_divided_stays_so(share, divisor):
    """As many channels go together as the forward asks for; `share`: of the halves, which go in pairs."""

    def paired(s, x):
        y = s.a(x)
        channels = y.shape[1] // share
        assert channels % divisor == 0 or divisor == 3
        return s.b(torch.cat(y.chunk(2, 1)[::-1], 1))

    graph = check_law(around(Block(paired)), images(), seeds=(0,))
    sizes = {len(unit.filters) for unit in graph.units if unit.filters[0][0] == "block.a"}
    together = 2 if divisor == 3 else max(2, share * divisor)
    assert sizes == ({together} if together < C else set())


def test_a_sum_of_numbers_of_channels_that_must_be_divided_stays_so():
    def joined(s, x):
        y, z = s.a(x), s.b(x)
        assert (y.shape[1] + z.shape[1]) % 4 == 0
        return torch.cat([y, z], 1)

    graph = check_law(around(Block(joined), 2 * C), images(), seeds=(0,))
    sizes = [len(unit.filters) for unit in graph.units if unit.filters[0][0].startswith("block")]
    assert sizes == [4, 4, 4, 4]


def test_a_divisor_that_changes_with_a_cut_asks_for_nothing():
    """Nor does a number of which every whole one is a multiple."""

    def read_in_whole(s, x):
        y = s.d(s.a(x))
        assert not any(y.shape[1] % divisor for divisor in (s.d.groups, s.d.in_channels, x.shape[1], 0.5))
        return s.b(x + y)

    graph = check_law(around(Block(read_in_whole, d=conv(C, C, 3, padding=1, groups=C))), images(), seeds=(0,))
    assert sum(unit.filters[0][0] in ("stem.0", "block.a") for unit in graph.units) == C


def test_why_filters_of_a_weight_of_fixed_size_stay():
    block = Block(lambda s, x: s.b(s.a(x)), b=KernelOfEverySample(number=lambda weight: C))
    reason = ChannelGraph(around(block), images()).layers["block.b"].reason
    assert reason == "is viewed at a fixed size in view (block.b)"
