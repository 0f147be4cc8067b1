"""The last lines of a run: gains, cost and files."""

import pytest

from taylor_pruning.report.closing import experiment_closing, sweep_closing


def stage(name, top1, parameters, macs, latency):
    return {"stage": name, "top1": top1, "images": 2000, "parameters": parameters, "macs": macs, "latency_ms": latency}


@pytest.fixture
def stages():
    return [
        stage("dense", 95.2, 538_506, 24_478_976, 3.2),
        stage("pruned", 71.0, 259_000, 12_793_000, 1.6),
        stage("compensated", 93.9, 259_000, 12_793_000, 1.6),
        stage("fine-tuned", 94.6, 259_000, 12_793_000, 3.52),
    ]


def test_an_experiment_says_gain_cost_and_files(stages, tmp_path):
    for name in ("results.json", "pruned_model.onnx"):
        (tmp_path / name).touch()
    results = {"stages": stages, "layers": {"a": {"filters": 64, "kept": 40}, "b": {"filters": 8, "kept": 8}}}
    assert experiment_closing(results, tmp_path).splitlines() == [
        "Removing 24 of 72 filters gave:",
        "  52 % fewer parameters (539 k -> 259 k)",
        "  48 % fewer multiply-accumulates an image (24.5 M -> 12.8 M)",
        "  10 % more time for one image on this machine (3.20 -> 3.52 ms)",  # said as it is
        "Cost, on 2,000 validation images:",
        "  top-1 95.20 % -> 94.60 % (-0.60 points); one standard error is 0.5 points",
        "  95.20 % dense, 71.00 % after the cut, 93.90 % after the repair, 94.60 % after",
        "  fine-tuning",
        f"Files in {tmp_path}:",
        "  pruned_model.onnx  the same for onnxruntime",
        "  results.json       every number",
    ]


def test_nearly_all_is_not_all_and_nearly_nothing_has_no_sign(stages, tmp_path):
    stages[-1].update(parameters=1_500, top1=95.196)
    text = experiment_closing({"stages": stages, "layers": {}}, tmp_path)
    assert "99.72 % fewer parameters (539 k -> 1.5 k)" in text
    assert "top-1 95.20 % -> 95.20 % (+0.00 points)" in text
    stages[-1].update(parameters=640)
    assert "99.88 % fewer parameters (539 k -> 640)" in experiment_closing({"stages": stages, "layers": {}}, tmp_path)


def test_what_one_image_of_2000_changes_is_said(stages, tmp_path):
    stages[-1].update(top1=95.15)
    assert "top-1 95.20 % -> 95.15 % (-0.05 points)" in experiment_closing({"stages": stages, "layers": {}}, tmp_path)


def test_images_that_are_all_right_give_no_error(stages, tmp_path):
    stages[-1].update(top1=100.0, images=24)
    text = experiment_closing({"stages": stages, "layers": {}}, tmp_path)
    assert "(+4.80 points); too few images to tell by how much" in text and "0.0 points" not in text


def test_a_budget_of_time_names_the_predicted_and_the_measured_time(stages, tmp_path):
    times = {
        "dense_ms": 10.0,
        "pruned_ms": 5.2,
        "asked_ms": 4.9,
        "predicted_ms": 5.0,
        "batch_size": 8,
    }
    results = {"stages": stages, "layers": {"a": {"filters": 64, "kept": 40}}, "latency": {**times, "device": "a CPU"}}
    text = experiment_closing(results, tmp_path)
    assert "5.20 ms for a batch of 8, 52% of the dense network's 10.00 ms" in text
    assert "asked for 4.90 ms, predicted 5.00 ms (-4 %)" in text


def test_warnings_come_first(stages, tmp_path):
    found = {"divergence": 2.4, "agreement": 9.0, "constant_divergence": 2.1, "constant_agreement": 14.0, "images": 100}
    stopped = {"asked": 80.0, "reached": 48.0, "tried": 52.0, "held_out": found}
    results = {"stages": stages, "layers": {"a": {"filters": 64, "kept": 40}}, "rounds": [{"uniform_widths": True}]}
    text = experiment_closing({**results, "stopped": stopped}, tmp_path)
    assert text.startswith("WARNING: stopped at 48 % instead of 80 %") and "--no-guard" in text
    assert "\nWARNING: the dense network answers nearly the same" in text
    assert all(len(line) <= 80 for line in text.splitlines()[:-1])


def test_a_network_that_no_layer_repairs_is_named(stages, tmp_path):
    repair = {"layers": [], "left_alone": {"up": "a transposed conv", "out": "a transposed conv"}}
    results = {"stages": stages, "layers": {"a": {"filters": 64, "kept": 40}}}
    rounds = [{"compensation": repair, "measured_loss_change": 0.1}]
    text = experiment_closing({**results, "rounds": rounds}, tmp_path)
    assert text.startswith("WARNING: no layer could be repaired (a transposed conv): the network is as")
    unchanged = [{"compensation": repair, "measured_loss_change": 0.0}]
    repaired = [{"compensation": {**repair, "layers": [{}]}, "measured_loss_change": 0.1}]
    for rounds in (unchanged, repaired):
        assert "WARNING" not in experiment_closing({**results, "rounds": rounds}, tmp_path)


def test_a_sweep_names_the_best_of_every_percentage(stages, tmp_path):
    worse = [*stages[:3], {**stages[3], "top1": 90.0}]
    cells = [
        {"status": "done", "percentage": 30.0, "method": "magnitude", "stages": worse},
        {"status": "done", "percentage": 30.0, "method": "lamp", "stages": [*stages[:3], {**stages[3], "macs": 2e7}]},
        {"status": "done", "percentage": 30.0, "method": "order 2", "stages": stages},  # as good as lamp, and cheaper
        {"status": "failed", "percentage": 50.0, "method": "order 2"},
    ]
    text = sweep_closing({"cells": cells}, tmp_path)
    assert text.startswith("30 %, best by order 2: top-1 95.20 % -> 94.60 % (-0.60 points); 52 % fewer")
    assert "agnitude" not in text and "50 %," not in text
    assert all(len(line) <= 80 for line in text.splitlines()[:-1])


def test_a_sweep_names_the_networks_that_lost_less_than_their_row_says(stages, tmp_path):
    cell = {"status": "done", "percentage": 99.0, "method": "order 3", "stages": stages}
    cells = [{**cell, "seed": 0, "stopped": None}, {**cell, "seed": 7, "stopped": {"asked": 99.0, "reached": 74.25}}]
    text = " ".join(sweep_closing({"cells": cells}, tmp_path).split())
    assert text.startswith("WARNING: stopped before a round that would have destroyed the network")
    assert "lost more: order 3 at 99 % with seed 7 after 74.2 %. Give" in text and "seed 0" not in text


def test_a_sweep_names_the_networks_whose_widths_or_repair_are_poor(stages, tmp_path):
    """But not those that were to have uniform widths."""
    cell = {"status": "done", "percentage": 30.0, "seed": 0, "stages": stages, "rounds": [{"uniform_widths": True}]}
    broken = {"compensation": {"layers": [], "left_alone": {"up": "a transposed conv"}}, "measured_loss_change": None}
    cells = [
        {**cell, "method": "order 2"},
        {**cell, "method": "order 3", "seed": 4},
        {**cell, "method": "lamp uniform"},
        {**cell, "method": "lamp compensated", "rounds": [broken]},
    ]
    text = " ".join(sweep_closing({"cells": cells}, tmp_path).split())
    assert text.startswith(
        "WARNING: order 2 at 30 % with seed 0; order 3 at 30 % with seed 4: the dense network answers"
    )
    assert "every layer lost the same share" in text and "LAMP, uniform" not in text
    assert "WARNING: LAMP, repaired at 30 % with seed 0: no layer could be repaired (a transposed conv)" in text


def test_a_sweep_of_several_seeds_names_the_best_mean(stages, tmp_path):
    lucky = [*stages[:3], {**stages[3], "top1": 95.0}]
    unlucky = [*stages[:3], {**stages[3], "top1": 93.0}]
    cells = [
        {"status": "done", "percentage": 30.0, "method": method, "stages": found}
        for method, found in [("order 1", lucky), ("order 1", unlucky), ("lamp", stages), ("lamp", lucky)]
    ]
    text = sweep_closing({"cells": cells}, tmp_path)
    assert text.startswith("30 %, best by LAMP, mean of 2 seeds: top-1 95.20 % -> 94.80 % (-0.40 points)")
