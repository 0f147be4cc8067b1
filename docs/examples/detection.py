"""Detection: halve the backbone, pyramid and head of a small RetinaNet, while the whole detector runs.

    python docs/examples/detection.py                  # trains, prunes by order 2, draws detection.png; 4 CPU minutes

The data are the embedded shapes, whose boxes come with the drawing. A detector cannot be traced as a whole; its backbone and
its head can: `prune_modules` names them, and `task=Detection()` knows the losses and outputs of torchvision's detectors. The
repair across layers follows what the dense detector says, without labels, before one epoch of training with them.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

import matplotlib
import torch
from torch import nn
from torch.utils.data import DataLoader
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.retinanet import RetinaNetHead

sys.path.insert(0, str(Path(__file__).parents[2]))

from EnhancedPruning import EnhancedPruning, PruningSettings
from taylor_pruning.experiment.embedded import SHAPES, embedded_shapes
from taylor_pruning.tasks.detection import Detection
from taylor_pruning.training.fine_tuning import Recipe, fine_tune

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def block(inputs, outputs, stride):
    convs = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
    return nn.Sequential(*(layer for conv in convs for layer in (conv, nn.BatchNorm2d(outputs), nn.ReLU())))


def detector():
    """RetinaNet on images of 32 x 32: one map of 8 x 8 and one of 4 x 4 cells."""
    body = nn.Sequential(block(3, 16, 1), block(16, 32, 2), block(32, 64, 2), block(64, 64, 2))
    pyramid = BackboneWithFPN(body, {"2": "0", "3": "1"}, [64, 64], 32)
    anchors = AnchorGenerator(((18,), (22,), (22,)), ((1.0,),) * 3)  # the pyramid adds a pooled map
    head = RetinaNetHead(32, 1, len(SHAPES) + 1, norm_layer=partial(nn.GroupNorm, 4))
    normalised = {"image_mean": [0.0] * 3, "image_std": [1.0] * 3}
    return RetinaNet(
        pyramid, len(SHAPES) + 1, anchor_generator=anchors, head=head, min_size=32, max_size=32, **normalised
    )


def loader(count, split, batch_size, shuffle):
    data = embedded_shapes(count, split)
    targets = [{"boxes": b[None], "labels": 1 + label[None]} for b, label in zip(data.boxes, data.labels, strict=True)]
    pairs = list(zip(data.images, targets, strict=True))
    return DataLoader(pairs, batch_size, shuffle=shuffle, collate_fn=lambda rows: tuple(zip(*rows, strict=True)))


@torch.no_grad()
def draw(path, val, networks):
    """Images with the box of which every network is surest, and its class."""
    images, targets = next(iter(val))
    images, targets = list(images[:10]), targets[:10]  # two of every shape
    rows = {"drawn": targets, **{name: model.eval()(images) for name, model in networks.items()}}
    figure, axes = plt.subplots(len(rows), len(images), figsize=(11, 1.3 * len(rows)), layout="constrained")
    for line, (name, found) in zip(axes, rows.items(), strict=True):
        line[0].set_ylabel(name)
        for axis, image, boxes in zip(line, images, found, strict=True):
            axis.imshow((image * 0.25 + 0.45).clip(0, 1).permute(1, 2, 0).numpy(), extent=(0, 32, 32, 0))
            for (x1, y1, x2, y2), label in zip(boxes["boxes"][:1].tolist(), boxes["labels"][:1].tolist(), strict=True):
                axis.add_patch(plt.Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor="w", linewidth=1.5))
                axis.set_title(SHAPES[label - 1], fontsize=8, pad=2)
            axis.set(xticks=[], yticks=[])
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=3000, help="training images")
    parser.add_argument("--validation-images", type=int, default=300)
    parser.add_argument("--epochs", type=int, default=8, help="epochs of the dense network")
    parser.add_argument(
        "--repair", default="network", choices=("layer", "network"), help="by layers, or then across them"
    )
    parser.add_argument("--output", type=Path, default=Path("detection.png"))
    arguments = parser.parse_args(argv)
    torch.manual_seed(0)
    train, val = loader(arguments.images, 0, 25, True), loader(arguments.validation_images, 1, 50, False)
    model, task = detector(), Detection()
    warmup = min(1, arguments.epochs / 2)
    recipe = Recipe(epochs=arguments.epochs, lr=0.1, warmup_epochs=warmup, accuracy_at_steps=False)
    fine_tune(model, train, val, recipe, task=task, progress=False)

    settings = PruningSettings(budget="params", rounds=2, prune_modules=["backbone", "head"], repair=arguments.repair,
                               repair_passes=10)  # fmt: skip
    pruning = EnhancedPruning(model, train, val, task=task, settings=settings, calibration_samples=200, progress=False,
                              recipe=Recipe(epochs=1, lr=0.02, accuracy_at_steps=False))  # fmt: skip
    result = pruning.run_full_pruning(50, 2)
    for stage in result.stages:
        print(f"{stage['stage']:12s} mAP {stage['map']:5.1f}, at IoU 0.5 {stage['map50']:5.1f}, "
              f"{stage['parameters']:,} parameters, {stage['macs'] / 1e6:.1f} M MACs", flush=True)  # fmt: skip
    draw(arguments.output, val, {"dense": model, "pruned": result.model})


if __name__ == "__main__":
    main()
