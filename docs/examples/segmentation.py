"""Segmentation: halve the multiply-accumulates of a small U-Net without training it again.

    python docs/examples/segmentation.py                      # trains, prunes by order 2, draws segmentation.png; 2 CPU minutes
    python docs/examples/segmentation.py --compare            # also order 1 and magnitude, on three draws; 6 CPU minutes

The data are the embedded shapes, whose masks come with the drawing: a class a pixel, background or one of five shapes.
Everything that is not classification is one argument, `task=Segmentation()`.
"""

import argparse
import statistics
import sys
from pathlib import Path

import matplotlib
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset, TensorDataset

sys.path.insert(0, str(Path(__file__).parents[2]))

from EnhancedPruning import EnhancedPruning, PruningSettings
from taylor_pruning.experiment.embedded import SHAPES, embedded_shapes
from taylor_pruning.tasks.dense import Segmentation
from taylor_pruning.training.fine_tuning import Recipe, fine_tune

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch

DRAWS = 3
COMPENSATION = 200  # images that repair


def block(inputs, outputs):
    convs = nn.Conv2d(inputs, outputs, 3, 1, 1, bias=False), nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
    return nn.Sequential(*(layer for conv in convs for layer in (conv, nn.BatchNorm2d(outputs), nn.ReLU())))


class SmallUNet(nn.Module):
    """Poolings down and as many upsamplings up, with the maps of the way down beside those of the way up."""

    def __init__(self, classes=6, widths=(16, 32, 48, 64)):
        super().__init__()
        self.down = nn.ModuleList([block(a, b) for a, b in zip((3, *widths), widths, strict=False)])
        self.up = nn.ModuleList([block(a + b, a) for a, b in zip(widths, widths[1:], strict=False)])
        self.head = nn.Conv2d(widths[0], classes, 1)

    def forward(self, x):
        maps = [self.down[0](x)]
        for layer in self.down[1:]:
            maps.append(layer(F.max_pool2d(maps[-1], 2)))
        x = maps.pop()
        for layer in reversed(self.up):
            x = layer(torch.cat([F.interpolate(x, scale_factor=2), maps.pop()], 1))
        return self.head(x)


def pairs(count, split):
    data = embedded_shapes(count, split)
    return TensorDataset(data.images, data.masks)


def pruning_of(model, train, val, draw, scoring):
    """EnhancedPruning on a draw of training images: `scoring` of them score, and 200 others compensate."""
    order = torch.randperm(len(train.dataset), generator=torch.Generator().manual_seed(draw)).tolist()
    calibration, compensation = order[:scoring], order[scoring : scoring + COMPENSATION]
    parts = [list(DataLoader(Subset(train.dataset, part), 50)) for part in (calibration, compensation)]
    settings = PruningSettings(target_macs="50%", rounds=2, seed=draw)
    return EnhancedPruning(model, train, val, task=Segmentation(), settings=settings, calibration=parts[0],
                           compensation=parts[1], recipe=Recipe(epochs=0), progress=False)  # fmt: skip


def row(name, stage, dense):
    print(f"{name:34s} mIoU {stage['miou']:5.1f} ({100 * stage['miou'] / dense['miou']:5.1f} % of dense), "
          f"{stage['macs'] / 1e6:5.1f} M MACs", flush=True)  # fmt: skip


def compare(model, train, val, few, many):
    """Orders 1 and 2, and compensated magnitude with its own and with uniform widths, under the same budget."""
    found = {}
    for draw in range(DRAWS):
        for scoring in (few, many):
            pruning = pruning_of(model, train, val, draw, scoring)
            for order in (1, 2):
                found.setdefault(f"order {order}, {scoring} images score", []).append(pruning.prune(taylor_order=order))
        for widths in ("own", "uniform"):
            result = pruning.prune_by_baseline("magnitude", widths=widths, compensate=True)
            found.setdefault(f"magnitude, {widths} widths", []).append(result)
    dense = pruning.dense_stage()["miou"]
    for name, results in found.items():
        shares = [100 * result.stages[-1]["miou"] / dense for result in results]
        print(f"{name:34s} {', '.join(f'{share:.1f}' for share in shares)} % of dense, mean {statistics.mean(shares):.2f} "
              f"± {statistics.stdev(shares):.2f} (n = {len(shares)})", flush=True)  # fmt: skip


def draw_masks(path, val, networks):
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
            axis.imshow(picture.numpy(), cmap=ListedColormap([*colours.values()]), vmin=0, vmax=len(SHAPES))
            axis.set(xticks=[], yticks=[])
    figure.legend(handles=[Patch(color=colour, label=name) for name, colour in colours.items()],
                  loc="outside lower center", ncols=len(colours), frameon=False)  # fmt: skip
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=2000, help="training images")
    parser.add_argument("--validation-images", type=int, default=600)
    parser.add_argument("--epochs", type=int, default=10, help="epochs of the dense network")
    parser.add_argument("--scoring-images", type=int, nargs=2, default=(20, 200), help="few and many, for --compare")
    parser.add_argument("--compare", action="store_true", help="also order 1 and magnitude, on three draws")
    parser.add_argument("--seed", type=int, default=0, help="of the dense network")
    parser.add_argument("--output", type=Path, default=Path("segmentation.png"))
    arguments = parser.parse_args(argv)
    torch.manual_seed(arguments.seed)
    train = DataLoader(pairs(arguments.images, 0), 50, shuffle=True)
    val, model = DataLoader(pairs(arguments.validation_images, 1), 100), SmallUNet()
    recipe = Recipe(epochs=arguments.epochs, lr=0.2, accuracy_at_steps=False)
    fine_tune(model, train, val, recipe, task=Segmentation(), progress=False)

    result = pruning_of(model, train, val, 0, arguments.scoring_images[1]).prune(taylor_order=2)
    for name, stage in zip(("dense", "cut, not repaired", "compensated"), result.stages, strict=True):
        row(name, stage, result.stages[0])
    draw_masks(arguments.output, val, {"dense": model, "half of MACs": result.model})
    if arguments.compare:
        compare(model, train, val, *arguments.scoring_images)


if __name__ == "__main__":
    main()
