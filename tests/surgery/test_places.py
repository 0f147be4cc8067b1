"""Buffers that say which channels are taken, in which order: after a cut they hold the places of those that are left."""

import pytest
import torch
from test_operations import Block, C, around, conv, images
from test_surgery import check_law
from torch import nn

from taylor_pruning.experiment.pruned_file import load_pruned, save_pruned

ORDER = torch.tensor([3, 1, 7, 0, 5, 2, 6, 4])


class Places(Block):
    def __init__(self, function, *places, **more):
        super().__init__(function, **more)
        for name, values in zip("pq", places, strict=False):
            self.register_buffer(name, values)


def there_and_back(s, x):
    return s.c(s.b(s.a(x)[:, s.p].relu())[:, s.q] + x)


BLOCKS = {  # name: (block, removable filters of the stem, of a, of b)
    "order": (lambda: Places(lambda s, x: s.b(s.a(x)[:, s.p]), ORDER), 8, 8, 8),
    "last to first": (lambda: Places(lambda s, x: s.b(s.a(x)[..., s.p.long(), :, :]), -1 - ORDER.int()), 8, 8, 8),
    "tokens": (lambda: Places(lambda s, x: s.b(s.a(x).flatten(2).mT[:, None, :, s.p.to(x.device)].squeeze(1).mT.view(x.shape)),
                              ORDER), 8, 8, 8),
    "some, one twice": (lambda: Places(lambda s, x: s.c(s.b(s.a(x)).index_select(1, s.p)), torch.tensor([6, 1, 6]),
                                       c=conv(3, C, 1)), 8, 8, 7),  # one of those that are taken stays
    "there and back": (lambda: Places(there_and_back, ORDER, ORDER.argsort(), c=conv(C, C, 1)), 8, 8, 8),
    "of two widths": (lambda: Places(lambda s, x: s.c(torch.cat([s.a(x), s.b(x)], 1)[:, s.p] + s.a(x)[:, s.p]), ORDER,
                                     c=conv(C, C, 1)), 8, 0, 0),
    "computed": (lambda: Places(lambda s, x: s.b(s.a(x)[:, 7 - s.p]), ORDER), 8, 0, 8),
    "of the last": (lambda: Places(lambda s, x: s.b(s.a(x)[..., s.p]), ORDER), 8, 8, 8),
    "of space": (lambda: Places(lambda s, x: s.b(s.a(x)[:, :, s.p]), ORDER), 8, 8, 8),
}  # fmt: skip


@pytest.mark.parametrize("name", BLOCKS)
def test_channels_at_stored_places_can_go(name, tmp_path):
    build, *expected = BLOCKS[name]
    model = around(build())
    graph = check_law(model, images(), seeds=(0, 1, 2))
    found = [graph.layers[layer] for layer in ("stem.0", "block.a", "block.b")]
    assert [int(info.removable.sum()) for info in found] == expected, [info.reason for info in found]
    smaller = graph.remove(graph.units[::3])
    save_pruned(tmp_path / "small.pt", smaller)
    loaded = load_pruned(tmp_path / "small.pt", factory=lambda: around(build()))
    torch.testing.assert_close(loaded(images()), smaller(images()))


def test_the_places_are_those_among_the_channels_that_are_left():
    model = nn.Sequential(conv(3, C, 3), Places(lambda s, x: s.a(x[:, s.p]), ORDER)).double()
    graph = check_law(model, images())
    smaller = graph.remove({"0": [0, 5]})
    assert smaller[1].p.tolist() == [2, 0, 5, 1, 4, 3] and model[1].p.tolist() == ORDER.tolist()
