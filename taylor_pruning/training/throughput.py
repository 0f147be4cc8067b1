"""Images a second at several batch sizes. The latency of one image measures launches on a GPU, this measures arithmetic."""

import statistics

import torch
from torch import Tensor, nn

from taylor_pruning.memory import free_bytes
from taylor_pruning.modes import in_evaluation
from taylor_pruning.timing import seconds_of

BATCH_SIZES = (16, 64, 256)
RUNS = 5
SECONDS = 0.1  # that the runs of one batch size may take, the first of them apart


@torch.no_grad()
def throughput(
    model: nn.Module, example: Tensor, batch_sizes: tuple[int, ...] = BATCH_SIZES, seconds: float = SECONDS
) -> dict[str, float]:
    """{batch size: images a second} of forward passes in evaluation mode: median of up to 5 runs after one to warm up.

    example: [1, ...] image on the model's device, repeated to batches. Sizes ascend; one of which a single run would
    take more than `seconds`, or more than half of a GPU's free memory, judged by the size before, ends the list.
    """
    found: dict[str, float] = {}
    with in_evaluation(model):
        one_image, bytes_an_image = 0.0, 0.0
        for size in sorted(batch_sizes):
            if one_image * size > seconds or bytes_an_image * size > free_bytes(example.device) / 2:
                break
            images = example.expand(size, *example.shape[1:]).contiguous()
            once, needed = _timed(model, images)
            runs = max(1, min(RUNS, int(seconds / once)))
            one_image = statistics.median(_timed(model, images)[0] for _ in range(runs)) / size
            bytes_an_image = needed / size
            found[str(size)] = 1 / one_image
    return found


def _timed(model: nn.Module, images: Tensor) -> tuple[float, int]:
    """Seconds of one forward, and bytes of a GPU's memory that it took."""
    if not images.is_cuda:
        return seconds_of(lambda: model(images), images.device), 0
    torch.cuda.synchronize(images.device)
    torch.cuda.reset_peak_memory_stats(images.device)
    before = torch.cuda.memory_allocated(images.device)
    seconds = seconds_of(lambda: model(images), images.device)
    return seconds, torch.cuda.max_memory_allocated(images.device) - before
