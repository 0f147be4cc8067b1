"""A sweep: pruning percentages x Taylor orders (x seeds) against baselines, in one results folder.

    python run_enhanced_pruning.py --pruning-percentages 30 50 --taylor-orders 1 2 3 --fine-tune-epochs 1 \
        --compare-baseline
    python run_enhanced_pruning.py --model vgg16 --pruning-percentages 10 30 50 70 --taylor-orders 1 2 3 \
        --fine-tune-epochs 5 --data-path imagenet-mini --compare-baseline
    python run_enhanced_pruning.py --resume runs/run_enhanced_pruning-vgg16    # an interrupted sweep, or failed cells

Every cell is the experiment that run_single_experiment.py runs with the same arguments. All cells of a seed share the data,
the dense network's evaluation and its ranking. A finished cell is on disk before the next begins.
"""

from taylor_pruning.interruption import ended_by_ctrl_c

with ended_by_ctrl_c():  # importing torch takes seconds
    import itertools
    import shlex
    import sys
    from pathlib import Path

    import torch

    from EnhancedPruning import EnhancedPruning, InputError, PruningResult
    from taylor_pruning.distributed import barrier, is_main
    from taylor_pruning.experiment.arguments import parse
    from taylor_pruning.experiment.command import Command, SweepTask
    from taylor_pruning.experiment.inputs import allow_repair
    from taylor_pruning.experiment.run import run_guarded
    from taylor_pruning.experiment.setup import Experiment, environment, prepare, warn_of_chance
    from taylor_pruning.report.closing import sweep_closing
    from taylor_pruning.report.json_files import read_json, write_json
    from taylor_pruning.report.sweep import sweep_table, write_sweep
    from taylor_pruning.report.sweep_numbers import CELL, DONE_CELL, STAGE
    from taylor_pruning.training.fine_tuning import TrainingDiverged

DESCRIPTION = """Sweep over pruning percentages and Taylor orders, compare, and report.

  %(prog)s --pruning-percentages 30 50 --compare-baseline
  %(prog)s --model vgg16 --pruning-percentages 10 30 50 70 \\
      --taylor-orders 1 2 3 --fine-tune-epochs 5 --data-path imagenet-mini
"""
CELL_ERRORS = (InputError, TrainingDiverged, torch.OutOfMemoryError)


def main(argv: list[str] | None = None) -> int:
    """Runs the sweep that the command line describes; returns the exit code."""
    with ended_by_ctrl_c():
        command = parse(SweepTask, DESCRIPTION, argv)
    return run_guarded(command, run)


def run(command: Command, folder: Path, device: torch.device) -> int:
    """Runs what is not yet in the folder, writes the tables and plots; 1 if a cell failed."""
    before = read_json(folder / "results.json", {"cells": [CELL]}) if command.run.resume else None
    barrier()
    if before and all(map(is_final, before["cells"])):
        if is_main():
            print(f"the sweep in {folder} is finished; nothing was changed")
        return outcome(before["cells"], folder)
    methods = [f"order {order}" for order in sorted(set(command.task.taylor_orders))]
    methods += baseline_methods(command.task) if command.task.compare_baseline else []
    percentages = sorted(set(command.task.pruning_percentages))
    cells, seeds = list(itertools.product(dict.fromkeys(methods), percentages)), list(dict.fromkeys(command.task.seeds))
    experiment = prepare(command, folder, device, percentages)
    dense = None
    for seed in seeds:
        sweep = Sweep(command, experiment, folder / "cells", seed, dense)
        for method, percentage in cells:
            sweep.cell(method, percentage)
        dense = sweep.pruning.dense_stage()
    if not is_main():
        return 0
    found = [read_cell(folder / "cells", *cell, seed) for cell in cells for seed in seeds]
    return report(command, experiment, folder, dense, found)


def baseline_methods(task: SweepTask) -> list[str]:
    """The published criteria to run: each with every kind of widths and, if asked for, also repaired."""
    repairs = ("", " compensated") if task.compensate_baselines else ("",)
    widths = [{"own": "", "uniform": " uniform"}[kind] for kind in task.baseline_widths]
    return [f"{name}{width}{repair}" for name in task.baselines for width in widths for repair in repairs]


def cell_file(folder: Path, method: str, percentage: float, seed: int) -> Path:
    exact = repr(float(percentage)).removesuffix(".0")  # "30" for 30.0, and never the same for two percentages
    return folder / f"{method.replace(' ', '-')}_{exact}_seed-{seed}.json"


def read_cell(folder: Path, method: str, percentage: float, seed: int) -> dict | None:
    """The cell in its file, None where there is none. Raises InputError if the file holds anything else."""
    file = cell_file(folder, method, percentage, seed)
    cell = read_json(file, CELL)
    if cell and cell["status"] == "done":
        cell = read_json(file, DONE_CELL)
    if cell and (cell["method"], cell["percentage"], cell["seed"]) != (method, percentage, seed):
        raise InputError(f"{file} is of another cell; remove it, and --resume computes it again")
    return cell


def is_final(cell: dict | None) -> bool:
    """Whether a cell is not computed again: it is finished, or has diverged, which the same numbers would do again."""
    return bool(cell) and (cell["status"] == "done" or cell.get("diverged", False))


class Sweep:
    """The cells of one seed, in `folder`."""

    def __init__(self, command: Command, experiment: Experiment, folder: Path, seed: int, dense: dict | None):
        self.command, self.experiment, self.folder, self.seed = command, experiment, folder, seed
        stage = dense or read_json(folder / "dense.json", STAGE)
        self.pruning = EnhancedPruning(**experiment.pipeline_arguments(seed, dense_stage=stage))
        stage = self.pruning.dense_stage()
        if is_main():
            folder.mkdir(exist_ok=True)
            if dense is None:  # once, not for every seed
                warn_of_chance(stage, experiment.data)
            write_json(folder / "dense.json", stage)

    def cell(self, method: str, percentage: float) -> None:
        """Prunes, fine-tunes and writes one cell, unless it is finished. A failure is recorded; the other cells run."""
        if is_final(read_cell(self.folder, method, percentage, self.seed)):
            return
        try:
            result = self.fine_tuned(method, percentage, self.pruned(method, percentage))
            content = {"status": "done", "error": None, **result.as_dict()}
        except CELL_ERRORS as error:
            allow_repair(self.folder.parent, error)
            # a failed cell keeps no checkpoint
            diverged = isinstance(error, TrainingDiverged)
            content = {"status": "failed", "error": str(error.reason if diverged else error), "diverged": diverged}
        self.write(method, percentage, content)

    def pruned(self, method: str, percentage: float) -> PruningResult:
        if not method.startswith("order "):
            criterion, *variant = method.split()
            widths, compensate = "uniform" if "uniform" in variant else "own", "compensated" in variant
            return self.pruning.prune_by_baseline(criterion, percentage, widths=widths, compensate=compensate)
        return self.pruning.prune(
            percentage,
            int(method.removeprefix("order ")),
            self.command.task.use_gradient_flow,
            checkpoint=self.file(method, percentage).with_suffix(".rounds.checkpoint"),
            resume=self.command.run.resume is not None,
        )

    def fine_tuned(self, method: str, percentage: float, result: PruningResult) -> PruningResult:
        """The fine-tuned network; where the GPU's memory is too small, with half the batch size."""
        checkpoint = self.file(method, percentage).with_suffix(".checkpoint")
        try:
            return self.pruning.fine_tune(result, checkpoint=checkpoint, resume=self.command.run.resume is not None)
        except CELL_ERRORS as error:
            if not isinstance(error.__cause__ or error, torch.OutOfMemoryError):
                raise
        half = max(1, self.command.data.batch_size // 2)
        print(f"{method} at {percentage:g} %: out of memory, once more with --batch-size {half}", flush=True)
        torch.cuda.empty_cache()
        arguments = self.experiment.pipeline_arguments(
            self.seed, dense_stage=self.pruning.dense_stage(), batch_size=half
        )
        return EnhancedPruning(**arguments).fine_tune(result, checkpoint=checkpoint)

    def file(self, method: str, percentage: float) -> Path:
        return cell_file(self.folder, method, percentage, self.seed)

    def write(self, method: str, percentage: float, content: dict) -> None:
        if not is_main():
            return
        file = self.file(method, percentage)
        write_json(file, {"percentage": percentage, "method": method, "seed": self.seed, **content})
        for suffix in (".rounds.checkpoint", ".checkpoint"):
            file.with_suffix(suffix).unlink(missing_ok=True)
        last = content["stages"][-1]["top1"] if content["status"] == "done" else None
        outcome = f"top-1 {last:.1f} %" if last is not None else f"failed: {content['error']}"
        print(f"{method}, {percentage:g} %, seed {self.seed}: {outcome}", flush=True)


def report(command: Command, experiment: Experiment, folder: Path, dense: dict, cells: list[dict]) -> int:
    """Writes the tables and plots and prints the table; returns the exit code."""
    for checkpoint in (folder / "cells").glob("*.checkpoint"):  # of cells that were killed after their last step
        checkpoint.unlink()
    sweep = {
        "arguments": command.as_dict(),
        "environment": environment(experiment.device),
        "dense": dense,
        "cells": cells,
    }
    write_sweep(sweep, folder)
    print(sweep_table(sweep))
    print(f"\n{sweep_closing(sweep, folder)}")
    return outcome(cells, folder)


def outcome(cells: list[dict], folder: Path) -> int:
    """The exit code; prints how many cells failed, and what can be done."""
    failed = [cell for cell in cells if cell["status"] == "failed"]
    diverged = sum(map(is_final, failed))
    advice = {
        "diverged": (diverged, "start another sweep of these percentages and methods with a lower --lr"),
        "failed": (len(failed) - diverged, f"--resume {shlex.quote(str(folder))} tries them again"),
    }
    for what, (count, remedy) in advice.items():
        if count and is_main():
            print(f"{count} of {len(cells)} cells {what}; results.md names them, {remedy}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
