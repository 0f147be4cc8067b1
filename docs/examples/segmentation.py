"""Segmentation: halve the multiply-accumulates of a small U-shaped network without training it again.

    python docs/examples/segmentation.py                      # trains, prunes by order 2, draws segmentation.png; 1 minute
    python docs/examples/segmentation.py --compare            # also order 1 and magnitude, three draws of calibration images

The data are the embedded shapes, whose masks come with the drawing: a class a pixel, background or one of five shapes.
Everything that is not classification is one argument, `task=Segmentation()`.
"""

import argparse
import copy
import sys
from pathlib import Path

import matplotlib
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

sys.path.insert(0, str(Path(__file__).parents[2]))

from EnhancedPruning import EnhancedPruning, PruningSettings
from taylor_pruning.experiment.embedded import SHAPES, embedded_shapes
from taylor_pruning.tasks.dense import Segmentation
from taylor_pruning.training.fine_tuning import Recipe, fine_tune

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch


def block(inputs, outputs):
    convs = (
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
        nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
    )
    return nn.Sequential(*(layer for conv in convs for layer in (conv, nn.BatchNorm2d(outputs), nn.ReLU())))


class SmallUNet(nn.Module):
    """Two poolings down, two upsamplings up, with the maps of the way down beside those of the way up."""

    def __init__(self, classes=6, widths=(16, 32, 48)):
        super().__init__()
        a, b, c = widths
        self.down = nn.ModuleList([block(3, a), block(a, b), block(b, c)])
        self.up = nn.ModuleList([block(c + b, b), block(b + a, a)])
        self.head = nn.Conv2d(a, classes, 1)

    def forward(self, x):
        first = self.down[0](x)
        second = self.down[1](F.max_pool2d(first, 2))
        x = self.down[2](F.max_pool2d(second, 2))
        for layer, skip in zip(self.up, (second, first), strict=True):
            x = layer(torch.cat([F.interpolate(x, scale_factor=2), skip], 1))
        return self.head(x)


def loaders(images):
    train, val = embedded_shapes(images, 0), embedded_shapes(600, 1)
    pairs = [TensorDataset(data.images, data.masks) for data in (train, val)]
    return DataLoader(pairs[0], 50, shuffle=True), DataLoader(pairs[1], 100)


def row(name, stage, dense):
    print(f"{name:28s} mIoU {stage['miou']:5.1f} ({100 * stage['miou'] / dense['miou']:5.1f} % of dense), "
          f"{stage['macs'] / 1e6:5.1f} M MACs", flush=True)  # fmt: skip


def draw(path, val, networks):
    """Images with their masks as drawn and as every network gives them."""
    images, masks = next(iter(val))
    images, masks = images[: 2 * len(SHAPES)], masks[: 2 * len(SHAPES)]  # two of every shape
    shown = (images * 0.25 + 0.45).clip(0, 1).permute(0, 2, 3, 1)
    rows = {"image": shown, "drawn": masks}
    with torch.no_grad():
        rows |= {name: network.eval()(images).argmax(1) for name, network in networks.items()}
    figure, axes = plt.subplots(len(rows), len(images), figsize=(11, 1.1 * len(rows) + 0.4), layout="constrained")
    colours = dict(zip(("background", *SHAPES), ("#e8e8e8", *plt.get_cmap("tab10").colors), strict=False))
    for line, (name, pictures) in zip(axes, rows.items(), strict=True):
        line[0].set_ylabel(name)
        for axis, picture in zip(line, pictures, strict=True):
            axis.imshow(picture, cmap=ListedColormap([*colours.values()]), vmin=0, vmax=len(SHAPES))
            axis.set(xticks=[], yticks=[])
    figure.legend(handles=[Patch(color=colour, label=name) for name, colour in colours.items()],
                  loc="outside lower center", ncols=len(colours), frameon=False)  # fmt: skip
    figure.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=1500, help="training images")
    parser.add_argument("--epochs", type=int, default=8, help="epochs of the dense network")
    parser.add_argument("--compare", action="store_true", help="also order 1 and magnitude, on three draws")
    parser.add_argument("--output", type=Path, default=Path("segmentation.png"))
    arguments = parser.parse_args()
    torch.manual_seed(0)
    (train, val), task, model = loaders(arguments.images), Segmentation(), SmallUNet()
    fine_tune(model, train, val, Recipe(epochs=arguments.epochs, lr=0.2), task=task, progress=False)

    settings = PruningSettings(target_macs="50%", rounds=2)
    for draw_number in range(3 if arguments.compare else 1):
        torch.manual_seed(draw_number)  # the loader's order: other calibration images
        pruning = EnhancedPruning(copy.deepcopy(model), train, val, task=task, settings=settings, calibration_samples=200,
                                  recipe=Recipe(epochs=0), progress=False)  # fmt: skip
        if draw_number == 0:
            row("dense", pruning.dense_stage(), pruning.dense_stage())
        results = {"order 2": pruning.prune(taylor_order=2)}
        if arguments.compare:
            results["order 1"] = pruning.prune(taylor_order=1)
            results["magnitude, compensated"] = pruning.prune_by_baseline("magnitude", compensate=True)
        row(f"order 2 unrepaired, draw {draw_number}", results["order 2"].stages[1], pruning.dense_stage())
        for name, result in results.items():
            row(f"{name}, draw {draw_number}", result.stages[-1], pruning.dense_stage())
        if draw_number == 0:
            draw(arguments.output, val, {"dense": model, "half of MACs": results["order 2"].model})


if __name__ == "__main__":
    main()
