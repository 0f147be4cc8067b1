"""Mean average precision of detections as COCO computes it (Lin et al. 2014, arXiv:1405.0312; cocodataset.org/#detection-eval).

Precision is made to fall with recall and averaged at 101 recalls from 0 to 1, for every class that occurs and IoU thresholds
0.5, 0.55, ..., 0.95; of an image the 100 surest detections of a class count. Objects of all sizes count, and none is a crowd.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import box_iou

# numpy's grids, as pycocotools has them: a recall of 57/100 lies below its 0.5700000000000001
THRESHOLDS = torch.from_numpy(np.linspace(0.5, 0.95, 10))
RECALLS = torch.from_numpy(np.linspace(0, 1, 101))
DETECTIONS = 100  # of an image and class


def average_precision(detections: Sequence[dict], targets: Sequence[dict]) -> dict[str, float]:
    """{"map": over all thresholds, "map50": at IoU 0.5}, per cent; nan where there is no object.

    Args:
        detections: of every image {"boxes" [n, 4] as x1, y1, x2, y2, "labels" [n], "scores" [n]}.
        targets: of every image {"boxes" [m, 4], "labels" [m]}.
    """
    classes = sorted({int(label) for target in targets for label in target["labels"]})
    if not classes:
        return {"map": float("nan"), "map50": float("nan")}
    surest = [image["scores"].argsort(descending=True, stable=True) for image in detections]
    by_class = torch.stack([_of_class(detections, targets, surest, label) for label in classes])
    return {"map": 100 * by_class.mean().item(), "map50": 100 * by_class[:, 0].mean().item()}


def _of_class(detections, targets, surest, label) -> Tensor:
    """[thresholds] average precision of one class."""
    scores, right, objects = [], [], 0
    for said, target, kept in zip(detections, targets, surest, strict=True):
        kept = kept[said["labels"][kept] == label][:DETECTIONS]
        boxes = target["boxes"][target["labels"] == label]
        objects += len(boxes)
        scores.append(said["scores"][kept].double())
        right.append(_matched(box_iou(said["boxes"][kept].double(), boxes.double())))
    order = torch.cat(scores).argsort(descending=True, stable=True)
    hits = torch.cat(right, 1)[:, order].double().cumsum(1)
    recall = hits / objects
    precision = hits / torch.arange(1, hits.shape[1] + 1)
    precision = precision.flip(1).cummax(1)[0].flip(1) if hits.shape[1] else precision
    padded = torch.cat([precision, precision.new_zeros(len(precision), 1)], 1)
    places = torch.searchsorted(recall.contiguous(), RECALLS.expand(len(recall), -1).contiguous())
    return padded.gather(1, places).mean(1)


def _matched(overlap: Tensor) -> Tensor:
    """[thresholds, n] which detections, surest first, find an object [n, m] that none before them has found."""
    right = torch.zeros(len(THRESHOLDS), len(overlap), dtype=torch.bool)
    for row, threshold in enumerate(THRESHOLDS):
        free = torch.ones(overlap.shape[1], dtype=torch.bool)
        for detection, overlaps in enumerate(overlap):
            if free.any():
                best = torch.where(free, overlaps, -1.0).argmax()
                if overlaps[best] >= threshold - 1e-9:
                    right[row, detection], free[best] = True, False
    return right
