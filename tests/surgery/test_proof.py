"""The proof of a cut: it passes what is right, finds what is wrong, and says which units are at fault."""

import copy
import math
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from taylor_pruning.errors import InputError
from taylor_pruning.surgery.graph import ChannelGraph
from taylor_pruning.surgery.operations import RULES
from taylor_pruning.surgery.proof import CutProof, difference, draw_anew, tensors_of


class Filters(NamedTuple):
    filters: tuple


class Chain(nn.Module):
    """Four 1x1 convs with BatchNorm between them."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3 if i == 0 else 6, 6, 1) for i in range(4))
        self.norms = nn.ModuleList(nn.BatchNorm2d(6) for _ in range(4))

    def forward(self, x):
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.relu(norm(conv(x)))
        return x


UNITS = [Filters(((str(layer), index),)) for layer in range(3) for index in range(6)]


def run_gated(model, units, x):
    """A reference: closes gates behind every BatchNorm."""
    for layer, (conv, norm) in enumerate(zip(model.convs, model.norms, strict=True)):
        gate = x.new_ones(6)
        gate[[unit.filters[0][1] for unit in units if unit.filters[0][0] == str(layer)]] = 0
        x = F.relu(norm(conv(x))) * gate[:, None, None]
    return x


def cut(model, units, wrong=(), raising=()):
    """A reference that leaves the shift of a BatchNorm behind in layers that are `wrong`."""
    smaller = copy.deepcopy(model)
    for (((layer, index),),) in units:
        conv = smaller.convs[int(layer) + 1]
        if layer in raising:
            conv.weight = nn.Parameter(conv.weight[:, 1:])
            continue
        if layer in wrong:
            conv.bias.data += conv.weight[:, index, 0, 0] * F.relu(smaller.norms[int(layer)].bias[index])
        conv.weight.data[:, index] = 0
    return smaller


def proof(model=None, modes=(False,), **faults):
    torch.manual_seed(0)
    model = Chain() if model is None else model
    example = torch.zeros(1, 3, 4, 4)
    return CutProof(model, [example], run_gated, lambda model, units: cut(model, units, **faults), modes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_what_is_right_passes(dtype):
    judge = proof(Chain().to(dtype), modes=(False, True))
    assert judge.failure(UNITS[::2]) is None and judge.faults(UNITS, share=0.5) == {}


def test_units_at_fault_are_found_together_with_the_reason():
    faults = proof(wrong={"1"}).faults(
        UNITS, share=0.5
    )  # initial shifts are zero: without new values nothing would show
    assert set(faults) == set(UNITS[6:12]) and "other outputs than closing" in faults[UNITS[6]]
    faults = proof(raising={"0"}, wrong={"2"}).faults(UNITS)
    assert set(faults) == set(UNITS[:6] + UNITS[12:])
    assert "makes the network fail" in faults[UNITS[0]] and "\n" not in faults[UNITS[0]]


def test_faults_that_show_only_together_leave_a_right_rest():
    judge = proof()
    judge.cut = lambda model, units: cut(
        model, units, wrong={"0"} if len({u.filters[0][0] for u in units}) == 3 else ()
    )
    faults = judge.faults(UNITS, share=0.5)
    assert 0 < len(faults) < len(UNITS) and judge.failure([u for u in UNITS if u not in faults]) is None


def test_a_network_that_says_nothing_is_refused():
    judge = proof()
    judge.run_gated = lambda model, units, x: x.log() * torch.nan
    judge.cut = lambda model, units: nn.Threshold(torch.inf, torch.nan)
    with pytest.raises(InputError, match="no finite number"):
        judge.failure(UNITS[:1])


@dataclass
class Answer:
    logits: torch.Tensor
    maps: dict


def test_all_outputs_are_compared():
    a, b = torch.ones(2), torch.arange(3)
    assert [t.tolist() for t in tensors_of((a, Answer(a, {"b": [b, None, 2]})))] == [[1, 1], [1, 1], [0, 1, 2], 2]
    assert difference([a, b], [a * 1.5, b]) == 0.5 and difference([a, b], [a, b + 1]) == torch.inf
    assert difference([a], [a[:1]]) == torch.inf and difference([a], [a * torch.inf]) == torch.inf


def test_a_layer_with_a_single_removable_filter_is_tried():
    class Octave(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.high, self.low, self.fc = (
                nn.Conv2d(3, 8, 1),
                nn.Conv2d(6, 6, 1),
                nn.Conv2d(2, 6, 1),
                nn.Linear(6, 4),
            )

        def forward(self, x):
            x = self.a(x)
            high = int(0.75 * x.shape[1])
            return self.fc(F.relu(self.high(x[:, :high]) + self.low(x[:, high:])).mean((2, 3)))

    torch.manual_seed(0)
    model, x = Octave().eval(), torch.zeros(1, 3, 4, 4)
    assert ChannelGraph(model, x, verify=False).layers["a"].removable.sum() == 1
    graph = ChannelGraph(model, x)
    assert {name for unit in graph.units for name, _ in unit.filters} == {"high", "low"}
    graph.remove(graph.units[:3])


LARGE = {
    "masked classes": lambda a: a.index_fill(1, torch.arange(2, 20), -1e9),
    "another mask in every row": lambda a: a.masked_fill(torch.eye(20)[:3].bool().flip(1), -1e9),
    "boxes beside scores": lambda a: torch.cat([a[:, :4], 1e4 * a[:, 4:]], 1),
    "one place": lambda a: torch.cat([a[:, :19], torch.full((3, 1), 1e12)], 1),
}


@pytest.mark.parametrize("name", LARGE)
def test_large_values_hide_no_small_ones_and_rounding_is_no_difference(name):
    torch.manual_seed(0)
    a = torch.randn(3, 20, dtype=torch.double)
    other = torch.cat([1.01 * a[:, :1], a[:, 1:]], 1)
    assert 9e-4 < difference([LARGE[name](a)], [LARGE[name](other)]) < 0.011
    a[:, 0] *= 1e-9  # less than the rounding of the sums of which it is left
    noise = 1e-12 * torch.randn(3, 20, dtype=torch.double)
    assert difference([a], [a + noise]) < 1e-11


def test_a_mask_in_the_outputs_hides_no_fault():
    class Masking(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.fc = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 6, 1), nn.Linear(6, 4)

        def forward(self, x):
            x = F.relu(self.a(x))
            x = self.fc(F.relu(self.b(x)).mean((2, 3)) / math.sqrt(x.shape[1]))
            return x.masked_fill(torch.tensor([False, False, True, False]), -1e9)

    torch.manual_seed(0)
    graph = ChannelGraph(Masking().eval(), torch.zeros(1, 3, 4, 4))
    assert "other outputs than closing" in graph.layers["a"].reason and graph.layers["b"].reason is None


class Ending(nn.Module):
    """A fault in `a`, and outputs that `end` makes of the values behind it."""

    def __init__(self, end):
        super().__init__()
        self.a, self.b, self.fc, self.end = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 6, 1), nn.Linear(6, 4), end

    def forward(self, x):
        x = F.relu(self.a(x))
        return self.end(self.fc(F.relu(self.b(x)).mean((2, 3)) / math.sqrt(x.shape[1])))


ENDS = {
    "dead": lambda x: F.relu(x - 20),
    "saturated": lambda x: (200 * x).softmax(1),
    "dead, and narrow": lambda x: F.relu(torch.where(x.abs() > 1e7, torch.nan, x) - 20),
    "dead beside another": lambda x: (x[:, :1] * 0 + 1, F.relu(x - 20)),
}


@pytest.mark.parametrize("name", ENDS)
def test_inputs_are_scaled_until_the_outputs_say_something(name):
    torch.manual_seed(0)
    graph = ChannelGraph(Ending(ENDS[name]).eval(), torch.zeros(1, 3, 4, 4))
    assert "other outputs than closing" in graph.layers["a"].reason and graph.layers["b"].reason is None


def test_outputs_that_never_vary_are_no_proof():
    torch.manual_seed(0)
    model, x = Ending(lambda x: x * 0 + 1).eval(), torch.zeros(1, 3, 4, 4)
    with pytest.raises(InputError, match="no finite number that depends on its random inputs"):
        ChannelGraph(model, x)
    assert len(ChannelGraph(model, x, verify=False).units) == 14


def test_new_values_keep_variances_positive_and_leave_no_default():
    model = Chain()
    weights = [p.clone() for p in model.parameters() if p.dim() > 1]
    nn.init.zeros_(model.norms[0].weight)
    model.norms[1].running_var.zero_()  # behind a constant
    draw_anew(model)
    for norm in model.norms:
        assert (norm.running_var > 0).all() and (norm.weight != 1).all() and (norm.bias != 0).all()
    assert (model.norms[0].weight != 0).all()
    assert all(map(torch.equal, weights, (p for p in model.parameters() if p.dim() > 1)))


class Leaky(nn.Module):
    """A forward that does something else where channels are missing."""

    def __init__(self, training_alone=False):
        super().__init__()
        self.a, self.bn, self.b = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1)
        self.fc, self.training_alone = nn.Linear(8, 4), training_alone

    def shifted(self, x):
        return x + 0.3 if x.shape[1] < 8 and (self.training or not self.training_alone) else x

    def forward(self, x):
        return self.fc(F.relu(self.b(self.shifted(F.relu(self.bn(self.a(x)))))).mean((2, 3)))


def test_a_graph_protects_what_its_trial_refutes_by_name():
    torch.manual_seed(0)
    model, x = Leaky(), torch.randn(2, 3, 4, 4)
    graph = ChannelGraph(model, x)
    assert "other outputs than closing" in graph.layers["a"].reason and graph.layers["b"].reason is None
    assert len(graph.units) == 8 and graph.smooth_operations == ()
    blind = ChannelGraph(model, x, verify=False)
    assert len(blind.units) == 16
    assert blind.remove(blind.units[:2], verify=False).a.out_channels == 6
    with pytest.raises(InputError, match=r"filters of a cannot be removed.*exclude"):
        blind.remove([*blind.units[:2], *blind.units[8:10]])


class Kept(nn.Module):
    """Computes a scale once and keeps it for evaluation, as LeViT its attention biases."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.logarithm, self.kept = (
            nn.Conv2d(3, 8, 1),
            nn.Conv2d(8, 4, 1),
            nn.Parameter(torch.zeros(8)),
            {},
        )

    def train(self, mode=True):
        if mode:
            self.kept = {}
        return super().train(mode)

    def forward(self, x):
        if self.training or "scale" not in self.kept:
            self.kept["scale"] = self.logarithm.exp()
        return self.b(self.a(x) * self.kept["scale"][:, None, None]).mean((2, 3))


def test_what_a_forward_has_kept_for_evaluation_is_computed_again():
    torch.manual_seed(0)
    model, x = Kept().double().eval(), torch.randn(2, 3, 4, 4, dtype=torch.double)
    with torch.no_grad():
        model(x)
        graph = ChannelGraph(model, x)
        assert len(graph.units) == 8 and not model.training and model.kept
        smaller = graph.remove(graph.units[::2])
        gates = torch.arange(8).double() % 2
        with graph.gated(gates):
            torch.testing.assert_close(smaller(x), model(x))


def test_a_rule_that_fails_protects_what_meets_the_operation(monkeypatch):
    def rule(call):
        raise IndexError("an argument that it expects is not there")

    monkeypatch.setitem(RULES, "tanh", rule)
    model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU(), nn.Conv2d(6, 6, 1), nn.Tanh(), nn.Conv2d(6, 2, 1))
    graph = ChannelGraph(model, torch.zeros(1, 3, 4, 4))
    assert graph.layers["2"].reason == "passes through tanh (3), called in a form that is not known"
    assert graph.layers["0"].reason is None


class Remembering(nn.Module):
    """Adds what it keeps of the image before, as `kept` says."""

    def __init__(self, kept):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)
        self.kept, self.before, self.calls, self.list = kept, None, 0, []
        self.register_buffer("mean", torch.ones(8, 1, 1))

    def forward(self, x):
        x = before = self.a(x)
        if self.kept == "features" and self.before is not None:
            x = x + self.before
        if self.kept == "in training" and self.training:
            x = x / 2 if self.before is None else x + self.before
        if self.kept == "first" and self.before is not None:  # as a cache that never looks at its input again
            x = before = self.before
        if self.kept == "draws":
            x = x + torch.rand_like(x)
        if self.kept == "number":
            x = x * (1 + self.calls)
        if self.kept == "list":
            x = x + sum(self.list)
        if self.kept == "buffer":
            x = x - self.mean
            self.mean = before.mean((0, 2, 3), keepdim=True)[0].detach()
        self.before, self.calls, self.list[:] = before, self.calls + 1, [before.mean((0, 2, 3), keepdim=True)]
        return self.b(F.relu(x)).mean((2, 3))


@pytest.mark.parametrize(
    ("kept", "attribute"),
    [
        ("features", "before"),
        ("in training", "before"),
        ("first", "before"),
        ("number", "calls"),
        ("list", "list"),
        ("buffer", "mean"),
        (None, None),
        ("draws", None),
    ],
)
def test_a_network_that_goes_on_from_the_call_before_is_refused(kept, attribute):
    torch.manual_seed(0)
    model, x = Remembering(kept).eval(), torch.randn(1, 3, 4, 4)
    if attribute is None:  # what is left behind is not read
        assert len(ChannelGraph(model, x).units) == 8
        return
    with pytest.raises(InputError, match=rf"on a second call, because .*0\.{attribute}.*make it an input"):
        ChannelGraph(nn.Sequential(model), x)


def test_statistics_in_buffers_are_no_state_of_calls():
    class Moving(nn.BatchNorm2d):
        def forward(self, x):
            self.running_mean.mul_(0.9).add_(0.1 * x.mean((0, 2, 3)))
            self.last = x
            return (x - self.running_mean[:, None, None]) * self.weight[:, None, None]

    model = nn.Sequential(nn.Conv2d(3, 8, 1), Moving(8), nn.ReLU(), nn.Conv2d(8, 4, 1))
    assert len(ChannelGraph(model.eval(), torch.randn(1, 3, 4, 4)).units) == 8


class Bounded(nn.Module):
    def forward(self, x):
        if x.abs().amax() > 60:
            raise ValueError("out of range")
        return F.relu(x)


class WithConstant(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.bounded, self.fc = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 5, 3), Bounded(), nn.Linear(5, 4)

    def forward(self, x):
        y = self.fc(F.relu(self.b(F.relu(self.a(x)))).mean((2, 3)))
        return y, self.bounded(x).mean() * 0


def test_a_network_that_takes_no_large_values_is_verified_on_small_ones():
    graph = ChannelGraph(WithConstant().double().eval(), torch.randn(1, 3, 12, 12, dtype=torch.double))
    assert len(graph.units) == 11
