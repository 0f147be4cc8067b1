"""Batches of any structure: how many samples they hold, some of their samples, several batches as one.

A batch is a tensor, or a tuple, list or dictionary of fields. A field is a tensor [B, ...], a list or tuple with one item a
sample (images of different sizes, targets of a detector), or a dictionary of fields. Anything else is kept as it is.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from taylor_pruning.checks import usable
from taylor_pruning.errors import InputError
from taylor_pruning.surgery.nested import map_tensors


def images(batch) -> Tensor | Sequence:
    """The first field with one entry a sample, a tensor [B, ...] or a list. Raises InputError where there is none."""
    for field in _fields(batch):
        if isinstance(field, dict):
            return images(field)
        if _has_samples(field):
            return field
    raise InputError("the batch has no field with one entry a sample; let it begin with a tensor [B, ...] or a list")


def size(batch) -> int:
    """Number of samples: the length of the first field. Raises InputError where there is none."""
    return len(images(batch))


def lengths(batch) -> set[int]:
    """Numbers of samples that the fields have; one number in a batch that can be taken apart."""
    found = set()
    _map_fields(batch, lambda field: found.update([len(field)] if _has_samples(field) else []), top=True)
    return found


def shapes(batch) -> tuple:
    """Those of one sample in every field that is a tensor; batches of the same ones can be joined."""
    found = []
    _map_fields(batch, lambda field: found.append(getattr(field, "shape", ())[1:]), top=True)
    return tuple(found)


def select(batch, index: Tensor | slice):
    """The samples of `index` (int64), in its order, as copies; those of a slice as views, for which no device waits."""
    return _map_fields(batch, lambda field: _pick(field, index), top=True)


def join(batches: Sequence):
    """Several batches of one structure as one."""
    first = batches[0]
    if isinstance(first, Tensor):
        return torch.cat(list(batches))
    if isinstance(first, dict):
        return {key: join_fields([batch[key] for batch in batches]) for key in first}
    return tuple(join_fields(fields) for fields in zip(*batches, strict=True))


def join_fields(fields: Sequence):
    """One field of several batches as one."""
    if isinstance(fields[0], (list, tuple)):
        return [item for field in fields for item in field]
    return join(fields) if isinstance(fields[0], (dict, Tensor)) else fields[0]


def split(batch, length: int) -> list:
    """The batch in parts of at most `length` samples."""
    total = size(batch)
    return [select(batch, torch.arange(start, min(start + length, total))) for start in range(0, total, length)]


def to_device(batch, device: torch.device | None):
    """The batch with all tensors on `device`; those of inference mode, which autograd could not use, are copied."""
    return map_tensors(batch, lambda tensor: usable(tensor).to(device))


def _fields(batch):
    if isinstance(batch, dict):
        return list(batch.values())
    return list(batch) if isinstance(batch, (list, tuple)) else [batch]


def _map_fields(batch, function, top=False):
    if isinstance(batch, dict):
        return {key: _map_fields(value, function) for key, value in batch.items()}
    if top and isinstance(batch, (list, tuple)):
        return tuple(_map_fields(field, function) for field in batch)
    return function(batch)


def _has_samples(field):
    return isinstance(field, (list, tuple)) or (isinstance(field, Tensor) and field.dim() > 0)


def _pick(field, index):
    if not _has_samples(field):
        return field
    if isinstance(index, slice):
        return field[index]
    return field[index.to(field.device)] if isinstance(field, Tensor) else [field[i] for i in index.tolist()]


def spread_rows(number: int, samples: int) -> torch.Tensor:
    """About `samples` of `number` positions, ascending: one drawn from each of so many stretches of equal length, the first 0.

    Images may be sorted by class, or go through the classes in turn: at equal distances these would miss some classes.
    """
    length = max(1, number // samples)
    starts = torch.arange(0, number, length)
    drawn = torch.randint(length, starts.shape, generator=torch.Generator().manual_seed(0))
    drawn[:1] = 0  # which also a loader has that gives only a part of its data set
    return (starts + drawn).clamp_max(number - 1)
