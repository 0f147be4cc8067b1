"""What the cells of a sweep say: means and deviations over seeds, before and after fine-tuning.

A sweep holds "dense" (the stage of the unpruned network), "cells", "arguments" and "environment". A cell has "percentage",
"method" (a key of report.figures.METHODS), "seed", "status" ("done" or "failed") and "error" (CELL); a failed one has
"diverged", whether training did; a finished one also has "stages", "layers" and "fine_tuning", as in the results of one
experiment (DONE_CELL). Percentages count what the argument "budget" says, filters where there is none. Failed cells enter
no mean.
"""

import math
from dataclasses import dataclass

import numpy as np

from taylor_pruning.errors import InputError
from taylor_pruning.report.figures import METHODS
from taylor_pruning.report.json_files import Values
from taylor_pruning.report.tables import numbers

# What is read back from files, for report.json_files.read_json. What was not measured is None.
NUMBER = (int, float, type(None))
STAGE = {"stage": str, "top1": (int, float), "top5": NUMBER, "loss": NUMBER, "images": int, "parameters": int, "macs": int,
         "file_bytes": int, "latency_ms": NUMBER, "seconds": NUMBER}  # fmt: skip
CELL = {"percentage": (int, float), "method": str, "seed": int, "status": str, "error": (str, type(None))}
DONE_CELL = CELL | {"stages": [STAGE], "layers": Values({"filters": int, "kept": int}), "rounds": Values({}),
                    "fine_tuning": Values({"top1": NUMBER}),
                    "accuracy_at_steps": Values({"step": int, "top1": NUMBER})}  # fmt: skip
COSTS = {"macs": "MACs", "parameters": "parameters", "file_bytes": "size", "latency_ms": "latency"}
COUNTED = {
    "filters": "filters",
    "params": "parameters",
    "macs": "MACs",
    "latency": "time",
}  # what the percentages count
WHEN = {"before": "before fine-tuning", "after": "after fine-tuning"}


@dataclass(frozen=True)
class Estimate:
    """Mean and sample standard deviation over `seeds` values; the deviation of a single one is NaN."""

    mean: float
    sd: float
    seeds: int

    @classmethod
    def of(cls, values) -> "Estimate":
        values = numbers(values)
        values = values[np.isfinite(values)]
        mean = float(values.mean()) if values.size else math.nan
        return cls(mean, float(values.std(ddof=1)) if values.size > 1 else math.nan, values.size)

    def text(self, style=".1f", sign="+-") -> str:
        if not self.seeds:
            return "-"
        return format(self.mean, style) + ("" if math.isnan(self.sd) else f" {sign} {self.sd:{style}}")


def stage_at(cell: dict, when: str) -> dict:
    """The cell's stage before or after fine-tuning, or the "dense" one; an empty dictionary where there is none.

    Before fine-tuning: the network that fine-tuning starts from, the repaired one if there is one.
    """
    names = {"dense": ("dense",), "before": ("pruned", "compensated", "trained", "repaired"), "after": ("fine-tuned",)}[
        when
    ]
    return ([{}] + [stage for stage in cell["stages"] if stage["stage"] in names])[-1]


def final_moment(sweep: dict) -> str:
    """ "after" (fine-tuning), or "before" in a sweep without fine-tuning."""
    return "after" if any(stage_at(cell, "after") for cell in finished_cells(sweep)) else "before"


def finished_cells(sweep):
    return [cell for cell in sweep["cells"] if cell["status"] == "done"]


def cells_by_method(sweep):
    """{(percentage, method): finished cells}, by percentage and then in the order of METHODS."""
    order = {method: place for place, method in enumerate(METHODS)}
    unknown = {cell["method"] for cell in sweep["cells"]} - set(order)
    if unknown:
        raise InputError(f"unknown methods in the sweep: {sorted(unknown)}; use one of {list(order)}")

    groups = {}
    for cell in sorted(finished_cells(sweep), key=lambda cell: (cell["percentage"], order[cell["method"]])):
        groups.setdefault((cell["percentage"], cell["method"]), []).append(cell)
    return groups


def methods_of(sweep):
    present = {cell["method"] for cell in sweep["cells"]}
    return [method for method in METHODS if method in present]


def removed_label(sweep):
    return COUNTED[sweep["arguments"].get("budget", "filters")] + " removed"


def percentages_of(sweep):
    return sorted({cell["percentage"] for cell in sweep["cells"]})


def estimate_of(cells, key, when):
    return Estimate.of([stage_at(cell, when).get(key) for cell in cells])


def reduction_of(sweep, cells, key, when):
    """Per cent saved against the dense network of the same cell, or of the sweep where the cell has none."""
    saved = []
    for cell in cells:
        dense = stage_at(cell, "dense") or sweep["dense"]
        before, now = numbers([dense.get(key), stage_at(cell, when).get(key)])
        saved.append(100 * (1 - now / before) if before else math.nan)
    return Estimate.of(saved)
