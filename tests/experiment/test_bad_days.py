"""Real faults from the outside: killed runs, full disks, broken images, hostile files, odd names, bare environments.

No fault is simulated: processes get SIGKILL, writes fail at a limit of the operating system, files are broken.
"""

import contextlib
import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from killed_runs import PROCESSES, in_child, killed, running
from PIL import Image

import run_enhanced_pruning
import run_single_experiment
from taylor_pruning.errors import InputError
from taylor_pruning.experiment import setup as ExperimentSetup
from taylor_pruning.experiment.arguments import parse
from taylor_pruning.experiment.command import ExperimentTask
from taylor_pruning.experiment.embedded import embedded_data
from taylor_pruning.experiment.export import export_model
from taylor_pruning.experiment.folders import load_image_folder
from taylor_pruning.experiment.loaders import _balanced_order
from taylor_pruning.experiment.pruned_file import load_pruned
from taylor_pruning.files import atomic_path

ROOT = Path(__file__).parents[2]
QUICK = [
    "--model", "vgg7_bn", "--train-epochs", "1", "--calibration-samples", "6", "--rounds", "1",
    "--batch-size", "8", "--workers", "0", "--device", "cpu",
]  # fmt: skip
SINGLE = ["--fine-tune-epochs", "1"]
SWEEP = [
    "--pruning-percentages", "30", "--taylor-orders", "2", "--compare-baseline", "--baselines", "random",
    "--fine-tune-epochs", "1",
]  # fmt: skip


def noise(label, seed, size=(16, 16)):
    pixels = np.random.default_rng(seed).integers(0, 120, (*size, 3))
    pixels[..., label] += 80
    return Image.fromarray(pixels.astype(np.uint8))


def write_images(root, *, classes=3, train=4, val=3, size=(16, 16)):
    for split, count in (("train", train), ("val", val)):
        for label in range(classes):
            folder = root / split / f"Klasse {label} ö"
            folder.mkdir(parents=True)
            for index in range(count):
                noise(label, 10 * label + index, size).save(folder / f"{index} 猫.png")
    return root


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("data") / "Bilder $x^2 ä 猫")


def single(data, *extra):
    return run_single_experiment.main(["--data-path", str(data), *QUICK, *SINGLE, "--quiet", *map(str, extra)])


def sweep(data, *extra):
    return run_enhanced_pruning.main(["--data-path", str(data), *QUICK, *SWEEP, "--quiet", *map(str, extra)])


@pytest.fixture(scope="module")
def whole(images, tmp_path_factory):
    """An unbroken run."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert single(images, "--output-dir", folder) == 0
    return folder


@pytest.fixture(scope="module")
def swept(images, whole, tmp_path_factory):
    """An unbroken sweep."""
    folder = tmp_path_factory.mktemp("swept") / "run"
    assert sweep(images, "--weights", whole / "dense_model.pt", "--output-dir", folder) == 0
    return folder


def names(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def contents(folder):
    return {name: (folder / name).read_bytes() for name in names(folder) if (folder / name).is_file()}


def measured(value):
    """Of a results file, what two equal runs agree in."""
    if isinstance(value, dict):
        timings = ("seconds", "latency_ms", "images_per_second", "file_bytes")
        return {k: measured(v) for k, v in value.items() if k not in timings}
    return [measured(v) for v in value] if isinstance(value, list) else value


def assert_same_run(folder, whole, but=()):
    """Same files, same numbers, same network as the unbroken run."""
    assert names(folder) == names(whole)
    ours, theirs = (json.loads((f / "results.json").read_text("utf-8")) for f in (folder, whole))
    for key in theirs.keys() - {"arguments", "environment", "seconds", *but}:
        assert measured(ours[key]) == measured(theirs[key]), key
    if (whole / "pruned_model.pt").exists():
        ours, theirs = (load_pruned(f / "pruned_model.pt").state_dict() for f in (folder, whole))
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def refused(code, capsys, *parts, expected=2):
    """One line that begins with error: and holds all `parts`, no traceback, the right exit code."""
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if "error:" in line]
    assert code == expected and len(lines) == 1 and "Traceback" not in error, error
    assert all(str(part) in lines[0] for part in parts), lines[0]


# ------------------------------------------------------------------------------------------------- killed processes


def die_writing(path):
    with atomic_path(path) as temporary:
        temporary.write_text('{"half":')
        os.kill(os.getpid(), signal.SIGKILL)


def killed_writing(path):
    process = PROCESSES.Process(target=die_writing, args=(path,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL and len(list(path.parent.glob(f".{path.name}.{process.pid}.*"))) == 1


SINGLE_STAGES = {
    "start": lambda folder, text: (folder / ".lock").exists(),
    "dense training": lambda folder, text: "train dense network 1/1" in text,
    "between dense epochs": lambda folder, text: (folder / "dense_training_checkpoint.pt").exists(),
    "scoring": lambda folder, text: (folder / "dense_model.pt").exists(),
    "rounds": lambda folder, text: "compensate" in text,
    "after a round": lambda folder, text: (folder / "rounds_checkpoint.pt").exists(),
    "fine-tuning": lambda folder, text: (folder / "pruned_before_fine_tuning.pt").exists(),
    "report": lambda folder, text: (folder / "pruned_model.pt").exists(),
}


def finished(folder, images):
    """Goes on with a run that was killed; where nothing was begun, the same command goes again."""
    if (folder / "config.json").exists():
        return run_single_experiment.main(["--resume", str(folder)])  # all arguments are in config.json
    return single(images, "--output-dir", folder)


def test_a_single_run_killed_in_one_stage_after_the_other_ends_as_an_unbroken_one(images, whole, tmp_path):
    folder = tmp_path / "Läufe" / "run"
    for stage, reached in SINGLE_STAGES.items():
        copy = tmp_path / stage
        copy.mkdir()
        place = ["--resume" if (folder / "config.json").exists() else "--output-dir", folder]
        arguments = ["--data-path", images, *QUICK, *SINGLE, *place]
        killed("run_single_experiment", arguments, copy, lambda text, reached=reached: reached(folder, text))
        killed_writing(folder / "results.json")
        shutil.copytree(folder, copy / "run")
    try:
        assert finished(folder, images) == 0
        assert_same_run(folder, whole)
    except AssertionError:
        for stage in SINGLE_STAGES:  # in which was it lost? The path says it
            folder = tmp_path / stage / "run"
            assert finished(folder, images) == 0, folder
            assert_same_run(folder, whole)
        raise


def test_a_sweep_killed_in_one_stage_after_the_other_ends_as_an_unbroken_one(images, whole, swept, tmp_path):
    folder, weights = tmp_path / "run", whole / "dense_model.pt"
    cells = folder / "cells"
    arguments = ["--data-path", images, *QUICK, *SWEEP, "--weights", weights]
    stages = {"scoring": cells / "dense.json", "between cells": cells / "order-2_30_seed-0.json",
              "report": folder / "results.md"}  # fmt: skip
    for stage, file in stages.items():
        place = ["--output-dir" if stage == "scoring" else "--resume", folder]
        killed("run_enhanced_pruning", [*arguments, *place], tmp_path, lambda text, file=file: file.exists())
        killed_writing(cells / "random_30_seed-0.json")
    (
        cells / "order-2_30_seed-0.checkpoint"
    ).touch()  # as a kill leaves it between the cell's file and the checkpoint's end
    assert run_enhanced_pruning.main(["--resume", str(folder)]) == 0
    assert_same_run(folder, swept)


def test_what_cannot_be_resumed_says_why(images, whole, swept, tmp_path, capsys):
    """Given arguments must agree; a folder of the other runner, or with another file for a config.json, is refused."""
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    before = contents(folder)
    resume = ["--resume", str(folder)]
    refused(run_single_experiment.main([*resume, "--lr", "0.5"]), capsys, "--lr was", "is 0.5")
    refused(run_enhanced_pruning.main(resume), capsys, "continue it with", "run_single_experiment.py")
    with pytest.raises(SystemExit) as stop:
        run_single_experiment.main([*resume, "--output-dir", str(tmp_path / "other")])
    refused(stop.value.code, capsys, "not in", "leave --output-dir out")
    assert run_single_experiment.main([*resume, "--output-dir", str(folder / ".." / "run")]) == 0
    assert contents(folder) == before
    for text in ("{", "[]", "{}", '{"arguments": 3}'):
        (folder / "config.json").write_text(text)
        with pytest.raises(SystemExit) as stop:
            run_single_experiment.main(resume)
        refused(stop.value.code, capsys, folder / "config.json", "not the config.json of a run")
    refused(run_single_experiment.main(["--resume", str(tmp_path / "nowhere")]), capsys, "no config.json")


@pytest.mark.parametrize("stage", ["dense training", "fine-tuning"])
def test_ctrl_c_ends_with_130_and_says_how_to_go_on(stage, images, tmp_path):
    folder = tmp_path / "run"
    arguments = ["--data-path", images, *QUICK, "--fine-tune-epochs", "50", "--output-dir", folder]
    reached = {"dense training": SINGLE_STAGES[stage],
               "fine-tuning": lambda folder, text: (folder / "fine_tuning_checkpoint.pt").exists()}[stage]  # fmt: skip
    with running("run_single_experiment", arguments, tmp_path, lambda text: reached(folder, text)) as (process, log):
        os.kill(process.pid, signal.SIGINT)
        process.join(60)
    assert process.exitcode == 130
    text = log.read_text()
    assert f"continue with --resume {folder}\n" in text and "Traceback" not in text
    assert not any(".tmp" in name for name in names(folder))


def test_the_second_of_two_runs_into_one_folder_is_refused(images, tmp_path, capsys):
    folder = tmp_path / "run"
    arguments = ["--data-path", images, *QUICK, *SINGLE, "--output-dir", folder]
    with running("run_single_experiment", arguments, tmp_path, lambda text: "train dense" in text) as (process, _):
        before = contents(folder)
        refused(single(images, "--output-dir", folder), capsys, folder, "another run", "--output-dir")
        refused(single(images, "--resume", folder), capsys, folder, "another run", "wait")
        assert process.is_alive() and before.items() <= contents(folder).items()


# ----------------------------------------------------------------------------------------------------- failing disk


@contextlib.contextmanager
def full_disk(size):
    """No file can grow beyond `size` bytes: the write fails in the kernel, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def interrupt(*arguments):
    raise KeyboardInterrupt


def test_no_room_for_the_first_file(images, tmp_path, capsys):
    folder = tmp_path / "run"
    with full_disk(500):
        refused(single(images, "--output-dir", folder), capsys, "config.json", "free space", "start again", expected=1)
    assert names(folder) == [".lock"]


def test_a_single_run_on_a_full_disk_loses_nothing_and_goes_on(images, whole, tmp_path, capsys):
    folder, dense = tmp_path / "run", (whole / "dense_model.pt").stat().st_size
    kept, place = {}, ["--output-dir", folder]
    room = {
        "dense_training_checkpoint.pt": dense - 1,
        "rounds_checkpoint.pt": dense // 4,
        "fine_tuning_checkpoint.pt": 5
        * (whole / "pruned_model.pt").stat().st_size
        // 2,  # twice the weights, not thrice
    }
    for file, size in room.items():
        with full_disk(size):
            code = single(images, *place)
        refused(code, capsys, folder / file, "free space", f"--resume {folder}", expected=1)
        assert kept.items() <= contents(folder).items() and not any(".tmp" in name for name in names(folder))
        if file.startswith("dense"):
            shutil.copy(whole / "dense_model.pt", folder)  # its checkpoint is larger than all that follow
        kept, place = contents(folder), ["--resume", folder]
    assert {"dense_model.pt", "rounds_checkpoint.pt", "pruned_before_fine_tuning.pt"} <= kept.keys()
    assert single(images, "--resume", folder) == 0
    assert_same_run(folder, whole)


@pytest.mark.parametrize("kind", ["pt2", "onnx"])
def test_an_export_on_a_full_disk_leaves_nothing(kind, tmp_path):
    if kind == "onnx":
        pytest.importorskip("onnxscript")
    model, file = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 10_000)), tmp_path / f"model.{kind}"
    with full_disk(50_000), pytest.raises(OSError) as error:
        export_model(model, torch.zeros(2, 3, 2, 2), file, kind)
    assert error.value.errno == errno.EFBIG and error.value.filename == str(file)
    assert not names(tmp_path)


def test_a_sweep_on_a_full_disk_loses_nothing_and_goes_on(images, whole, swept, tmp_path, capsys, monkeypatch):
    folder, arguments = tmp_path / "run", ["--weights", whole / "dense_model.pt", "--fine-tune-epochs", 0]
    with monkeypatch.context() as patch:
        patch.setattr(run_enhanced_pruning.Sweep, "fine_tuned", interrupt)
        assert sweep(images, *arguments, "--output-dir", folder) == 130
    capsys.readouterr()
    assert (folder / "cells" / "order-2_30_seed-0.rounds.checkpoint").exists()  # larger than all that follows
    kept, place = {}, ["--resume", folder]
    cell = (swept / "cells" / "order-2_30_seed-0.json").stat().st_size  # results.json holds it and another one
    for file, room in {"cells/order-2_30_seed-0.json": cell // 2, "results.json": cell * 5 // 4}.items():
        with full_disk(room):
            code = sweep(images, *arguments, *place)
        refused(code, capsys, folder / file, "free space", f"--resume {folder}", expected=1)
        kept.pop("cells/order-2_30_seed-0.rounds.checkpoint", None)  # the cell is finished
        assert kept.items() <= contents(folder).items() and file not in names(folder)
        assert not any(".tmp" in name for name in names(folder))
        kept, place = contents(folder), ["--resume", folder]
    assert sweep(images, *arguments, *place) == 0
    cells = {name: content for name, content in kept.items() if name.startswith("cells/order")}
    assert cells and cells.items() <= contents(folder).items()  # not computed again
    assert [cell["status"] for cell in json.loads((folder / "results.json").read_text())["cells"]] == ["done"] * 2


def starved(arguments, log):
    """A run that may take 150 MB more than its process has when it begins."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + 150_000_000
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    in_child("run_single_experiment", arguments, log)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux")
def test_too_little_memory_is_said_and_the_run_can_go_on(images, tmp_path):
    arguments = ["--data-path", images, *QUICK, "--model", "vgg16", "--image-size", "64", "--weights", "none"]
    process = PROCESSES.Process(
        target=starved, args=([*map(str, arguments), "--output-dir", str(tmp_path / "run")], tmp_path / "log")
    )
    process.start()
    process.join(120)
    text = (tmp_path / "log").read_text()
    assert process.exitcode == 1 and "Traceback" not in text, text
    assert f"lower --memory-limit, then continue with --resume {tmp_path / 'run'}, or start a new run with" in text


@pytest.mark.parametrize("place", ["file", "file/run", "read-only/run"])
def test_an_output_folder_that_cannot_be_is_named(place, images, tmp_path, capsys):
    if place.startswith("read-only"):
        (tmp_path / "read-only").mkdir(mode=0o500)
        if os.access(tmp_path / "read-only", os.W_OK):
            pytest.skip("this user may write everywhere")
    (tmp_path / "file").write_text("precious")
    for run in (single, sweep):
        refused(run(images, "--output-dir", tmp_path / place), capsys, tmp_path / place, "another --output-dir")
    assert (tmp_path / "file").read_text() == "precious"


def test_a_place_for_files_that_cannot_be_written_leaves_no_run(images, tmp_path, capsys):
    """The folder is free for the corrected command."""
    (tmp_path / "file").touch()
    table = tmp_path / "file" / "times.json"
    code = single(images, "--budget", "latency", "--latency-table", table, "--output-dir", tmp_path / "run")
    refused(code, capsys, tmp_path / "file")
    assert names(tmp_path) == ["file"]


# ---------------------------------------------------------------------------------------------------- damaged files


def flip_a_bit(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def cut_off(file):
    file.write_bytes(file.read_bytes()[:-40])


def empty(file):
    file.write_bytes(b"")


DAMAGES = (flip_a_bit, cut_off, empty)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_network_or_checkpoint_is_named_and_never_used(damage, images, whole, tmp_path, capsys):
    """A flipped bit of a weight is a number like others, which torch.load reads."""
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    damage(folder / "pruned_model.pt")
    with pytest.raises(InputError, match="damaged.*save the network again"):
        load_pruned(folder / "pruned_model.pt")
    for name in ("results.json", "pruned_model.pt"):  # as before the end of the run
        (folder / name).unlink()
    for name in ("dense_model.pt", "pruned_before_fine_tuning.pt"):
        shutil.copy(whole / "dense_model.pt", folder / "dense_model.pt")
        shutil.copy(whole / "pruned_model.pt", folder / "pruned_before_fine_tuning.pt")
        damage(folder / name)
        before = contents(folder)
        capsys.readouterr()
        refused(run_single_experiment.main(["--resume", str(folder)]), capsys, folder / name, "damaged", "remove")
        assert contents(folder) == before


def test_damaged_results_are_named_and_computed_again(swept, whole, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(swept, folder)
    capsys.readouterr()
    for name in ("results.json", "cells/dense.json", "cells/order-2_30_seed-0.json"):
        for damage in (cut_off, empty):
            damage(folder / name)
            refused(run_enhanced_pruning.main(["--resume", str(folder)]), capsys, folder / name, "damaged", "remove it")
        (folder / name).unlink()
        if name != "results.json":
            shutil.copy(swept / name, folder / name)
    cell = folder / "cells/order-2_30_seed-0.json"
    for damage in ({"layers": {"conv": 3}}, {"accuracy_at_steps": [1]}, {"fine_tuning": "none"}):
        cell.write_text(json.dumps(json.loads((swept / "cells" / cell.name).read_text()) | damage))
        refused(run_enhanced_pruning.main(["--resume", str(folder)]), capsys, cell, "damaged", "remove it")
    cell.unlink()
    single_run = tmp_path / "single"
    shutil.copytree(whole, single_run)
    cut_off(single_run / "results.json")
    refused(run_single_experiment.main(["--resume", str(single_run)]), capsys, "results.json", "damaged")
    assert run_enhanced_pruning.main(["--resume", str(folder)]) == 0
    assert_same_run(folder, swept)


# ---------------------------------------------------------------------------------------------------- broken images


def truncated_jpeg(path):
    noise(1, 0).save(path)
    path.write_bytes(path.read_bytes()[:-300])


BROKEN = {"truncated": truncated_jpeg, "empty": Path.touch, "text": lambda path: path.write_text("no image")}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_image_is_named(kind, tmp_path, capsys):
    data = write_images(tmp_path / "data", classes=2, train=2, val=1)
    bad = data / "val" / "Klasse 1 ö" / "kaputt.jpg"
    BROKEN[kind](bad)
    refused(single(data, "--output-dir", tmp_path / "run"), capsys, bad, "--skip-corrupt")
    assert "config.json" not in names(tmp_path / "run")  # the folder is free for the corrected command


def test_broken_images_are_left_out_and_counted(images, whole, tmp_path, capsys):
    data = tmp_path / images.name
    shutil.copytree(images, data)
    bad = [data / "train" / "Klasse 1 ö" / f"{kind}.jpg" for kind in BROKEN]
    for path, breaks in zip(bad, BROKEN.values(), strict=True):
        breaks(path)
    output = tmp_path / "run"
    assert single(data, "--skip-corrupt", "--output-dir", output) == 0
    assert "3 corrupt image(s) left out" in capsys.readouterr().out
    assert sorted(json.loads((output / "results.json").read_text("utf-8"))["data"]["skipped"]) == sorted(map(str, bad))
    assert_same_run(output, whole, but=("data",))


def test_cells_that_failed_are_tried_again(whole, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(ExperimentSetup, "HELD_OUT", 0)  # or the rounds would read all of so few images
    data = write_images(tmp_path / "data", size=(72, 72))
    train = load_image_folder(data).evaluation_train
    last = Path(train.samples[_balanced_order(np.array(train.targets), 0)[-1]][0])  # fine-tuning alone comes to it
    good = last.read_bytes()
    last.write_bytes(b"no image")
    arguments = ["--weights", whole / "dense_model.pt", "--image-size", 72]
    assert sweep(data, *arguments, "--output-dir", tmp_path / "run") == 1
    assert f"2 of 2 cells failed; results.md names them, --resume {tmp_path / 'run'}" in capsys.readouterr().err
    assert str(last) in (tmp_path / "run" / "results.md").read_text("utf-8")
    last.write_bytes(good)
    assert sweep(data, *arguments, "--resume", tmp_path / "run") == 0


@pytest.mark.parametrize("size", [32, 72])  # decoded at once; decoded batch by batch
def test_unusual_images_work(size, whole, tmp_path):
    data = write_images(tmp_path / "data", train=1, val=1, size=(size, size))
    place, colour = data / "train" / "Klasse 1 ö", noise(1, 0, (size, size))
    colour.convert("CMYK").save(place / "cmyk.jpg")
    colour.convert("L").save(place / "grey.png")
    colour.quantize(16).save(place / "palette.png", transparency=bytes([0, 128, 255]))
    Image.fromarray(np.asarray(colour)[..., 0].astype(np.uint16) * 257).save(place / "16 bit.png")
    noise(1, 0, (1, 1)).save(place / "pixel.png")
    extra = ["--weights", whole / "dense_model.pt", "--image-size", size, "--calibration-samples", 7]
    assert single(data, *extra, "--output-dir", tmp_path / "run") == 0


def test_images_of_one_pixel_work_or_say_what_does(tmp_path, capsys):
    data = write_images(tmp_path / "data", classes=2, train=2, val=1, size=(1, 1))
    refused(single(data, "--output-dir", tmp_path / "run"), capsys, "1x1 pixels", "--image-size 224")
    extra = ["--model", "shufflenet_v2_x0_5", "--fine-tune-epochs", 0, "--no-compensate"]
    assert single(data, *extra, "--output-dir", tmp_path / "run") == 0


# ---------------------------------------------------------------------------------------------------- odd data sets


def remove_class(data):
    for split in ("train", "val"):
        shutil.rmtree(data / split / "Klasse 1 ö")


ODD = {
    "empty class": (lambda data: (data / "train" / "leer").mkdir(), "leer; fill or remove"),
    "class in val alone": (lambda data: shutil.rmtree(data / "train" / "Klasse 1 ö"), "Klasse 1 ö; add them"),
    "one class": (remove_class, "give at least two classes"),
}


@pytest.mark.parametrize("case", ODD)
def test_a_data_set_that_cannot_be_learnt_is_refused(case, tmp_path, capsys):
    data = write_images(tmp_path / "data", classes=2, train=1, val=1)
    change, message = ODD[case]
    change(data)
    refused(single(data, "--output-dir", tmp_path / "run"), capsys, data, message)


def test_one_image_a_class_and_batches_above_the_data_set_work(tmp_path):
    data = write_images(tmp_path / "data", classes=2, train=1, val=1)
    shutil.rmtree(data / "val" / "Klasse 1 ö")  # one validation image
    arguments = ["--batch-size", 64, "--calibration-samples", 1000, "--output-dir", tmp_path / "run"]
    assert single(data, *arguments) == 0
    stages = json.loads((tmp_path / "run" / "results.json").read_text("utf-8"))["stages"]
    assert stages[-1]["images"] == 1


# ---------------------------------------------------------------------------------------- weights, names, surroundings


class Payload:
    """Unpickling it creates the file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(value, images, whole, tmp_path, capsys):
    state = torch.load(whole / "dense_model.pt")
    state["classifier.weight"][0, 0] = value
    torch.save(state, tmp_path / "weights.pt")
    code = single(images, "--weights", tmp_path / "weights.pt", "--output-dir", tmp_path / "run")
    refused(code, capsys, tmp_path / "weights.pt", "classifier.weight", "other weights")


def test_code_in_weights_is_refused_and_not_run(images, whole, tmp_path, capsys):
    weights, mark = tmp_path / "weights.pt", tmp_path / "mark"
    torch.save({**torch.load(whole / "dense_model.pt"), "extra": Payload(mark)}, weights)
    torch.load(weights, weights_only=False)
    assert mark.exists()  # the payload works
    mark.unlink()
    for run in (single, sweep):
        refused(run(images, "--weights", weights, "--output-dir", tmp_path / "run"), capsys, weights, "pickled code")
    assert not mark.exists()


def test_weights_from_a_pipe_or_device_are_refused(images, tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe")  # as <(zcat weights.pt.gz) of the shell: nobody could read it twice
    for path in (tmp_path / "pipe", "/dev/zero"):
        refused(
            single(images, "--weights", path, "--output-dir", tmp_path / "run"), capsys, f"{path} is no file, but a"
        )


def test_names_that_are_not_even_utf8_work(images, tmp_path, capsys):
    odd = tmp_path / os.fsdecode(b"caf\xe9 \xff")
    try:
        shutil.copytree(images, odd / "data")
    except OSError:
        pytest.skip("this file system takes UTF-8 alone")
    broken = odd / "data" / "val" / "Klasse 0 ö" / os.fsdecode(b"\xfe.jpg")
    broken.touch()
    refused(single(odd / "data", "--output-dir", odd / "run"), capsys, "\\udcfe.jpg", "--skip-corrupt")
    arguments = [odd / "data", "--skip-corrupt", "--no-compensate", "--fine-tune-epochs", 0]
    assert single(*arguments, "--output-dir", odd / "run") == 0
    assert json.loads((odd / "run" / "results.json").read_text("utf-8"))["data"]["skipped"] == [str(broken)]
    refused(single(*arguments, "--resume", odd / "run", "--seed", 1), capsys, "other arguments: --seed was 0, is 1;")
    assert single(*arguments, "--resume", odd / "run", "--memory-limit", "1GB") == 0  # as a full memory asks for


def test_a_bare_environment_in_ascii_works(images, whole, tmp_path):
    """As under cron: no UTF-8, no home, nothing but PATH, and a backend of plots that does not exist."""
    environment = {
        "LC_ALL": "C",
        "PYTHONUTF8": "0",
        "PATH": os.defpath,
        "OMP_NUM_THREADS": "1",
        "MPLBACKEND": "nonsense",
    }
    folder = tmp_path / "Läufe 猫"
    command = [sys.executable, ROOT / "run_single_experiment.py", "--data-path", images, *QUICK, "--skip-corrupt",
               "--weights", whole / "dense_model.pt", "--fine-tune-epochs", "0", "--output-dir", folder]  # fmt: skip
    ran = subprocess.run(list(map(str, command)), env=environment, cwd=tmp_path, capture_output=True, timeout=240)
    assert ran.returncode == 0 and b"Traceback" not in ran.stderr, ran.stderr.decode()
    assert {"results.json", "accuracy.png"} <= set(names(folder))


def test_the_dense_network_is_kept_where_there_is_room_for_it(tmp_path, monkeypatch):
    few = embedded_data(20, 10)
    monkeypatch.setattr(ExperimentSetup, "embedded_data", lambda: few)
    command = parse(ExperimentTask, "", [*QUICK, "--quiet"])

    def dense(name, cache):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / cache))
        (tmp_path / name).mkdir()
        ExperimentSetup.prepare(command, tmp_path / name, torch.device("cpu"))
        return names(tmp_path / name)

    (tmp_path / "file").touch()
    assert dense("a", "file/cache") == ["dense_model.pt"]  # the cache cannot be made
    assert dense("b", "cache") == []
    [kept] = (tmp_path / "cache" / "enhanced-taylor-pruning").iterdir()
    kept.write_bytes(kept.read_bytes()[:1000])
    with pytest.raises(InputError, match=f"{kept.name} cannot be read .* remove the file"):
        dense("c", "cache")
