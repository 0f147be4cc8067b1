"""Ctrl-C before a run has begun, and again while it ends."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from taylor_pruning.interruption import ended_by_ctrl_c, without_ctrl_c

ROOT = Path(__file__).parents[1]
# Torch is replaced by a module whose import presses Ctrl-C, and as some imports do, catches what Python then raises.
PRESSED = """
import os, signal
try:
    os.kill(os.getpid(), signal.SIGINT)
except KeyboardInterrupt:
    raise ImportError("half of torch")
"""


def ended(code, **options):
    """The process that ran the code; Ctrl-C is ignored where the tests run in the background of a script."""
    usual = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    return subprocess.run([sys.executable, "-c", usual + code], capture_output=True, text=True, **options)


@pytest.mark.parametrize("runner", ["run_single_experiment", "run_enhanced_pruning"])
def test_ctrl_c_while_torch_is_imported_gives_one_line(runner, tmp_path):
    (tmp_path / "torch.py").write_text(PRESSED)
    run = ended(f"import {runner}", env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"})
    assert (run.returncode, run.stdout) == (130, "")
    assert run.stderr == "interrupted; start again with the same arguments\n"


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


def test_the_callers_way_with_ctrl_c_comes_back():
    before = signal.getsignal(signal.SIGINT)
    try:
        for usual in (signal.default_int_handler, lambda *_: None):
            signal.signal(signal.SIGINT, usual)
            for block in (ended_by_ctrl_c, without_ctrl_c):
                with block():
                    changed = signal.getsignal(signal.SIGINT) is not usual
                    assert changed == (usual is signal.default_int_handler)
                assert signal.getsignal(signal.SIGINT) is usual
    finally:
        signal.signal(signal.SIGINT, before)
