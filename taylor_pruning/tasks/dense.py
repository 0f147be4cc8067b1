"""One class a pixel, or numbers: segmentation by mIoU, regression by the mean absolute error."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from taylor_pruning.checks import CLASS_NUMBERS, check_one_tensor, no_pair, refuse_probabilities
from taylor_pruning.errors import InputError
from taylor_pruning.options import check_argument
from taylor_pruning.tasks.classification import kl_divergence
from taylor_pruning.tasks.directions import random_directions
from taylor_pruning.tasks.task import Task


class Segmentation(Task):
    """Logits [B, K, H, W] against class numbers [B, H, W]; of volumes [B, K, D, H, W] and [B, D, H, W], of series [B, K, T] and
    [B, T].

    Loss and divergence are means over pixels: cross-entropy over the labelled ones, Kullback-Leibler divergence over all.
    A network that returns a dictionary, as torchvision's do, is judged by its entry "out"; in training its entry "aux", where
    it has one, adds `aux_weight` times its loss (torchvision's references/segmentation).

    Args:
        ignore_index: class number of pixels without a label. aux_weight: see above.
    """

    name, main = "segmentation", "miou"

    def __init__(self, ignore_index: int = 255, aux_weight: float = 0.5):
        check_argument("ignore_index", ignore_index, int)
        check_argument("aux_weight", aux_weight, float, low=0)
        self.ignore_index, self.aux_weight = ignore_index, aux_weight

    def read(self, batch, where, device=None):
        batch = super().read(batch, where, device)
        images, labels = _pair(batch, where, "class numbers [B, H, W]")
        if labels.dim() == images.dim() and labels.shape[1] == 1:
            labels = labels[:, 0]
        fits = len(labels) == len(images) and 2 <= labels.dim() < images.dim()
        if labels.dtype not in CLASS_NUMBERS or not fits:
            kind = f"{str(labels.dtype).removeprefix('torch.')} {[*labels.shape]}"
            raise InputError(
                f"the labels of {where} are {kind}; give class numbers [B, H, W], of volumes [B, D, H, W], of series [B, T]"
            )
        return images, labels.long()

    def forward(self, model, batch):
        outputs = super().forward(model, batch)
        if isinstance(outputs, dict) and "out" in outputs:
            return dict(outputs) if model.training else outputs["out"]
        return outputs

    def check(self, outputs, batch, where):
        super().check(outputs, batch, where)
        labels = batch[1]
        check_one_tensor(outputs, where)
        if outputs.dim() < 3 or outputs.shape[2:] != labels.shape[1:]:
            wanted = f"[{len(labels)}, classes, {', '.join(map(str, labels.shape[1:]))}]"
            raise InputError(
                f"the network gives {[*outputs.shape]} for {where}; it must give logits {wanted}, as large as the labels"
            )
        used = labels[labels != self.ignore_index]
        if used.numel() and not (used.min() >= 0 and used.max() < outputs.shape[1]):
            wrong = int(used.min() if used.min() < 0 else used.max())
            raise InputError(
                f"{where} holds class {wrong}, but the network has {outputs.shape[1]} classes (and ignores {self.ignore_index})"
            )

    def check_kind(self, model, outputs, batch):
        if type(self).loss is Segmentation.loss:  # another one may take probabilities
            refuse_probabilities(outputs)

    def loss(self, outputs, batch) -> Tensor:
        if isinstance(outputs, dict):
            aux = self.aux_weight * self.loss(outputs["aux"], batch) if "aux" in outputs else 0
            return self.loss(outputs["out"], batch) + aux
        labels = batch[1]
        losses = F.cross_entropy(outputs, labels, ignore_index=self.ignore_index, reduction="none")
        return losses.flatten(1).sum(1) / (labels != self.ignore_index).flatten(1).sum(1).clamp_min(1)

    def divergence(self, outputs: Tensor, dense_outputs: Tensor) -> Tensor:
        return kl_divergence(outputs, dense_outputs).flatten(1).mean(1)

    def projection(self, outputs: Tensor, signs: Tensor) -> Tensor:
        directions = random_directions(outputs.detach(), signs.reshape(outputs.shape))
        return (outputs * directions).flatten(1).sum(1) / outputs[0, 0].numel() ** 0.5

    def statistics(self, outputs: Tensor, batch) -> Tensor:
        labels, classes = batch[1], outputs.shape[1]
        used = labels != self.ignore_index
        pairs = labels[used] * classes + outputs.argmax(1)[used]
        confusion = torch.bincount(pairs, minlength=classes**2)
        loss = self.loss(outputs, batch).double().sum()
        return torch.cat([loss[None], loss.new_tensor([len(labels)]), confusion.to(loss)])

    def metrics(self, sums: Tensor) -> dict[str, float]:
        """miou: intersection over union, mean over the classes that occur, per cent; pixel_accuracy; loss; images."""
        loss, images = sums[:2].tolist()
        classes = round((len(sums) - 2) ** 0.5)
        confusion = sums[2:].reshape(classes, classes)
        right, union = confusion.diagonal(), confusion.sum(0) + confusion.sum(1) - confusion.diagonal()
        iou = right[union > 0] / union[union > 0]
        accuracy = right.sum() / confusion.sum()
        return {
            "miou": 100 * iou.mean().item(),
            "pixel_accuracy": 100 * accuracy.item(),
            "loss": loss / images,
            "images": int(images),
        }


class Regression(Task):
    """Numbers [B, ...] against numbers of as many entries: mean squared error, judged by the mean absolute error.

    Args:
        scale: what an error is measured in for loss and divergence, one number or one an output [...]. Errors of outputs with
            different units count alike when each is divided by its own spread. The metric "mae" is not scaled.
        ignore_nan: targets that are NaN are unknown, as depth that a sensor did not see; loss and metric leave them out.
    """

    name, main, larger_is_better = "regression", "mae", False

    def __init__(self, scale: float | Tensor = 1.0, ignore_nan: bool = False):
        check_argument("ignore_nan", ignore_nan, bool)
        try:
            self.scale, self.ignore_nan = torch.as_tensor(scale), ignore_nan
            usable = bool(((self.scale > 0) & self.scale.isfinite()).all())
        except (TypeError, ValueError, RuntimeError):  # text, None, lists of unequal lengths
            usable = False
        if not usable:
            raise InputError(f"scale must be numbers above 0: what an error is measured in, not {scale!r}")

    def read(self, batch, where, device=None):
        batch = super().read(batch, where, device)
        inputs, targets = _pair(batch, where, "numbers [B, ...]")
        if len(targets) != len(inputs):
            raise InputError(
                f"the targets of {where} are {[*targets.shape]} for {len(inputs)} images; give one row an image"
            )
        if targets.is_complex():
            raise InputError(f"the targets of {where} are complex; give their real and imaginary parts as two numbers")
        usable = ~targets.isinf() if self.ignore_nan else targets.isfinite()
        if not usable.all():
            remedy = "NaN where one is" if self.ignore_nan else "ignore_nan=True where NaN is for"
            raise InputError(f"the targets of {where} hold NaN or Inf; give finite numbers, or {remedy} unknown")
        return inputs, targets

    def check(self, outputs, batch, where):
        super().check(outputs, batch, where)
        targets = batch[1]
        check_one_tensor(outputs, where)
        if outputs.numel() != targets.numel():
            raise InputError(
                f"the network gives {[*outputs.shape]} for {where}, but the targets are {[*targets.shape]}; give as many"
            )
        sizes = [[size for size in tensor.shape[1:] if size > 1] for tensor in (outputs, targets)]
        if sizes[0] != sizes[1] and all(len(of_one) > 1 for of_one in sizes):
            raise InputError(
                f"the network gives {[*outputs.shape]} for {where}, but the targets are {[*targets.shape]}; give them in the "
                "same order of dimensions, or flat as [B, N]"
            )
        try:
            torch.broadcast_to(self.scale, outputs.shape)
        except RuntimeError as error:
            raise InputError(
                f"scale is {[*self.scale.shape]}, but an output {[*outputs.shape[1:]]}; give one number each"
            ) from error

    def _squares(self, outputs, wanted):
        errors = (outputs - wanted.reshape(outputs.shape).to(outputs)) / self.scale.to(outputs)
        return errors.square().reshape(len(outputs), -1)

    def loss(self, outputs: Tensor, batch) -> Tensor:
        known = ~batch[1].reshape(len(outputs), -1).isnan()
        return (self._squares(outputs, batch[1].nan_to_num()) * known).sum(1) / known.sum(1).clamp_min(1)

    def divergence(self, outputs: Tensor, dense_outputs: Tensor) -> Tensor:
        return self._squares(outputs, dense_outputs).mean(1)

    def projection(self, outputs: Tensor, signs: Tensor) -> Tensor:
        scaled = outputs * signs.to(outputs).reshape(outputs.shape) / self.scale.to(outputs)
        return scaled.reshape(len(outputs), -1).sum(1) * (2 / outputs[0].numel()) ** 0.5

    def statistics(self, outputs: Tensor, batch) -> Tensor:
        errors = (outputs.double() - batch[1].reshape(outputs.shape).double()).abs()
        known = ~errors.isnan()
        counts = errors.new_tensor([len(outputs), known.sum()])
        return torch.stack([errors[known].sum(), self.loss(outputs, batch).double().sum(), *counts])

    def metrics(self, sums: Tensor) -> dict[str, float]:
        """mae: mean absolute error over all known numbers; loss; images."""
        error, loss, images, known = sums.tolist()
        return {"mae": error / known if known else math.nan, "loss": loss / images, "images": int(images)}


def _pair(batch, where, labels):
    if not isinstance(batch, (tuple, list)) or len(batch) != 2 or not all(isinstance(t, Tensor) for t in batch):
        raise no_pair(batch, where, labels)
    return batch
