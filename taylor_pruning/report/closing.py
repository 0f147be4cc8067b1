"""The last lines that a run prints: what was gained, at what cost, and where the files are.

print(experiment_closing(results, folder))       # results: the content of results.json
print(sweep_closing(sweep, folder))              # sweep: the content of a sweep's results.json
"""

import statistics
import textwrap
from pathlib import Path

from taylor_pruning.report.figures import METHODS
from taylor_pruning.report.sweep_numbers import cells_by_method
from taylor_pruning.report.tables import signed, standard_error
from taylor_pruning.report.warnings import experiment_warnings, sweep_warnings

LINE = 80  # columns
STAGES = {
    "dense": "dense",
    "pruned": "after the cut",
    "compensated": "after the repair",
    "trained": "after the training between rounds",
    "repaired": "after the repair across layers",
    "fine-tuned": "after fine-tuning",
}
FILES = {
    "pruned_model.pt": "the smaller network, for load_pruned",
    "pruned_model.onnx": "the same for onnxruntime",
    "pruned_model.pt2": "the same for torch.export.load",
    "results.md": "the tables",
    "results.csv": "one row for every network and stage",
    "results.json": "every number",
    "accuracy.png": "top-1 as a picture; other plots are beside it",
}


def experiment_closing(results: dict, folder: Path) -> str:
    """What one experiment gained and what that cost, and its files in `folder`."""
    stages = results["stages"]
    dense, final = stages[0], stages[-1]
    filters, kept = (sum(layer[key] for layer in results["layers"].values()) for key in ("filters", "kept"))
    top1 = ", ".join(f"{stage['top1']:.2f} % {STAGES[stage['stage']]}" for stage in stages)
    return "\n".join(
        [
            *_warnings(experiment_warnings(results)),
            f"Removing {filters - kept:,} of {filters:,} filters gave:",
            *(f"  {line}" for line in [*_gains(dense, final), *_latency(results.get("latency"))]),
            f"Cost, on {final['images']:,} validation images:",
            f"  {_cost(dense, final)}; {_chance(final)}",
            textwrap.fill(top1, LINE, initial_indent="  ", subsequent_indent="  "),
            *_files(Path(folder)),
        ]
    )


def sweep_closing(sweep: dict, folder: Path) -> str:
    """What the method with the highest top-1 at every percentage, of several the cheapest, gained and cost; the files.

    Numbers are means over the seeds.
    """
    found, lines = {}, _warnings(sweep_warnings(sweep))
    for (percentage, method), cells in cells_by_method(sweep).items():
        found.setdefault(percentage, {})[method] = cells
    for percentage, by_method in found.items():
        means = {
            method: [_mean([cell["stages"][at] for cell in cells]) for at in (0, -1)]
            for method, cells in by_method.items()
        }
        best = max(means, key=lambda method: (means[method][1]["top1"], -means[method][1]["macs"]))
        seeds = f", mean of {len(by_method[best])} seeds" if len(by_method[best]) > 1 else ""
        text = f"{percentage:g} %, best by {METHODS[best].label}{seeds}: {_cost(*means[best])}; "
        lines.append(textwrap.fill(text + ", ".join(_gains(*means[best])), LINE, subsequent_indent="  "))
    return "\n".join([*lines, *_files(Path(folder))])


def _mean(stages: list[dict]) -> dict:
    return {
        key: statistics.mean(stage[key] for stage in stages) for key in ("top1", "parameters", "macs", "latency_ms")
    }


def _gains(dense: dict, final: dict) -> list[str]:
    def amount(key, less, more):
        change = 100 * (1 - final[key] / dense[key])
        change = round(change, 0 if abs(change) < 99 else 2)  # all but all is not all
        return f"{abs(change):g} % {less if change >= 0 else more}"

    return [
        f"{amount('parameters', 'fewer', 'more')} parameters ({_number(dense['parameters'])} -> "
        f"{_number(final['parameters'])})",
        f"{amount('macs', 'fewer', 'more')} multiply-accumulates an image ({_number(dense['macs'])} -> "
        f"{_number(final['macs'])})",
        f"{amount('latency_ms', 'less', 'more')} time for one image on this machine ({dense['latency_ms']:.2f} -> "
        f"{final['latency_ms']:.2f} ms)",
    ]


def _warnings(texts: list[str]) -> list[str]:
    """Lines of the warnings, each of which begins with the word."""
    return [line for text in texts for line in textwrap.wrap(f"WARNING: {text}", LINE, subsequent_indent="  ")]


def _latency(times: dict | None) -> list[str]:
    """The time that a budget of latency asked for and predicted, beside the measured one."""
    if not times:
        return []
    change = signed(100 * (times["predicted_ms"] / times["pruned_ms"] - 1), 0)
    share = times["pruned_ms"] / times["dense_ms"]
    return [
        f"{times['pruned_ms']:.2f} ms for a batch of {times['batch_size']}, {share:.0%} of the dense network's "
        f"{times['dense_ms']:.2f} ms",
        f"asked for {times['asked_ms']:.2f} ms, predicted {times['predicted_ms']:.2f} ms ({change} %)",
    ]


def _cost(dense: dict, final: dict) -> str:
    change = signed(final["top1"] - dense["top1"], 2)  # with one decimal, 95.60 -> 95.55 would be no change
    return f"top-1 {dense['top1']:.2f} % -> {final['top1']:.2f} % ({change} points)"


def _chance(stage: dict) -> str:
    error = standard_error(stage["top1"], stage["images"])
    return "too few images to tell by how much" if error is None else f"one standard error is {error:.1f} points"


def _number(count: float) -> str:
    for size, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return f"{count:,.0f}"


def _files(folder: Path) -> list[str]:
    found = [(name, what) for name, what in FILES.items() if (folder / name).exists()]
    return [f"Files in {folder}:", *(f"  {name:<19}{what}" for name, what in found)]
