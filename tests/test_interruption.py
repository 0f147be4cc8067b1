"""Ctrl-C before a run has begun, and again while it ends."""

import itertools
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from taylor_pruning.interruption import COMMANDS, ended_by_ctrl_c, without_ctrl_c

ROOT = Path(__file__).parents[1]
# Torch is replaced by a module whose import presses Ctrl-C, and as some imports do, catches what Python then raises.
PRESSED = """
import os, signal
try:
    os.kill(os.getpid(), signal.SIGINT)
except KeyboardInterrupt:
    raise ImportError("half of torch")
"""


def ended(code, command="run_single_experiment.py", **options):
    """The process of that name that ran the code; Ctrl-C is ignored where the tests run in the background of a script."""
    usual = f"import signal, sys; sys.argv = [{command!r}]; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    return subprocess.run([sys.executable, "-c", usual + code], capture_output=True, text=True, **options)


@pytest.fixture
def pressed(tmp_path):
    """The environment in which torch is such a module."""
    (tmp_path / "torch.py").write_text(PRESSED)
    return {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}


STARTED = [
    ("run_single_experiment", str(ROOT / "run_single_experiment.py")),
    ("run_enhanced_pruning", "run_enhanced_pruning.py"),
    ("run_single_experiment", "/usr/local/bin/prune-experiment"),
    ("run_enhanced_pruning", "/usr/local/bin/prune-sweep"),
]


@pytest.mark.parametrize("runner, command", STARTED)
def test_ctrl_c_while_torch_is_imported_gives_one_line(runner, command, pressed):
    run = ended(f"import {runner}", command, env=pressed)
    assert (run.returncode, run.stdout) == (130, "")
    assert run.stderr == "interrupted; start again with the same arguments\n"


def test_ctrl_c_does_not_end_other_programs_that_import_a_command(pressed):
    code = """
import atexit
atexit.register(lambda: print("tidied up", signal.getsignal(signal.SIGINT) is signal.default_int_handler))
try:
    import run_single_experiment
except ImportError:
    from taylor_pruning.interruption import silent_at_exit
    silent_at_exit()
"""
    run = ended(code, "notebook.py", env=pressed)
    assert (run.returncode, run.stdout, run.stderr) == (0, "tidied up True\n", "")


WORKER = """
import multiprocessing, os, signal
from taylor_pruning.interruption import ended_by_ctrl_c

def press():
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with ended_by_ctrl_c():
        os.kill(os.getpid(), signal.SIGINT)

if __name__ == "__main__":
    worker = multiprocessing.get_context("spawn").Process(target=press)
    worker.start()
    worker.join()
    print(worker.exitcode)
"""


def test_workers_end_without_a_word(tmp_path):
    (tmp_path / "prune-sweep.py").write_text(WORKER)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(tmp_path / "prune-sweep.py")]
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert (run.returncode, run.stdout, run.stderr) == (0, "130\n", "")


def test_the_commands_are_those_that_are_installed():
    found = re.findall(r'^(\S+) = "(\w+):main"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert {*COMMANDS} == {*itertools.chain.from_iterable(found)}


def test_ctrl_c_after_the_last_words_prints_no_traceback():
    code = f"""
import atexit, os, sys
sys.path.insert(0, {str(ROOT)!r})
from taylor_pruning.interruption import silent_at_exit
atexit.register(os.kill, os.getpid(), signal.SIGINT)   # as torch tidies up
silent_at_exit()
"""
    run = ended(code)
    assert (run.returncode, run.stderr) == (-signal.SIGINT, "")


def test_the_callers_way_with_ctrl_c_comes_back(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["prune-experiment"])
    before = signal.getsignal(signal.SIGINT)
    try:
        for usual in (signal.default_int_handler, lambda *_: None):
            signal.signal(signal.SIGINT, usual)
            for block in (ended_by_ctrl_c, without_ctrl_c):
                with block():
                    changed = signal.getsignal(signal.SIGINT) is not usual
                    assert changed == (usual is signal.default_int_handler)
                assert signal.getsignal(signal.SIGINT) is usual
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with ended_by_ctrl_c():
            signal.signal(signal.SIGINT, usual)  # as what is imported may
        assert signal.getsignal(signal.SIGINT) is usual
    finally:
        signal.signal(signal.SIGINT, before)
