"""One class an image, or several: logits against class numbers, or against yes-or-no labels."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from taylor_pruning.checks import check_batch, check_one_tensor, describe, no_pair, read_batch, refuse_probabilities
from taylor_pruning.errors import InputError
from taylor_pruning.modes import in_evaluation, requirements_kept
from taylor_pruning.options import check_argument
from taylor_pruning.tasks.directions import bernoulli_directions, random_directions
from taylor_pruning.tasks.task import Task


class Classification(Task):
    """Logits [B, K] against class numbers [B]: cross-entropy, Kullback-Leibler divergence, top-1."""

    name, main, loss_name = "classification", "top1", "cross-entropy"

    def read(self, batch, where, device=None):
        return read_batch(batch, where, device)

    def loss(self, outputs: Tensor, batch) -> Tensor:
        """In double precision, in which also the slope of a sure prediction has digits."""
        return F.cross_entropy(outputs.double(), batch[1], reduction="none")

    def divergence(self, outputs: Tensor, dense_outputs: Tensor) -> Tensor:
        return kl_divergence(outputs, dense_outputs)

    def projection(self, outputs: Tensor, signs: Tensor) -> Tensor:
        return (outputs * random_directions(outputs.detach(), signs)).sum(1)

    def statistics(self, outputs: Tensor, batch) -> Tensor:
        hits = outputs.topk(min(5, outputs.shape[1])).indices == batch[1][:, None]
        loss = self.loss(outputs, batch).sum()
        return torch.stack([hits[:, 0].sum(), hits.sum(), loss, loss.new_tensor(len(batch[1]))])

    def metrics(self, sums: Tensor) -> dict[str, float]:
        top1, top5, loss, images = sums.tolist()
        return {
            "top1": 100 * top1 / images,
            "top5": 100 * top5 / images,
            "loss": loss / images,
            "images": int(images),
        }

    def check(self, outputs, batch, where: str) -> None:
        check_batch(*batch, outputs, where)
        if not torch.isfinite(outputs).all():
            raise InputError(f"the network gives NaN or infinite logits for {where}; check its weights")

    def check_kind(self, model, outputs, batch):
        if type(self).loss is Classification.loss:  # another one may take probabilities
            refuse_probabilities(outputs)


class OtherLoss(Classification):
    """Class logits under another loss (logits [B, K], labels [B]) -> [B]; without a divergence, so without compensation."""

    name, loss_name = "classification by another loss than the cross-entropy", "loss"

    def __init__(self, loss):
        if not callable(loss):
            raise InputError(f"the loss is {loss!r}; give a function of (logits, labels)")
        self.of_labels = loss

    def loss(self, outputs, batch):
        losses = self.of_labels(outputs, batch[1])
        if not isinstance(losses, Tensor) or losses.shape != outputs.shape[:1]:
            raise InputError(f"the loss gives {describe(losses)}; give one number an image, as by reduction='none'")
        return losses

    def defines(self, name: str) -> bool:
        return name != "divergence" and super().defines(name)


class MultiLabel(Task):
    """Logits [B, K] against labels [B, K] of 0 and 1: binary cross-entropy summed over the labels, mean F1 over them."""

    name, main = "multi-label classification", "f1"

    def read(self, batch, where, device=None):
        batch = super().read(batch, where, device)
        if not isinstance(batch, (tuple, list)) or len(batch) != 2 or not all(isinstance(t, Tensor) for t in batch):
            raise no_pair(batch, where, "labels [B, K] of 0 and 1")
        images, labels = batch
        if labels.dim() != 2 or len(labels) != len(images) or not ((labels == 0) | (labels == 1)).all():
            raise InputError(
                f"the labels of {where} are {[*labels.shape]}; give 0 or 1 for every image and label, [B, K]"
            )
        return images, labels

    def check(self, outputs, batch, where):
        super().check(outputs, batch, where)
        check_one_tensor(outputs, where)
        if outputs.shape != batch[1].shape:
            raise InputError(
                f"the network gives {[*outputs.shape]} for {where}, but the labels are {[*batch[1].shape]}; give as many"
            )

    def check_kind(self, model, outputs, batch):
        """Values alone do not show probabilities: few logits may lie between 0 and 1, too."""
        if type(self).loss is not MultiLabel.loss or (outputs < 0).any() or (outputs > 1).any():
            return
        with in_evaluation(model), requirements_kept(model), torch.enable_grad():
            last = self.forward(model.requires_grad_(True), batch).grad_fn
        if type(last).__name__.startswith("Sigmoid"):
            raise InputError(
                "the network ends in a sigmoid; give it without that last step: the loss takes logits, and applies the sigmoid"
            )

    def loss(self, outputs: Tensor, batch) -> Tensor:
        return F.binary_cross_entropy_with_logits(outputs, batch[1].to(outputs), reduction="none").sum(1)

    def divergence(self, outputs: Tensor, dense_outputs: Tensor) -> Tensor:
        return bernoulli_divergence(outputs, dense_outputs).sum(1)

    def projection(self, outputs: Tensor, signs: Tensor) -> Tensor:
        return (outputs * bernoulli_directions(outputs.detach(), signs)).sum(1)

    def statistics(self, outputs: Tensor, batch) -> Tensor:
        said, labels = outputs > 0, batch[1].bool()
        counts = torch.stack([(said & labels).sum(0), said.sum(0), labels.sum(0)]).double()
        loss = self.loss(outputs.double(), batch).sum()
        return torch.cat([loss[None], loss.new_tensor([len(labels)]), counts.flatten()])

    def metrics(self, sums: Tensor) -> dict[str, float]:
        loss, images = sums[:2].tolist()
        right, said, labels = sums[2:].reshape(3, -1)
        present = labels + said > 0
        f1 = 2 * right[present] / (labels + said)[present]
        return {"f1": 100 * f1.mean().item(), "loss": loss / images, "images": int(images)}


def kl_divergence(logits: Tensor, dense_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """[B, ...] divergence of the classes along dimension 1 from those of the dense network, in nats.

    At the temperature T: T^2 KL(softmax(dense / T) || softmax(logits / T)) (Hinton et al. 2015, arXiv:1503.02531).
    """
    found, wanted = ((values / temperature).log_softmax(1) for values in (logits, dense_logits))
    return temperature**2 * F.kl_div(found, wanted, reduction="none", log_target=True).sum(1)


def bernoulli_divergence(logits: Tensor, dense_logits: Tensor) -> Tensor:
    """Of every entry: Kullback-Leibler divergence of a yes-or-no probability from the dense network's, in nats."""
    p = dense_logits.sigmoid()
    yes = F.logsigmoid(dense_logits) - F.logsigmoid(logits)
    no = F.logsigmoid(-dense_logits) - F.logsigmoid(-logits)
    return p * yes + (-dense_logits).sigmoid() * no


def is_classification(task: Task) -> bool:
    """Whether outputs are class logits under the plain cross-entropy, for which closed forms hold."""
    return type(task) is Classification


def task_of(task: Task | None, loss: Callable | None = None) -> Task:
    """The task, classification where none is given, by the cross-entropy or another loss. Raises InputError if it is none."""
    if task is None:
        return Classification() if loss is None else OtherLoss(loss)
    if loss is not None:
        raise InputError("a task has a loss of its own; give a task or a loss, not both")
    if not isinstance(task, Task):
        kind = task.__name__ if isinstance(task, type) else type(task).__name__
        raise InputError(f"task is {kind}; give an instance of taylor_pruning.tasks.task.Task, as Segmentation()")
    check_argument("larger_is_better", task.larger_is_better, bool)
    return task
