"""Loaders whose epochs can be repeated bit for bit, and draws of calibration images.

    loader = make_loader(data.train, 64, shuffle=True, seed=0, device=device)
    loader.set_epoch(3)
    for images, labels in loader:                                               # on `device`
        ...

Decoded images are augmented batch by batch on the device; others are decoded by DataLoader workers. Order and augmentation
depend on (seed, epoch) alone, never on the number of workers or on what was drawn before, so a resumed run sees the images
that an unbroken run would have seen.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing.pool import ThreadPool

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Subset, default_collate

from taylor_pruning.errors import InputError
from taylor_pruning.experiment.data import ImageData, TensorImages
from taylor_pruning.generators import seeded
from taylor_pruning.tasks.batches import spread_rows

FLOATS_AT_ONCE = 2**23  # normalised pixels that are made at once: 32 MiB


class EpochBatches:
    """Which images make up the batches of an epoch: a function of (seed, epoch), cut over `shard` = (rank, world size).

    Shuffled (training): every rank gets equally many images and batches; up to `world - 1` images of an epoch, other
    ones each time, are left out. Batches are as even as can be, so that no last batch of one image meets BatchNorm.
    In order (evaluation): every image exactly once over all ranks.
    """

    def __init__(self, length: int, batch_size: int, *, shuffle: bool, seed: int, shard: tuple[int, int] = (0, 1)):
        rank, world = shard
        if batch_size < 1:
            raise InputError(f"batch size must be at least 1, got {batch_size}")
        if length < (world if shuffle else 1):
            raise InputError(f"{length} images cannot be spread over {world} process(es); give more images")
        self.length, self.batch_size, self.shuffle, self.seed, self.shard = length, batch_size, shuffle, seed, shard
        self.share = length // world if shuffle else len(range(rank, length, world))
        self.epoch = 0

    def __len__(self) -> int:
        return -(-self.share // self.batch_size)

    def batches(self) -> list[np.ndarray]:
        rank, world = self.shard
        if not self.shuffle:
            order = np.arange(rank, self.length, world)
            return [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.length)
        return np.array_split(order[: self.share * world][rank::world], len(self))

    def spread(self, samples: int) -> tuple[list[int], "EpochBatches"]:
        """About `samples` positions (tasks.batches.spread_rows), and the batches of them alone, in order."""
        rows = spread_rows(self.length, samples).tolist()
        return rows, EpochBatches(len(rows), self.batch_size, shuffle=False, seed=self.seed, shard=self.shard)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        """Batches as DataLoader keys; the epoch travels with every index, so that persistent workers know it."""
        for batch in self.batches():
            yield [(self.epoch, index) for index in batch.tolist()]


class BatchLoader:
    """Loads a TensorImages on `device`, where the uint8 images live; no loop over images.

    Several batches are cropped, flipped and normalised at once and then handed out one by one, which takes fewer launches
    on a GPU. Nothing waits for the device but the copy of an epoch's order at its beginning.
    """

    def __init__(self, dataset: TensorImages, plan: EpochBatches, device: torch.device):
        self.dataset, self.plan, self.device = dataset, plan, device
        self.smallest_batch = min(map(len, plan.batches()))
        self._resident = dataset.to(device)

    def __len__(self) -> int:
        return len(self.plan)

    def set_epoch(self, epoch: int) -> None:
        self.plan.epoch = epoch

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        data, batches = self._resident, self.plan.batches()
        if not batches:  # of one process of several, on very few images
            return
        shifts, flips = self._draws()
        order = torch.from_numpy(np.concatenate(batches)).to(self.device)
        at_once = max(1, FLOATS_AT_ONCE // (data.images[0].numel() * len(batches[0])))
        first = 0
        for start in range(0, len(batches), at_once):
            sizes = [len(batch) for batch in batches[start : start + at_once]]
            index = order[first : first + sum(sizes)]
            first += sum(sizes)
            images = data.take(
                index, None if shifts is None else shifts[index], None if flips is None else flips[index]
            )
            yield from zip(images.split(sizes), data.targets[index].split(sizes), strict=True)

    def spread(self, samples: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Batches of about `samples` images spread over the set (tasks.batches.spread_rows); reads no others."""
        rows, plan = self.plan.spread(samples)
        data = replace(self.dataset, images=self.dataset.images[rows], targets=self.dataset.targets[rows])
        return list(BatchLoader(data, plan, self.device))

    def _draws(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Shifts [N, 2] and flips [N] of all images, drawn on the CPU: the same for every batch size, shard and device."""
        data, shifts, flips = self._resident, None, None
        rng = np.random.default_rng([self.plan.seed, self.plan.epoch, 1])
        if data.padding:
            shifts = torch.from_numpy(rng.integers(2 * data.padding + 1, size=(len(data), 2))).to(self.device)
        if data.flip:
            flips = torch.from_numpy(rng.integers(2, size=len(data)).astype(bool)).to(self.device)
        return shifts, flips


class WorkerLoader:
    """A DataLoader with the interface of BatchLoader: batches on `device`, `set_epoch`, errors of workers as raised."""

    def __init__(self, dataset: Dataset, plan: EpochBatches, device: torch.device, workers: int):
        self.dataset, self.plan, self.device = dataset, plan, device
        self.smallest_batch = min(map(len, plan.batches()))
        self._loader = DataLoader(
            _SeededItems(dataset, plan.seed), batch_sampler=plan, num_workers=workers, collate_fn=_collate,
            pin_memory=device.type == "cuda", persistent_workers=workers > 0,
            worker_init_fn=_ignore_interrupts,
            generator=torch.Generator().manual_seed(plan.seed),  # keeps the DataLoader off the global generator
        )  # fmt: skip

    def __len__(self) -> int:
        return len(self.plan)

    def set_epoch(self, epoch: int) -> None:
        self.plan.epoch = epoch

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        with _interrupts_deferred():
            batches = iter(self._loader)
        for batch in batches:
            if isinstance(batch, InputError):
                raise batch
            images, labels = batch
            yield images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)

    def spread(self, samples: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """See BatchLoader.spread."""
        rows, plan = self.plan.spread(samples)
        return list(WorkerLoader(Subset(self.dataset, rows), plan, self.device, self._loader.num_workers))


def _ignore_interrupts(worker: int) -> None:
    """Ctrl-C in a terminal reaches every process. The one that trains ends the workers; workers that end first are an error."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextlib.contextmanager
def _interrupts_deferred():
    """Ctrl-C in the block counts at its end, and not in processes that are forked in it.

    Python drops an exception that is raised in what it calls around a fork, and the run would go on.
    """
    usual, caught = signal.getsignal(signal.SIGINT), []
    if not callable(usual) or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGINT, lambda *received: caught.append(received))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, usual)
        if caught:
            usual(*caught[0])


def is_worker_failure(error: BaseException) -> bool:
    """Whether a worker was killed, or had no shared memory for its batch; torch raises RuntimeError, wherever it is then."""
    signs = ("DataLoader worker (pid", "shared memory", "shm_open", "</torch_")  # the last: a file in /dev/shm
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)


class _SeededItems(Dataset):
    """Items with the random transforms seeded by (seed, epoch, index); InputErrors are returned in place of items.

    A DataLoader wraps what a worker raises into a message that holds the whole traceback; a returned error arrives
    as it is, and the loader raises it.
    """

    def __init__(self, dataset: Dataset, seed: int):
        self.dataset, self.seed = dataset, seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int]):
        seed = np.random.SeedSequence([self.seed, *key]).generate_state(1, np.uint64)
        with seeded(int(seed[0]), torch.device("cpu")):
            try:
                return self.dataset[key[1]]
            except InputError as error:
                return error


def _collate(items: list):
    error = next((item for item in items if isinstance(item, InputError)), None)
    return default_collate(items) if error is None else error


def make_loader(
    dataset: Dataset,
    batch_size: int,
    *,
    shuffle: bool = False,
    workers: int = 0,
    seed: int = 0,
    device: torch.device | str = "cpu",
    distributed: bool = False,
) -> BatchLoader | WorkerLoader:
    """Iterable of (images float32 [B, 3, H, W], labels int64 [B]) on `device`, with `len`, `dataset`, `set_epoch`.

    workers: processes that decode images; a set that is decoded already needs none. distributed: this process's share
    under torch.distributed, see EpochBatches. Raises InputError on an empty set or a batch size below 1, and while
    iterating on an image that cannot be decoded.
    """
    device = torch.device(device)
    shard = (torch.distributed.get_rank(), torch.distributed.get_world_size()) if distributed else (0, 1)
    plan = EpochBatches(len(dataset), batch_size, shuffle=shuffle, seed=seed, shard=shard)
    if isinstance(dataset, TensorImages):
        return BatchLoader(dataset, plan, device)
    return WorkerLoader(dataset, plan, device, workers)


def calibration_batches(
    data: ImageData, samples: int, batch_size: int, *, seed: int = 0, device: torch.device | str = "cpu"
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Class-balanced training images under the evaluation transform, as [(images, labels)] on `device`.

    The classes alternate; within a class, images come in random order without repetition. A class without further
    images is skipped, and `samples` above the size of the set means all of it. The sequence of images depends on `seed`
    alone, `batch_size` only cuts it. Raises InputError when samples or batch_size is below 1.
    """
    if samples < 1 or batch_size < 1:
        raise InputError(f"calibration needs at least 1 sample and batch size 1, got {samples} and {batch_size}")
    order = _balanced_order(np.asarray(data.evaluation_train.targets), seed)[:samples].tolist()
    with ThreadPool(min(8, os.cpu_count() or 1)) as pool:
        items = pool.map(data.evaluation_train.__getitem__, order)
    batches = [default_collate(items[i : i + batch_size]) for i in range(0, len(items), batch_size)]
    return [(images.to(device), labels.to(device)) for images, labels in batches]


def _balanced_order(labels: np.ndarray, seed: int) -> np.ndarray:
    """All indices, ordered by (how many of its class came before, random rank of the class)."""
    rng = np.random.default_rng(seed)
    shuffled = rng.permutation(len(labels))
    class_rank = rng.permutation(labels.max() + 1)[labels[shuffled]]
    by_class = np.argsort(class_rank, kind="stable")
    _, starts, counts = np.unique(class_rank[by_class], return_index=True, return_counts=True)
    place = np.empty(len(labels), np.int64)
    place[by_class] = np.arange(len(labels)) - np.repeat(starts, counts)
    return shuffled[np.lexsort((class_rank, place))]
