"""Zeroed gates are removed channels where a forward assigns to parts of tensors, or copies over them."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from test_operations import Block, C, around, conv, images, parameter
from test_surgery import check_law

from taylor_pruning.surgery.graph import ChannelGraph


def shifted(s, x):
    """Quarters of the channels move by a pixel, as in temporal shift modules."""
    y = s.a(x)
    part, out = y.shape[1] // 4, torch.zeros_like(y)
    out[:, :part, 1:] = y[:, :part, :-1]
    out[:, part : 2 * part, :-1] = y[:, part : 2 * part, 1:]
    out[:, 2 * part :] = y[:, 2 * part :]
    return s.b(out)


def partly_convolved(s, x):
    y = s.a(x).clone()
    y[:, : s.width] = s.c(y[:, : s.width].relu())
    return s.b(y)


def unpooled(s, x):
    y = F.max_pool2d(s.a(x), 2)
    n, c, h, w = y.shape
    out = y.new_zeros(n, c, 2 * h, 2 * w)
    out[:, :, ::2, ::2] = y
    out[:, :, 1::2, 1::2] = s.shift
    return s.b(out)


def stacked(s, x):
    """A volume of the channels of two maps, one beside the other."""
    y, z = s.a(x), s.a(x.flip(3))
    volume = torch.zeros(y.size(0), 2 * y.size(1), 2, *y.shape[2:], dtype=y.dtype)
    volume[:, : y.size(1), 0], volume[:, y.size(1) :, 0] = y, z
    volume[:, : y.size(1), 1, :, 1:] = y[..., 1:]
    volume[:, y.size(1) :, 1, :, 1:] = z[..., :-1]
    return s.b(s.c(volume.flatten(2, 3)).mean(2, keepdim=True).expand_as(x) + x)


def framed(s, x):
    y = s.a(x).clone()
    y[:, :, 0], y[..., -1] = 0, 1.5
    return s.b(y)


def copied(s, x):
    y, z = torch.empty_like(x), s.a(x)
    y.copy_(z)
    y[0].copy_(z[1] * 0.5)
    return s.b(y.clone().copy_(s.shift) + y)


def counted(s, x):
    y = s.a(x).clone()
    y[:, :, 0] = y.shape[1]
    return s.b(y)


def at_places(s, x):
    y = s.a(x).clone()
    y[y < 0] = 0.1
    return s.b(y)


def spectrum(s, x):
    """Real and imaginary parts as channels, and back."""
    f = torch.fft.rfftn(s.a(x), dim=(-2, -1), norm="ortho") * torch.view_as_complex(s.scale)
    f = torch.stack((f.real, f.imag), 2).flatten(1, 2)
    f = F.relu(s.c(f)).unflatten(1, (-1, 2))
    f = torch.complex(f[:, :, 0], f[:, :, 1])
    return s.b(torch.fft.irfftn(torch.view_as_complex(torch.view_as_real(f)), s=x.shape[2:], dim=(-2, -1)))


def halves(s, x):
    y = s.a(x)
    half = y.size(1) // 2
    one, other = y.narrow(1, 0, half), y.narrow(1, half, y.size(1) - half)
    return s.b(torch.cat([other, one * 2], 1))


def correlated(s, x):
    """Every channel of one map is convolved with that of another."""
    y, kernel = s.a(x), F.adaptive_avg_pool2d(s.b(x), 3)
    n, c = kernel.shape[:2]
    found = F.conv2d(y.reshape(1, n * c, *y.shape[2:]), kernel.reshape(n * c, 1, 3, 3), padding=1, groups=n * c)
    return found.view(n, c, *found.shape[2:])


def two_halves(s, x):
    """As many channels as twice a half: the last one of an odd number is left out."""
    y = torch.cat([s.a(x), s.b(x)], 1)
    half = y.size(1) // 2
    return s.c(y[:, : half + half])


def one_and_a_half(s, x):
    y, c = s.a(x), x.size(1)
    room = y.new_zeros(y.size(0), c + c // 2, *y.shape[2:])
    room[:, :c] = y
    return s.b(room[:, :c])


def joined_in_place(s, x):
    """One beside the other in a tensor that was made before."""
    y, z = s.a(x), s.b(x).narrow(1, 0, x.size(1))
    room = torch.empty(y.size(0), y.size(1) + z.size(1), *y.shape[2:], dtype=y.dtype)
    with torch.no_grad():
        torch.cat([y, z], 1, out=room)
    return s.c(room[:, : y.size(1) + z.size(1)])


def accumulated(s, x):
    room = torch.zeros(x.size(0), s.a.out_channels, *x.shape[2:], dtype=x.dtype)
    room += s.a(x)
    room.add_(s.b(x))
    return room


def filled_up(s, x):
    """The shortcut gets as many channels of zeros as it lacks, in front or behind."""
    y = torch.cat([s.a(x), s.b(x)], 1)
    z = F.pad(x, (0, 0, 0, 0, 0, y.size(1) - x.size(1)))
    return s.c(y + z + torch.cat([x.new_zeros(x.size(0), y.size(1) - x.size(1), *x.shape[2:]), x], 1))


def filled_up_in_front(s, x):
    y = torch.cat([s.a(x), s.b(x)], 1)
    return s.c(y + F.pad(x, (0, 0, 0, 0, y.size(1) - x.size(1), 0)))


def filled_up_by_a_number(s, x):
    """By as many channels of zeros as the module says, behind and on both sides."""
    y = torch.cat([s.a(x), s.b(x)], 1)
    return s.c(y + F.pad(x, s.behind) + F.pad(x, (0, 0, 0, 0, s.side, s.side)))


def filled_up_to_a_width(s, x):
    """The shortcut gets as many channels of zeros as it lacks of what the module says, or arguments that it holds."""
    y = torch.cat([s.a(x), s.b(x)], 1)
    return s.c(y + s.fill(x) + F.pad(x, (0, 0, 0, 0, 0, s.width - x.size(1))))


def filled(x, wide):
    return torch.cat([x, x.new_zeros(x.size(0), wide - x.size(1), *x.shape[2:])], 1)


def filled_up_as_space_is(s, x):
    """The same number pads columns, which stay as many."""
    y = F.pad(torch.cat([s.a(x), s.b(x)], 1), (s.side, s.side))
    return s.c(y + F.pad(x, (s.side, s.side, 0, 0, s.side, s.side)))


def scattered(s, x):
    """To the same places of every channel, to places that the values of a channel give, and ones counted there."""
    y = s.a(x)
    places = torch.arange(y.shape[2]).flip(0).view(1, 1, -1, 1).expand_as(y)
    z = torch.zeros_like(y).scatter_(2, places, y)
    own = (y > 0.1).cumsum(3).clamp(max=y.shape[3] - 1)
    return s.b(s.b(z.scatter_add(3, own, y)) * y.new_zeros(y.shape).scatter_add(3, own, torch.ones_like(y)))


def scattered_over_channels(s, x):
    y = s.a(x)
    places = torch.arange(y.shape[1]).flip(0).view(1, -1, 1, 1).expand_as(y)
    return s.b(torch.zeros_like(y).scatter(1, places, y))


def widened(s, x):
    """As many columns more as one has channels more than another."""
    y = torch.cat([s.a(x), s.b(x)], 1)
    return s.c(F.pad(y, (0, y.size(1) - x.size(1))))


def filled_up_by_others(s, x):
    """More than what one lacks of another: the zeros are those of no channels."""
    y = torch.cat([s.a(x), s.b(x)], 1)
    zeros = x.new_zeros(x.size(0), y.size(1) + x.size(1), *x.shape[2:])
    return s.b(x + zeros.sum(1, keepdim=True)) + zeros[:, 8:16] * zeros.shape[1]


def angles(s, x):
    """The angle of a closed channel is 0 or pi, by the sign that its zero has kept."""
    return s.b(torch.complex(s.a(x), s.a(x.flip(3)) + 0.1).angle())


BLOCKS = {  # name: (block, removable filters of the stem, of a, of b)
    "shifted quarters": (Block(shifted), 8, 8, 8),
    "a part in place": (Block(partly_convolved, c=conv(2, 2, 1), width=2), 8, 8, 8),
    "unpooled": (Block(unpooled, shift=parameter(C, 1, 1)), 8, 8, 8),
    "volume": (Block(stacked, c=conv(2 * C, C, 1)), 8, 8, 8),
    "framed": (Block(framed), 8, 8, 8),
    "copied": (Block(copied, shift=parameter(C, 1, 1)), 8, 8, 8),
    "number of channels": (Block(counted), 8, 0, 8),
    "at places": (Block(at_places), 8, 0, 8),
    "spectrum": (Block(spectrum, c=conv(2 * C, 2 * C, 1), scale=parameter(C, 12, 7, 2)), 8, 8, 8),
    "halves by narrow": (Block(halves), 8, 8, 8),
    "correlated channels": (Block(correlated), 8, 8, 8),
    "two halves": (Block(two_halves, c=conv(2 * C, C, 1)), 8, 0, 0),
    "room for more": (Block(one_and_a_half), 0, 0, 8),
    "joined in place": (Block(joined_in_place, c=conv(2 * C, C, 1)), 8, 8, 8),
    "accumulated": (Block(accumulated), 8, 8, 8),
    "filled up": (Block(filled_up, c=conv(2 * C, C, 1)), 8, 8, 8),
    "filled up in front": (Block(filled_up_in_front, c=conv(2 * C, C, 1)), 8, 8, 8),
    "filled up by a number": (
        Block(filled_up_by_a_number, c=conv(2 * C, C, 1), behind=(0, 0, 0, 0, 0, C), side=C // 2),
        8,
        8,
        8,
    ),
    "filled up to a width": (
        Block(filled_up_to_a_width, c=conv(2 * C, C, 1), fill=partial(filled, wide=2 * C), width=2 * C),
        8,
        8,
        8,
    ),
    "filled up to a number": (
        Block(filled_up_to_a_width, c=conv(2 * C, C, 1), fill=lambda x: filled(x, 2 * C), width=2 * C),
        0,
        0,
        0,
    ),
    "filled up as space is": (Block(filled_up_as_space_is, c=conv(2 * C, C, 1), side=C // 2), 8, 4, 4),
    "scattered": (Block(scattered), 8, 8, 8),
    "scattered over channels": (Block(scattered_over_channels), 8, 0, 8),
    "widened": (Block(widened, c=conv(2 * C, C, 1)), 0, 0, 0),
    "filled up by others": (Block(filled_up_by_others), 0, 0, 0),
    "angles": (Block(angles), 8, 8, 8),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_zeroed_gates_are_removed_channels(name):
    block, *expected = BLOCKS[name]
    graph = check_law(around(block), images(), seeds=(0,))
    found = [graph.layers[layer] for layer in ("stem.0", "block.a", "block.b")]
    assert [int(info.removable.sum()) for info in found] == expected, [info.reason for info in found]
    assert graph.layers["mid"].reason is None


def by_assignment(s, x):
    seen, y = torch.zeros(2, dtype=x.dtype), s.a(x)
    seen[0] = y.mean() + 100
    return s.b(y * 2 if seen.sum() > 1 else y)


def through_a_view(s, x):
    seen, y = torch.zeros(2, 2, dtype=x.dtype), s.a(x)
    seen[0].add_(y.mean())
    return s.b(y * float(seen.detach().sum()))


@pytest.mark.parametrize("function", [by_assignment, through_a_view])
def test_a_constant_that_was_written_to_is_none(function):
    """A decision by its values would be taken from what it held before."""
    graph = ChannelGraph(around(Block(function)), images())
    assert graph.layers["stem.0"].reason == "passes through block, whose forward no graph can repeat"
    assert "block.a" not in graph.layers and graph.layers["mid"].reason is None
