"""Targets: what must be left, in per cent or in absolute numbers."""

import pytest
import torch

from EnhancedPruning import EnhancedPruning, PruningSettings
from taylor_pruning.errors import InputError
from taylor_pruning.selection.costs import CostModel
from taylor_pruning.selection.targets import Target, parse_target
from taylor_pruning.surgery.graph import ChannelGraph
from taylor_pruning.training.profile import profile


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("50%", Target("macs", share=0.5)),
        ("12.5 %", Target("macs", share=0.125)),
        ("150M", Target("macs", amount=150e6)),
        ("1.2g", Target("macs", amount=1.2e9)),
        (3e6, Target("macs", amount=3e6)),
        ("20000", Target("macs", amount=20000)),
    ],
)
def test_targets_are_read(text, expected):
    assert parse_target("macs", text) == expected


@pytest.mark.parametrize(("text", "expected"), [("5ms", 5), ("0.1 s", 100), ("300us", 0.3), ("2e1MS", 20)])
def test_targets_in_time_are_milliseconds(text, expected):
    assert parse_target("latency", text) == Target("latency", amount=pytest.approx(expected))
    assert parse_target("latency", "40%") == Target("latency", share=0.4)
    for wrong in ("5", "5M", "0ms", "ms", "-3ms"):
        with pytest.raises(InputError, match="target"):
            parse_target("latency", wrong)


@pytest.mark.parametrize("text", ["", "half", "0%", "100%", "0.5", "-3M", "5ms", "1.2.3M", None, "nan"])
def test_what_is_no_target_is_refused(text):
    with pytest.raises(InputError, match="target"):
        parse_target("params", text)


@pytest.mark.parametrize("kind", ["macs", "params"])
@pytest.mark.parametrize("absolute", [False, True])
def test_what_is_left_is_the_target(kind, absolute, half_resnet_of_4):
    model, images = half_resnet_of_4, torch.randn(8, 3, 32, 32)
    batches = [(images, torch.arange(8) % 4)]
    dense = profile(model, images[:1])[{"params": "parameters"}.get(kind, kind)]
    text = str(0.6 * dense) if absolute else "60%"
    settings = PruningSettings(rounds=2, compensate=False, **{f"target_{kind}": text})
    result = EnhancedPruning(model, batches, batches, settings=settings, progress=False).prune(taylor_order=1)
    left = result.stages[-1][{"params": "parameters"}.get(kind, kind)] / dense
    assert left == pytest.approx(0.6, abs=0.01)


def test_a_target_above_the_network_and_two_targets_are_refused(half_resnet_of_4):
    graph = ChannelGraph(half_resnet_of_4, torch.randn(1, 3, 32, 32))
    with pytest.raises(InputError, match="smaller target"):
        Target("params", amount=1e9).percentage(CostModel(graph, "params").total())
    with pytest.raises(InputError, match="one target"):
        PruningSettings(target_macs="50%", target_params="50%")


def test_a_percentage_beside_a_target_is_refused(half_resnet_of_4):
    batches = [(torch.randn(8, 3, 32, 32), torch.arange(8) % 4)]
    settings = PruningSettings(target_macs="60%", rounds=1)
    pruning = EnhancedPruning(half_resnet_of_4, batches, batches, settings=settings, progress=False)
    calls = (
        lambda: pruning.prune(70),
        lambda: pruning.run_full_pruning(30),
        lambda: pruning.prune_by_baseline("lamp", 70),
    )
    for call in calls:
        with pytest.raises(InputError, match="a pruning percentage and a target contradict each other"):
            call()
