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

import torch
from torch.nn import functional as F

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]

from compare_criteria import add_network_arguments, balanced, load, tuned
from measuring import spread, started

from EnhancedFilterPruner import EnhancedFilterPruner
from EnhancedPruning import EnhancedPruning, PruningSettings
from GradientFlowAnalyzer import collect_flow
from taylor_pruning.experiment.loaders import calibration_batches
from taylor_pruning.modes import frozen
from taylor_pruning.report.json_files import write_json
from taylor_pruning.scoring.flow import group_mean, normalised, relative_flow
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


def gate_flow_change(loss, gates):
    """First-order change of every sample's squared gate gradient when a unit is removed, by one HVP.

    With gamma_n = d loss_n / d g_n, H_n the gate Hessian and S_n(g) = ||gamma_n||^2, the step g_u: 1 -> 0 gives

        C[n, u] = -d S_n / d g_u = -2 (H_n gamma_n)_u

    This is the criterion of Wang, Zhang, Grosse 2020 (GraSP, arXiv:2002.07376, section 4) for gates in place of
    weights. GraSP takes the gradient of the batch's mean loss; here every sample has its own, so that the batch size
    does not matter.

    Args:
        loss: scalar, the sum over the batch of the samples' losses.
        gates: [B, units] of ones with `requires_grad`, the gates of the forward.

    Returns:
        [B, units] tensor; negative where the unit's removal takes gradient flow away.
    """
    (gradient,) = torch.autograd.grad(loss, gates, create_graph=True)
    (slope,) = torch.autograd.grad(gradient.square().sum(), gates, retain_graph=False)
    return -slope


def collect_flow_change(model, graph, batches):
    """[N, units] `gate_flow_change` of every image and unit under cross-entropy."""
    changes = []
    for images, labels in batches:
        gates = images.new_ones(len(images), len(graph.units)).requires_grad_()
        with frozen(model), torch.enable_grad(), graph.gated(gates):
            loss = F.cross_entropy(model(images), labels, reduction="sum")
        changes.append(gate_flow_change(loss, gates).cpu())
    return torch.cat(changes)


def signal_to_noise(graph, flow):
    """[units] weights from r_u = mean_n F[n, u] / sd_n F[n, u], as `normalised` scales them.

    Signal-to-noise as a measure of importance: Graves 2011 (Practical Variational Inference). The ratio is
    bounded by 1000, reached where the samples agree; a unit without flow has 0.

    Args:
        flow: [N, units], N >= 2.
    """
    mean = flow.double().mean(0)
    noise = torch.hypot(flow.double().std(0, correction=0), 1e-3 * mean)
    ratio = torch.where(mean > 0, mean / noise.clamp_min(torch.finfo(torch.float64).tiny), 0.0)
    return normalised(graph, ratio)


def preserved_flow(graph, change):
    """[units] weights from the flow that a unit's removal takes away, as `normalised` scales them.

        c_u = mean_n C[n, u]     r_u = 2 / (1 + exp(c_u / rms of c in the layer))

    r lies in (0, 2): above 1 for units whose removal lowers the squared gradient norm. Source: `gate_flow_change`,
    which GraSP ranks weights by; the logistic function makes a weight of it that single outliers cannot blow up.

    Args:
        change: [N, units] from `gate_flow_change`.
    """
    mean = change.double().mean(0)
    scale = group_mean(graph, mean.square()).sqrt().clamp_min(torch.finfo(torch.float64).tiny)
    return normalised(graph, 2 * torch.sigmoid(-mean / scale))


def weights_from(name, batches):
    """A stand-in for EnhancedFilterPruner.flow_weights that gives the named weights, or None."""

    def flow_weights(pruner):
        if name == "none":
            return None
        if name == "preserved flow":
            return preserved_flow(pruner.graph, collect_flow_change(pruner.model, pruner.graph, batches))
        flow = collect_flow(pruner.model, pruner.graph, batches)
        return {"relative flow": relative_flow, "signal-to-noise": signal_to_noise}[name](pruner.graph, flow)

    return flow_weights


def one(name, compensate, seed, model, data, val, arguments):
    """One row a percentage."""
    batches = calibration_batches(data, arguments.calibration_samples, 100, seed=seed)
    more = calibration_batches(data, arguments.compensation_samples, 100, seed=seed)
    settings = PruningSettings(compensate=bool(compensate), rounds=arguments.rounds, seed=seed)
    pruning = EnhancedPruning(
        model, val, val, calibration=batches, compensation=more, settings=settings, progress=False
    )
    with patch.object(EnhancedFilterPruner, "flow_weights", weights_from(name, batches)):
        for percentage in arguments.percentages:
            pruned = pruning.prune(percentage, 2).model
            yield {
                "weights": name, "compensated": bool(compensate), "seed": seed, "percentage": percentage,
                "top1": evaluate(pruned, val, progress=False).top1,
                "tuned_top1": evaluate(tuned(pruned, data, arguments, seed, arguments.lr)[0], val, progress=False).top1,
            }  # fmt: skip


def table(rows):
    percentages = sorted({row["percentage"] for row in rows})
    print(
        "\n| weights | compensated | " + " | ".join(f"{p:g} %, before / after fine-tuning" for p in percentages) + " |"
    )
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
                print(
                    *(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for r in new for k, v in r.items()),
                    flush=True,
                )
                write_json(arguments.output, results)
    table(rows)


if __name__ == "__main__":
    main()
