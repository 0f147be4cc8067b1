"""Regression: the angle of a triangle, from a network with a third of its multiply-accumulates and no training after.

    python docs/examples/regression.py                        # trains, prunes by order 2, draws regression.png; 1/2 minute

The data are triangles of the embedded data set. A turn by 120 degrees gives the same triangle, so that the network gives the
cosine and the sine of three times the angle. The only argument that differs from classification is `task=Regression()`.
"""

import argparse
import math
import sys
from pathlib import Path

import matplotlib
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

sys.path.insert(0, str(Path(__file__).parents[2]))

from EnhancedPruning import EnhancedPruning, PruningSettings
from taylor_pruning.experiment.embedded import embedded_shapes
from taylor_pruning.tasks.dense import Regression
from taylor_pruning.training.fine_tuning import Recipe, fine_tune

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def network():
    layers, inputs = [], 3
    for outputs, stride in ((16, 1), (32, 2), (48, 2), (64, 2)):
        layers += [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
        inputs = outputs
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 16, 32), nn.ReLU(), nn.Linear(32, 2))


def loader(count, split, batch_size, shuffle):
    data = embedded_shapes(count, split, ("triangle",))
    targets = torch.stack([torch.cos(3 * data.angles), torch.sin(3 * data.angles)], 1)
    return DataLoader(TensorDataset(data.images, targets), batch_size, shuffle=shuffle)


@torch.no_grad()
def degrees_off(model, val):
    """Mean error of the angle in degrees; a guess would be 30 off."""
    model.eval()
    pairs = [(model(images), targets) for images, targets in val]
    said, true = (torch.cat(part) for part in zip(*pairs, strict=True))
    off = torch.atan2(said[:, 1], said[:, 0]) - torch.atan2(true[:, 1], true[:, 0])
    return ((off + math.pi) % (2 * math.pi) - math.pi).abs().rad2deg().mean().item() / 3


@torch.no_grad()
def draw(path, networks):
    """Triangles with the outline at the angle that every network gives, in place and size as drawn."""
    data = embedded_shapes(10, 1, ("triangle",))
    inside, pixels = data.masks.bool(), torch.arange(32) + 0.5
    area = inside.sum((1, 2))
    x, y = (inside.sum(axis).float() @ pixels / area for axis in (1, 2))
    radius = (area / (0.75 * 3**0.5)).sqrt()
    angles = {"drawn": data.angles}
    for name, model in networks.items():
        cosine, sine = model.eval()(data.images).unbind(1)
        angles[name] = torch.atan2(sine, cosine) / 3
    figure, axes = plt.subplots(len(angles), len(area), figsize=(11, 1.1 * len(angles) + 0.1), layout="constrained")
    for line, (name, turned) in zip(axes, angles.items(), strict=True):
        line[0].set_ylabel(name)
        for i, axis in enumerate(line):
            axis.imshow((data.images[i] * 0.25 + 0.45).clip(0, 1).permute(1, 2, 0).numpy(), extent=(0, 32, 32, 0))
            corners = turned[i] + math.pi + 2 * math.pi * torch.arange(4) / 3
            outline = x[i] + radius[i] * corners.cos(), y[i] + radius[i] * corners.sin()
            axis.plot(*(ends.numpy() for ends in outline), "w", linewidth=1.5)
            axis.set(xticks=[], yticks=[], xlim=(0, 32), ylim=(32, 0))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=3000, help="training images")
    parser.add_argument("--validation-images", type=int, default=600)
    parser.add_argument("--epochs", type=int, default=12, help="epochs of the dense network")
    parser.add_argument("--output", type=Path, default=Path("regression.png"))
    arguments = parser.parse_args(argv)
    torch.manual_seed(0)
    train, val = loader(arguments.images, 0, 50, True), loader(arguments.validation_images, 1, 100, False)
    model, task = network(), Regression()
    fine_tune(model, train, val, Recipe(epochs=arguments.epochs, lr=0.02), task=task, progress=False)

    settings = PruningSettings(target_macs="33%", rounds=2)
    pruning = EnhancedPruning(model, train, val, task=task, settings=settings, recipe=Recipe(epochs=0), progress=False)
    result = pruning.prune(taylor_order=2)
    for stage in result.stages:
        print(f"{stage['stage']:12s} MAE {stage['mae']:.3f}, {stage['parameters']:,} parameters, "
              f"{stage['macs'] / 1e6:.2f} M MACs", flush=True)  # fmt: skip
    before, after = (degrees_off(net, val) for net in (model, result.model))
    print(f"angle: {before:.1f} degrees off before, {after:.1f} after; a guess is 30 off")
    draw(arguments.output, {"dense": model, "third of MACs": result.model})


if __name__ == "__main__":
    main()
