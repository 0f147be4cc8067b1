"""How many images a pass may take at once, so that it stays within the memory of the device.

    portions = Portions(device, limit=parse_bytes("4GB"))
    for images, labels in batches:
        for part in portions.slices(len(images)):
            with portions.measured(part):
                work(images[part], labels[part])

The first two parts have few images, and what they take says how many the next ones may have. Nothing runs twice for it.
On a CPU parts are small in any case: larger ones are slower there, see ENOUGH.
"""

import ctypes
import itertools
import math
import os
import re
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from taylor_pruning.distributed import world_size
from taylor_pruning.errors import InputError

# Images of the first parts; what does not grow with them, as a matrix of channels, counts less in the second.
PROBES = (4, 16)
SHARE = 0.8  # of the free memory that a pass may take
# Bytes that a pass takes on a CPU of one or two threads, in proportion on others, even where more are free. The C library
# maps large tensors anew each time, page by page: forward and backward of MobileNetV2 at 224 pixels took 2.2 s of a CPU for
# 32 images in parts of 4, 2.8 s in parts of 8, 4.0 s at once.
ENOUGH, ENOUGH_FORWARD = 2**29, 2**27
HELD = 2**31  # bytes of activations that compensation holds at most on a CPU without a limit
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, KEPT = -1, -3, 2**30  # of malloc.h, see keep_freed_memory
MERGED = 1024  # images of a batch on a GPU, which waits for the host where batches are small
UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def is_out_of_memory(error: BaseException) -> bool:
    """Whether there was not enough memory, on a GPU or for torch on a CPU, whose error is a RuntimeError like others."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)


def raise_out_of_memory(error: BaseException) -> None:
    """Raises the error again if memory ran out, which says nothing of the network or file that was being tried."""
    if is_out_of_memory(error):
        raise error


def parse_bytes(text: str) -> int:
    """Bytes of "4GB", "500MB" or "2.5G" (powers of 1,024). Raises InputError for anything else."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(?:I?B)?\s*", text.upper())
    if not found or not float(found[1]):
        raise InputError(f"--memory-limit must be a number of bytes such as 4GB or 500MB, not {text}")
    return int(float(found[1]) * UNITS[found[2]])


def free_bytes(device: torch.device) -> int:
    """What this process may still take on the device: of a machine, also within the limits of its control groups."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    if sys.platform != "linux":
        return 8 * 2**30
    (line,) = (line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable"))
    return min([int(line.split()[1]) * 1024, *_left_in_groups()])


def keep_freed_memory() -> None:
    """Lets the C library of Linux keep freed memory of this process for the next tensors, up to KEPT.

    It would return large blocks to the system and get them back page by page, which took a third of the CPU time of training
    on photographs. For programs of our own alone: it holds for the whole process.
    """
    for parameter in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD):
        _of_c_library("mallopt", parameter, KEPT)


def return_freed_memory() -> None:
    """Gives freed memory back to the system, also what lies between blocks in use: for the end of a step of a run."""
    _of_c_library("malloc_trim", 0)


def _of_c_library(name: str, *arguments: int) -> None:
    """Calls a function of glibc; other C libraries do without."""
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), name):
        getattr(library, name)(*arguments)


def used_bytes(device: torch.device) -> int:
    """What this process holds on the device now."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    if sys.platform != "linux":
        return 0
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _left_in_groups() -> Iterator[int]:
    """Bytes left within every control group of the process that has a limit, of version 2 and 1."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number != "0" and "memory" not in controllers.split(","):
            continue
        root = Path("/sys/fs/cgroup", "" if number == "0" else "memory")
        names = (
            ("memory.max", "memory.current") if number == "0" else ("memory.limit_in_bytes", "memory.usage_in_bytes")
        )
        group = root / path.lstrip("/")
        for folder in (group, *group.parents):
            limit, used = (_number(folder / name) for name in names)
            if limit is not None and used is not None:
                yield max(0, limit - used + (_cached(folder) or 0))
            if folder == root:
                break


def _number(file: Path) -> int | None:
    """The number in a file; None where there is none, or no limit."""
    try:
        text = file.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _cached(folder: Path) -> int | None:
    """Bytes of files that the group may drop."""
    try:
        lines = (folder / "memory.stat").read_text().splitlines()
    except OSError:
        return None
    values = dict(line.split() for line in lines)
    return int(values.get("total_inactive_file", values.get("inactive_file", 0)))


class _Live(TorchDispatchMode):
    """Counts the bytes of the tensors that operations make, while they live; `peak` is the most at one time."""

    def __init__(self):
        super().__init__()
        self.seen, self.now, self.peak = {}, 0, 0
        self.new: dict = {}  # {operation: whether it makes tensors}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function not in self.new:  # not views and operations in place, which are half of all
            self.new[function] = any(returned.alias_info is None for returned in function._schema.returns)
        for tensor in tree_leaves(result) if self.new[function] else ():
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage):
        key, size = storage._cdata, storage.nbytes()
        if key not in self.seen:
            self.seen[key] = size
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._free, key)

    def _free(self, key):
        self.now -= self.seen.pop(key, 0)


class Portions:
    """Parts of batches that fit into the memory of a device; see the module's example.

    Args:
        limit: bytes that the process may hold in all on the device; None: what it holds and SHARE of what is free.
        backward: whether the pass holds activations for a backward pass.

    Attributes:
        size: images of a part, once one has been measured.
        bytes_an_image: what one of its images took.
    """

    def __init__(self, device: torch.device, limit: int | None = None, *, backward: bool = True):
        self.device, self.limit = device, limit
        self.enough = enough_bytes(device, backward)
        self.size, self.bytes_an_image, self._probes = None, None, list(PROBES)

    def slices(self, images: int) -> Iterator[slice]:
        """Consecutive parts of a batch of so many images."""
        start = 0
        while start < images:
            sizes = [size for size in (self.size, *self._probes[:1]) if size]
            end = min(images, start + min(sizes))
            yield slice(start, end)
            start = end

    @contextmanager
    def measured(self, part: slice):
        """Measures what the block takes, unless that is known: it works on the images of the part."""
        if not self._probes:
            yield
            return
        budget = allowed_bytes(self.device, self.limit)
        with peak_of(self.device) as taken:
            yield
        self._probes.pop(0)
        self.bytes_an_image = max(1.0, taken() / (part.stop - part.start))
        self.size = max(1, int(min(budget, self.enough) / self.bytes_an_image))


def allowed_bytes(device: torch.device, limit: int | None) -> float:
    """What the process may take on the device beside what it holds, see Portions; negative where it holds too much."""
    return SHARE * free_bytes(device) if limit is None else limit - used_bytes(device)


def enough_bytes(device: torch.device, backward: bool) -> float:
    """What a pass takes at most, see ENOUGH; infinite on a GPU, which is faster the more it has to do at once."""
    if device.type != "cpu":
        return math.inf
    return (ENOUGH if backward else ENOUGH_FORWARD) * max(1, torch.get_num_threads() / 2)


@contextmanager
def peak_of(device: torch.device):
    """Yields a function that gives the bytes that the block has taken at most."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield lambda: torch.cuda.max_memory_allocated(device) - before
        return
    with _Live() as live:
        yield lambda: live.peak


def merged(batches: Sequence, device: torch.device, size: int = MERGED) -> list:
    """The batches (images, labels), on a GPU in larger ones: it would wait for the host between small ones.

    Args:
        size: images of a batch at most.
    """
    batches, size = list(batches), min(size, MERGED)
    if device.type != "cuda" or not all(isinstance(x, Tensor) for x, _ in batches):
        return batches
    if len({x.shape[1:] for x, _ in batches}) != 1:
        return batches
    images, labels = (None if part[0] is None else torch.cat(part) for part in zip(*batches, strict=True))
    size = min(size, -(-len(images) // world_size()))  # so that every process has a batch
    starts = range(0, len(images), size)
    return [(images[i : i + size], None if labels is None else labels[i : i + size]) for i in starts]


def fitting(run: Callable[[slice], object], images: int, device: torch.device, limit: int | None, copies: int) -> int:
    """How many images `copies` forwards at a time can take in half of the memory, see Portions.

    Args:
        run: run(part) is one forward of some of so many `images`; a few of them run to find out.
    """
    portions, budget = Portions(device, limit, backward=False), allowed_bytes(device, limit) / 2
    for part in itertools.islice(portions.slices(images), len(PROBES)):
        with portions.measured(part):
            run(part)
    return max(1, int(min(portions.enough, budget / copies) / portions.bytes_an_image))


def held_bytes(device: torch.device, limit: int | None) -> int:
    """Bytes of activations that may be held beside: half of the memory, see Portions; on a CPU without a limit HELD at most."""
    half = max(0, int(allowed_bytes(device, limit) / 2))
    return half if device.type == "cuda" or limit is not None else min(half, HELD)
