"""Seconds and peak memory of parts of a program, in a process each or one by one; results from which a run continues."""

import ctypes
import gc
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch


def peak_bytes(device=None):
    """Largest memory that this process has had on the device: resident on a CPU, allocated on a GPU."""
    if device and device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Start:
    """Clocks and peak memory at the start of a part. Other programs disturb CPU seconds less than wall time."""

    def __init__(self, device=None):
        self.device = device
        self._wait()
        if device and device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        self.wall, self.cpu, self.bytes = time.perf_counter(), time.process_time(), peak_bytes(device)

    def _wait(self):
        if self.device and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def since(self):
        self._wait()
        return {
            "wall seconds": time.perf_counter() - self.wall,
            "CPU seconds": time.process_time() - self.cpu,
            "peak bytes": peak_bytes(self.device) - self.bytes,
        }


def measured(action):
    """(wall seconds of the action, bytes by which its peak was above what was resident before, None outside of Linux)."""
    gc.collect()
    linux = sys.platform == "linux"
    if linux:
        ctypes.CDLL(None).malloc_trim(0)  # what earlier parts have freed would hide what this one needs
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again at what is resident (man 5 proc)
    start = Start()
    action()
    found = start.since()
    return found["wall seconds"], found["peak bytes"] if linux else None


def in_turn(script, arguments, parts, repeats):
    """{part: [what it printed as JSON, one a repeat]} of `script arguments --part PART`."""
    results = {part: [] for part in parts}
    for repeat in range(repeats):
        for part, measured in results.items():
            command = [sys.executable, script, *arguments, "--part", part]
            process = subprocess.run(command, check=True, capture_output=True, text=True)
            measured.append(json.loads(process.stdout.splitlines()[-1]))
            values = ", ".join(f"{value:.4g} {unit}" for unit, value in measured[-1].items())
            print(f"{repeat + 1} {part:12s} {values}", flush=True)
    return results


def print_ratios(results, part, reference):
    """The ratios of the medians, and the least and the largest ratio of one repeat."""
    for unit in ("wall seconds", "CPU seconds", "peak bytes"):
        ours, theirs = [m[unit] for m in results[part]], [m[unit] for m in results[reference]]
        ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
        median = statistics.median(ours) / statistics.median(theirs)
        print(
            f"{unit}: {part} / {reference} = {median:.2f} ({min(ratios):.2f} to {max(ratios):.2f}, n = {len(ratios)})"
        )


def started(arguments, may_differ, empty):
    """The results so far in `arguments.output`, or `empty`; ends the program if they belong to other arguments.

    Args:
        may_differ: names of arguments that may differ between a run and its continuation.
    """
    output = Path(arguments.output)
    results = json.loads(output.read_text()) if output.exists() else {"arguments": vars(arguments), **empty}
    then, now = ({k: v for k, v in a.items() if k not in may_differ} for a in (results["arguments"], vars(arguments)))
    if then != now:
        raise SystemExit(f"{output} has results of {then}; give another --output")
    return {**results, "arguments": vars(arguments)}


def spread(values, digits=1):
    """The mean and, of several values, their standard deviation."""
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}"
