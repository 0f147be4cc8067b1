"""Both command lines from the outside: what they write, what they refuse, and that a killed run goes on."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from quick import drawn_plots
from watching import interrupted_at, without_timings

import EnhancedPruning as EnhancedPruning_module
import run_enhanced_pruning
import run_single_experiment
from EnhancedPruning import EnhancedPruning
from taylor_pruning.experiment.choices import BaselineChoice
from taylor_pruning.experiment.command import DataSettings
from taylor_pruning.experiment.folders import load_image_folder
from taylor_pruning.experiment.loaders import make_loader
from taylor_pruning.experiment.pruned_file import load_pruned
from taylor_pruning.experiment.rounds import Rounds
from taylor_pruning.experiment.setup import warn_of_chance, warn_of_few_images
from taylor_pruning.training import fine_tuning as FineTuning
from taylor_pruning.training.fine_tuning import TrainingDiverged, evaluate

QUICK = [
    "--model", "vgg7_bn", "--train-epochs", "1", "--calibration-samples", "12", "--rounds", "1",
    "--batch-size", "8", "--workers", "0", "--device", "cpu", "--quiet",
]  # fmt: skip
SWEEP = ["--pruning-percentages", "20", "40", "--taylor-orders", "2", "--compare-baseline", "--baselines", "magnitude",
         "--rounds", "2"]  # fmt: skip
WITH_ALL = ["--fine-tune-epochs", "2", "--use-gradient-flow", "--oracle-samples", "4"]


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory):
    """Three classes of 16x16 images: noise of three colours."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 6)):
        for label in range(3):
            folder = root / split / f"class {label} ä"
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = rng.integers(0, 120, (16, 16, 3))
                pixels[..., label] += 80
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{index}.png")
    return root


def single(image_folder, output, *extra):
    return run_single_experiment.main(["--data-path", str(image_folder), "--output-dir", str(output), *QUICK, *extra])


@pytest.fixture(scope="module")
def finished(image_folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("single") / "run"
    with drawn_plots():
        assert single(image_folder, output, *WITH_ALL) == 0
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
    assert results["data"]["image_size"] == 16 and len(results["data"]["mean"]) == len(results["data"]["std"]) == 3
    config = json.loads((finished / "config.json").read_text())
    assert config["arguments"]["pruning_percentage"] == 30 and config["environment"]["torch"] == torch.__version__


def test_the_saved_network_is_the_one_that_was_measured(finished, image_folder):
    model = load_pruned(finished / "pruned_model.pt")
    val = make_loader(load_image_folder(image_folder).val, 8)
    accuracy = evaluate(model, val, progress=False)
    stage = json.loads((finished / "results.json").read_text())["stages"][-1]
    assert (accuracy.top1, accuracy.loss) == (pytest.approx(stage["top1"]), pytest.approx(stage["loss"], rel=1e-5))
    assert sum(p.numel() for p in model.parameters()) == stage["parameters"]


def test_zero_epochs_mean_no_fine_tuning(image_folder, tmp_path):
    assert single(image_folder, tmp_path / "run", "--fine-tune-epochs", "0", "--no-compensate") == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert [stage["stage"] for stage in results["stages"]] == ["dense", "pruned"] and results["fine_tuning"] == []


@pytest.mark.parametrize(("top1", "warns"), [(33.4, True), (40.0, True), (60.0, False)])
def test_a_dense_network_at_chance_is_pointed_out(top1, warns, image_folder, capsys):
    """18 images of three classes: two standard errors are 22 points."""
    warn_of_chance({"top1": top1}, load_image_folder(image_folder))
    assert ("no better than chance" in capsys.readouterr().err) == warns


def test_validation_images_of_one_class_are_pointed_out(image_folder, capsys):
    data = load_image_folder(image_folder)
    data.val.targets[:] = 1
    warn_of_chance({"top1": 100.0}, data)
    assert capsys.readouterr().err == (
        "all validation images are of one class, so that accuracies say nothing; give others too\n"
    )


@pytest.mark.parametrize(("samples", "said"), [(17, None), (40, "only 17 are left"), (100, "none is left")])
def test_too_few_images_to_judge_the_rounds_are_pointed_out(samples, said, capsys):
    warn_of_few_images(57, DataSettings(calibration_samples=17, compensation_samples=samples))
    error = capsys.readouterr().err
    assert said in error if said else not error


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
    assert not list(tmp_path.iterdir()), "found before any training; no folder is left"


def test_weights_that_cannot_be_downloaded_name_the_way_out(image_folder, tmp_path, monkeypatch, capsys):
    from urllib.error import URLError

    def no_network(*arguments, **keywords):
        raise URLError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    assert single(image_folder, tmp_path / "out", "--model", "squeezenet1_1", "--image-size", "64") == 2
    assert "--weights" in capsys.readouterr().err


def test_a_folder_in_use_or_already_used_is_refused(finished, image_folder, tmp_path, capsys):
    import fcntl

    assert single(image_folder, finished) == 2
    assert "holds a run already" in capsys.readouterr().err
    (tmp_path / "results.json").write_text("of another program")
    assert single(image_folder, tmp_path) == 2
    assert "holds results.json already, which is kept" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]
    arguments = (*WITH_ALL, "--resume", str(finished))
    with open(finished / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert single(image_folder, finished, *arguments) == 2
    assert "another run" in capsys.readouterr().err


def test_a_run_interrupted_in_fine_tuning_resumes_to_the_same_result(finished, image_folder, tmp_path, monkeypatch):
    """With its flow and its oracle, which were measured before. So the same command gives the same results."""
    interrupted_at(monkeypatch, FineTuning.Training, "train_epoch", 3)  # one of the dense network, two of fine-tuning
    assert single(image_folder, tmp_path / "run", *WITH_ALL) == 130
    assert (tmp_path / "run" / "fine_tuning_checkpoint.pt").exists()
    assert run_single_experiment.main(["--resume", str(tmp_path / "run")]) == 0
    whole, resumed = (json.loads((f / "results.json").read_text()) for f in (finished, tmp_path / "run"))
    assert without_timings(whole) == without_timings(resumed)


def test_dense_training_goes_on_at_the_last_finished_epoch(image_folder, tmp_path, monkeypatch):
    def no_further(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Rounds, "next", no_further)
    extra, folder = ["--train-epochs", "3"], tmp_path / "broken"
    assert single(image_folder, tmp_path / "whole", *extra) == 130
    epochs = interrupted_at(monkeypatch, FineTuning.Training, "train_epoch", 3)
    assert single(image_folder, folder, *extra) == 130
    assert single(image_folder, folder, *extra, "--resume", str(folder)) == 130
    assert [epoch for _, _, epoch, *_ in epochs] == [1, 2, 3, 3]
    ours, theirs = (torch.load(f / "dense_model.pt") for f in (folder, tmp_path / "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert not (folder / "dense_training_checkpoint.pt").exists()


@pytest.fixture(scope="module")
def swept(image_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep") / "run"
    arguments = ["--data-path", str(image_folder), *QUICK, *SWEEP, "--fine-tune-epochs", "2"]
    with drawn_plots():
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


def test_a_sweep_with_other_arguments_does_not_resume(swept, capsys):
    folder, arguments = swept
    assert run_enhanced_pruning.main([*arguments, "--resume", str(folder), "--lr", "0.5"]) == 2
    assert re.search(r"--lr was 0\.\d+, is 0\.5", capsys.readouterr().err)


def test_a_sweep_interrupted_in_a_cell_repeats_no_round(swept, image_folder, tmp_path, monkeypatch):
    whole, arguments = swept
    folder = tmp_path / "run"
    rounds = interrupted_at(monkeypatch, Rounds, "next", None)
    interrupted_at(monkeypatch, run_enhanced_pruning.Sweep, "fine_tuned", 2)
    assert run_enhanced_pruning.main([*arguments, "--output-dir", str(folder)]) == 130
    before = [call for call in rounds if not isinstance(call[-1], BaselineChoice)]
    first = folder / "cells" / "order-2_20_seed-0.json"
    written = first.stat().st_mtime_ns
    assert run_enhanced_pruning.main(["--resume", str(folder)]) == 0
    after = [call for call in rounds if not isinstance(call[-1], BaselineChoice)]
    assert len(after) == len(before) > 0, "the round of the cell at 40 % was finished"
    assert first.stat().st_mtime_ns == written
    ours, theirs = (json.loads((f / "results.json").read_text())["cells"] for f in (folder, whole))
    assert without_timings(ours) == without_timings(theirs)
    assert not list((folder / "cells").glob("*.checkpoint"))


def test_a_sweeps_cell_is_the_experiment_of_the_single_runner(swept, image_folder, tmp_path):
    """Same filters, same rounds, same accuracy, though the sweep prunes to another percentage before it."""
    folder, _ = swept
    cells = json.loads((folder / "results.json").read_text())["cells"]
    [cell] = (cell for cell in cells if cell["method"] == "order 2" and cell["percentage"] == 40)
    assert single(image_folder, tmp_path / "run", "--pruning-percentage", "40", "--rounds", "2") == 0
    alone = json.loads((tmp_path / "run" / "results.json").read_text())
    for key in ("plan", "rounds", "scores", "stages", "fine_tuning", "curvature"):
        assert without_timings(cell[key]) == without_timings(alone[key]), key


def test_every_seed_of_a_sweep_reaches_its_pipeline(finished, image_folder, tmp_path, monkeypatch):
    pipelines = []

    def spy(**arguments):
        pipelines.append(arguments)
        return EnhancedPruning(**arguments)

    monkeypatch.setattr(run_enhanced_pruning, "EnhancedPruning", spy)
    arguments = ["--data-path", str(image_folder), *QUICK, "--weights", str(finished / "dense_model.pt"), "--seeds", "3", "5",
                 "--pruning-percentages", "20", "--taylor-orders", "1", "--fine-tune-epochs", "0"]  # fmt: skip
    assert run_enhanced_pruning.main([*arguments, "--output-dir", str(tmp_path / "run")]) == 0
    assert [pipeline["settings"].seed for pipeline in pipelines] == [3, 5]
    assert [pipeline["train_loader"].plan.seed for pipeline in pipelines] == [3, 5]
    first, second = (torch.cat([images for images, _ in pipeline["calibration"]]) for pipeline in pipelines)
    assert not torch.equal(first, second)


def test_a_finished_run_is_left_as_it_is(finished, swept, capsys):
    for runner, folder in ((run_single_experiment, finished), (run_enhanced_pruning, swept[0])):
        before = {path: (path.stat().st_mtime_ns, path.is_file() and path.read_bytes()) for path in folder.rglob("*")}
        assert runner.main(["--resume", str(folder)]) == 0
        assert f"{folder} is finished; nothing was changed" in capsys.readouterr().out
        assert before == {p: (p.stat().st_mtime_ns, p.is_file() and p.read_bytes()) for p in folder.rglob("*")}


DAMAGED = {
    "results.json": ['{"a": 1}', '{"cells": [{}]}', '{"cells": 3}', "[" * 100_000],
    "cells/dense.json": ["{}", '{"top1": 5}'],
    "cells/order-2_20_seed-0.json": ["{}", '{"status": "done"}', "of another cell"],
}


@pytest.mark.parametrize("name", DAMAGED)
def test_files_of_another_content_are_named(name, swept, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(swept[0], folder)
    if name != "results.json":
        (folder / "results.json").unlink()
    for text in DAMAGED[name]:
        if text == "of another cell":
            text = (folder / "cells" / "order-2_40_seed-0.json").read_text()
        (folder / name).write_text(text)
        assert run_enhanced_pruning.main(["--resume", str(folder)]) == 2
        error = capsys.readouterr().err
        assert f"{folder / name} is" in error and "remove it, and --resume" in error and "Traceback" not in error


def test_only_the_cells_of_a_sweep_are_reported(swept, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(swept[0], folder)
    (folder / "results.json").unlink()
    for name in ("order-2_30_seed-0.json", "notes_seed-7.json"):
        (folder / "cells" / name).write_text("{}")
    assert run_enhanced_pruning.main(["--resume", str(folder)]) == 0
    assert len(json.loads((folder / "results.json").read_text())["cells"]) == 4


def test_every_percentage_has_a_file_of_its_own(tmp_path):
    shares = (30.0, 30, 33.3333331, 33.3333334, 0.00001, 12.5)
    names = [run_enhanced_pruning.cell_file(tmp_path, "order 2", share, 1).name for share in shares]
    assert names[:3] == ["order-2_30_seed-1.json"] * 2 + ["order-2_33.3333331_seed-1.json"] and len(set(names)) == 5


def test_a_failed_cell_is_recorded_and_the_rest_goes_on(image_folder, tmp_path, monkeypatch, capsys):
    train = EnhancedPruning_module.fine_tune

    def diverges_once(model, *arguments, **keywords):
        if "order-2_40" in str(keywords["checkpoint"]):
            raise TrainingDiverged("loss is NaN in step 3", "last good checkpoint: of this cell", 1, 3, 0.1, None)
        return train(model, *arguments, **keywords)

    monkeypatch.setattr(EnhancedPruning_module, "fine_tune", diverges_once)
    arguments = ["--data-path", str(image_folder), *QUICK, *SWEEP, "--pruning-percentages", "40", "--rounds", "1",
                 "--fine-tune-epochs", "1"]  # fmt: skip
    assert run_enhanced_pruning.main([*arguments, "--output-dir", str(tmp_path / "run")]) == 1
    cells = json.loads((tmp_path / "run" / "results.json").read_text())["cells"]
    failed = [cell for cell in cells if cell["status"] == "failed"]
    assert [(c["method"], c["percentage"], c["error"]) for c in failed] == [("order 2", 40, "loss is NaN in step 3")]
    said = "1 of 2 cells diverged; results.md names them, start another sweep of these"
    assert len(cells) == 2 and said in capsys.readouterr().err
    monkeypatch.setattr(run_enhanced_pruning, "prepare", None)  # the same numbers would diverge again
    before = (tmp_path / "run" / "results.json").read_bytes()
    assert run_enhanced_pruning.main(["--resume", str(tmp_path / "run")]) == 1
    assert said in capsys.readouterr().err and before == (tmp_path / "run" / "results.json").read_bytes()
