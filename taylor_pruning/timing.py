"""Wall-clock times of calls on a device."""

import time
from collections.abc import Callable

import torch

# A time is the least of a few runs, each of as many calls as fill 2 ms: what else the machine does can only add to it.
RUNS, SECONDS_A_RUN = 3, 2e-3


def seconds_of(call: Callable[[], object], device: torch.device, calls: int = 1) -> float:
    """Seconds of a call, the mean of so many in a row; a GPU has then finished them."""
    start = time.perf_counter()
    for _ in range(calls):
        call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) / calls


@torch.no_grad()
def least_milliseconds(call: Callable[[], object], device: torch.device, runs: int = RUNS) -> float:
    """Milliseconds of a call in the fastest of the runs, after two calls to warm up."""
    seconds_of(call, device)
    calls = max(1, round(SECONDS_A_RUN / seconds_of(call, device)))
    return 1000 * min(seconds_of(call, device, calls) for _ in range(runs))
