"""After how many training steps a method has the accuracy that the best Taylor order has before training."""

from dataclasses import dataclass

import numpy as np

from taylor_pruning.report.sweep_numbers import cells_by_method, methods_of, percentages_of


@dataclass(frozen=True)
class StepsToReach:
    """Of one percentage of a sweep.

    top1: to be reached, before training, mean over the seeds. best: the method that has it.
    steps: {method: the first measured step at which its mean is that high, None if none is}, of methods that were measured.
    last: {method: the last measured step}.
    """

    percentage: float
    best: str
    top1: float
    steps: dict[str, int | None]
    last: dict[str, int]


def steps_to_reach(sweep: dict) -> list[StepsToReach]:
    """One entry a percentage of which top-1 against steps was measured. Without any order, the best method sets the aim."""
    groups = cells_by_method(sweep)
    found = []
    for percentage in percentages_of(sweep):
        curves = {method: mean_curve(groups.get((percentage, method), [])) for method in methods_of(sweep)}
        curves = {method: curve for method, curve in curves.items() if curve}
        before = {method: curve[0] for method, curve in curves.items() if 0 in curve}
        orders = [method for method in before if method.startswith("order")]
        if not before:
            continue
        best = max(orders or before, key=before.get)
        steps = {m: next((s for s, top1 in c.items() if top1 >= before[best]), None) for m, c in curves.items()}
        found.append(StepsToReach(percentage, best, before[best], steps, {m: max(c) for m, c in curves.items()}))
    return found


def mean_curve(cells: list[dict]) -> dict[int, float]:
    """{step: mean top-1 over the cells that have a curve}, of the steps that all of these have."""
    runs = [
        {point["step"]: point["top1"] for point in c["accuracy_at_steps"]} for c in cells if c.get("accuracy_at_steps")
    ]
    steps = sorted(set.intersection(*map(set, runs))) if runs else []
    return {step: float(np.mean([run[step] for run in runs])) for step in steps}
