"""Both command lines from the outside: what they write, what they refuse, and that a killed run goes on."""

import copy
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

import EnhancedFilterPruner as EnhancedFilterPruner_module
import EnhancedPruning as EnhancedPruning_module
import run_enhanced_pruning
import run_single_experiment
from EnhancedFilterPruner import EnhancedFilterPruner
from EnhancedPruning import EnhancedPruning, PruningSettings
from taylor_pruning.errors import InputError
from taylor_pruning.experiment.folders import load_image_folder
from taylor_pruning.experiment.loaders import make_loader
from taylor_pruning.experiment.pruned_file import load_pruned
from taylor_pruning.experiment.setup import warn_of_chance
from taylor_pruning.repair.compensation import CompensationReport
from taylor_pruning.scoring.collecting import _signs
from taylor_pruning.training import fine_tuning as FineTuning
from taylor_pruning.training.fine_tuning import Recipe, TrainingDiverged, evaluate

ROOT = Path(__file__).parents[2]
QUICK = [
    "--model", "squeezenet1_1", "--train-epochs", "1", "--calibration-samples", "12", "--rounds", "1",
    "--batch-size", "8", "--workers", "0", "--device", "cpu", "--quiet",
]  # fmt: skip
SWEEP = ["--pruning-percentages", "20", "40", "--taylor-orders", "2", "--compare-baseline", "--baselines", "magnitude",
         "--rounds", "2"]  # fmt: skip


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory):
    """Three classes of 32x32 images: noise of three colours."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 6)):
        for label in range(3):
            folder = root / split / f"class {label} ä"
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = rng.integers(0, 120, (32, 32, 3))
                pixels[..., label] += 80
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{index}.png")
    return root


def single(image_folder, output, *extra):
    return run_single_experiment.main(["--data-path", str(image_folder), "--output-dir", str(output), *QUICK, *extra])


def without_timings(value):
    """results.json without what may differ between two equal runs."""
    if isinstance(value, dict):
        varying = ("seconds", "latency_ms", "images_per_second", "file_bytes", "command", "output_dir", "resume", "quiet",
                   "git_commit")  # fmt: skip
        return {k: without_timings(v) for k, v in value.items() if k not in varying}
    return [without_timings(v) for v in value] if isinstance(value, list) else value


@pytest.fixture(scope="module")
def finished(image_folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("single") / "run"
    code = single(image_folder, output, "--fine-tune-epochs", "2", "--use-gradient-flow", "--oracle-samples", "4")
    assert code == 0
    return output


def test_a_run_leaves_its_folder(finished):
    names = {path.name for path in finished.iterdir()}
    assert {"config.json", "results.json", "pruned_model.pt", "gradient_flow.json", "accuracy.png", "oracle.png",
            "filters_per_layer.png", "score_distribution.png", "gradient_flow.png", "flow_vs_score.png"} <= names  # fmt: skip
    assert not any("tmp" in name or "checkpoint" in name for name in names)
    results = json.loads((finished / "results.json").read_text())
    assert [stage["stage"] for stage in results["stages"]] == ["dense", "pruned", "compensated", "fine-tuned"]
    dense, pruned = results["stages"][0], results["stages"][-1]
    assert pruned["parameters"] < dense["parameters"] and pruned["macs"] < dense["macs"]
    assert pruned["file_bytes"] < dense["file_bytes"]
    removed = sum(map(len, results["plan"].values()))
    removable = sum(layer["filters"] for layer in results["layers"].values() if layer["reason"] is None)
    assert removed == pytest.approx(0.3 * removable, abs=1)
    assert results["data"]["classes"] == [f"class {label} ä" for label in range(3)]  # in the order of the logits
    assert results["data"]["image_size"] == 32 and len(results["data"]["mean"]) == len(results["data"]["std"]) == 3
    config = json.loads((finished / "config.json").read_text())
    assert config["arguments"]["pruning_percentage"] == 30 and config["environment"]["torch"] == torch.__version__


def test_the_saved_network_is_the_one_that_was_measured(finished, image_folder):
    model = load_pruned(finished / "pruned_model.pt")
    val = make_loader(load_image_folder(image_folder).val, 8)
    accuracy = evaluate(model, val, progress=False)
    stage = json.loads((finished / "results.json").read_text())["stages"][-1]
    assert (accuracy.top1, accuracy.loss) == (pytest.approx(stage["top1"]), pytest.approx(stage["loss"], rel=1e-5))
    assert sum(p.numel() for p in model.parameters()) == stage["parameters"]


def test_the_same_command_gives_the_same_results(finished, image_folder, tmp_path):
    arguments = ("--fine-tune-epochs", "2", "--use-gradient-flow", "--oracle-samples", "4")
    assert single(image_folder, tmp_path / "again", *arguments) == 0
    first, second = (json.loads((f / "results.json").read_text()) for f in (finished, tmp_path / "again"))
    assert without_timings(first) == without_timings(second)


def test_zero_epochs_mean_no_fine_tuning(image_folder, tmp_path):
    assert single(image_folder, tmp_path / "run", "--fine-tune-epochs", "0", "--no-compensate") == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert [stage["stage"] for stage in results["stages"]] == ["dense", "pruned"] and results["fine_tuning"] == []


@pytest.mark.parametrize(("top1", "warns"), [(33.4, True), (40.0, True), (60.0, False)])
def test_a_dense_network_at_chance_is_pointed_out(top1, warns, image_folder, capsys):
    """18 images of three classes: two standard errors are 22 points."""
    warn_of_chance({"top1": top1}, load_image_folder(image_folder))
    assert ("no better than chance" in capsys.readouterr().err) == warns


BAD = {
    "no such folder": (["--data-path", "nowhere"], "nowhere"),
    "no train": (["--data-path", "."], "train/"),
    "unknown model": (["--model", "vgg61"], "vgg"),
    "percentage 0": (["--pruning-percentage", "0"], "between 0 and 100"),
    "percentage 100": (["--pruning-percentage", "100"], "between 0 and 100"),
    "percentage -5": (["--pruning-percentage=-5"], "between 0 and 100"),
    "percentage NaN": (["--pruning-percentage", "nan"], "between 0 and 100"),
    "order 4": (["--taylor-order", "4"], "--taylor-order"),
    "negative epochs": (["--fine-tune-epochs", "-1"], "at least 0"),
    "layer bound": (["--layer-bound", "0.5"], "at least 1"),
    "no weights file": (["--weights", "missing.pth"], "missing.pth"),
    "no cuda": (["--device", "cuda"], "cuda"),
    "pattern": (["--exclude", "nothing*"], "nothing*"),
    "learning rate": (["--lr", "nan"], "above 0"),
    "too much": (["--pruning-percentage", "99", "--min-filters", "8"], "lower percentage"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_one_clear_line_and_code_2(case, image_folder, tmp_path, monkeypatch, capsys):
    if case == "no cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.chdir(tmp_path)
    extra, message = BAD[case]
    try:
        code = single(image_folder, "out", *extra)
    except SystemExit as exit:
        code = exit.code
    error = capsys.readouterr().err
    assert code == 2 and message in error and "Traceback" not in error
    assert len([line for line in error.splitlines() if "error:" in line]) == 1
    assert not list((tmp_path / "out").glob("[!.]*")), "found before any training, and the folder is free again"


def test_weights_that_cannot_be_downloaded_name_the_way_out(image_folder, tmp_path, monkeypatch, capsys):
    from urllib.error import URLError

    def no_network(*arguments, **keywords):
        raise URLError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    assert single(image_folder, tmp_path / "out", "--image-size", "64") == 2
    assert "--weights" in capsys.readouterr().err


def test_corrupt_images_are_named_or_left_out(image_folder, tmp_path, capsys):
    import shutil

    copy = tmp_path / "images"
    shutil.copytree(image_folder, copy)
    bad = copy / "train" / "class 0 ä" / "bad.png"
    bad.write_bytes(b"no image")
    assert single(copy, tmp_path / "a", "--fine-tune-epochs", "0") == 2
    assert "bad.png" in capsys.readouterr().err
    assert single(copy, tmp_path / "b", "--fine-tune-epochs", "0", "--skip-corrupt") == 0
    assert "1 corrupt image" in capsys.readouterr().out


def test_a_folder_in_use_or_already_used_is_refused(finished, image_folder, capsys):
    import fcntl

    assert single(image_folder, finished) == 2
    assert "holds a run already" in capsys.readouterr().err
    arguments = ("--fine-tune-epochs", "2", "--use-gradient-flow", "--oracle-samples", "4", "--resume", str(finished))
    with open(finished / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert single(image_folder, finished, *arguments) == 2
    assert "another run" in capsys.readouterr().err


def command(runner, image_folder, *extra):
    return [sys.executable, str(ROOT / f"{runner}.py"), "--data-path", str(image_folder), *QUICK, *extra]


def kill_when(process, condition, seconds=240):
    """SIGKILL as soon as the condition holds; the process must still be running then."""
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < end, "the condition was never met"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()


def test_a_single_run_killed_in_fine_tuning_resumes_to_the_same_result(finished, image_folder, tmp_path):
    folder = tmp_path / "run"
    extra = ["--fine-tune-epochs", "2", "--use-gradient-flow", "--oracle-samples", "4"]
    process = subprocess.Popen(
        command("run_single_experiment", image_folder, *extra, "--output-dir", str(folder)), stderr=subprocess.DEVNULL
    )
    kill_when(process, (folder / "fine_tuning_checkpoint.pt").exists)
    assert run_single_experiment.main(["--resume", str(folder)]) == 0
    whole, resumed = (json.loads((f / "results.json").read_text()) for f in (finished, folder))
    assert without_timings(whole) == without_timings(resumed)


@pytest.fixture
def progressive(plain_network, images, labels, monkeypatch):
    """progressive(steps between the rounds): a pipeline of three rounds, the networks that were trained between the rounds
    and (target, smaller network, kept filters) of every compensation, which here doubles the first layer's weights."""
    loader = make_loader(torch.utils.data.TensorDataset(images, labels), 6, shuffle=True)
    trained, compensations = [], []

    def train_steps(model, *arguments, **keywords):
        trained.append(model)
        FineTuning.train_steps(model, *arguments, **keywords)

    def compensate(target, smaller, batches, kept, *, progress, seed):
        compensations.append((target, copy.deepcopy(smaller), kept))
        smaller.get_submodule("0").weight.data.mul_(2)
        return CompensationReport()

    def pipeline(steps):
        settings = PruningSettings(rounds=3, fine_tune_between=steps)
        pruning = EnhancedPruning(plain_network, loader, loader, settings=settings, progress=False)
        return pruning, trained, compensations

    monkeypatch.setattr(EnhancedPruning_module, "train_steps", train_steps)
    monkeypatch.setattr(EnhancedPruning_module, "compensate", compensate)
    return pipeline


@pytest.mark.parametrize("steps", [0, 3])
def test_compensation_fits_to_the_dense_network_or_to_the_trained_one_before_the_cut(progressive, steps):
    """And starts at the weights of that network: fits do not pile up over the rounds."""
    pruning, trained, compensations = progressive(steps)
    result = pruning.prune(60, 2)
    after = [r["after_training"] is not None for r in result.rounds]
    assert after == [steps > 0, steps > 0, False]  # after every round but the last
    expected = [pruning.model, *trained] if steps else [pruning.model] * 3
    for (target, smaller, kept), network in zip(compensations, expected, strict=True):
        assert target is network
        for layer in ("0", "4"):
            weight, source = smaller.get_submodule(layer).weight, target.get_submodule(layer).weight
            assert len(kept[layer]) == len(weight) and set(kept[layer]) <= set(range(len(source)))
            if layer == "0":  # its inputs are whole: the kept filters are those of the target
                assert torch.equal(weight, source[kept[layer]])


@pytest.mark.parametrize(("percentage", "order", "message"), [(99, 2, "lower percentage"), (100, 2, "between 0 and 100"),
                                                              (30, 4, "taylor_order")])  # fmt: skip
def test_what_cannot_be_pruned_is_refused_before_it_is_scored(progressive, monkeypatch, percentage, order, message):
    pruning = progressive(0)[0]
    monkeypatch.setattr(pruning, "_ranked", lambda *arguments: pytest.fail("scored"))
    with pytest.raises(InputError, match=message):
        pruning.prune(percentage, order)


@pytest.mark.parametrize(("steps", "compensated"), [(0, True), (3, True), (0, False)])
def test_predicted_and_measured_loss_change_are_of_one_loss(plain_network, images, labels, steps, compensated, monkeypatch):
    """Behind compensation the divergence from the dense network, also in later rounds; else the loss of the labels."""
    loader = make_loader(torch.utils.data.TensorDataset(images, labels), 6)
    settings = PruningSettings(rounds=3, fine_tune_between=steps, compensate=compensated)
    pruning = EnhancedPruning(plain_network, loader, loader, settings=settings, progress=False)
    pruners, choose = [], EnhancedFilterPruner.select

    def select(pruner, *arguments):
        pruners.append((pruner, choose(pruner, *arguments)))
        return pruners[-1][1]

    monkeypatch.setattr(EnhancedFilterPruner, "select", select)
    result = pruning.prune(60, 2)
    dense = plain_network(images).softmax(1)

    def loss(logits):
        return F.cross_entropy(logits, dense).item() if compensated else F.cross_entropy(logits, labels).item()

    networks = [pruner.model for pruner, _ in pruners]
    assert networks[0] is plain_network and len(networks) == 3
    for (pruner, chosen), record in zip(pruners, result.rounds, strict=True):
        assert record["loss"] == ("divergence" if compensated else "cross-entropy")
        directions = pruner.directions  # all images, in the order of the loader
        shift = directions.coordinates[:, chosen].sum(1)
        assert torch.allclose(directions.logits, pruner.model(images))
        shifted = directions.logits - torch.einsum("nkr,nr->nk", directions.basis, shift)
        assert record["predicted_loss_change"] == pytest.approx(loss(shifted) - loss(directions.logits), abs=1e-9)
    ends = [*networks[1:], result.model]
    for start, end, record in zip(networks, ends, result.rounds, strict=True):
        if not steps:  # training changes the network between two rounds
            assert record["measured_loss_change"] == pytest.approx(loss(end(images)) - loss(start(images)), abs=1e-9)
            labelled = [F.cross_entropy(model(images), labels).item() for model in (start, end)]
            assert record["label_loss_change"] == pytest.approx(labelled[1] - labelled[0], abs=1e-9)


@pytest.mark.parametrize("compensated", [True, False])
def test_the_pruned_stage_is_the_plan_without_any_repair(plain_network, images, labels, compensated):
    loader = make_loader(torch.utils.data.TensorDataset(images, labels), 6)
    settings = PruningSettings(rounds=3, compensate=compensated)
    pruning = EnhancedPruning(plain_network, loader, loader, settings=settings, progress=False)
    result = pruning.prune(60, 2)
    stage = result.stages[1]
    loss = F.cross_entropy(pruning.graph.remove(result.plan)(images), labels).item()
    assert stage["stage"] == "pruned" and stage["loss"] == pytest.approx(loss)
    if compensated:
        assert result.stages[2]["loss"] == pytest.approx(F.cross_entropy(result.model(images), labels).item())
        assert result.stages[2]["loss"] != pytest.approx(loss)


@pytest.mark.parametrize("compensated", [True, False])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_results_hold_the_ranking_that_selected_from_one_pass(silu_network, images, labels, order, compensated, monkeypatch):
    loader = make_loader(torch.utils.data.TensorDataset(images, labels), 6)
    settings = PruningSettings(rounds=1, compensate=compensated, selection="independent")
    pruning = EnhancedPruning(silu_network, loader, loader, settings=settings, progress=False)
    passes = interrupted_at(monkeypatch, EnhancedFilterPruner, "rank", None)
    probed = interrupted_at(monkeypatch, EnhancedFilterPruner_module, "probe_derivatives", None)
    result = pruning.prune(40, order, use_gradient_flow=True)
    assert len(passes) == 1 and len(probed) == (order > 1 and not compensated)
    path = None if order == 1 else "exact" if compensated else "hvp"
    assert result.curvature["path"] == path
    assert (result.curvature["h_error"] is not None) == (path == "hvp")
    order_of_units = sorted(range(len(pruning.graph.units)), key=lambda u: score_of(result, pruning.graph.units[u]))
    gone = {u for u, unit in enumerate(pruning.graph.units) if unit.filters[0][1] in result.plan[unit.filters[0][0]]}
    assert gone == set(order_of_units[: len(gone)]), "the lowest scores are those that went"
    assert ("nats²" in result.criterion) == (order == 1) and "weighed by gradient flow" in result.criterion
    assert result.gradient_flow["units"]["score"] == [score_of(result, unit) for unit in pruning.graph.units]


def score_of(result, unit):
    layer, index = unit.filters[0]
    return result.scores[layer][index]


def test_gradient_flow_covers_the_same_layers_before_and_after(plain_network, images, labels):
    network = nn.Sequential(*plain_network[:-1], nn.Linear(24, 12), nn.ReLU(), nn.Linear(12, 4)).double().eval()
    loader = make_loader(torch.utils.data.TensorDataset(images, labels), 6)
    settings = PruningSettings(rounds=1, exclude=("4",), prune_linear=True)
    pruning = EnhancedPruning(network, loader, loader, settings=settings, recipe=Recipe(epochs=1), progress=False)
    flow = pruning.fine_tune(pruning.prune(30, 2, use_gradient_flow=True)).gradient_flow
    measured = {stage: {name for name, values in flow["layers"].items() if values[stage] is not None}
                for stage in ("dense", "pruned", "fine-tuned")}  # fmt: skip
    assert measured["dense"] == measured["pruned"] == measured["fine-tuned"] == {"0", "8"}


def test_results_say_what_compensation_did_to_every_layer(plain_network, images, labels):
    network = nn.Sequential(*plain_network[:6], nn.Conv2d(6, 6, 3, groups=6), *plain_network[6:]).double().eval()
    loader = make_loader(torch.utils.data.TensorDataset(images, labels), 6)
    pruning = EnhancedPruning(network, loader, loader, settings=PruningSettings(rounds=2), progress=False)
    for record in pruning.prune(40, 2).rounds:
        fitted = {layer["name"] for layer in record["compensation"]["layers"]}
        left_alone = record["compensation"]["left_alone"]
        assert fitted | left_alone.keys() == {"0", "4", "6", "9"}
        assert "depthwise" in left_alone["6"]
        assert all({"error_before", "error_after", "ridge"} <= layer.keys() for layer in record["compensation"]["layers"])


def test_the_seed_reaches_every_random_draw(silu_network, images, labels, monkeypatch):
    """Probes, random directions, a fit's images and positions, random scores, dropout."""
    seeds = set()
    loader = make_loader(torch.utils.data.TensorDataset(images, labels), 6)

    def spy(name):
        function = getattr(EnhancedPruning_module, name)

        def call(*arguments, **keywords):
            seeds.add((name, keywords["seed"] if "seed" in keywords else arguments[-1]))
            return function(*arguments, **keywords)

        monkeypatch.setattr(EnhancedPruning_module, name, call)

    spy("compensate")
    spy("baseline_scores")
    for name in ("collect_directions", "probe_derivatives"):
        function = getattr(EnhancedFilterPruner_module, name)

        def call(*arguments, name=name, function=function, **keywords):
            seeds.add((name, keywords["seed"]))
            return function(*arguments, **keywords)

        monkeypatch.setattr(EnhancedFilterPruner_module, name, call)
    for compensated in (True, False):
        settings = PruningSettings(rounds=1, compensate=compensated, seed=7)
        pruning = EnhancedPruning(silu_network, loader, loader, settings=settings, progress=False)
        pruning.prune(30, 2)
        pruning.prune_by_baseline("random", 30)
    assert seeds == {(n, 7) for n in ("compensate", "baseline_scores", "collect_directions", "probe_derivatives")}


def test_random_directions_depend_on_the_seed_and_not_on_the_split():
    assert not torch.equal(_signs(0, 3, 0, 4, 50), _signs(1, 3, 0, 4, 50))
    assert torch.equal(_signs(1, 3, 0, 6, 50)[2:], _signs(1, 3, 2, 4, 50))


def test_what_lies_between_rounds_is_trained_and_the_last_round_is_not(progressive):
    pruning, trained, _ = progressive(3)
    result = pruning.prune(60, 2)
    assert len(trained) == 2 and [r["after_training"] is not None for r in result.rounds] == [True, True, False]
    trained.clear()
    baseline = pruning.prune_by_baseline("magnitude", 60)  # one shot: there is nothing between rounds
    assert not trained and "train" not in baseline.seconds and baseline.criterion == "magnitude"


def test_a_progressive_run_interrupted_twice_ends_in_the_same_result(progressive, tmp_path, monkeypatch):
    pruning = progressive(3)[0]
    whole = pruning.run_full_pruning(60, fine_tune_epochs=1, checkpoint=tmp_path / "whole.pt")
    train, calls = EnhancedPruning_module.train_steps, []

    def interrupted(model, *arguments, **keywords):
        calls.append(keywords["round_index"])
        if len(calls) == 2:
            raise KeyboardInterrupt
        train(model, *arguments, **keywords)

    def stop(*arguments, **keywords):
        raise KeyboardInterrupt

    def run(resume):
        return pruning.run_full_pruning(60, fine_tune_epochs=1, checkpoint=tmp_path / "run.pt", resume=resume)

    monkeypatch.setattr(EnhancedPruning_module, "train_steps", interrupted)
    with monkeypatch.context() as patch:
        patch.setattr(EnhancedPruning_module, "fine_tune", stop)
        for resume in (False, True):  # the first run ends between the second round and the third, the second behind it
            with pytest.raises(KeyboardInterrupt):
                run(resume)
    resumed = run(True)
    assert calls == [0, 1, 1]  # no finished round is repeated
    assert without_timings(whole.as_dict()) == without_timings(resumed.as_dict())
    assert whole.seconds["train"] > 0
    ours, theirs = resumed.model.state_dict(), whole.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def interrupted_at(patch, owner, name, number):
    """Ctrl-C in the call of that number; returns the list of the calls' arguments."""
    function, calls = getattr(owner, name), []

    def call(*arguments, **keywords):
        calls.append(arguments)
        if len(calls) == number:
            raise KeyboardInterrupt
        return function(*arguments, **keywords)

    patch.setattr(owner, name, call)
    return calls


def test_dense_training_goes_on_at_the_last_finished_epoch(image_folder, tmp_path, monkeypatch):
    extra, folder = ["--train-epochs", "3", "--fine-tune-epochs", "0"], tmp_path / "broken"
    assert single(image_folder, tmp_path / "whole", *extra) == 0
    epochs = interrupted_at(monkeypatch, FineTuning.Training, "train_epoch", 3)
    assert single(image_folder, folder, *extra) == 130
    assert single(image_folder, folder, *extra, "--resume", str(folder)) == 0
    assert [epoch for _, _, epoch, *_ in epochs] == [1, 2, 3, 3]
    ours, theirs = (torch.load(f / "dense_model.pt") for f in (folder, tmp_path / "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert not (folder / "dense_training_checkpoint.pt").exists()


def test_no_finished_round_of_pruning_is_repeated(plain_network, images, labels, tmp_path, monkeypatch):
    loader = make_loader(torch.utils.data.TensorDataset(images, labels), 6)
    settings, checkpoint = PruningSettings(rounds=3), tmp_path / "run.pt"

    def run(percentage=60, order=2, network=plain_network, settings=settings, calibration=None, **keywords):
        pruning = EnhancedPruning(
            network, loader, loader, settings=settings, calibration=calibration, progress=False
        )
        return pruning.run_full_pruning(percentage, order, fine_tune_epochs=0, checkpoint=checkpoint, **keywords)

    whole = run()
    other = copy.deepcopy(plain_network)
    other[0].weight.data[0, 0, 0, 0] += 1
    refused = {
        "pruning_percentage was 60, is 30": {"percentage": 30},
        "taylor_order was 2, is 1": {"order": 1},
        "the dense network was": {"network": other},
        "seed was 0, is 1": {"settings": dataclasses.replace(settings, seed=1)},
        "rounds was 3, is 4": {"settings": dataclasses.replace(settings, rounds=4)},
        "budget was filters, is macs": {"settings": dataclasses.replace(settings, budget="macs")},
        "the calibration images was": {"calibration": [(images[:6], labels[:6])]},
    }
    written = checkpoint.with_suffix(".rounds").read_bytes()
    for message, change in refused.items():
        with pytest.raises(InputError, match=f"another pruning: .*{message}"):
            run(**change, resume=True)
    assert checkpoint.with_suffix(".rounds").read_bytes() == written
    checkpoint.with_suffix(".rounds").write_bytes(b"something else")
    with pytest.raises(InputError, match="not a checkpoint of pruning rounds"):
        run(resume=True)
    rounds = interrupted_at(monkeypatch, EnhancedPruning, "_round", 3)
    with pytest.raises(KeyboardInterrupt):
        run()
    broken = run(resume=True)
    assert [number for _, _, number, *_ in rounds] == [1, 2, 3, 3]
    assert without_timings(whole.as_dict()) == without_timings(broken.as_dict())
    ours, theirs = broken.model.state_dict(), whole.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.fixture(scope="module")
def swept(image_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep") / "run"
    arguments = ["--data-path", str(image_folder), *QUICK, *SWEEP, "--fine-tune-epochs", "2"]
    assert run_enhanced_pruning.main([*arguments, "--output-dir", str(folder)]) == 0
    return folder, arguments


def test_a_sweep_leaves_tables_and_plots(swept, capsys):
    folder, _ = swept
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "results.json", "results.csv", "results.md", "accuracy.png", "accuracy.pdf"} <= names
    sweep = json.loads((folder / "results.json").read_text())
    cells = {(cell["method"], cell["percentage"]) for cell in sweep["cells"]}
    assert cells == {(m, p) for m in ("order 2", "magnitude") for p in (20, 40)}
    assert all(cell["status"] == "done" for cell in sweep["cells"])


def test_a_killed_sweep_resumes_to_the_same_table_and_repeats_nothing(swept, image_folder, tmp_path):
    whole, arguments = swept
    folder = tmp_path / "run"
    process = subprocess.Popen(
        command("run_enhanced_pruning", image_folder, *SWEEP, "--fine-tune-epochs", "2", "--output-dir", str(folder)),
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    kill_when(process, (folder / "cells" / "order-2_40_seed-0.checkpoint").exists)  # in the middle of the second cell
    first = folder / "cells" / "order-2_20_seed-0.json"
    written = first.stat().st_mtime_ns
    assert run_enhanced_pruning.main([*arguments, "--resume", str(folder)]) == 0
    assert first.stat().st_mtime_ns == written
    assert without_timings(json.loads((folder / "results.json").read_text())["cells"]) == without_timings(
        json.loads((whole / "results.json").read_text())["cells"]
    )


def test_a_sweep_with_other_arguments_does_not_resume(swept, capsys):
    folder, arguments = swept
    assert run_enhanced_pruning.main([*arguments, "--resume", str(folder), "--lr", "0.5"]) == 2
    assert re.search(r"--lr was 0\.\d+, is 0\.5", capsys.readouterr().err)


def test_a_sweep_interrupted_in_a_cell_repeats_no_round(swept, image_folder, tmp_path, monkeypatch):
    whole, arguments = swept
    folder = tmp_path / "run"
    rounds = interrupted_at(monkeypatch, EnhancedPruning, "_round", None)
    interrupted_at(monkeypatch, run_enhanced_pruning.Sweep, "fine_tuned", 2)
    assert run_enhanced_pruning.main([*arguments, "--output-dir", str(folder)]) == 130
    before = len(rounds)
    assert run_enhanced_pruning.main(["--resume", str(folder)]) == 0
    assert len(rounds) == before > 0, "the round of the cell at 40 % was finished"
    ours, theirs = (json.loads((f / "results.json").read_text())["cells"] for f in (folder, whole))
    assert without_timings(ours) == without_timings(theirs)
    assert not list((folder / "cells").glob("*.checkpoint"))


def test_a_sweeps_cell_is_the_experiment_of_the_single_runner(swept, image_folder, tmp_path):
    """Same filters, same rounds, same accuracy, though the sweep prunes to other percentages before it."""
    folder, _ = swept
    cells = json.loads((folder / "results.json").read_text())["cells"]
    for cell in (cell for cell in cells if cell["method"] == "order 2"):
        output = tmp_path / f"{cell['percentage']:g}"
        assert single(image_folder, output, "--pruning-percentage", str(cell["percentage"]), "--rounds", "2") == 0
        alone = json.loads((output / "results.json").read_text())
        for key in ("plan", "rounds", "scores", "stages", "fine_tuning", "curvature"):
            assert without_timings(cell[key]) == without_timings(alone[key]), key


def test_a_finished_run_is_left_as_it_is(finished, swept, capsys):
    for runner, folder in ((run_single_experiment, finished), (run_enhanced_pruning, swept[0])):
        before = {path: (path.stat().st_mtime_ns, path.is_file() and path.read_bytes()) for path in folder.rglob("*")}
        assert runner.main(["--resume", str(folder)]) == 0
        assert f"{folder} is finished; nothing was changed" in capsys.readouterr().out
        assert before == {p: (p.stat().st_mtime_ns, p.is_file() and p.read_bytes()) for p in folder.rglob("*")}


def test_a_failed_cell_is_recorded_and_the_rest_goes_on(image_folder, tmp_path, monkeypatch, capsys):
    train = EnhancedPruning_module.fine_tune

    def diverges_once(model, *arguments, **keywords):
        if "order-2_40" in str(keywords["checkpoint"]):
            raise TrainingDiverged("loss is NaN in step 3", 1, 3, 0.1, None)
        return train(model, *arguments, **keywords)

    monkeypatch.setattr(EnhancedPruning_module, "fine_tune", diverges_once)
    arguments = ["--data-path", str(image_folder), *QUICK, *SWEEP, "--fine-tune-epochs", "1"]
    assert run_enhanced_pruning.main([*arguments, "--output-dir", str(tmp_path / "run")]) == 1
    cells = json.loads((tmp_path / "run" / "results.json").read_text())["cells"]
    failed = [cell for cell in cells if cell["status"] == "failed"]
    assert [(c["method"], c["percentage"], c["error"]) for c in failed] == [("order 2", 40, "loss is NaN in step 3")]
    assert len(cells) == 4 and "1 of 4 cells failed" in capsys.readouterr().err


def test_two_processes_make_the_plan_of_one(image_folder, tmp_path):
    """torchrun with gloo: batches sharded, the plan the same, accuracy close."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    extra = ["--fine-tune-epochs", "1", "--calibration-samples", "24", "--output-dir"]
    run = command("run_single_experiment", image_folder, *extra)
    subprocess.run([*run, str(tmp_path / "one")], check=True, env=environment, stdout=subprocess.DEVNULL)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29517"]
    weights = ["--weights", str(tmp_path / "one" / "dense_model.pt")]
    both = []
    for name, prefix in (("single", [sys.executable]), ("double", torchrun)):
        subprocess.run([*prefix, *run[1:], str(tmp_path / name), *weights], check=True, env=environment,
                       stdout=subprocess.DEVNULL)  # fmt: skip
        both.append(json.loads((tmp_path / name / "results.json").read_text()))
    assert both[0]["plan"] == both[1]["plan"]
    assert both[0]["stages"][-1]["images"] == both[1]["stages"][-1]["images"] == 18


class CountedLoader:
    """Counts the passes over a list of batches that reach the end."""

    def __init__(self, batches):
        self.batches, self.passes = batches, 0

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        yield from self.batches
        self.passes += 1

    def spread(self, samples):
        return self.batches[:1]


@pytest.mark.parametrize("reestimate", [False, True])
def test_nothing_is_evaluated_twice(plain_network, batches, reestimate):
    """Dense, pruned, compensated, three epochs; one more where the statistics that fine-tuning begins with are new."""
    val = CountedLoader(batches)
    settings = PruningSettings(rounds=2, reestimate_batchnorm=reestimate)
    pruning = EnhancedPruning(plain_network, batches, val, settings=settings, progress=False)
    result = pruning.run_full_pruning(40, 2, fine_tune_epochs=3)
    assert val.passes == 6 + reestimate
    last = result.stages[-1]
    accuracy = evaluate(result.model, batches, progress=False)
    assert {key: last[key] for key in vars(accuracy)} == vars(accuracy)
