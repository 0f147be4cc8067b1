"""What is checked of every batch: on the device, without waiting for it; the host reads the results every few batches.

log = BatchLog(device)
for images, labels in loader:
    logits = model(images)
    check_logits(logits, len(labels), where)
    loss = F.cross_entropy(logits, valid_labels(labels, logits.shape[1]))
    log.add(batch_facts(loss, images, labels), classes=logits.shape[1], count=len(labels), where=where)
    if log.due:
        for batch in log.read():
            batch.check()
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from taylor_pruning.checks import check_ranges
from taylor_pruning.surgery.nested import tensors_in

BATCHES_BETWEEN_READS = 32


def valid_labels(labels: Tensor, classes: int) -> Tensor:
    """Labels that cross-entropy can take, which on CUDA ends the process on others; `batch_facts` tells of those."""
    return labels.clamp(0, classes - 1)


def batch_facts(loss: Tensor, images: Tensor, labels: Tensor, *more: Tensor) -> Tensor:
    """[5 + more] on the device: loss, smallest and largest pixel, smallest and largest label, other scalars."""
    return torch.stack([loss.detach(), *images.detach().aminmax(), *labels.aminmax(), *more])


def input_facts(loss: Tensor, inputs) -> Tensor:
    """[5] like `batch_facts`, for what a network of any task reads; the task checks its labels itself, which may hold NaN."""
    numbers = [t.detach() for t in tensors_in(inputs) if t.is_floating_point() and t.numel()]
    ends = torch.stack([torch.stack(t.aminmax()).to(loss) for t in numbers] or [loss.new_zeros(2)])
    return torch.stack([loss.detach(), ends[:, 0].min(), ends[:, 1].max(), *loss.new_zeros(2)])


@dataclass(frozen=True)
class Batch:
    """What the host read of one batch: see `batch_facts`; `count` images, a model of `classes` outputs."""

    facts: list[float]
    classes: int
    count: int
    where: str

    def check(self) -> None:
        """Raises InputError on NaN or Inf pixels and on labels that the model has no output for."""
        check_ranges(*self.facts[1:5], self.classes, self.where)


class BatchLog:
    """Facts of the batches since the last read. `every`: batches between reads, by default 1 on a CPU.

    A read waits for the device to finish all that it was given; on a CPU there is nothing to wait for.
    """

    def __init__(self, device: torch.device, every: int | None = None):
        self.every = every or (1 if device.type == "cpu" else BATCHES_BETWEEN_READS)
        self._unread: list[tuple[Tensor, int, int, str]] = []

    def add(self, facts: Tensor, *, classes: int, count: int, where: str) -> None:
        self._unread.append((facts, classes, count, where))

    @property
    def due(self) -> bool:
        return len(self._unread) >= self.every

    def read(self) -> list[Batch]:
        """The batches since the last read, in order."""
        if not self._unread:
            return []
        facts, *rest = zip(*self._unread, strict=True)
        self._unread = []
        return [Batch(*fields) for fields in zip(torch.stack(facts).tolist(), *rest, strict=True)]
