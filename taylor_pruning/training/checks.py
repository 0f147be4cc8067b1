"""What is checked of every batch: on the device, without waiting for it; the host reads the results every few batches.

log = BatchLog(device)
for images, labels in loader:
    logits = model(images)
    check_logits(logits, labels, where)
    loss = F.cross_entropy(logits, valid_labels(labels, logits.shape[1]))
    log.add(batch_facts(loss, images, labels), classes=logits.shape[1], count=len(labels), where=where)
    if log.due:
        for batch in log.read():
            batch.check()
"""

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from taylor_pruning.errors import InputError

BATCHES_BETWEEN_READS = 32


def check_logits(logits: Tensor, labels: Tensor, where: str) -> None:
    """Raises InputError if the logits are not [B, classes] for labels [B]."""
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(labels):
        found = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise InputError(f"the model gave {found} for {where}; it must give logits [{len(labels)}, classes]")


def valid_labels(labels: Tensor, classes: int) -> Tensor:
    """Labels that cross-entropy can take, which on CUDA ends the process on others; `batch_facts` tells of those."""
    return labels.clamp(0, classes - 1)


def batch_facts(loss: Tensor, images: Tensor, labels: Tensor, *more: Tensor) -> Tensor:
    """[5 + more] on the device: loss, smallest and largest pixel, smallest and largest label, other scalars."""
    return torch.stack([loss.detach(), *images.detach().aminmax(), *labels.aminmax(), *more])


@dataclass(frozen=True)
class Batch:
    """What the host read of one batch: see `batch_facts`; `count` images, a model of `classes` outputs."""

    facts: list[float]
    classes: int
    count: int
    where: str

    def check(self) -> None:
        """Raises InputError on NaN or Inf pixels and on labels that the model has no output for."""
        _, low_pixel, high_pixel, low_label, high_label = self.facts[:5]
        if not -torch.inf < low_pixel <= high_pixel < torch.inf:
            raise InputError(
                f"{self.where} holds NaN or Inf pixels; look for broken images or a zero in the normalisation"
            )
        if low_label < 0 or high_label >= self.classes:
            label = low_label if low_label < 0 else high_label
            raise InputError(
                f"{self.where} holds label {int(label)}, but the model has {self.classes} outputs "
                f"(labels 0 to {self.classes - 1}); give the model as many outputs as the data has classes"
            )


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


def nonfinite_tensor(model: nn.Module) -> str | None:
    """Name of the first parameter or buffer that holds NaN or Inf. Waits for the device once."""
    named = itertools.chain(model.named_parameters(), model.named_buffers())
    tensors = {name: tensor for name, tensor in named if tensor.is_floating_point()}
    # A sum shows every NaN and Inf and is 20 times as fast as isfinite(); where finite values overflow it, those decide.
    if not tensors or torch.stack([tensor.detach().sum() for tensor in tensors.values()]).isfinite().all():
        return None
    return next((name for name, tensor in tensors.items() if not tensor.isfinite().all()), None)
