"""The calls of layers that are timed: at which widths, under which key, and which are left out."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

from taylor_pruning.errors import InputError
from taylor_pruning.selection import layer_calls as layer_calls_module
from taylor_pruning.selection.latency_table import LatencyTable
from taylor_pruning.selection.layer_calls import layer_calls
from taylor_pruning.surgery.graph import ChannelGraph


def calls_of(*layers, channels=3, batch=2):
    graph = ChannelGraph(nn.Sequential(*layers).eval(), torch.zeros(batch, channels, 8, 8))
    return {call.weight.removesuffix(".weight"): call for call in layer_calls(graph)}


def separable(width):
    depthwise = nn.Conv2d(width, width, 3, groups=width)
    return nn.Conv2d(1, width, 3, padding=1), nn.ReLU(), depthwise, nn.Conv2d(width, 4, 1)


def test_widths_of_a_layer_are_odd_or_multiples_and_those_that_stay_are_alone():
    calls = calls_of(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 8, 1))
    assert calls["0"].grid(1) == ((3,), (3, 7, 15, 23, 32))
    assert calls["2"].grid(1) == ((3, 7, 15, 23, 32), (8,))  # outputs of the network stay
    assert calls["2"].grid(8) == ((8, 16, 24, 32), (8,))


def test_a_layer_of_grayscale_images_is_no_depthwise_one():
    calls = calls_of(*separable(32), channels=1)
    assert calls["0"].grid(1) == ((1,), (3, 7, 15, 23, 32)) and calls["0"].depthwise == 0
    assert calls["2"].depthwise == 1


def test_the_key_holds_what_the_time_depends_on_but_the_widths():
    """Depthwise layers of several widths share one: a cut changes their groups."""
    narrow, wide = (calls_of(*separable(width), channels=1)["2"] for width in (8, 16))
    assert narrow.key(1) == wide.key(1) != narrow.key(8)
    grouped = [calls_of(nn.Conv2d(4, 8, 1, groups=n), nn.ReLU(), channels=4)["0"] for n in (1, 2)]
    assert grouped[0].key(1) != grouped[1].key(1)


def test_the_key_of_a_linear_layer_holds_its_positions_and_not_its_width():
    over_channels = [calls_of(nn.Flatten(2), nn.Linear(64, 4), channels=n)["1"].key(1) for n in (3, 5)]
    narrow = calls_of(nn.AvgPool2d(2), nn.Flatten(2), nn.Linear(16, 4))["2"].key(1)
    assert over_channels[0] == narrow != over_channels[1]


@pytest.mark.parametrize("batch", [1, 4])
def test_elements_are_those_of_one_image_and_channel(batch):
    calls = calls_of(nn.Conv2d(3, 5, 3), nn.Flatten(2), nn.Linear(36, 7), batch=batch)
    assert calls["0"].elements == 36 and calls["2"].elements == 5


def test_a_grouped_transposed_layer_is_left_out():
    calls = calls_of(nn.Conv2d(3, 8, 3), nn.ConvTranspose2d(8, 8, 2, groups=2), nn.ConvTranspose2d(8, 4, 2))
    assert set(calls) == {"0", "2"}


class Own(nn.Module):
    """A layer that reads a parameter of one row, whatever the batch."""

    def __init__(self):
        super().__init__()
        self.code, self.first, self.scales = nn.Parameter(torch.rand(1, 6)), nn.Conv2d(3, 8, 1), nn.Linear(6, 8)

    def forward(self, x):
        return F.relu(self.first(x)) * self.scales(self.code)[:, :, None, None]


def test_a_layer_that_reads_no_images_is_timed_on_its_own_row(monkeypatch):
    monkeypatch.setattr(layer_calls_module, "least_milliseconds", lambda call, device: call())
    graph = ChannelGraph(Own(), torch.zeros(2, 3, 8, 8))
    (call,) = (call for call in layer_calls(graph) if call.weight == "scales.weight")
    assert call.milliseconds(6, 8, 1, torch.zeros(1)).shape == (1, 8)


class Functional(nn.Module):
    """A grouped conv whose groups are named, and layers whose weight is computed, or fixed."""

    def __init__(self):
        super().__init__()
        self.first, self.normed = nn.Conv2d(3, 8, 1), weight_norm(nn.Conv2d(8, 8, 1))
        self.weight = nn.Parameter(torch.rand(8, 1, 3, 3))
        self.register_buffer("blur", torch.full((3, 1, 3, 3), 1 / 9))

    def forward(self, x):
        x = F.conv2d(x, self.blur, padding=1, groups=3)
        return F.relu(F.conv2d(self.normed(F.relu(self.first(x))), self.weight, groups=8))


def test_named_groups_of_a_depthwise_layer_shrink_and_weights_that_are_no_parameters_are_left_out(monkeypatch):
    monkeypatch.setattr(layer_calls_module, "least_milliseconds", lambda call, device: call())
    graph = ChannelGraph(Functional(), torch.zeros(2, 3, 8, 8))
    calls = {call.weight: call for call in layer_calls(graph)}
    assert calls.keys() == {"first.weight", "weight"}
    assert calls["weight"].milliseconds(1, 5, 2, torch.zeros(1)).shape == (2, 5, 6, 6)


def test_a_table_is_found_in_the_home_folder_and_written_for_new_times_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    table = LatencyTable("~/times.json", "a", "1")
    table.update([])
    assert not (tmp_path / "times.json").exists()
    table.update([(("conv", 3, 4), 1.5)])
    assert LatencyTable(tmp_path / "times.json", "a", "1")["conv", 3, 4] == 1.5
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match="cannot read the latency table"):
        LatencyTable(tmp_path / "folder", "a", "1")
