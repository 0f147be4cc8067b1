"""What a network costs: parameters, multiply-accumulates, bytes on disk, milliseconds."""

import io

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from taylor_pruning.modes import frozen
from taylor_pruning.stored import stored
from taylor_pruning.surgery.nested import tensors_in
from taylor_pruning.surgery.recording import call
from taylor_pruning.timing import least_milliseconds
from taylor_pruning.training.throughput import throughput

COSTS = ("parameters", "macs", "file_bytes", "latency_ms", "images_per_second")  # of `profile`
LATENCY_RUNS = 15


def profile(model: nn.Module, example: Tensor) -> dict:
    """Costs of `model` on one image.

    Args:
        model: it runs in evaluation mode and comes back as it was.
        example: [1, ...] image on the model's device; a list is the network's one argument, a tuple or dict all of them.

    Returns:
        {"parameters", "macs" (multiply-accumulates), "file_bytes" (of the saved weights), "latency_ms" (see `latency`),
        "images_per_second" (by batch size, see training.throughput; {} unless the example is a tensor)}.
    """
    with frozen(model), torch.no_grad():
        with FlopCounterMode(display=False) as counter:
            call(model, example)
        buffer = io.BytesIO()
        torch.save(stored(model), buffer)
        return {
            "parameters": sum(p.numel() for p in model.parameters()),
            "macs": counter.get_total_flops() // 2,
            "file_bytes": buffer.tell(),
            "latency_ms": latency(model, example),
            "images_per_second": throughput(model, example) if isinstance(example, Tensor) else {},
        }


def latency(model: nn.Module, example: Tensor) -> float:
    """Wall-clock milliseconds of a forward, the least of LATENCY_RUNS, see timing.least_milliseconds."""
    device = next((tensor.device for tensor in tensors_in(example) if tensor.is_cuda), torch.device("cpu"))
    return least_milliseconds(lambda: call(model, example), device, LATENCY_RUNS)
