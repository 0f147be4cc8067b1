"""Runs in processes of their own that are killed while they work, without the seconds in which a process imports torch."""

import contextlib
import importlib
import multiprocessing
import os
import signal
import sys
import threading
import time

from tqdm import tqdm

# Children of a server that has imported torch already: as separate as subprocesses.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["run_single_experiment", "run_enhanced_pruning"])


def in_child(runner, arguments, log):
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # ignored where the tests run in the background of a script
    tqdm.set_lock(threading.RLock())  # its default is a semaphore of the system, which a kill would leave behind
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
            assert process.is_alive() and time.monotonic() < end, f"the stage was not reached:\n{log.read_text()}"
            time.sleep(0.002)
        yield process, log
    finally:
        process.kill()
        process.join()


def killed(*arguments):
    with running(*arguments) as (process, _):
        assert process.is_alive(), "the run ended before it could be killed"
    assert process.exitcode == -signal.SIGKILL
