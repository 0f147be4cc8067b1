"""Few batches that represent a loader: the first images, or images spread over it."""

from collections.abc import Iterable

import torch

from taylor_pruning.tasks.batches import select, size, spread_rows

HELD_OUT = 100  # images that neither score nor repair, on which a round is judged


def first_images(loader: Iterable, samples: int) -> list:
    """Batches of the first `samples` images, of all where there are fewer."""
    batches, taken = [], 0
    for batch in loader:
        batches.append(select(batch, torch.arange(min(samples - taken, size(batch)))))
        taken += size(batches[-1])
        if taken >= samples:
            break
    return batches


def split_images(batches: list, samples: int) -> tuple[list, list]:
    """The batches of the first `samples` images, and those of all others; each may be empty."""
    first, others, before = [], [], 0
    for batch in batches:
        images = size(batch)
        here = min(images, max(0, samples - before))
        before += images
        for part, rows in ((first, torch.arange(here)), (others, torch.arange(here, images))):
            if len(rows):
                part.append(select(batch, rows))
    return first, others


def spread_images(loader: Iterable, samples: int) -> list:
    """About `samples` images at the places of `spread_rows`.

    A loader that can pick them out (`loader.spread`) reads no others; any other loader is read from beginning to end. One
    without a length of its data set is taken whole.
    """
    if hasattr(loader, "spread"):
        return loader.spread(samples)
    batches, seen = [], 0
    rows = spread_rows(len(loader.dataset), samples) if hasattr(loader, "dataset") else None
    for batch in loader:
        here = torch.arange(size(batch))
        if rows is not None:
            here = rows[(rows >= seen) & (rows < seen + len(here))] - seen
        seen += size(batch)
        if len(here):
            batches.append(select(batch, here))
    return batches


def are_all_images(taken: list, loader: Iterable, samples: int) -> bool:
    """Whether what `spread_images` has taken is all that the loader gives, which may drop its last batch."""
    counted = hasattr(loader, "dataset")
    if not counted and not hasattr(loader, "spread"):
        return True
    return len(taken) == len(loader) and not (counted and len(loader.dataset) >= 2 * samples)
