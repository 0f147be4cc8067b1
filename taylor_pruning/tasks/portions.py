"""Work on a batch in parts that fit into the memory of the device."""

from collections.abc import Callable

import torch

from taylor_pruning.errors import InputError
from taylor_pruning.memory import Portions
from taylor_pruning.tasks.batches import select, size


def in_portions(work: Callable, batch, portions: Portions) -> list:
    """[work(part of the batch, number of samples before it)] of consecutive parts.

    A part for which a GPU's memory does not suffice is tried again in halves.

    Raises:
        InputError: the memory does not suffice for one sample.
    """
    found, samples = [], size(batch)
    for part in portions.slices(samples):
        with portions.measured(part):
            some = batch if part.stop - part.start == samples else select(batch, torch.arange(part.start, part.stop))
            found += _in_halves(work, some, part.start)
    return found


def _in_halves(work, batch, first):
    samples = size(batch)
    try:
        return [work(batch, first)]
    except torch.OutOfMemoryError as error:
        if samples == 1:
            raise InputError("one image does not fit into GPU memory; lower --image-size") from error
    half = samples // 2  # outside of the except block, which would keep the failed pass alive
    halves = (torch.arange(half), 0), (torch.arange(half, samples), half)
    return [result for rows, start in halves for result in _in_halves(work, select(batch, rows), first + start)]
