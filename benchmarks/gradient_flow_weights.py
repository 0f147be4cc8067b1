"""Do gradient-flow weights help a ranking? Accuracy with each of them and without, before and after fine-tuning.

    python benchmarks/gradient_flow_weights.py --model resnet32 --weights resnet32.th --data-path cifar10
    python benchmarks/gradient_flow_weights.py                        # VGG-11 with BatchNorm on the embedded data

Order 2 in rounds, once without and once with compensation; fine-tuning on `--fine-tune-images` at one learning rate.
Mean and standard deviation over seeds (calibration draw and order of training images). Finished seeds are in --output.
"""

import argparse
import sys
from pathlib import Path
from unittest.mock import patch

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]

from compare_criteria import add_network_arguments, balanced, load, spread, tuned
from measuring import started

from EnhancedFilterPruner import EnhancedFilterPruner
from EnhancedPruning import EnhancedPruning, PruningSettings
from GradientFlowAnalyzer import collect_flow, preserved_flow, signal_to_noise
from taylor_pruning.experiment.loaders import calibration_batches
from taylor_pruning.report.experiment import write_json
from taylor_pruning.scoring.flow import relative_flow
from taylor_pruning.training.fine_tuning import evaluate


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_network_arguments(parser)
    parser.add_argument("--percentages", type=float, nargs="+", default=[30, 50, 70])
    parser.add_argument("--compensate", type=int, nargs="+", default=[0, 1], help="without (0), with compensation (1)")
    parser.add_argument("--rounds", type=int, default=PruningSettings.rounds)
    parser.add_argument("--fine-tune-epochs", type=int, default=2)
    parser.add_argument("--fine-tune-images", type=int, default=2000)
    parser.add_argument("--lr", type=float, nargs="+", default=[0.01])
    parser.add_argument("--output", default="gradient_flow_weights.json")
    return parser.parse_args()


def weights_from(name, batches):
    """A stand-in for EnhancedFilterPruner.flow_weights that gives the named weights, or None."""

    def flow_weights(pruner):
        if name == "none":
            return None
        flow, change = collect_flow(pruner.model, pruner.graph, batches, want_change=name == "preserved flow")
        if name == "preserved flow":
            return preserved_flow(pruner.graph, change)
        return {"relative flow": relative_flow, "signal-to-noise": signal_to_noise}[name](pruner.graph, flow)

    return flow_weights


def one(name, compensate, seed, model, data, val, arguments):
    """One row a percentage."""
    batches = calibration_batches(data, arguments.calibration_samples, 100, seed=seed)
    more = calibration_batches(data, arguments.compensation_samples, 100, seed=seed)
    settings = PruningSettings(compensate=bool(compensate), rounds=arguments.rounds, seed=seed)
    pruning = EnhancedPruning(model, val, val, calibration=batches, compensation=more, settings=settings, progress=False)
    with patch.object(EnhancedFilterPruner, "flow_weights", weights_from(name, batches)):
        for network in pruning.path("order 2", arguments.percentages):
            yield {
                "weights": name, "compensated": bool(compensate), "seed": seed, "percentage": network.percentage,
                "top1": evaluate(network.model, val, progress=False).top1,
                "tuned_top1": evaluate(tuned(network.model, data, arguments, seed, arguments.lr)[0], val, progress=False).top1,
            }  # fmt: skip


def table(rows):
    percentages = sorted({row["percentage"] for row in rows})
    print("\n| weights | compensated | " + " | ".join(f"{p:g} %, before / after fine-tuning" for p in percentages) + " |")
    print("|---" * (2 + len(percentages)) + "|")
    for compensated, name in dict.fromkeys((row["compensated"], row["weights"]) for row in rows):
        cells = []
        for p in percentages:
            mine = [r for r in rows if (r["compensated"], r["weights"], r["percentage"]) == (compensated, name, p)]
            cells.append(" / ".join(spread([r[key] for r in mine]) for key in ("top1", "tuned_top1")))
        print(f"| {name} | {'yes' if compensated else 'no'} | " + " | ".join(cells) + " |")


def main():
    arguments = parse_arguments()
    data, model = load(arguments)
    val = balanced(data, arguments.test_images, 0)
    results = started(arguments, ("seeds", "compensate", "output"), {"rows": []})
    rows = results["rows"]
    for seed in arguments.seeds:
        for compensate in arguments.compensate:
            for name in ("none", "relative flow", "signal-to-noise", "preserved flow"):
                if any((r["weights"], r["compensated"], r["seed"]) == (name, bool(compensate), seed) for r in rows):
                    continue
                new = list(one(name, compensate, seed, model, data, val, arguments))
                rows += new
                print(*(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for r in new for k, v in r.items()), flush=True)
                write_json(arguments.output, results)
    table(rows)


if __name__ == "__main__":
    main()
