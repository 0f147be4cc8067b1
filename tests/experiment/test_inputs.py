"""A resumed run reads the images and the weights that it began with."""

import json
import shutil

import pytest
import torch
from image_files import write_folder, write_image
from watching import interrupted_at

import run_enhanced_pruning
import run_single_experiment
from taylor_pruning.errors import InputError
from taylor_pruning.experiment.command import DataSettings
from taylor_pruning.experiment.folders import CorruptImageError, load_image_folder
from taylor_pruning.experiment.inputs import allow_repair, check_inputs
from taylor_pruning.training import fine_tuning as FineTuning

QUICK = [
    "--model", "vgg7_bn", "--train-epochs", "1", "--calibration-samples", "4", "--rounds", "1", "--batch-size", "4",
    "--workers", "0", "--device", "cpu", "--quiet", "--fine-tune-epochs", "1", "--no-compensate",
]  # fmt: skip


def rename(data):
    for split in ("train", "val"):
        (data / split / "cat").rename(data / split / "zebra")


def another_image(data):
    write_image(data / "val" / "dog" / "2.png", (32, 32), "red")


def many_classes(data):
    rename(data)
    for name in ("emu", "gnu", "yak"):
        for split in ("train", "val"):
            write_image(data / split / name / "0.png")


CHANGES = {
    "many classes": (many_classes, "emu is new; the class gnu is new; 2 more classes are gone or new; 9 images"),
    "renamed class": (rename, "the class cat is gone; the class zebra is new"),
    "new class": (lambda data: [write_image(data / s / "emu" / "0.png") for s in ("train", "val")], "emu is new; 7 images"),
    "fewer images": (lambda data: (data / "train" / "cat" / "0.png").unlink(), "5 images in train instead of 6"),
    "replaced image": (another_image, "images in val were renamed or replaced"),
}  # fmt: skip


def refused(code, capsys, *parts):
    error = capsys.readouterr().err
    assert code == 2 and "Traceback" not in error and all(part in error for part in parts), error


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """A run that was interrupted in fine-tuning, and its data."""
    place = tmp_path_factory.mktemp("interrupted")
    data = write_folder(place / "data")
    with pytest.MonkeyPatch.context() as patch:
        interrupted_at(patch, FineTuning.Training, "train_epoch", 2)
        arguments = ["--data-path", str(data), *QUICK, "--output-dir", str(place / "run")]
        assert run_single_experiment.main(arguments) == 130
    return place / "run", data


@pytest.mark.parametrize("change", CHANGES)
def test_other_images_do_not_continue_a_run(change, interrupted, tmp_path, capsys):
    run, data = interrupted
    shutil.move(data, tmp_path / "kept")
    shutil.copytree(tmp_path / "kept", data)
    apply, message = CHANGES[change]
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    try:
        apply(data)
        refused(run_single_experiment.main(["--resume", str(run)]), capsys, str(data), message, "new run")
    finally:
        shutil.rmtree(data)
        shutil.move(tmp_path / "kept", data)
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}


def test_a_run_of_an_older_version_goes_on_with_the_images_that_are_there(interrupted, tmp_path, capsys):
    """Unless the dense network that it trained has other classes."""
    run, data = tmp_path / "run", interrupted[1]
    shutil.copytree(interrupted[0], run)
    config = json.loads((run / "config.json").read_text())
    inputs = config.pop("inputs")
    (run / "config.json").write_text(json.dumps(config))
    torch.save({"classifier.weight": torch.zeros(3, 128)}, run / "dense_model.pt")
    refused(
        run_single_experiment.main(["--resume", str(run)]), capsys, "dense_model.pt is of another network", "remove"
    )
    shutil.copy(interrupted[0] / "dense_model.pt", run / "dense_model.pt")
    (run / "config.json").write_text(json.dumps(config))
    assert run_single_experiment.main(["--resume", str(run)]) == 0
    assert json.loads((run / "config.json").read_text()) == {**config, "inputs": inputs}
    assert inputs["images"]["classes"] == ["cat", "dog"] and str(data) == config["arguments"]["data_path"]


@pytest.mark.parametrize("inputs", [3, {"images": 3}, {"images": {"classes": [], "train": [1], "val": {}}}])
def test_a_config_that_does_not_say_which_images_is_named(inputs, interrupted, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(interrupted[0], run)
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"inputs": inputs}))
    refused(
        run_single_experiment.main(["--resume", str(run)]),
        capsys,
        "does not say which images the run read; start a new run",
    )


def test_other_weights_do_not_continue_a_sweep(interrupted, tmp_path, monkeypatch, capsys):
    run, data = interrupted
    weights = tmp_path / "weights.pt"
    shutil.copy(run / "dense_model.pt", weights)
    arguments = ["--data-path", str(data), *QUICK, "--weights", str(weights), "--pruning-percentages", "20", "40",
                 "--taylor-orders", "1"]  # fmt: skip
    interrupted_at(monkeypatch, run_enhanced_pruning.Sweep, "fine_tuned", 2)
    assert run_enhanced_pruning.main([*arguments, "--output-dir", str(tmp_path / "run")]) == 130
    torch.save({name: value + 1 for name, value in torch.load(weights).items()}, weights)
    resume = ["--resume", str(tmp_path / "run")]
    refused(run_enhanced_pruning.main(resume), capsys, f"{weights} has other content", "new run")
    weights.unlink()
    refused(run_enhanced_pruning.main(resume), capsys, f"cannot open {weights}")
    shutil.copy(run / "dense_model.pt", weights)
    assert run_enhanced_pruning.main(resume) == 0


def test_a_broken_image_may_be_repaired(interrupted, tmp_path):
    """Its size changes; other images still have to be those of the run."""
    config = json.loads((interrupted[0] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    data = load_image_folder(shutil.copytree(interrupted[1], tmp_path / "data"))
    settings = DataSettings(data_path=str(tmp_path / "data"))
    check_inputs(tmp_path, settings, data)
    another_image(tmp_path / "data")
    changed = load_image_folder(tmp_path / "data")
    for error in (None, InputError("other"), CorruptImageError("cannot decode")):
        allow_repair(tmp_path, error)
        if not isinstance(error, CorruptImageError):
            with pytest.raises(InputError, match="renamed or replaced"):
                check_inputs(tmp_path, settings, changed)
    check_inputs(tmp_path, settings, changed)
    with pytest.raises(InputError, match="renamed or replaced"):  # from then on, the repaired ones
        check_inputs(tmp_path, settings, data)


@pytest.mark.parametrize("place", ["train", "train/cat/run", "val/run", "link/dog"])
def test_results_among_the_images_are_refused(place, tmp_path, capsys):
    data = write_folder(tmp_path / "data")
    (data / "link").symlink_to(data / "val")
    there = sorted(data.rglob("*"))
    code = run_single_experiment.main(["--data-path", str(data), *QUICK, "--output-dir", str(data / place)])
    refused(code, capsys, "lies among the images", "pass another --output-dir")
    assert [path for path in sorted(data.rglob("*")) if path.name != ".lock"] == there
