"""Splits samples into folds by a hash of what the network reads: a sample has the same fold in every pass and batch."""

from collections import defaultdict

import torch
from torch import Tensor

from taylor_pruning.tasks import batches as samples
from taylor_pruning.tasks.classification import Classification
from taylor_pruning.tasks.task import Task

FOLDS = 4
PRIME = 2**31 - 1
FACTOR = 2654435761
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of a number


def fold_of(inputs, count: int | None = None) -> Tensor:
    """[B] fold of every sample, a function of its numbers alone.

    Args:
        inputs: what the network is called with (Task.inputs): tensors [B, ...] and lists of one tensor a sample, in tuples and
            dictionaries.
        count: B; None: the length of the inputs, a tensor. A tensor of another length counts for nothing.
    """
    hashes = _hashes(inputs, len(inputs) if count is None else count)
    return hashes % PRIME % FOLDS  # the prime mixes all bits: those of rounded pixels end in zeros


def _hashes(inputs, count):
    """[B] hash of what the inputs hold of every sample; 0 where they hold nothing."""
    if isinstance(inputs, Tensor):
        if not inputs.dim() or len(inputs) != count:
            return torch.zeros(count, dtype=torch.int64)
        inputs = torch.view_as_real(inputs) if inputs.is_complex() else inputs
        numbers = inputs.detach().flatten(1) if inputs.dim() > 1 else inputs.detach()[:, None]
        numbers = numbers.contiguous().view(_INTEGERS[inputs.element_size()]).long()
        weights = torch.arange(1, numbers.shape[1] + 1, device=numbers.device) * FACTOR + 40503  # wraps around: a hash
        return (numbers * weights).sum(1).cpu()
    if isinstance(inputs, list) and len(inputs) == count and all(isinstance(item, Tensor) for item in inputs):
        return torch.cat([_hashes(item[None], 1) for item in inputs])
    parts = inputs.values() if isinstance(inputs, dict) else inputs if isinstance(inputs, (list, tuple)) else ()
    found = torch.zeros(count, dtype=torch.int64)
    for number, part in enumerate(parts):
        found += _hashes(part, count) * (FACTOR**number % PRIME)
    return found


def folds_of(batches, task: Task | None = None) -> Tensor:
    """[number of samples] fold of every sample of the batches, on the CPU. `task`: default classification."""
    task = task or Classification()
    return torch.cat([fold_of(task.inputs(batch), samples.size(batch)) for batch in batches])


def by_fold(batches, task: Task | None = None):
    """Yields (fold, batches of the samples that fall into it); batches are no larger than the largest one given."""
    sizes = [samples.size(batch) for batch in batches]
    folds = folds_of(batches, task).split(sizes)
    for fold in range(FOLDS):
        chosen = [(f == fold).nonzero().flatten() for f in folds]
        picked = defaultdict(list)  # by the shapes in them: others cannot be joined
        for batch, i in zip(batches, chosen, strict=True):
            if len(i):
                picked[samples.shapes(batch)].append(samples.select(batch, i))
        if picked:
            joined = [samples.join(alike) for alike in picked.values()]
            yield fold, [part for batch in joined for part in samples.split(batch, max(sizes))]
