"""Runs in processes of their own that are killed while they work, without the seconds in which a process imports torch."""

import contextlib
import importlib
import multiprocessing
import os
import signal
import sys
import threading
import time

import pytest
from quick import quick_reports
from tqdm import tqdm

# Children of a server that has imported torch already: as separate as subprocesses.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["run_single_experiment", "run_enhanced_pruning"])


def into_log(log):
    """What this process prints goes there, and nowhere else."""
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)


def in_child(runner, arguments, log):
    into_log(log)
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # ignored where the tests run in the background of a script
    tqdm.set_lock(threading.RLock())  # its default is a semaphore of the system, which a kill would leave behind
    quick_reports(pytest.MonkeyPatch())  # a child does not inherit what the tests set
    sys.exit(importlib.import_module(runner).main(arguments))


@contextlib.contextmanager
def running(runner, arguments, tmp_path, reached):
    """A run in a process of its own, from when `reached(text that it has printed)` holds; killed at the end."""
    log = tmp_path / "log"
    log.touch()
    process = PROCESSES.Process(target=in_child, args=(runner, list(map(str, arguments)), log))
    process.start()
    try:
        end = time.monotonic() + 120
        while not reached(log.read_text(errors="replace")):
            assert process.is_alive() and time.monotonic() < end, f"{tmp_path.name} was not reached:\n{log.read_text()}"
            time.sleep(0.002)
        yield process, log
    finally:
        process.kill()
        process.join()


def killed(*arguments):
    with running(*arguments) as (process, _):
        assert process.is_alive(), "the run ended before it could be killed"
    assert process.exitcode == -signal.SIGKILL
