"""Numbers of channels that modules keep in dictionaries and settings follow a cut, and those of which tensors are made anew."""

import copy
import types
from dataclasses import dataclass, field

import pytest
import torch
from test_operations import Block, C, around, images
from test_surgery import check_law
from torch import nn

from taylor_pruning.experiment.pruned_file import load_pruned, save_pruned
from taylor_pruning.surgery.graph import ChannelGraph


@dataclass(frozen=True)
class Config:
    dim: int = C
    heads: int = 2


def by_dictionary(s, x):
    return s.b(s.a(x).view(x.shape[0], s.settings["dim"], -1).view_as(x))


def by_attribute(s, x):
    return s.b(s.a(x).view(x.shape[0], s.settings.dim, -1).view_as(x))


def split(s, x):
    first, second = torch.split(s.a(x), s.settings["parts"], 1)
    return s.b(torch.cat([second, first], 1))


def by_both(s, x):
    """Both convs have the width that the settings of one of them say."""
    y = s.a(x).view(x.shape[0], s.settings.dim, -1).view_as(x)
    return s.last(s.b(y).view(x.shape[0], s.inner.settings.dim, -1).view_as(x))


def with_ones(s, x):
    return s.b(s.a(x) + torch.ones(s.a.out_channels, dtype=x.dtype)[:, None, None])


def sharing(settings=None):
    inner, settings = nn.Identity(), settings or Config()
    inner.settings = settings
    return {"settings": settings, "inner": inner, "last": nn.Conv2d(C, C, 1)}


@dataclass
class Nested:
    encoder: Config = field(default_factory=Config)
    _width: int = C


def by_encoder(s, x):
    return s.b(s.a(x).view(x.shape[0], s.settings.encoder.dim, -1).view_as(x))


def by_stage(s, x):
    return s.b(s.a(x).view(x.shape[0], s.settings["stages"][1]["dim"], -1).view_as(x))


def by_last(s, x):
    return s.b(s.a(x).view(x.shape[0], s.settings[-1][1], -1).view_as(x))


def by_private_name(s, x):
    return s.b(s.a(x).view(x.shape[0], s.settings._width, -1).view(x.shape[0], s._width, -1).view_as(x))


BLOCKS = {
    "in settings": (by_encoder, lambda: {"settings": Nested()}),
    "in a list": (by_stage, lambda: {"settings": {"stages": [{"dim": 3}, {"dim": C}], 7: "relu"}}),
    "in a list of pairs": (by_last, lambda: {"settings": ["M", (3, C)]}),
    "private": (by_private_name, lambda: {"settings": Nested(), "_width": C}),
    "dictionary": (by_dictionary, lambda: {"settings": {"dim": C, "act": "relu"}}),
    "dataclass": (by_attribute, lambda: {"settings": Config()}),
    "namespace": (by_attribute, lambda: {"settings": types.SimpleNamespace(dim=C)}),
    "parts": (split, lambda: {"settings": {"parts": [3, 5]}}),
    "shared": (by_both, sharing),
    "ones": (with_ones, dict),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_widths_follow(name, tmp_path):
    def build():
        return around(Block(function, **held()))

    function, held = BLOCKS[name]
    model = build()
    graph = check_law(model, images(), seeds=(0, 1))
    assert graph.layers["block.a"].reason is None
    before = repr(getattr(model.block, "settings", None))
    smaller = graph.remove(graph.units[::3])
    assert repr(getattr(model.block, "settings", None)) == before
    save_pruned(tmp_path / "small.pt", smaller)
    loaded = load_pruned(tmp_path / "small.pt", factory=build)
    torch.testing.assert_close(loaded(images()), smaller(images()))
    assert repr(getattr(loaded.block, "settings", None)) == repr(getattr(smaller.block, "settings", None))


def test_settings_with_which_is_computed_stay():
    def scaled(s, x):
        y = s.a(x) * s.settings["dim"] ** -0.5
        return s.b(y.view(len(x), s.settings["dim"], -1).view_as(x))

    graph = ChannelGraph(around(Block(scaled, settings={"dim": C})), images(1))
    assert graph.layers["block.a"].reason == "their number enters mul (block)"


class Rebuilding(nn.Module):
    """Copies itself by building itself again from its settings."""

    def __init__(self, settings):
        super().__init__()
        self.settings, self.a, self.b = settings, nn.Conv2d(3, C, 1), nn.Conv2d(C, 4, 1)

    def __deepcopy__(self, memo):
        copied = Rebuilding(self.settings)
        copied.load_state_dict(self.state_dict())
        return copied

    def forward(self, x):
        return self.b(self.a(x).view(x.shape[0], self.settings["dim"], *x.shape[2:]))


def test_settings_that_copies_of_a_module_share_stay_as_they_are():
    settings = {"dim": C}
    graph = ChannelGraph(Rebuilding(settings), torch.randn(1, 3, 4, 4))
    assert not graph.layers["a"].removable.any() and settings == {"dim": C} and type(settings["dim"]) is int


@pytest.mark.parametrize("settings", [Config(), types.SimpleNamespace(dim=C)])
def test_a_file_leaves_the_settings_of_other_networks_alone(settings, tmp_path):
    """A factory may give all networks that it builds the same settings."""

    def build():
        return around(Block(by_both, **sharing(settings)))

    graph, before = ChannelGraph(build(), images(1)), repr(settings)
    smaller = graph.remove(graph.units[::3])
    save_pruned(tmp_path / "small.pt", smaller)
    loaded = load_pruned(tmp_path / "small.pt", factory=build)
    assert repr(settings) == before != repr(loaded.block.settings)
    torch.testing.assert_close(loaded(images()), smaller(images()))
    assert loaded.block.settings is loaded.block.inner.settings


def test_what_a_run_leaves_in_settings_and_under_private_names_is_no_part_of_the_network(tmp_path):
    def build():
        return around(Block(by_dictionary, settings={"dim": C}))

    graph = ChannelGraph(build(), images(1))
    smaller = graph.remove(graph.units[::3])
    smaller.block.settings["step"], smaller.block._calls = 7, 3
    save_pruned(tmp_path / "small.pt", smaller)
    loaded = load_pruned(tmp_path / "small.pt", factory=build)
    assert loaded.block.settings == {"dim": smaller.block.a.out_channels} and not hasattr(loaded.block, "_calls")
    torch.testing.assert_close(loaded(images()), smaller(images()))


@pytest.mark.parametrize("fresh", [{"_made": False}, {"_made": 0}, {"_made": [0, 0]}, {"_made": {"size": 0}}])
def test_a_file_does_not_say_that_a_new_network_has_run(fresh, tmp_path):
    """The grid that goes with a private flag or size is in no file."""

    def on_grid(s, x):
        size = x.shape[-1]
        made = {bool: True, int: size, list: [size, size], dict: {"size": size}}[type(fresh["_made"])]
        if s._made != made:
            s._made, s.grid = made, torch.ones(size).to(x)
        return s.b(s.a(x).view(x.shape[0], s._width, -1).view_as(x) * s.grid)

    def build():
        return around(Block(on_grid, grid=None, _width=C, **copy.deepcopy(fresh)))

    graph = ChannelGraph(build(), images(1))
    smaller = graph.remove(graph.units[::3])
    expected = smaller(images())
    save_pruned(tmp_path / "small.pt", smaller)
    loaded = load_pruned(tmp_path / "small.pt", factory=build)
    assert loaded.block._width == loaded.block.a.out_channels < C and loaded.block._made == fresh["_made"]
    torch.testing.assert_close(loaded(images()), expected)


def test_an_object_that_copies_share_stays_as_it_is():
    class Single:
        def __init__(self):
            self.dim = C

        def __deepcopy__(self, memo):
            return self

    model = around(Block(by_attribute, settings=Single()))
    assert (
        not ChannelGraph(model, images(1)).layers["block.a"].removable.any() and type(model.block.settings.dim) is int
    )
