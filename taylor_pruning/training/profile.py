"""What a network costs: parameters, multiply-accumulates, bytes on disk, milliseconds."""

import io
import statistics
import time

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from taylor_pruning.modes import frozen
from taylor_pruning.training.throughput import throughput

LATENCY_RUNS = 15
WARM_UP_RUNS = 3


def profile(model: nn.Module, example: Tensor) -> dict:
    """Costs of `model` on one image.

    Args:
        model: it runs in evaluation mode and comes back as it was.
        example: [1, ...] image on the model's device.

    Returns:
        {"parameters", "macs" (multiply-accumulates), "file_bytes" (of the saved weights), "latency_ms" (see `latency`),
        "images_per_second" (by batch size, see training.throughput)}.
    """
    with frozen(model), torch.no_grad():
        with FlopCounterMode(display=False) as counter:
            model(example)
        buffer = io.BytesIO()
        torch.save(model.state_dict(), buffer)
        return {
            "parameters": sum(p.numel() for p in model.parameters()),
            "macs": counter.get_total_flops() // 2,
            "file_bytes": buffer.tell(),
            "latency_ms": latency(model, example),
            "images_per_second": throughput(model, example),
        }


def latency(model: nn.Module, example: Tensor, runs: int = LATENCY_RUNS) -> float:
    """Median wall-clock milliseconds of a forward, after three that do not count."""
    times = []
    for run in range(runs + WARM_UP_RUNS):
        start = time.perf_counter()
        model(example)
        if example.is_cuda:
            torch.cuda.synchronize(example.device)
        if run >= WARM_UP_RUNS:
            times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times)
