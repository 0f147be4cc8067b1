"""Every criterion side by side on one network, one set of calibration images and one set of prunable filters.

    python benchmarks/compare_criteria.py --model resnet32 --weights resnet32.th --data-path cifar10
    python benchmarks/compare_criteria.py --model vgg11_bn            # trained by the toolkit on the embedded data

All criteria prune to the same budget, the network's multiply-accumulates unless --budget says something else. Published
criteria choose their own widths under it or take the same share of every layer (", uniform"), in one shot, or in rounds with
the same repair as the orders (", compensated").

For every criterion: top-1 and loss after real removal without fine-tuning and, with --fine-tune-epochs, after one short
fine-tuning of one recipe, its learning rate chosen from --lr in the first seed; correlation and relative error of
single-filter estimates with the true loss change; seconds and peak memory of scoring as ratios to one forward+backward
pass over the same images. Mean and standard deviation over calibration seeds. Torch-Pruning's criteria run where
torch-pruning is installed (benchmarks/requirements.txt). An interrupted run repeats no finished criterion.
"""

import argparse
import copy
import importlib.util
import math
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.data import default_collate

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]

from cifar_resnets import CIFAR_RESNETS, cifar_resnet
from measuring import measured, spread, started
from torch_pruning_peers import PEERS, peer_scores

from EnhancedFilterPruner import Rankings
from EnhancedPruning import EnhancedPruning, PruningSettings
from taylor_pruning.experiment.arguments import parse
from taylor_pruning.experiment.command import ExperimentTask
from taylor_pruning.experiment.folders import load_image_folder
from taylor_pruning.experiment.loaders import calibration_batches, make_loader
from taylor_pruning.experiment.setup import prepare
from taylor_pruning.report.json_files import write_json
from taylor_pruning.scoring.oracle import spearman, true_loss_changes
from taylor_pruning.selection.baselines import BASELINES, baseline_scores
from taylor_pruning.selection.constraints import BUDGETS, Constraints
from taylor_pruning.training.fine_tuning import Recipe, evaluate, fine_tune

OURS = [f"order {order}" for order in (1, 2, 3)]
VARIANTS = {  # suffix of a criterion's name: settings
    "": {"compensate": False},
    ", one shot": {"compensate": False, "rounds": 1},
    ", independent, one shot": {"compensate": False, "rounds": 1, "selection": "independent"},
    ", compensated": {"compensate": True},
    ", joint, compensated": {"compensate": True, "selection": "joint"},
}
BASELINE_VARIANTS = ("", ", uniform", ", compensated", ", uniform, compensated")
CPU = torch.device("cpu")
HELD_OUT = 500  # training images that choose the learning rate and the epoch


def add_network_arguments(parser):
    """What `load` and `balanced` need, the draws and their seeds, and the precision of training."""
    parser.add_argument(
        "--model", default="vgg11_bn", help="resnet20, 32, 44, 56, 110 of cifar_resnets.py, or torchvision's"
    )
    parser.add_argument("--weights", help="weights file")
    parser.add_argument("--data-path", help="ImageFolder root (default: the embedded data)")
    parser.add_argument("--calibration-samples", type=int, default=600)
    parser.add_argument("--compensation-samples", type=int, default=1000)
    parser.add_argument("--test-images", type=int, default=2000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--amp", choices=("bf16",), help="train in mixed precision, channels-last")


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_network_arguments(parser)
    parser.add_argument("--percentages", type=float, nargs="+", default=[10, 30, 50, 70])
    parser.add_argument("--fine-tune-epochs", type=int, default=0)
    parser.add_argument("--fine-tune-images", type=int, default=2000)
    parser.add_argument("--lr", type=float, nargs="+", default=[0.01],
                        help="the best on held-out images is taken for each criterion and percentage")  # fmt: skip
    parser.add_argument("--rounds", type=int, default=PruningSettings.rounds)
    parser.add_argument(
        "--budget", choices=BUDGETS, default="macs", help="what the percentages count, for all criteria"
    )
    parser.add_argument("--layer-bound", type=float, default=Constraints.layer_bound)
    parser.add_argument("--true-changes", type=int, default=60, help="filters whose true loss change is measured")
    parser.add_argument("--criteria", nargs="+", help="substrings of the criteria to run (default: all)")
    parser.add_argument("--output", default="compare_criteria.json")
    return parser.parse_args()


# --------------------------------------------------------------------------------------------------- one seed


def load(arguments):
    """Data and dense network; where there are no weights for it, it is trained (and kept) as the runners do."""
    if arguments.weights and arguments.data_path and arguments.model in CIFAR_RESNETS:
        return load_image_folder(arguments.data_path), cifar_resnet(arguments.model, arguments.weights)
    given = {"--model": arguments.model, "--weights": arguments.weights, "--data-path": arguments.data_path}
    words = [word for pair in given.items() if pair[1] for word in pair]
    experiment = prepare(parse(ExperimentTask, "", [*words, "--device", "cpu"]), Path(arguments.output).parent, CPU)
    return experiment.data, experiment.built.model.eval()


def balanced(data, images, seed):
    """A validation loader with equally many images of every class, the classes interleaved."""
    targets = torch.as_tensor(data.val.targets)
    classes = targets.unique()
    by_class = [torch.nonzero(targets == c).flatten() for c in classes]
    order = torch.stack([index[: images // len(classes)] for index in by_class], 1).flatten()
    return [default_collate([data.val[int(index)] for index in part]) for part in order.split(250)]


def networks(criterion, pruning, data, arguments, seed, batches):
    """{percentage: pruned network}."""
    for suffix in sorted(VARIANTS, key=len, reverse=True):
        name = criterion.removesuffix(suffix) if suffix else criterion
        if name in OURS and name + suffix == criterion:
            settings = PruningSettings(
                **{
                    "rounds": arguments.rounds,
                    "seed": seed,
                    "layer_bound": arguments.layer_bound,
                    "budget": arguments.budget,
                    **VARIANTS[suffix],
                }
            )
            ours = EnhancedPruning(pruning.model, pruning.train_loader, pruning.val_loader, calibration=batches,
                                   compensation=pruning.images.compensation, settings=settings, progress=False)  # fmt: skip
            return {p: ours.prune(p, int(name[-1])).model for p in arguments.percentages}
    base, *variant = criterion.split(", ")
    how = {"widths": "uniform" if "uniform" in variant else "own", "compensate": "compensated" in variant}
    if base in PEERS:
        base = partial(peer_scores, base, batches=batches)
    return {p: pruning.prune_by_baseline(base, p, **how).model for p in arguments.percentages}


def single_estimates(pruning, batches, arguments, seed):
    """{criterion: {"spearman", "pearson", "relative_error"}} against the true loss change of randomly drawn filters."""
    generator = torch.Generator().manual_seed(seed)
    units = torch.randperm(len(pruning.graph.units), generator=generator)[: arguments.true_changes]
    true = true_loss_changes(pruning.model, pruning.graph, batches, units.tolist(), progress=False)
    ranked = pruning.rankings.of(pruning.model, 3)
    estimates = {f"order {order}": ranked.scores(order)[units] for order in (1, 2, 3)}
    for name in BASELINES:
        estimates[name] = baseline_scores(name, pruning.graph, ranked.directions, seed)[units]
    if importlib.util.find_spec("torch_pruning"):
        for name in PEERS:
            estimates[name] = peer_scores(name, pruning.graph, batches)[units]
    return {
        name: {
            "spearman": spearman(values, true),
            "pearson": torch.corrcoef(torch.stack([values, true]))[0, 1].item(),
            "relative_error": ((values - true).norm() / true.norm()).item() if name in OURS else None,
        }
        for name, values in estimates.items()
    }


def fresh(pruning):
    """Rankings without any cached result."""
    return Rankings(pruning.graph, pruning.images, pruning.settings, progress=False)


def costs(pruning, batches):
    """{criterion: (seconds, peak bytes) of scoring over those of one forward+backward pass over the same images}."""
    model = pruning.model.requires_grad_(True)

    def one_pass():
        for images, labels in batches:
            F.cross_entropy(model(images), labels).backward()
        model.zero_grad(set_to_none=True)

    seconds, memory = measured(one_pass)
    parts = {"ours, all orders": lambda: fresh(pruning).of(model, 3)}
    for name in PEERS if importlib.util.find_spec("torch_pruning") else ():
        parts[name] = lambda name=name: peer_scores(name, pruning.graph, batches)
    found = {name: measured(part) for name, part in parts.items()}
    return {name: (s / seconds, None if m is None else m / memory) for name, (s, m) in found.items()}


def tuned(model, data, arguments, seed, rates):
    """(network, learning rate) after fine-tuning with the one of the rates that is best on held-out training images."""
    count = arguments.fine_tune_images + HELD_OUT
    ((images, labels),) = calibration_batches(data, count, count, seed=seed)
    held_out = [(images[-HELD_OUT:], labels[-HELD_OUT:])]  # compensation has seen the first images
    rest = torch.utils.data.TensorDataset(images[:-HELD_OUT], labels[:-HELD_OUT])
    train = make_loader(rest, 64, shuffle=True, seed=seed)
    fixed = {"epochs": arguments.fine_tune_epochs, "amp": arguments.amp, "channels_last": bool(arguments.amp)}
    best = None
    for lr in rates:
        candidate = copy.deepcopy(model)
        history = fine_tune(candidate, train, held_out, Recipe(lr=lr, **fixed), progress=False)
        top1 = history.epochs[history.best_epoch]["top1"]
        if best is None or top1 > best[0]:
            best = (top1, candidate, lr)
    return best[1:]


def rates_to_try(results, criterion, percentage):
    """The learning rates to try: all, or the one that the first seed chose."""
    rows = results["rows"]
    chosen = [r["lr"] for r in rows if (r["criterion"], r["percentage"]) == (criterion, percentage) and "lr" in r]
    return chosen[:1] or results["arguments"]["lr"]


def run(arguments):
    data, dense = load(arguments)
    val = balanced(data, arguments.test_images, 0)
    names = arguments.criteria
    everything = [order + suffix for suffix in VARIANTS for order in OURS]
    peers = PEERS if importlib.util.find_spec("torch_pruning") else ()
    everything += [name + suffix for suffix in BASELINE_VARIANTS for name in (*BASELINES, *peers)]
    criteria = [
        c for c in everything if not names or any(c == n or (n.endswith("*") and c.startswith(n[:-1])) for n in names)
    ]
    results = started(arguments, ("seeds", "criteria", "output"), {"rows": [], "single": []})
    results |= {"torch": torch.__version__, "threads": torch.get_num_threads()}
    accuracy = evaluate(dense, val, progress=False)
    results["dense"] = {"top1": accuracy.top1, "loss": accuracy.loss, "images": accuracy.images}
    print(f"dense: top-1 {accuracy.top1:.1f} %, loss {accuracy.loss:.3f}, {accuracy.images} images", flush=True)
    for seed in arguments.seeds:
        batches = calibration_batches(data, arguments.calibration_samples, 100, seed=seed)
        more = calibration_batches(data, arguments.compensation_samples, 100, seed=seed)
        pruning = EnhancedPruning(dense, val, val, calibration=batches, compensation=more,
                                  settings=PruningSettings(compensate=False, seed=seed, rounds=arguments.rounds,
                                                           budget=arguments.budget), progress=False)  # fmt: skip
        pruning.graph.model.eval()
        if arguments.true_changes and seed not in [single["seed"] for single in results["single"]]:
            estimates = single_estimates(pruning, batches, arguments, seed)
            results["single"].append({"seed": seed, "costs": costs(pruning, batches), **estimates})
        done = {row["criterion"] for row in results["rows"] if row["seed"] == seed}
        for criterion in (c for c in criteria if c not in done):
            start, rows = time.perf_counter(), []
            for percentage, model in networks(criterion, pruning, data, arguments, seed, batches).items():
                after = evaluate(model, val, progress=False)
                row = {
                    "criterion": criterion,
                    "percentage": percentage,
                    "seed": seed,
                    "top1": after.top1,
                    "loss": after.loss,
                }
                if arguments.fine_tune_epochs:
                    model, row["lr"] = tuned(model, data, arguments, seed, rates_to_try(results, criterion, percentage))
                    row["tuned_top1"] = evaluate(model, val, progress=False).top1
                rows.append(row)
            results["rows"] += rows
            values = " ".join(f"{row['top1']:.1f} {row.get('tuned_top1', math.nan):.1f}" for row in rows)
            print(f"seed {seed}, {criterion}: {values} ({time.perf_counter() - start:.0f} s)", flush=True)
            write_json(arguments.output, results)
    return results


def tables(results):
    """Markdown: top-1 by percentage, mean and standard deviation over seeds; then single-filter estimates."""
    percentages = sorted({row["percentage"] for row in results["rows"]})
    for key, title in (("top1", "without fine-tuning"), ("tuned_top1", "after fine-tuning")):
        rows = [row for row in results["rows"] if key in row]
        if not rows:
            continue
        print(f"\n| top-1 {title} | " + " | ".join(f"{p:g} %" for p in percentages) + " |")
        print("|---" * (1 + len(percentages)) + "|")
        for criterion in dict.fromkeys(row["criterion"] for row in rows):
            cells = [
                [r[key] for r in rows if r["criterion"] == criterion and r["percentage"] == p] for p in percentages
            ]
            print(f"| {criterion} | " + " | ".join(spread(c) for c in cells) + " |")
    singles = results["single"]
    if singles:
        print("\n| single filters | Spearman | Pearson | relative error |\n|---|---|---|---|")
        for name in (n for n in singles[0] if n not in ("seed", "costs")):
            columns = [[s[name][k] for s in singles] for k in ("spearman", "pearson", "relative_error")]
            cells = [f"{statistics.mean(c):.3f}" if None not in c else "" for c in columns]
            print(f"| {name} | " + " | ".join(cells) + " |")
        print("\n| scoring over one forward+backward pass | seconds | peak memory |\n|---|---|---|")
        for name in singles[0]["costs"]:
            columns = zip(*(s["costs"][name] for s in singles), strict=True)
            print(f"| {name} | " + " | ".join("" if None in column else spread(column) for column in columns) + " |")


if __name__ == "__main__":
    tables(run(parse_arguments()))
