"""Average precision of detections by hand, and against pycocotools where it is installed."""

import contextlib
import io
import math

import pytest
import torch

from taylor_pruning.tasks.average_precision import average_precision

BOX = [0.0, 0.0, 10.0, 10.0]


def said(*detections):
    """Of one image: (box, score) or (box, score, label)."""
    boxes = torch.tensor([d[0] for d in detections]).reshape(-1, 4)
    labels = torch.tensor([d[2] if len(d) > 2 else 1 for d in detections], dtype=torch.long)
    return {"boxes": boxes, "labels": labels, "scores": torch.tensor([d[1] for d in detections])}


def drawn(*boxes):
    return {"boxes": torch.tensor(boxes).reshape(-1, 4), "labels": torch.ones(len(boxes), dtype=torch.long)}


def apart(count):
    """So many boxes of 10 x 10 that do not meet."""
    return [[20.0 * i, 0.0, 20.0 * i + 10, 10.0] for i in range(count)]


FALSE = [500.0, 50.0, 510.0, 60.0]
CASES = {
    "found": ([said((BOX, 0.9))], [drawn(BOX)], 100, 100),
    "IoU 0.72 is right at 5 of 10 thresholds": ([said(([0.0, 0.0, 10.0, 7.2], 0.9))], [drawn(BOX)], 50, 100),
    "precision is 1/2 at every recall": ([said((FALSE, 0.9), (BOX, 0.8))], [drawn(BOX)], 50, 50),
    "a false one behind the right one costs nothing": ([said((BOX, 0.9), (FALSE, 0.8))], [drawn(BOX)], 100, 100),
    "a second box on one object is false": (
        [said((BOX, 0.9), (BOX, 0.8), (apart(2)[1], 0.7))],
        [drawn(*apart(2))],
        (51 + 50 * 2 / 3) / 101 * 100,
        (51 + 50 * 2 / 3) / 101 * 100,
    ),
    "half of the objects are 51 of 101 recalls": ([said((BOX, 0.9))], [drawn(*apart(2))], 5100 / 101, 5100 / 101),
    "a recall of 0.57 lies below the 58th of numpy's grid": (
        [said(*((box, 0.9) for box in apart(57)))],
        [drawn(*apart(100))],
        5700 / 101,
        5700 / 101,
    ),
    "precision counts over all images": (
        [said((BOX, 0.7)), said((FALSE, 0.9))],
        [drawn(BOX), drawn(BOX)],
        51 / 2 / 101 * 100,
        51 / 2 / 101 * 100,
    ),
    "there is no object": ([said((BOX, 0.9))], [drawn()], math.nan, math.nan),
    "nothing is said": ([said()], [drawn(BOX)], 0, 0),
    "classes that do not occur do not count": ([said((BOX, 0.9), (BOX, 0.9, 2))], [drawn(BOX)], 100, 100),
    "of a class the 100 surest of an image count, whatever other classes say": (
        [said(*[(FALSE, 0.9, 2)] * 100, *[(FALSE, 0.8)] * 99, (BOX, 0.7), (BOX, 0.6))],
        [drawn(BOX)],
        1,
        1,
    ),
    "the 101st does not": ([said(*[(FALSE, 0.8)] * 100, (BOX, 0.7))], [drawn(BOX)], 0, 0),
}


@pytest.mark.parametrize("case", CASES)
def test_average_precision_by_hand(case):
    detections, targets, overall, at_half = CASES[case]
    wanted = {"map": overall, "map50": at_half}
    assert average_precision(detections, targets) == pytest.approx(wanted, nan_ok=True)


def random_images(seed):
    """(detections, targets) of 12 images with up to 5 objects of 4 classes; every third seed has equal scores."""
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    detections, targets = [], []
    for _ in range(12):
        objects, count = 1 + int(5 * rand(1)), int((140 if seed % 2 else 12) * rand(1))
        corner = 80 * rand(objects, 2)
        boxes, labels = torch.cat([corner, corner + 5 + 40 * rand(objects, 2)], 1), 1 + (4 * rand(objects)).long()
        near = (objects * rand(count)).long()
        moved = boxes[near] + 4 * (rand(count, 4) - 0.5)
        kinds = torch.where(rand(count) < 0.8, labels[near], 1 + (5 * rand(count)).long())
        scores = rand(count)
        detections.append({"boxes": moved, "labels": kinds, "scores": scores if seed % 3 else scores.round(decimals=1)})
        targets.append({"boxes": boxes, "labels": labels})
    return detections, targets


@pytest.mark.parametrize("seed", range(4))
def test_average_precision_is_that_of_pycocotools(seed):
    coco, cocoeval = pytest.importorskip("pycocotools.coco"), pytest.importorskip("pycocotools.cocoeval")
    detections, targets = random_images(seed)

    def rows(images, **more):
        return [
            {"image_id": image, "category_id": int(label), "bbox": [x1, y1, x2 - x1, y2 - y1], **more}
            | ({"score": found["scores"][i].item()} if "scores" in found else {"area": (x2 - x1) * (y2 - y1)})
            for image, found in enumerate(images)
            for i, ((x1, y1, x2, y2), label) in enumerate(zip(found["boxes"].tolist(), found["labels"], strict=True))
        ]

    with contextlib.redirect_stdout(io.StringIO()):
        truth = coco.COCO()
        objects = [{**row, "id": 1 + number} for number, row in enumerate(rows(targets, iscrowd=0))]
        kinds = [{"id": kind} for kind in range(1, 6)]
        truth.dataset = {"images": [{"id": i} for i in range(12)], "annotations": objects, "categories": kinds}
        truth.createIndex()
        judged = cocoeval.COCOeval(truth, truth.loadRes(rows(detections)), "bbox")
        judged.evaluate()
        judged.accumulate()
        judged.summarize()
    found = average_precision(detections, targets)
    assert [found["map"], found["map50"]] == pytest.approx([100 * value for value in judged.stats[:2]], abs=1e-9)
