"""Ctrl-C before and after a run: one line, where Python would print a traceback. Imports nothing that takes time.

with ended_by_ctrl_c():
    import torch

Other programs that import the runners, as a notebook or a test does, keep their own way with Ctrl-C.
"""

import atexit
import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from pathlib import Path

COMMANDS = ("run_single_experiment", "run_enhanced_pruning", "prune-experiment", "prune-sweep")  # what users start
INTERRUPTED = 128 + signal.SIGINT  # exit code, as shells have it
START_AGAIN = "start again with the same arguments"


@contextlib.contextmanager
def ended_by_ctrl_c():
    """Within the block, Ctrl-C ends a command at once, with the exit code INTERRUPTED. It must not be writing anything.

    Some imports catch the exception that Python raises. Where the caller handles Ctrl-C in another way, that is kept.
    """

    def end(*_):
        with contextlib.suppress(OSError):  # standard error is closed, or its reader has gone
            if multiprocessing.parent_process() is None:  # workers that import the command anew say nothing
                os.write(2, f"interrupted; {START_AGAIN}\n".encode())
        os._exit(INTERRUPTED)

    with _handled_by(end) if _is_command() else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def without_ctrl_c():
    """Within the block, Ctrl-C is ignored: for the last words of a process that is ending."""
    with _handled_by(signal.SIG_IGN):
        yield


def silent_at_exit():
    """From when Python ends a command, Ctrl-C kills it without a word: what there is to say has been said."""
    if _is_command() and _is_pythons():
        atexit.register(signal.signal, signal.SIGINT, signal.SIG_DFL)


@contextlib.contextmanager
def _handled_by(handler):
    ours = _is_pythons()
    if ours:
        signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        if ours and signal.getsignal(signal.SIGINT) is handler:  # nobody has set another one meanwhile
            signal.signal(signal.SIGINT, signal.default_int_handler)


def _is_command() -> bool:
    """Whether the process is one of COMMANDS, however it was started, and no other program that imports it."""
    return Path(sys.argv[0]).stem in COMMANDS


def _is_pythons() -> bool:
    """Whether Ctrl-C is handled as Python does it, and this thread may change that."""
    usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    return usual and threading.current_thread() is threading.main_thread()
