"""Few batches that represent a loader: the first images, or images spread evenly over it."""

from collections.abc import Iterable

import torch

from taylor_pruning.errors import InputError
from taylor_pruning.tasks.batches import select, size

Batches = list  # of batches of a task


def first_images(loader: Iterable, samples: int) -> list:
    """Batches of the first `samples` images, of all where there are fewer. Raises InputError if there is none."""
    batches, taken = [], 0
    for batch in loader:
        batches.append(select(batch, torch.arange(min(samples - taken, size(batch)))))
        taken += size(batches[-1])
        if taken >= samples:
            break
    if not taken:
        raise InputError("there are no calibration images; the training loader is empty")
    return batches


def spread_images(loader: Iterable, samples: int) -> list:
    """About `samples` images at equal distances, because a loader may be sorted by class. Raises InputError if empty.

    A loader that can pick them out (`loader.spread`) reads no others; any other loader is read from beginning to end.
    """
    if hasattr(loader, "spread"):
        return loader.spread(samples)
    batches, seen = [], 0
    stride = max(1, len(loader.dataset) // samples) if hasattr(loader, "dataset") else 1
    for batch in loader:
        first, count = -seen % stride, size(batch)
        seen += count
        if first < count:
            batches.append(select(batch, torch.arange(first, count, stride)))
    if not batches:
        raise InputError("there are no validation images")
    return batches
