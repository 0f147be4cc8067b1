"""Which recipe gets most of the accuracy back: the same pruned network and the same number of training steps for all.

    python benchmarks/fine_tuning_recipes.py --model resnet32 --weights resnet32.th --data-path cifar10
    python benchmarks/fine_tuning_recipes.py --model vgg11_bn            # trained by the toolkit on the embedded data

For every seed (calibration draw, order of batches, dropout) the dense network is pruned once by order 2 with the default
settings, and each recipe trains a copy for `--steps` optimiser steps. "progressive" spends half of them between the
rounds of a pruning of its own. Printed: mean and standard deviation over seeds of top-1 and loss of the last weights on
the test images (no epoch is chosen on them), the difference to "plain" in the same seed, and seconds of training, one
evaluation included. Every finished cell is in `--output`: the same command, also with more seeds, continues from there.
"""

import argparse
import copy
import dataclasses
import itertools
import sys
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

from compare_criteria import add_network_arguments, balanced, load
from measuring import spread, started

from EnhancedPruning import EnhancedPruning, PruningSettings
from taylor_pruning.experiment.loaders import calibration_batches, make_loader
from taylor_pruning.report.json_files import write_json
from taylor_pruning.training.fine_tuning import Recipe, evaluate, fine_tune, reestimate_batchnorm

PLAIN, PROGRESSIVE = "plain SGD, cosine", "progressive"
REESTIMATED = ("BatchNorm re-estimation", "everything")
CLIPPED = {f"distillation 0.5, clipped at {ratio:g}": ratio for ratio in (0.05, 0.1, 0.2)}
NAMES = (PLAIN, "BatchNorm re-estimation", "warm-up", "label smoothing 0.1", "distillation 0.5", "distillation 0.9", "EMA",
         "everything", *CLIPPED, PROGRESSIVE)  # fmt: skip
MAY_DIFFER = ("seeds", "recipes", "output")  # between a run and its continuation


def changes(name, steps):
    """What a recipe changes in Recipe; an epoch is all of the training."""
    warmup, smoothing = {"warmup_epochs": 0.1}, {"label_smoothing": 0.1}
    ema = {"ema_decay": 1 - 20 / (steps + 20)}  # over about the last twentieth of the steps
    taught = {weight: {"distillation_weight": weight, "temperature": 4.0} for weight in (0.5, 0.9)}
    return {
        "warm-up": warmup,
        "label smoothing 0.1": smoothing,
        "distillation 0.5": taught[0.5],
        "distillation 0.9": taught[0.9],
        "EMA": ema,
        "everything": {**warmup, **smoothing, **taught[0.5], **ema},
        **{clipped: {**taught[0.5], "clip_ratio": ratio} for clipped, ratio in CLIPPED.items()},
    }.get(name, {})


class Steps:
    """`steps` batches of a loader, pass after pass, as one epoch."""

    def __init__(self, loader, steps):
        self.loader, self.steps = loader, steps

    def __len__(self):
        return self.steps

    def set_epoch(self, epoch):
        pass  # there is one

    def __iter__(self):
        return itertools.islice(itertools.chain.from_iterable(map(self._pass, itertools.count(1))), self.steps)

    def _pass(self, number):
        self.loader.set_epoch(number)
        return self.loader


class Seed:
    """One dense network, its calibration draw and order of batches; prunes at the first request."""

    def __init__(self, arguments, data, dense, val, seed):
        self.arguments, self.data, self.dense, self.val, self.seed = arguments, data, dense, val, seed
        self.calibration = calibration_batches(data, arguments.calibration_samples, 100, seed=seed)
        self.compensation = calibration_batches(data, arguments.compensation_samples, 100, seed=seed)
        self.train = make_loader(data.train, arguments.batch_size, shuffle=True, seed=seed)
        amp = arguments.amp
        self.recipe = Recipe(epochs=1, lr=arguments.lr, amp=amp, channels_last=bool(amp), distillation_weight=0.0,
                             clip_ratio=None)  # fmt: skip
        self.networks = {}

    def pruned(self, steps_between):
        if steps_between not in self.networks:
            settings = PruningSettings(seed=self.seed, fine_tune_between=steps_between)
            pruning = EnhancedPruning(
                self.dense, self.train, self.val, calibration=self.calibration, compensation=self.compensation,
                settings=settings, recipe=self.recipe, progress=False,
            )  # fmt: skip
            self.networks[steps_between] = pruning.prune(self.arguments.percentage, 2)
        return self.networks[steps_between]

    def cell(self, name):
        """Trains by one recipe; {"before": {"top1", "loss"}, "top1", "loss", "seconds", "steps"}."""
        steps, gaps = self.arguments.steps, PruningSettings.rounds - 1
        between = steps // 2 // gaps if name == PROGRESSIVE else 0
        network = self.pruned(between)
        model, last_steps = copy.deepcopy(network.model), steps - gaps * between
        if name in REESTIMATED:
            reestimate_batchnorm(model, self.calibration)
        recipe = dataclasses.replace(self.recipe, **changes(name, steps))
        torch.manual_seed(self.seed)  # dropout
        history = fine_tune(model, Steps(self.train, last_steps), self.val, recipe, teacher=self.dense, progress=False)
        before, after = ({key: record[key] for key in ("top1", "loss")} for record in history.epochs)
        seconds = network.seconds.get("train", 0.0) + history.epochs[1]["seconds"]
        return {"before": before, **after, "seconds": seconds, "steps": last_steps + gaps * between}


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_network_arguments(parser)
    parser.add_argument("--percentage", type=float, default=50, help="of the filters removed")
    parser.add_argument("--steps", type=int, default=400, help="optimiser steps of every recipe")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=Recipe.lr)
    parser.add_argument("--recipes", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--output", default="fine_tuning_recipes.json")
    return parser.parse_args()


def run(arguments):
    results = started(arguments, MAY_DIFFER, {"cells": []})
    done = {(cell["recipe"], cell["seed"]) for cell in results["cells"]}
    todo = [(name, s) for s in arguments.seeds for name in arguments.recipes if (name, s) not in done]
    if not todo:
        return results
    data, dense = load(arguments)
    val = balanced(data, arguments.test_images, 0)
    accuracy = evaluate(dense, val, progress=False)
    results |= {"dense": vars(accuracy), "torch": torch.__version__, "threads": torch.get_num_threads()}
    for seed, cells in itertools.groupby(todo, key=lambda cell: cell[1]):
        work = Seed(arguments, data, dense, val, seed)
        for name, _ in cells:
            cell = {"recipe": name, "seed": seed, **work.cell(name)}
            results["cells"].append(cell)
            write_json(arguments.output, results)
            print(f"seed {seed}, {name}: {cell['before']['top1']:.1f} -> {cell['top1']:.1f} %, loss {cell['loss']:.3f}, "
                  f"{cell['seconds']:.0f} s", flush=True)  # fmt: skip
    return results


def table(results):
    """Markdown: mean and standard deviation over the seeds."""
    a, dense = results["arguments"], results["dense"]
    by_recipe = {name: {c["seed"]: c for c in results["cells"] if c["recipe"] == name} for name in NAMES}
    plain = by_recipe[PLAIN]
    print(f"\n{a['model']}, {a['percentage']:g} % of filters removed, {a['steps']} steps of {a['batch_size']} images at "
          f"learning rate {a['lr']:g}, {dense['images']} test images, {results['threads']} thread(s)\n")  # fmt: skip
    print("| recipe | top-1 (%) | against plain | loss (nats) | seconds | seeds |\n|---|---|---|---|---|---|")
    print(f"| dense | {dense['top1']:.1f} | | {dense['loss']:.3f} | | |")
    if plain:
        before = [cell["before"] for cell in plain.values()]
        top1, loss = ([b[key] for b in before] for key in ("top1", "loss"))
        print(f"| pruned | {spread(top1)} | | {spread(loss, 3)} | | {len(before)} |")
    for name, cells in by_recipe.items():
        if cells:
            columns = {key: [cell[key] for cell in cells.values()] for key in ("top1", "loss", "seconds")}
            gains = [cell["top1"] - plain[seed]["top1"] for seed, cell in cells.items() if seed in plain]
            gain = spread(gains) if gains and name != PLAIN else ""
            print(f"| {name} | {spread(columns['top1'])} | {gain} | {spread(columns['loss'], 3)} | "
                  f"{spread(columns['seconds'], 0)} | {len(cells)} |")  # fmt: skip


if __name__ == "__main__":
    table(run(parse_arguments()))
