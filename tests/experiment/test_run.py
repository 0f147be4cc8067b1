"""Where the command line runs: platforms, devices, and what is checked before a run trains anything."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tqdm import tqdm

from taylor_pruning.experiment.arguments import parse
from taylor_pruning.experiment.command import DEVICES, ExperimentTask
from taylor_pruning.experiment.run import run_guarded
from taylor_pruning.experiment.setup import choose_device

ROOT = Path(__file__).parents[2]


def test_auto_takes_a_device_that_can_sum_in_float64(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert choose_device("cpu").type == "cpu"
    assert "mps" not in DEVICES


def test_a_platform_without_file_locks_is_named(tmp_path):
    code = "import sys; sys.modules['fcntl'] = None\n"
    for runner in ("run_single_experiment", "run_enhanced_pruning"):
        code += f"import {runner}; assert {runner}.main(['--output-dir', 'out']) == 2\n"
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True
    )
    assert ended.returncode == 0 and not (tmp_path / "out").exists()
    assert ended.stderr.decode() == 2 * (
        "error: the command line runs on Linux and macOS; on Windows use WSL, or EnhancedPruning from Python\n"
    )


def test_an_option_without_effect_is_said_as_the_run_begins(tmp_path, capsys):
    command = parse(ExperimentTask, "", ["--output-dir", str(tmp_path / "run"), "--repair-passes", "3"])
    assert run_guarded(command, lambda *_: 0) == 0
    assert capsys.readouterr().err == "--repair-passes has no effect without --repair network\n"


def test_ctrl_c_pressed_twice_says_how_to_go_on_once(tmp_path, capsys, monkeypatch):
    def pressed_twice(*_):
        monkeypatch.setattr("taylor_pruning.experiment.run.how_to_continue", again)
        raise KeyboardInterrupt

    def again(folder):
        os.kill(os.getpid(), signal.SIGINT)
        return "go on"

    command = parse(ExperimentTask, "", ["--output-dir", str(tmp_path / "run")])
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert run_guarded(command, pressed_twice) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().err == "interrupted\ngo on\n"


def test_a_bar_that_is_interrupted_as_it_is_made_leaves_no_traceback(tmp_path, monkeypatch):
    """Python deletes an object without attributes then, and tells `sys.unraisablehook` what that raises."""
    command, said = parse(ExperimentTask, "", ["--output-dir", str(tmp_path / "run")]), []
    monkeypatch.setattr(sys, "unraisablehook", said.append)

    def interrupted(*_):
        raise KeyboardInterrupt

    def run(*_):
        monkeypatch.setattr(tqdm, "_get_free_pos", interrupted)
        tqdm(range(3))

    assert run_guarded(command, run) == 130 and not said


def test_memory_that_does_not_suffice_says_how_to_go_on_and_other_errors_stay(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["run_single_experiment.py"])

    def failing(error):
        def run(*_):
            raise error

        return run

    command, errors = (
        parse(ExperimentTask, "", ["--model", "timm/resnet18"]),
        (MemoryError("no room"), RuntimeError("other")),
    )
    assert run_guarded(command, failing(errors[0])) == 1
    folder = Path("runs/run_single_experiment-timm-resnet18")
    said = capsys.readouterr().err
    assert f"out of memory (no room); free memory or lower --memory-limit, then continue with --resume {folder}" in said
    with pytest.raises(RuntimeError, match="other"):
        run_guarded(command, failing(errors[1]))
    assert sorted(map(str, Path("runs").iterdir())) == [f"{folder}", f"{folder}-2"]
