"""Few batches that represent a loader: the first images, or images spread evenly over it."""

from collections.abc import Iterable

from torch import Tensor

from taylor_pruning.errors import InputError

Batches = list[tuple[Tensor, Tensor]]
HELD_OUT = 100  # images that neither score nor repair, on which a round is judged


def first_images(loader: Iterable, samples: int) -> Batches:
    """Batches of the first `samples` images, of all where there are fewer. Raises InputError if there is none."""
    batches, taken = [], 0
    for images, labels in loader:
        batches.append((images[: samples - taken], labels[: samples - taken]))
        taken += len(batches[-1][1])
        if taken >= samples:
            break
    if not taken:
        raise InputError("there are no calibration images; the training loader is empty")
    return batches


def split_images(batches: Batches, samples: int) -> tuple[Batches, Batches]:
    """The batches of the first `samples` images, and those of all others; each may be empty."""
    first, others, before = [], [], 0
    for images, labels in batches:
        here = max(0, samples - before)
        before += len(labels)
        for part, rows in ((first, slice(0, here)), (others, slice(here, None))):
            if len(labels[rows]):
                part.append((images[rows], labels[rows]))
    return first, others


def spread_images(loader: Iterable, samples: int) -> Batches:
    """About `samples` images at equal distances, because a loader may be sorted by class. Raises InputError if empty.

    A loader that can pick them out (`loader.spread`) reads no others; any other loader is read from beginning to end.
    """
    if hasattr(loader, "spread"):
        return loader.spread(samples)
    batches, seen = [], 0
    stride = max(1, len(loader.dataset) // samples) if hasattr(loader, "dataset") else 1
    for images, labels in loader:
        first = -seen % stride
        seen += len(labels)
        if first < len(labels):
            batches.append((images[first::stride], labels[first::stride]))
    if not batches:
        raise InputError("there are no validation images")
    return batches
