"""Gauss-Newton parts or Hessian-vector products? Top-1 of a smooth network after its cut, without repair and training.

    python benchmarks/smooth_networks.py --activations SiLU GELU --seeds 0 1

The network is the embedded data's vgg7_bn, with another function in the place of its ReLUs, trained again for six epochs.
Shares of its multiply-accumulates are removed in five rounds, with either kind of derivatives.
"""

import argparse
import copy
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import nn

from EnhancedPruning import EnhancedPruning, PruningSettings
from taylor_pruning.experiment.arguments import parse
from taylor_pruning.experiment.command import ExperimentTask
from taylor_pruning.experiment.setup import prepare
from taylor_pruning.training.fine_tuning import Recipe, evaluate, fine_tune


def with_activation(model: nn.Module, kind: type[nn.Module]) -> nn.Module:
    """A copy of the model with modules of that kind in the place of its ReLUs."""
    model = copy.deepcopy(model)
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.ReLU):
                setattr(module, name, kind())
    return model


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--activations", nargs="+", default=["SiLU", "GELU"], help="classes of torch.nn")
    parser.add_argument("--orders", type=int, nargs="+", default=[2, 3])
    parser.add_argument("--curvatures", nargs="+", default=["exact", "hvp"])
    parser.add_argument("--percentages", type=float, nargs="+", default=[30, 50, 70])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--images", type=int, default=200, help="images that score")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        experiment = prepare(parse(ExperimentTask, "", ["--quiet"]), Path(folder), torch.device("cpu"))
    val = experiment.loader(experiment.data.val)
    for activation in arguments.activations:
        model = with_activation(experiment.built.model, getattr(nn, activation))
        train = experiment.loader(experiment.data.train, shuffle=True, seed=1)
        fine_tune(model, train, val, Recipe(epochs=6, lr=0.03), progress=False)
        print(f"{activation}: dense {evaluate(model, val, progress=False).top1:.1f}", flush=True)
        for seed in arguments.seeds:
            train = experiment.loader(experiment.data.train, shuffle=True, seed=seed + 5)
            for order in arguments.orders:
                for curvature in arguments.curvatures:
                    settings = PruningSettings(compensate=False, budget="macs", curvature=curvature, seed=seed)
                    pruning = EnhancedPruning(
                        model, train, val, settings=settings, calibration_samples=arguments.images, progress=False
                    )
                    found = [pruning.prune(p, order).stages[-1]["top1"] for p in arguments.percentages]
                    print(f"  seed {seed}, order {order}, {curvature}:", *(f"{top1:.1f}" for top1 in found), flush=True)


if __name__ == "__main__":
    main()
