"""Accuracy and loss of a classifier, and new BatchNorm statistics."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from tqdm import tqdm

from taylor_pruning.checks import check_logits, check_weights, nonfinite_weight
from taylor_pruning.distributed import all_reduce_sum, is_main
from taylor_pruning.errors import InputError
from taylor_pruning.memory import Portions
from taylor_pruning.modes import in_evaluation, modes_kept
from taylor_pruning.tasks.batches import size
from taylor_pruning.tasks.classification import is_classification, task_of
from taylor_pruning.tasks.portions import in_portions
from taylor_pruning.tasks.task import Task
from taylor_pruning.training.checks import BatchLog, batch_facts, valid_labels
from taylor_pruning.training.recipe import AMP_DTYPES


@dataclass(frozen=True)
class Accuracy:
    """Top-1 and top-min(5, classes) accuracy in per cent, mean cross-entropy in nats, number of images."""

    top1: float
    top5: float
    loss: float
    images: int


def measure(
    task: Task, model: nn.Module, loader: Iterable, *, memory_limit: int | None = None, **options
) -> Accuracy | dict:
    """The metrics of a network on a loader: an Accuracy by `evaluate`, whose `options` these are, or what the task evaluates.

    Batches are split so that a classifier stays within `memory_limit` (memory.Portions); a task evaluates them as they are.

    The dictionary of another task always has "loss", the mean of its loss over the samples where it does not give one.

    Raises:
        InputError: as `evaluate`, or the task does not give its main metric.
    """
    if is_classification(task):
        return evaluate(model, loader, memory_limit=memory_limit, **options)
    check_weights(model)
    with in_evaluation(model), torch.no_grad():
        metrics = task.evaluated(model, loader)
    return metrics if "loss" in metrics else metrics | {"loss": mean_loss(task, model, loader)}


def main_figures(task: Task, metrics: Accuracy | Mapping) -> dict:
    """{the task's main metric, "loss"} of the metrics."""
    found = figures(metrics)
    return {name: found[name] for name in (task.main, "loss")}


def figures(metrics: Accuracy | Mapping) -> dict:
    """Metrics as a dictionary."""
    return dict(metrics) if isinstance(metrics, Mapping) else asdict(metrics)


@torch.no_grad()
def mean_loss(task: Task, model: nn.Module, loader: Iterable) -> float:
    """Mean over the samples of the task's loss with labels, in evaluation mode, over all processes."""
    sums = torch.zeros(2, dtype=torch.float64, device=next(model.parameters()).device)
    with in_evaluation(model):
        for batch in loader:
            losses = task.loss(task.forward(model, batch), batch)
            sums += torch.stack([losses.double().sum(), sums.new_tensor(len(losses))])
    total, samples = all_reduce_sum(sums).tolist()
    return total / samples


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    *,
    amp: str | None = None,
    memory_limit: int | None = None,
    description: str = "evaluate",
    progress: bool = True,
) -> Accuracy:
    """Accuracy of `model` (images [B, C, H, W] -> logits [B, K]) over all (images, labels) of `loader`, in eval mode.

    `amp`: "bf16" or "fp16" for mixed precision, None for the precision of the weights; losses are float64 in any case.
    One pass, in which the host waits for a GPU once every 32 batches; batches are split so that it stays within
    `memory_limit` (memory.Portions). Under torch.distributed the counts of all processes are summed. The modes of the
    model come back as they were.
    Raises InputError on an empty loader, NaN weights, NaN images, or labels outside the logits' range.
    """
    check_weights(model)
    device = next(model.parameters()).device
    log, batches, portions = BatchLog(device), [], Portions(device, memory_limit, backward=False)

    def forward(part, _):
        with torch.autocast(device.type, AMP_DTYPES[amp], enabled=amp is not None):
            return model(part[0]), *part

    with in_evaluation(model):
        bar = tqdm(loader, desc=description, leave=False, disable=not (progress and is_main()))
        for index, batch in enumerate(bar):
            where = f"{description}: batch {index}"
            for logits, images, labels in in_portions(forward, batch, portions):
                check_logits(logits, len(labels), where)
                log.add(_facts(logits, images, labels), classes=logits.shape[1], count=len(labels), where=where)
            if log.due:
                batches += _checked(log)
        batches += _checked(log)
    columns = [(batch.facts[0], *batch.facts[5:], batch.count) for batch in batches]
    sums = torch.tensor(columns, dtype=torch.float64, device=device).reshape(-1, 4).sum(0)
    loss, top1, top5, images = all_reduce_sum(sums).tolist()
    if not images:
        raise InputError(f"{description}: the loader gives no images; check the data path and the number of images")
    return Accuracy(100 * top1 / images, 100 * top5 / images, loss / images, int(images))


def _facts(logits: Tensor, images: Tensor, labels: Tensor) -> Tensor:
    """[7]: `batch_facts` with the sum of the losses, top-1 hits, top-5 hits."""
    classes = logits.shape[1]
    hits = logits.topk(min(5, classes)).indices == labels[:, None]
    loss = F.cross_entropy(logits.double(), valid_labels(labels, classes), reduction="sum")
    return batch_facts(loss, images, labels, hits[:, 0].sum(), hits.sum())


def _checked(log: BatchLog):
    batches = log.read()
    for batch in batches:
        batch.check()
    return batches


@torch.no_grad()
def reestimate_batchnorm(model: nn.Module, batches: Iterable, task: Task | None = None) -> None:
    """Replace, in place, every BatchNorm's running statistics by the averages over `batches`.

    Each batch is (images [B, C, H, W], labels), or one of the task, and weighs by its samples. All other modules run in
    eval mode; modes and
    momenta come back as they were. No communication: under torch.distributed every process gives the same batches.
    Raises InputError if there is no batch, or if the new statistics hold NaN or Inf.
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    momenta, task = [norm.momentum for norm in norms], task_of(task)
    seen = 0
    with modes_kept(model):
        model.eval()
        for norm in norms:
            norm.train()
        try:
            for index, batch in enumerate(batches):
                seen += size(batch)
                for norm in norms:
                    if index == 0:
                        norm.reset_running_stats()  # momentum 1 alone would keep an old NaN
                    norm.momentum = size(batch) / seen
                task.forward(model, batch)
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum
    if not seen:
        raise InputError("BatchNorm statistics: there are no batches; give at least one batch of images")
    if name := nonfinite_weight(model):
        raise InputError(f"BatchNorm statistics: {name} came out as NaN or Inf; look for broken images")
