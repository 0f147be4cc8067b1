"""The frame around a run: its results folder, one run a folder, errors and interruptions with the right exit code."""

import contextlib
import errno
import os
import shlex
import sys
from pathlib import Path

from taylor_pruning.distributed import end_distributed, init_distributed, is_main
from taylor_pruning.errors import InputError
from taylor_pruning.experiment.command import Command
from taylor_pruning.experiment.inputs import allow_repair
from taylor_pruning.experiment.loaders import is_worker_failure
from taylor_pruning.experiment.setup import choose_device, environment
from taylor_pruning.experiment.streams import lasting_streams, silent_half_made_bars
from taylor_pruning.files import remove_leftovers, user_path
from taylor_pruning.interruption import INTERRUPTED, START_AGAIN, silent_at_exit, without_ctrl_c
from taylor_pruning.memory import is_out_of_memory, keep_freed_memory
from taylor_pruning.report.json_files import plain, read_json, write_json
from taylor_pruning.training.fine_tuning import Interrupted, TrainingDiverged

try:
    import fcntl  # locks the results folder
except ImportError:  # Windows
    fcntl = None

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
EXPLAINED = (InputError, TrainingDiverged, OSError, MemoryError, RuntimeError, KeyboardInterrupt)
RUNNERS = {  # an option that the other one has not
    "run_single_experiment.py (prune-experiment)": "taylor_order",
    "run_enhanced_pruning.py (prune-sweep)": "taylor_orders",
}
CHECK_PATH = "check that path, or pass another --output-dir"
WORKER_FAILED = "a process that decodes images was killed, or shared memory (/dev/shm) is full"
NEVER_REPLACED = ("results.json", "pruned_model.pt")  # of a run whose config.json is gone, or of another program
# may differ between a run and its resumption
NOT_COMPARED = ("resume", "output_dir", "quiet", "device", "workers", "latency_table", "memory_limit")


def run_guarded(command: Command, run) -> int:
    """run(command, folder, device) with clear errors; returns the exit code.

    Exit codes: 2 bad input, 1 training diverged, the disk failed, there is not enough memory or a worker of a loader was
    killed, 130 interrupted.
    """
    folder = None
    silent_at_exit()
    with lasting_streams(), silent_half_made_bars():
        try:
            folder = results_folder(command)
            if fcntl is None:
                raise InputError(
                    "the command line runs on Linux and macOS; on Windows use WSL, or EnhancedPruning from Python"
                )
            keep_freed_memory()
            device = init_distributed(choose_device(command.run.device))
            for note in command.notes if is_main() else ():
                print(note, file=sys.stderr)
            with open_folder(folder, command):
                return run(command, folder, device)
        except EXPLAINED as error:
            with without_ctrl_c():  # pressed a second time
                code, message = explained(error, folder)
                if code is None:
                    raise
                print(message, file=sys.stderr)
                return code
        finally:
            end_distributed()


def explained(error: BaseException, folder: Path | None) -> tuple[int | None, str]:
    """Exit code and message of an error; (None, "") for one that nobody foresaw, whose traceback says most.

    folder: of the results, None where it is not known yet.
    """
    if isinstance(error, (InputError, TrainingDiverged)):
        return 2 if isinstance(error, InputError) else 1, f"error: {error}"
    if isinstance(error, KeyboardInterrupt):
        reason = error.reason if isinstance(error, Interrupted) and error.checkpoint else "interrupted"
        return INTERRUPTED, f"{reason}\n{how_to_continue(folder)}"
    if isinstance(error, OSError):
        disk = error.errno in DISK_ERRORS
        advice = f"free space, then {how_to_continue(folder)}" if disk else CHECK_PATH
        return 1 if disk else 2, f"error: {error.strerror or error}: {error.filename or folder}; {advice}"
    first = str(error).strip().splitlines()[:1]
    if is_out_of_memory(error):
        advice = f"free memory or lower --memory-limit, then {how_to_continue(folder)}"
        anew = "start a new run with a lower --batch-size, --calibration-samples or --image-size"
        return 1, f"error: out of memory ({''.join(first)[:200]}); {advice}, or {anew}"
    if is_worker_failure(error):
        return 1, f"error: {WORKER_FAILED}; lower --workers, or free memory, then {how_to_continue(folder)}"
    return None, ""


def how_to_continue(folder):
    """What to do after an interruption, in words; `folder` is None where not even that was known."""
    started = folder and os.path.exists(folder / "config.json")  # False also where the folder cannot be searched
    return f"continue with --resume {shlex.quote(str(folder))}" if started else START_AGAIN


def results_folder(command):
    """The folder that the command names, or one in runs/ that does not exist yet."""
    if named := command.run.resume or command.run.output_dir:
        return user_path(named)
    base = Path("runs") / f"{Path(sys.argv[0]).stem}-{command.data.model.replace('/', '-')}"
    candidates = (base if n == 1 else base.with_name(f"{base.name}-{n}") for n in range(1, 10**6))
    return next(path for path in candidates if not path.exists())


@contextlib.contextmanager
def open_folder(folder, command):
    """Makes the results folder with its config.json and locks it while the block runs.

    Wrong input that is found before anything was written leaves nothing: neither the config.json, so that the folder is free
    for the corrected command, nor folders that were not there.

    Raises:
        InputError: another run has the folder, it holds results already, or `--resume` finds other arguments there.
    """
    if not is_main():
        yield
        return
    config = folder / "config.json"
    if command.run.resume and not config.exists():
        raise InputError(
            f"{folder} has no config.json; --resume takes the folder of an interrupted run; leave it out to start a new run"
        )
    found = [name for name in NEVER_REPLACED if os.path.lexists(folder / name)]
    if found and not config.exists():
        raise InputError(f"{folder} holds {found[0]} already, which is kept; pass another --output-dir")
    made = [place for place in (folder, *folder.parents) if not place.exists()]  # the innermost first
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder) as lock:
        if command.run.resume:
            check_same_arguments(read_json(config), command)
        elif config.exists():
            raise InputError(
                f"{folder} holds a run already; pass --resume {shlex.quote(str(folder))} or another --output-dir"
            )
        for place in (folder, folder / "cells"):
            remove_leftovers(place)
        before = {config.name, *os.listdir(folder)}
        if not command.run.resume:
            write_json(
                config, {"arguments": command.as_dict(), "environment": environment(choose_device(command.run.device))}
            )
        try:
            yield
        except (InputError, OSError) as error:
            allow_repair(folder, error)
            wrong_input = isinstance(error, InputError) or error.errno not in DISK_ERRORS
            if wrong_input and not command.run.resume and before.issuperset(os.listdir(folder)):
                config.unlink()
                lock.unlink()
                for place in made:
                    if not os.listdir(place):
                        place.rmdir()
            raise


@contextlib.contextmanager
def locked(folder):
    """Holds the lock of a results folder, a file, and yields its path. Raises InputError if another run holds it."""
    path = folder / ".lock"
    with open(path, "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            mine = os.fstat(lock.fileno())
            ours = path.exists() and os.path.samestat(mine, path.stat())  # not one that a run that ended has removed
        except BlockingIOError:
            ours = False
        if not ours:
            raise InputError(f"another run is writing into {folder}; wait for it or pass another --output-dir")
        yield path


def check_same_arguments(config, command):
    """Raises InputError naming the arguments in which `command` differs from the run that is to be resumed."""
    now, then = plain(command.as_dict()), config["arguments"]
    for runner, name in RUNNERS.items():
        if name in then and name not in now:
            raise InputError(f"the folder belongs to a run of {runner}; continue it with that program")
    names = sorted(n for n in now.keys() | then.keys() if n not in NOT_COMPARED and now.get(n) != then.get(n))
    if names:
        changes = ", ".join(f"--{n.replace('_', '-')} was {then.get(n)}, is {now.get(n)}" for n in names)
        raise InputError(
            f"the folder belongs to a run with other arguments: {changes}; repeat them or start a new folder"
        )
