"""What repairs and distillation are worth at equal numbers of training steps, beside Torch-Pruning's criteria.

    python benchmarks/repairs.py --data DIR --device cuda --workers 6 --minutes 4.5 --output repairs.json
    python benchmarks/repairs.py --output repairs.json --minutes 0            # the tables of what there is

DIR holds what orders.py asks for. A cell (network, share of the multiply-accumulates, seed) prunes by order 2 in five rounds
with compensation (300 images score, 1,000 compensate; on Imagenette 240 do both). A method is how the network that is
trained came about, and how it is trained:

    layer       compensated, as `--repair layer`
    squares     the same, but the last layer is fitted by least squares like all others
    network     repaired across layers, `--repair network`
    network@R   the same at the relative rate R

    TP NAME           Torch-Pruning's criterion NAME of torch_pruning_peers.py, in one cut, with widths as it ranks
    TP NAME, uniform  the same share of every layer
    TP NAME, sparse S half of the steps learn sparsely before the cut, with the share S of the published shrinkage

and, behind a plus, `logits W`: distillation of the logits with weight W. Every method makes the same number of optimiser
steps of 64 images. The rate falls along half a cosine; it is constant while learning sparsely. `lr R`, behind another plus,
is another rate. Printed: top-1 on test images, mean and standard deviation over the seeds, and seconds.
"""

import argparse
import copy
import dataclasses
import functools
import json
import multiprocessing
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]

from fine_tuning_recipes import Steps
from measuring import spread, started
from orders import drawn
from orders_data import SUBJECTS, dense_network, prepare, training_loader
from torch_pruning_peers import learn_sparsely, peer_scores

from EnhancedPruning import EnhancedPruning, PruningSettings
from taylor_pruning.experiment.results import all_filters, remaining
from taylor_pruning.repair import network as network_repair
from taylor_pruning.repair.compensation import compensate
from taylor_pruning.report.json_files import write_json
from taylor_pruning.tasks.classification import kl_divergence
from taylor_pruning.training.evaluation import evaluate
from taylor_pruning.training.fine_tuning import Recipe
from taylor_pruning.training.steps import OptimiserSteps

METHODS = ("layer", "network", "layer + logits 0.5", "network + logits 0.5")
SCORING = 300


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder of the archive")
    parser.add_argument("--models", help="folder of the weights, if it is another")
    parser.add_argument("--scratch", default="/tmp/repairs", help="folder for decoded images")
    parser.add_argument("--networks", nargs="+", choices=SUBJECTS, default=["resnet32"])
    parser.add_argument("--levels", type=int, nargs="+", default=[35, 20], help="per cent of the MACs that are left")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), help="as above, each in quotes")
    parser.add_argument("--steps", type=int, nargs="+", default=[0, 30, 125, 500], help="optimiser steps")
    parser.add_argument("--train-images", type=int, nargs="+", default=[2000, 8000])
    parser.add_argument("--compensation-images", type=int, help="instead of each network's own number")
    parser.add_argument("--repair-passes", type=float, default=network_repair.PASSES)
    parser.add_argument("--lr", type=float, help="instead of each network's own learning rate")
    parser.add_argument("--amp", choices=("bf16",), help="train in mixed precision; on a CPU, channels-last too")
    parser.add_argument("--test-images", type=int, default=10000)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--workers", type=int, default=1, help="processes that share the device")
    parser.add_argument("--minutes", type=float, default=60, help="no training starts later")
    parser.add_argument("--output", default="repairs.json")
    return parser.parse_args()


class Work:
    """One cell: its images, its dense network, the pruned networks, and every method's training."""

    def __init__(self, network, left, seed, arguments):
        self.arguments, self.seed, self.left, self.device = arguments, seed, left, torch.device(arguments.device)
        self.subject = SUBJECTS[network]
        self.dense = dense_network(network, arguments.models or arguments.data, arguments.device)
        self.draw = drawn(network, SCORING, arguments.compensation_images, seed, arguments)
        monitor = self.draw.compensation[:1]
        self.pruning = EnhancedPruning(
            self.dense, monitor, monitor, calibration=self.draw.scoring, compensation=self.draw.compensation,
            settings=PruningSettings(seed=seed, budget="macs"), progress=False,
        )  # fmt: skip
        precision = {"amp": arguments.amp, "channels_last": True} if arguments.amp else {}
        self.recipe, self.networks = Recipe(epochs=1, lr=arguments.lr or self.subject.tuning[2], **precision), {}

    @functools.cached_property
    def layer(self):
        """(compensated network, plan, seconds of compensation)"""
        result = self.pruning.prune(100 - self.left, 2)
        return result.model, result.plan, result.seconds["compensate"]

    @functools.cached_property
    def squares(self):
        """As `layer`, of the same filters."""
        _, plan, seconds = self.layer
        kept, model = remaining(all_filters(self.pruning.graph), plan), self.pruning.graph.remove(plan)
        compensate(
            self.dense, model, self.draw.compensation, kept, progress=False, seed=self.seed, to_predictions=False
        )
        return model, plan, seconds

    def network(self, rate):
        """As experiment.rounds.Rounds.repaired does it, at a given rate or (None) at its own."""
        start, (images, judging) = time.perf_counter(), network_repair.split(self.draw.compensation, self.seed)
        model, plan, seconds = self.layer
        kept = remaining(all_filters(self.pruning.graph), plan)
        repaired = self.pruning.graph.remove(plan)
        compensate(self.dense, repaired, images, kept, progress=False, seed=self.seed, to_predictions=False)
        losses = functools.partial(kl_divergence, temperature=4.0)
        report = network_repair.repair_network(
            self.dense, repaired, images, judging + self.draw.held_out, losses, passes=self.arguments.repair_passes, rate=rate,
            seed=self.seed, progress=False,
        )  # fmt: skip
        if report.steps:
            compensate(
                self.dense, repaired, self.draw.compensation, kept, progress=False, seed=self.seed, only_logits=True
            )
        print(f"    repair: loss {report.loss_before:.3f} -> {report.loss_after:.3f} at {report.steps}", flush=True)
        return repaired if report.steps else model, plan, seconds + time.perf_counter() - start

    def train_loader(self, count):
        index = self.draw.rest[:count]
        return training_loader(self.arguments.scratch, self.subject, index, self.arguments.device, self.seed)

    def row(self, method, count, steps):
        """What one method reaches in a number of steps; None where it has no such state."""
        way, *more = method.split(" + ")
        given = dict(text.split() for text in more)
        weight, lr = float(given.get("logits", 0)), float(given.get("lr", self.recipe.lr))
        recipe = dataclasses.replace(self.recipe, distillation_weight=weight, lr=lr)
        teacher = self.dense if weight else None
        train, start, steps_before = self.train_loader(count), time.perf_counter(), 0
        if way.startswith("TP"):
            steps_before = steps // 2 if ", sparse" in way else 0
            found = self.peer(way, Steps(train, steps_before), recipe, teacher), None, 0.0
        else:
            rate = way.partition("@")[2]
            across = way.startswith("network")
            found = self.repaired(float(rate) if rate else None) if across else getattr(self, way)
            start = time.perf_counter()
        model = copy.deepcopy(found[0])
        if steps:
            self.train(model, Steps(train, steps - steps_before), recipe, teacher)
        seconds = found[2] + time.perf_counter() - start
        return {"top1": evaluate(model, self.draw.tests["top1"], progress=False).top1, "seconds": seconds}

    def peer(self, way, train, recipe, teacher):
        """The network that a criterion of Torch-Pruning cuts, `train` being the steps of its sparse learning."""
        name, *options = way.split(", ")
        share = [float(option.removeprefix("sparse ")) for option in options if option.startswith("sparse")]
        pruning, widths = self.pruning, "uniform" if "uniform" in options else "own"
        if len(train):
            model = copy.deepcopy(self.dense).requires_grad_(True)
            learn = functools.partial(
                learn_sparsely, name, model, self.pruning.rankings.example, steps=len(train), share=share[0]
            )
            self.train(model, train, recipe, teacher, constant=True, prepare=learn)
            monitor = self.draw.compensation[:1]
            pruning = EnhancedPruning(model, monitor, monitor, calibration=self.draw.scoring,
                                      settings=self.pruning.settings, progress=False)  # fmt: skip
        scores = functools.partial(peer_scores, name, batches=self.draw.scoring)
        return pruning.prune_by_baseline(scores, 100 - self.left, widths=widths).model

    def repaired(self, rate):
        if rate not in self.networks:
            self.networks[rate] = self.network(rate)
        return self.networks[rate]

    def train(self, model, train, recipe, teacher, constant=False, prepare=lambda optimizer: None):
        torch.manual_seed(self.seed)
        total = None if constant else len(train)
        steps = OptimiserSteps(model, recipe.resolved(self.device), teacher, total=total)
        prepare(optimizer=steps.optimizer)
        model.train()
        for batch in train:
            steps.step([batch], ["training"])
        steps.release()
        model.eval()


def run_cell(network, left, seed, todo, arguments, end):
    """Rows of one cell; those that `end` (time.time()) leaves no time for are missing."""
    rows, work = [], Work(network, left, seed, arguments)
    for method, count, steps in todo:
        if time.time() > end:
            break
        found = work.row(method, count, steps)
        if found:
            rows.append({"network": network, "left": left, "seed": seed, "method": method, "train images": count,
                         "steps": steps, **found})  # fmt: skip
            print(f"{network} {left} % seed {seed}, {method:22s} {count:5d} images, {steps:4d} steps: "
                  f"{found['top1']:.2f} ({found['seconds']:.1f} s)", flush=True)  # fmt: skip
    return rows


def run(arguments):
    free = ("seeds", "networks", "levels", "methods", "steps", "train_images", "minutes", "workers", "output", "device",
            "data", "models", "scratch")  # fmt: skip
    end, results = time.time() + 60 * arguments.minutes, started(arguments, free, {"rows": [], "dense": {}})
    prepare(arguments)
    keys = ("network", "left", "seed", "method", "train images", "steps")
    done = {tuple(row[key] for key in keys) for row in results["rows"]}
    for name in arguments.networks:
        dense = dense_network(name, arguments.models or arguments.data, arguments.device)
        tests = drawn(name, SCORING, arguments.compensation_images, 0, arguments).tests["top1"]
        results["dense"][name] = evaluate(dense, tests, progress=False).top1
        print(f"{name}, dense: {results['dense'][name]:.2f}", flush=True)
    first = arguments.train_images[0]
    todo = [(m, n, s) for s in arguments.steps for n in arguments.train_images for m in arguments.methods
            if s or n == first]  # fmt: skip
    context, threads = multiprocessing.get_context("spawn"), max(1, torch.get_num_threads() // arguments.workers)
    with ProcessPoolExecutor(arguments.workers, context, torch.set_num_threads, (threads,)) as pool:
        cells = [(n, left, seed) for seed in arguments.seeds for left in arguments.levels for n in arguments.networks]
        futures = {}
        for cell in cells:
            missing = [job for job in todo if (*cell, *job) not in done]
            futures[pool.submit(run_cell, *cell, missing, arguments, end)] = cell
        for future in as_completed(futures):
            if future.exception():
                print(f"{futures[future]} FAILED: {future.exception()!r}", flush=True)
                continue
            results["rows"] += future.result()
            write_json(arguments.output, results)
    return results


def tables(results):
    """A table for every network, share and number of training images: a row a method, a column a number of steps."""
    rows = results["rows"]
    for network, left in sorted({(r["network"], r["left"]) for r in rows}):
        for count in sorted({r["train images"] for r in rows if (r["network"], r["left"]) == (network, left)}):
            mine = [r for r in rows if (r["network"], r["left"]) == (network, left)
                    and (r["train images"] == count or not r["steps"])]  # fmt: skip
            steps = sorted({r["steps"] for r in mine})
            seeds = len({r["seed"] for r in mine})
            print(f"\n{network}, {left} % of the MACs left, {count} training images, {seeds} seeds, "
                  f"dense {results['dense'][network]:.1f}: top-1 (%) after so many steps\n")  # fmt: skip
            print(
                "| method | "
                + " | ".join(map(str, steps))
                + f" | seconds at {steps[-1]} |\n|---"
                + "|---" * (len(steps) + 1)
                + "|"
            )
            for method in dict.fromkeys(r["method"] for r in mine):
                cells = [[r for r in mine if r["method"] == method and r["steps"] == s] for s in steps]
                texts = [spread([r["top1"] for r in some]) if some else "" for some in cells]
                seconds = statistics.mean(r["seconds"] for r in cells[-1]) if cells[-1] else float("nan")
                print(f"| {method} | " + " | ".join(texts) + f" | {seconds:.1f} |")


def main():
    arguments = parse_arguments()
    results = run(arguments) if arguments.minutes > 0 else json.loads(Path(arguments.output).read_text())
    if results["rows"]:
        tables(results)


if __name__ == "__main__":
    main()
