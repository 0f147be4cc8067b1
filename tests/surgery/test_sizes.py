"""Sizes that a forward reads off tensors: kept between calls, turned into constants, computed by others."""

import math
from functools import lru_cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import randomise
from test_surgery import check_law
from torch import nn

from taylor_pruning.errors import InputError
from taylor_pruning.repair.paired_runs import refresh_batchnorms
from taylor_pruning.surgery import other_sizes
from taylor_pruning.surgery.draws import equal_draws
from taylor_pruning.surgery.graph import ChannelGraph


class Around(nn.Module):
    """conv - `middle` - conv - head."""

    def __init__(self, middle, width=8, **more):
        super().__init__()
        self.a, self.b, self.fc = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(width, 6, 3, padding=1), nn.Linear(6, 4)
        self.middle = middle
        for name, value in more.items():
            setattr(self, name, value)

    def forward(self, x):
        return self.fc(F.relu(self.b(self.middle(self, F.relu(self.a(x))))).mean((2, 3)))


def around(middle, *args, **more):
    torch.manual_seed(0)
    return randomise(Around(middle, *args, **more))


def images(number=3, *size):
    size = size or (12, 12)
    return torch.randn(number, 3, *size, dtype=torch.double, generator=torch.Generator().manual_seed(0))


@lru_cache
def kept_plan(shape):
    return [shape[0], shape[1] // 2, 2, shape[2] * shape[3]]


KEPT = {}


def kept_by_name(name, size):
    return KEPT.setdefault(name, size)


@pytest.mark.parametrize(
    "plan", [kept_plan, lambda shape: [*kept_plan(shape)[:3], kept_by_name("hw", shape[2] * shape[3])]]
)
def test_sizes_that_are_kept_between_calls_belong_to_one_trace(plan):
    kept_plan.cache_clear()
    KEPT.clear()

    def middle(block, x):
        y = x.reshape(plan(x.shape)).mean(2)
        return y.reshape(len(x), -1, *x.shape[2:]) * (0.5 if block.training else 1)  # it is traced twice

    model = around(middle, 4)
    for _ in range(2):
        graph = check_law(model, images(), seeds=(0,))
        assert graph.layers["a"].reason is None and len(graph.units) == 10
        nodes = len(graph.executions[False].trace.graph.nodes)
        model(images())
        assert len(graph.executions[False].trace.graph.nodes) == nodes  # nor does a call add to an old graph


# -- images of other sizes than the example's ---------------------------------------------------------------------------


def padded_to_even(block, x):
    rows, columns = ((math.ceil(n / 2) * 2 - n) for n in x.shape[2:])
    return F.pad(x, (0, columns, 0, rows))


def three_quarters(block, x):
    return F.interpolate(x, size=[int(n * 0.75) for n in x.shape[2:]])


def graded(block, x):
    return x * torch.from_numpy(np.linspace(0, 1, x.shape[3]))


def row_by_row(block, x):
    rows = list(x.split(1, 2))
    for i in range(1, len(rows)):
        rows[i] = rows[i] + F.relu(block.row(rows[i - 1]))
    return torch.cat(rows, 2)


def placed(block, x):
    place = block.place
    return x + (place if place.shape[2:] == x.shape[2:] else F.interpolate(place, size=x.shape[2:]))


def pooled_otherwise(block, x):
    return F.avg_pool2d(x, 2) if x.shape[2] > 12 else F.max_pool2d(x, 2)


def joined_otherwise(block, x):
    y = block.row(x)
    return F.relu(x) + (x if x.shape[2] > 12 else y)


SIZES = [(12, 12), (15, 9), (24, 19)]


@pytest.mark.parametrize("middle", [padded_to_even, three_quarters, graded])
def test_numbers_that_a_size_was_turned_into_are_those_of_every_size(middle):
    model = around(middle)
    graph = ChannelGraph(model, images(1))
    gates = torch.ones(len(graph.units), dtype=torch.double)
    for size in SIZES:
        with torch.no_grad(), graph.gated(gates):
            gated = model(images(3, *size))
        torch.testing.assert_close(gated, model(images(3, *size)))
        check_law(model, images(3, *size), seeds=(0,), example=images(1))
    assert len(graph.units) == 14 and "forward" not in vars(model)


@pytest.mark.parametrize("middle", [row_by_row, placed, pooled_otherwise, joined_otherwise])
def test_a_size_at_which_the_forward_does_other_steps_is_refused(middle):
    model = around(middle, row=nn.Conv2d(8, 8, 1), place=nn.Parameter(torch.randn(1, 8, 12, 12)))
    graph = check_law(model, images(), seeds=(0,))
    assert all(info.reason is None for info in graph.layers.values())
    gates = torch.ones(len(graph.units), dtype=torch.double)
    message = r"other steps on inputs of shape \(3, 15, 9\) than .* \(3, 12, 12\)"
    for _ in range(2):
        with graph.gated(gates), pytest.raises(InputError, match=message):
            model(images(3, 15, 9))


def test_statistics_behind_images_of_several_sizes():
    model, taken = around(three_quarters, norm=nn.BatchNorm2d(8)), []
    model.middle = lambda block, x: block.norm(three_quarters(block, x))
    inputs = [images(2, *size) for size in SIZES]
    with model.norm.register_forward_pre_hook(lambda module, args: taken.append(args[0].movedim(1, 0).flatten(1))):
        for x in inputs:
            model(x)
    refresh_batchnorms(model, inputs)
    torch.testing.assert_close(model.norm.running_mean, torch.cat(taken, 1).mean(1))


# -- sizes computed by others -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "size", [lambda s: int(np.prod(s[1:])), lambda s: np.prod(s[1:]), lambda s: int(s[1] * s[2] * s[3])]
)
def test_a_product_of_sizes_by_numpy_follows(size):
    def middle(block, x):
        x = F.max_pool2d(block.c(x), 6)
        x = F.relu(block.hidden(x.view(-1, size(x.shape))))
        return x[:, :, None, None]

    model = around(middle, c=nn.Conv2d(8, 5, 3, padding=1), hidden=nn.Linear(20, 8))
    graph = check_law(model, images(), seeds=(0,))
    assert [graph.layers[name].reason for name in "acb"] == [None] * 3


def test_a_literal_that_is_a_product_of_sizes_is_protected():
    def middle(block, x):
        assert int(np.prod(x.shape[1:])) > 0 and np.prod([2, 3]) == 6
        return F.relu(block.hidden(x.reshape(-1, 8 * 144)))[:, :, None, None]

    graph = check_law(around(middle, hidden=nn.Linear(8 * 144, 8)), images(), seeds=(0,))
    assert graph.layers["a"].reason.startswith("removing them makes the network fail") and len(graph.units) == 6


def test_the_length_of_a_parameter_follows():
    def middle(block, x):
        return block.scale.view(-1, len(block.scale), 1, 1) * x  # as YOLOv12's blocks scale their branch

    assert len(check_law(around(middle, scale=nn.Parameter(torch.randn(8))), images(), seeds=(0,)).units) == 14


def test_the_length_of_a_parameter_is_no_literal_of_the_same_value_elsewhere():
    def middle(block, x):
        shares = block.shares.softmax(0)
        x = sum(shares[i] * x for i in range(len(block.shares)))
        q, k, v = block.qkv(x).reshape(len(x), 3, 2, -1, x[0, 0].numel()).unbind(1)
        return ((q.mT @ k).softmax(-1) @ v.mT).mT.reshape(len(x), -1, *x.shape[2:])

    more = {"shares": nn.Parameter(torch.randn(3)), "qkv": nn.Conv2d(8, 24, 1)}
    graph = check_law(around(middle, **more), images(), seeds=(0,))
    assert graph.layers["qkv"].reason is None


def test_a_size_with_which_is_computed_is_no_literal_of_the_same_value():
    def middle(block, x):
        rows = x.transpose(1, 2)
        return rows[:, : rows.shape[1] - 1].transpose(1, 2) * block.scale.view(12, 1).mean()

    model = around(middle, scale=nn.Parameter(torch.randn(12)))
    graph = check_law(model, images(3, 16, 12), seeds=(0,), example=images(1))
    assert len(graph.units) == 14


def by_stride(network, x):
    return x * 2 if x.stride(2) > 9 else x


def by_sameness(network, x):
    return x * 2 if x.is_same_size(x.mT) else x


@pytest.mark.parametrize("middle", [by_stride, by_sameness])
def test_a_decision_by_what_follows_from_a_size_is_one_by_the_size(middle):
    torch.manual_seed(0)
    model = randomise(Around(middle))
    graph = ChannelGraph(model, torch.zeros(1, 3, 9, 9))
    with graph.gated(torch.ones(len(graph.units))), pytest.raises(InputError, match="does other steps"):
        model(torch.randn(2, 3, 9, 12, dtype=torch.float64))


class Wider(nn.Module):
    """Returns one answer or the other by the shape of the images."""

    def __init__(self):
        super().__init__()
        self.a, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)

    def forward(self, x):
        features = self.a(x).relu().mean((2, 3))
        answers = self.fc(features), self.fc(-features)
        return *answers, answers[x.shape[3] > x.shape[2]]


def test_what_is_returned_may_be_chosen_by_a_size():
    torch.manual_seed(0)
    model = randomise(Wider())
    graph = ChannelGraph(model, torch.zeros(1, 3, 9, 9))
    for width in (9, 12):
        x = torch.randn(2, 3, 9, width, dtype=torch.float64)
        expected = model(x)
        with graph.gated(torch.ones(len(graph.units))):
            for ours, theirs in zip(model(x), expected, strict=True):
                torch.testing.assert_close(ours, theirs)


class BackToItsType(nn.Module):
    """Activates in float32, and goes on in the type of its input."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.fc = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 3), nn.Linear(6, 4)

    def forward(self, x):
        y = F.silu(self.a(x).float()).to(x.dtype)
        return self.fc(self.b(y).float().mean((2, 3)).to(self.fc.weight.dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_type_that_is_read_off_the_input_is_that_of_every_run(dtype):
    graph = ChannelGraph(BackToItsType().to(dtype).eval(), torch.zeros(1, 3, 8, 8, dtype=dtype))
    assert len(graph.units) == 14 and graph.layers["b"].reason is None
    assert graph.remove(graph.units[:5])(torch.zeros(2, 3, 8, 8, dtype=dtype)).dtype == dtype


def test_where_another_type_is_computed_otherwise_the_steps_of_the_example_run_at_every_size():
    def middle(block, x):
        return 2 * x if x.dtype == torch.double else x

    model = around(middle).float().eval()
    graph = ChannelGraph(model, images(1).float())
    model.double()
    with graph.gated(torch.ones(len(graph.units))):
        for size in (12, 16):
            x = images(2, size, size)
            torch.testing.assert_close(model(x), model.fc(F.relu(model.b(F.relu(model.a(x)))).mean((2, 3))))


def test_another_type_is_recorded_once_for_all_sizes_where_the_forward_reads_none(monkeypatch):
    recorded, record = [], other_sizes.record
    monkeypatch.setattr(other_sizes, "record", lambda *args: recorded.append(args) or record(*args))
    graph = ChannelGraph(Around(lambda s, x: x).eval(), torch.zeros(1, 3, 8, 8), verify=False)
    recorded.clear()
    gates, model = torch.ones(len(graph.units)), graph.model.double()
    for size in (8, 9, 10):
        x = images(2, size, size)
        with graph.gated(gates):
            gated = model(x)
        torch.testing.assert_close(gated, model(x))
    assert len(recorded) == 1


def test_few_sizes_are_kept_and_that_of_the_example_is_one_of_them(monkeypatch):
    monkeypatch.setattr(other_sizes, "MOST_SIZES", 2)
    model = around(padded_to_even)
    graph = ChannelGraph(model, images(1), verify=False)
    trace, gates = graph.executions[False].trace, torch.ones(len(graph.units), dtype=torch.double)
    example = next(iter(images(1).shape[2:]))
    for size in (9, 10, 11, 13, example, 15):
        with graph.gated(gates):
            gated = model(x := images(2, size, size))
        torch.testing.assert_close(gated, model(x))
        assert len(trace.at_sizes) <= 3 and next(iter(trace.at_sizes))[0] == ((3, example, example),)


def by_largest_divisor(s, x):
    divisor = 7
    while x.shape[2] % divisor:
        divisor -= 1
    return x * divisor


@pytest.mark.parametrize(
    "middle",
    [
        by_largest_divisor,
        lambda s, x: x * torch.from_numpy(np.ones(1)) * x.shape[2],
        lambda s, x: torch.fft.rfft2(x).real[..., : x.shape[-1] // 2],
        lambda s, x: x.mT.reshape(x.shape),
    ],
)
def test_a_forward_is_recorded_alike_at_every_size(middle):
    """A proof records under `equal_draws`, where new tensors pass through a few more operations."""
    model, x = around(middle), images(2, 8, 10)
    graph = ChannelGraph(model, images(1), verify=False)
    with torch.no_grad(), equal_draws(torch.device("cpu")), graph.gated(torch.ones(len(graph.units))):
        found = model(x)
    assert torch.allclose(found, model(x))


def positions_first(s, x):
    return x.flatten(2).transpose(1, 2)


MIXED = {
    "all sizes are named": lambda s, x: positions_first(s, x).reshape(x.shape[0], s.a.out_channels, *x.shape[2:]),
    "one size is open": lambda s, x: positions_first(s, x).reshape(x.shape[0], s.a.out_channels, -1, x.shape[3]),
    "merged before": lambda s, x: positions_first(s, x).flatten(1).view(x.shape[0], s.a.out_channels, *x.shape[2:]),
    "positions are open": lambda s, x: positions_first(s, x).reshape(x.shape[0], s.a.out_channels, -1).unsqueeze(3),
}


@pytest.mark.parametrize("name", MIXED)
def test_channels_whose_elements_a_view_takes_by_the_size_of_the_image_are_protected(name):
    """On 2 x 2 pixels, the size on which cuts are tried, four neighbouring channels become every other channel."""
    model, x = around(MIXED[name]), images(2, 4, 6)
    graph = ChannelGraph(model, images(1, 2, 2))
    assert graph.layers["a"].reason.startswith("is mixed with positions in")
    assert graph.layers["b"].removable.all()
    smaller, gates = graph.remove({"b": [1, 4]}), torch.ones(len(graph.units))
    gates[graph.units_of({"b": [1, 4]})] = 0
    with torch.no_grad(), graph.gated(gates):
        torch.testing.assert_close(smaller(x), model(x))
