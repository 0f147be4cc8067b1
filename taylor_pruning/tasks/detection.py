"""Detectors of torchvision: Faster R-CNN, RetinaNet, SSD, SSDlite and FCOS.

Losses are those of training mode. The divergence compares what the heads say before any box is chosen, because choosing
boxes (thresholds, non-maximum suppression) has no derivative: at every anchor the Kullback-Leibler divergence of its
classes, and half the squared difference of its box offsets times the dense network's probability of an object there; summed
over the anchors.
The second stage of Faster R-CNN, whose proposals move with the network, is asked at fixed boxes of three sizes.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torchvision.models.detection.ssd import SSD

from taylor_pruning.checks import describe
from taylor_pruning.distributed import gather_objects
from taylor_pruning.errors import InputError
from taylor_pruning.generators import seeded
from taylor_pruning.modes import in_evaluation, modes_kept
from taylor_pruning.tasks.average_precision import average_precision
from taylor_pruning.tasks.classification import bernoulli_divergence, kl_divergence
from taylor_pruning.tasks.directions import bernoulli_directions, random_directions
from taylor_pruning.tasks.task import Task, unflatten

FIXED_BOXES = (2, 3, 4)  # boxes along each side of an image, of sizes that overlap by half


class Detection(Task):
    """Batches (images: list of [C, H, W], targets: list of {"boxes" [n, 4] as x1, y1, x2, y2, "labels" [n], class 0 is the
    background}), as torchvision's detectors take them. Judged by "map", COCO's mean average precision, per cent.

    Outputs are {"loss": [B], "heads": [{"logits" [B, n, K], "boxes" [B, n, 4 or 4 K], "softmax": bool}]}; in training mode
    the loss alone. Scores take one image at a time, as the losses are known of a batch as a whole.
    """

    name, main, samples_apart = "detection", "map", False

    def read(self, batch, where, device=None):
        if (
            not isinstance(batch, (tuple, list))
            or len(batch) != 2
            or not all(isinstance(f, (tuple, list)) for f in batch)
        ):
            raise InputError(
                f"{where} is {describe(batch)}; give pairs (list of images, list of targets), as torchvision does"
            )
        images, targets = map(list, super().read(batch, where, device))
        if len(images) != len(targets):
            raise InputError(f"{where} has {len(images)} images and {len(targets)} targets; give one target an image")
        for target in targets:
            boxes = target.get("boxes") if isinstance(target, dict) else None
            if not isinstance(boxes, Tensor) or boxes.shape[1:] != (4,) or "labels" not in target:
                raise InputError(
                    f"a target of {where} is {describe(target)}; give a dict with boxes [n, 4] and labels [n]"
                )
            if (boxes[:, 2:] <= boxes[:, :2]).any():
                raise InputError(f"a box of {where} has no area; give x1, y1, x2, y2 with x1 < x2 and y1 < y2")
        return images, targets

    def forward(self, model: nn.Module, batch):
        images, targets = batch
        if model.training:
            return {"loss": _total(model(images, targets), len(images))}
        # The losses of two-stage detectors draw the anchors that count.
        with _losses_in_eval_mode(model), _heads_watched(model) as seen, seeded(0, images[0].device):
            losses = model(images, targets)
        return {"loss": _total(losses, len(images)), "heads": _head_outputs(model, seen)}

    def loss(self, outputs, batch) -> Tensor:
        return outputs["loss"]

    def divergence(self, outputs, dense_outputs) -> Tensor:
        total = 0.0
        for head, dense in zip(outputs["heads"], dense_outputs["heads"], strict=True):
            logits, wanted = head["logits"], dense["logits"]
            if dense["softmax"]:
                total = total + kl_divergence(logits.movedim(2, 1), wanted.movedim(2, 1)).sum(1)
            else:
                total = total + bernoulli_divergence(logits, wanted).flatten(1).sum(1)
            squares = (head["boxes"] - dense["boxes"]).square().sum(2)
            total = total + (_objectness(dense) * squares).sum(1) / 2
        return total

    def projection(self, outputs, signs: Tensor) -> Tensor:
        total = 0.0
        for head, drawn in zip(outputs["heads"], unflatten(signs, outputs)["heads"], strict=True):
            logits = head["logits"].detach()
            if head["softmax"]:
                w = random_directions(logits.movedim(2, 1), drawn["logits"].movedim(2, 1)).movedim(1, 2)
            else:
                w = bernoulli_directions(logits, drawn["logits"])
            along_boxes = _objectness(head).sqrt()[:, :, None] * drawn["boxes"].to(logits)
            total = total + (head["logits"] * w).flatten(1).sum(1) + (head["boxes"] * along_boxes).flatten(1).sum(1)
        return total

    @torch.no_grad()
    def evaluate(self, model: nn.Module, loader) -> dict[str, float]:
        """{"map", "map50": per cent, "images"}; see tasks.average_precision."""
        found = []
        with in_evaluation(model):
            for images, targets in loader:
                for said, target in zip(model(list(images)), targets, strict=True):
                    found.append([{key: value.cpu() for key, value in one.items() if isinstance(value, Tensor)}
                                  for one in (said, target)])  # fmt: skip
        found = [pair for share in gather_objects(found) for pair in share]
        if not found:
            raise InputError("detection: the loader gives no images to evaluate; check the data")
        return average_precision(*zip(*found, strict=True)) | {"images": len(found)}


def _total(losses, samples):
    """[B] sum of a batch's losses, the same for each of its samples, so that their mean is the batch's loss."""
    return sum(losses.values()).expand(samples)


def _objectness(head):
    """[B, n] probability of an object at every anchor."""
    logits = head["logits"].detach()
    return logits.softmax(2)[..., 1:].sum(2) if head["softmax"] else logits.sigmoid().amax(2)


@contextmanager
def _losses_in_eval_mode(model) -> Iterator[None]:
    """While open, the detector computes losses as in training, and its layers run in the mode that they have."""
    parts = [
        part for part in (model, getattr(model, "rpn", None), getattr(model, "roi_heads", None)) if part is not None
    ]
    with modes_kept(*parts):
        for part in parts:
            part.training = True
        yield


@contextmanager
def _heads_watched(model) -> Iterator[dict]:
    """While open, forwards leave in the dictionary what the heads said, and what the second stage read."""
    seen, kinds = {}, {"one": getattr(model, "head", None), "rpn": getattr(getattr(model, "rpn", None), "head", None)}
    hooks = [
        module.register_forward_hook(lambda module, args, output, kind=kind: seen.update({kind: output}))
        for kind, module in kinds.items()
        if module is not None
    ]
    if roi_heads := getattr(model, "roi_heads", None):
        hooks.append(roi_heads.register_forward_pre_hook(lambda module, args: seen.update(roi=args)))
    try:
        if not hooks:
            raise InputError(
                f"{type(model).__name__} is no fasterrcnn, retinanet, ssd, ssdlite or fcos of torchvision; define a Task"
            )
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _head_outputs(model, seen):
    if "one" in seen:
        head = seen["one"]
        outputs = [{"logits": head["cls_logits"], "boxes": head["bbox_regression"], "softmax": isinstance(model, SSD)}]
        if "bbox_ctrness" in head:
            centre = head["bbox_ctrness"]
            outputs.append({"logits": centre, "boxes": centre.new_zeros(*centre.shape[:2], 0), "softmax": False})
        return outputs
    logits, boxes = (
        torch.cat([level.unflatten(1, (-1, size)).flatten(3).movedim(2, 3).flatten(1, 2) for level in levels], 1)
        for levels, size in zip(seen["rpn"], (1, 4), strict=True)
    )
    return [{"logits": logits, "boxes": boxes, "softmax": False}, _second_stage(model.roi_heads, *seen["roi"][:3])]


def _second_stage(roi_heads, features, proposals, shapes):
    """What the second stage says at fixed boxes."""
    fixed = [_fixed_boxes(*shape).to(proposal) for shape, proposal in zip(shapes, proposals, strict=True)]
    logits, boxes = roi_heads.box_predictor(roi_heads.box_head(roi_heads.box_roi_pool(features, fixed, shapes)))
    logits, boxes = (rows.reshape(len(fixed), len(fixed[0]), -1) for rows in (logits, boxes))
    return {"logits": logits, "boxes": boxes, "softmax": True}


def _fixed_boxes(height, width):
    """[n, 4] boxes on grids of FIXED_BOXES along each side."""
    boxes = []
    for count in FIXED_BOXES:
        start = torch.arange(count) / (count + 1)
        y, x = torch.meshgrid(start, start, indexing="ij")
        corner = torch.stack([x, y], 2).reshape(-1, 2)
        boxes.append(torch.cat([corner, corner + 2 / (count + 1)], 1))
    return torch.cat(boxes) * torch.tensor([width, height, width, height])
