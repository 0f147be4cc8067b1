"""A sweep: pruning percentages x Taylor orders (x seeds) against baselines, in one results folder.

    python run_enhanced_pruning.py --pruning-percentages 30 50 --taylor-orders 1 2 3 --fine-tune-epochs 1 \
        --compare-baseline
    python run_enhanced_pruning.py --model vgg16 --pruning-percentages 10 30 50 70 --taylor-orders 1 2 3 \
        --fine-tune-epochs 5 --data-path imagenet-mini --compare-baseline
    python run_enhanced_pruning.py --resume runs/run_enhanced_pruning-vgg16 ...   # the same arguments again

Every finished cell is on disk before the next begins.
"""

import json
import sys

import torch

from taylor_pruning.training.distributed import is_main
from taylor_pruning.experiment.arguments import add_shared_arguments, add_sweep_arguments, new_parser, parse
from taylor_pruning.errors import InputError
from taylor_pruning.report.experiment import write_json
from taylor_pruning.experiment.run import run_guarded
from taylor_pruning.experiment.setup import environment, prepare, warn_of_chance
from taylor_pruning.training.fine_tuning import TrainingDiverged
from taylor_pruning.report.sweep import sweep_table, verdict, write_sweep

CELL_ERRORS = (InputError, TrainingDiverged, torch.OutOfMemoryError)


def main(argv=None):
    parser = new_parser("Sweep over pruning percentages and Taylor orders, compare, and report.")
    add_sweep_arguments(parser)
    add_shared_arguments(parser)
    return run_guarded(parser, parse(parser, argv), run)


def run(args, folder, device):
    """Runs what is not yet in the folder, writes the tables and plots; 1 if a cell failed."""
    cells = folder / "cells"
    methods = [f"order {order}" for order in sorted(set(args.taylor_orders))]
    methods += args.baselines if args.compare_baseline else []
    percentages = sorted(set(args.pruning_percentages))
    experiment = prepare(args, folder, device, percentages)
    dense = None
    for seed in args.seeds:
        sweep = Sweep(args, experiment, cells, seed, dense)
        for method in methods:
            sweep.run(method, percentages)
        dense = sweep.pruning.dense_stage()
    return report(args, experiment, folder, dense) if is_main() else 0


class Sweep:
    """The cells of one seed. All methods share one collection of statistics at the dense network."""

    def __init__(self, args, experiment, folder, seed, dense):
        self.args, self.experiment, self.folder, self.seed = args, experiment, folder, seed
        self.pruning = experiment.pruning(seed, dense_stage=dense or _read(folder / "dense.json"))
        stage = self.pruning.dense_stage()
        if is_main():
            folder.mkdir(exist_ok=True)
            if dense is None:  # once, not for every seed
                warn_of_chance(stage, experiment.data)
            write_json(folder / "dense.json", stage)

    def run(self, method, percentages):
        """All percentages of a method, on one way down; finished cells are passed over, failed ones tried again."""
        todo = [p for p in percentages if (_read(self.file(method, p)) or {}).get("status") != "done"]
        if not todo:
            return
        checkpoint = self.folder / f"{method.replace(' ', '-')}_seed-{self.seed}.rounds.checkpoint"
        start = self.pruning.restored(checkpoint) if self.args.resume else None
        if start and start.percentage > todo[0]:  # of a cell that failed before
            start = None
        try:
            for network in self.pruning.path(
                method,
                percentages,
                use_gradient_flow=self.args.use_gradient_flow,
                seed=self.seed,
                start=start,
                checkpoint=checkpoint,
            ):
                if network.percentage in todo:
                    self.cell(method, network)
                    todo.remove(network.percentage)
            if is_main():
                checkpoint.unlink(missing_ok=True)
        except CELL_ERRORS as error:  # the way down itself failed: so did all that lies behind
            for percentage in todo:
                self.write(method, percentage, {"status": "failed", "error": str(error)})

    def cell(self, method, network):
        """Fine-tunes one pruned network and writes the cell; a failure is recorded, on CUDA after a smaller batch."""
        try:
            result = self.fine_tuned(self.pruning, method, network)
        except CELL_ERRORS as error:
            if not isinstance(error.__cause__ or error, torch.OutOfMemoryError):
                return self.write(method, network.percentage, {"status": "failed", "error": str(error)})
            result = self.retried(method, network)
        return self.write(method, network.percentage, result)

    def retried(self, method, network):
        half = max(1, self.args.batch_size // 2)
        print(f"{method} at {network.percentage:g} %: out of memory, once more with --batch-size {half}", flush=True)
        torch.cuda.empty_cache()
        pruning = self.experiment.pruning(self.seed, dense_stage=self.pruning.dense_stage(), batch_size=half)
        try:
            return self.fine_tuned(pruning, method, network)
        except CELL_ERRORS as error:
            return {"status": "failed", "error": str(error)}

    def fine_tuned(self, pruning, method, network):
        order = int(method.removeprefix("order ")) if method.startswith("order ") else None
        flow = self.args.use_gradient_flow and order is not None
        result = pruning.result_of(network, order, flow)
        checkpoint = self.file(method, network.percentage).with_suffix(".checkpoint")
        result = pruning.fine_tune(result, checkpoint=checkpoint, resume=self.args.resume is not None)
        return {"status": "done", "error": None, **result.as_dict()}

    def file(self, method, percentage):
        return self.folder / f"{method.replace(' ', '-')}_{percentage:g}_seed-{self.seed}.json"

    def write(self, method, percentage, content):
        if not is_main():
            return
        file = self.file(method, percentage)
        write_json(file, {"percentage": percentage, "method": method, "seed": self.seed, **content})
        file.with_suffix(".checkpoint").unlink(missing_ok=True)
        last = content["stages"][-1]["top1"] if content["status"] == "done" else None
        outcome = f"top-1 {last:.1f} %" if last is not None else f"failed: {content['error']}"
        print(f"{method}, {percentage:g} %, seed {self.seed}: {outcome}", flush=True)


def _read(path):
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def report(args, experiment, folder, dense):
    for checkpoint in (folder / "cells").glob("*.checkpoint"):  # of rounds, and of cells killed after their last step
        checkpoint.unlink()
    cells = [_read(file) for file in sorted((folder / "cells").glob("*_seed-*.json"))]
    sweep = {"arguments": vars(args), "environment": environment(experiment.device), "dense": dense, "cells": cells}
    paths = write_sweep(sweep, folder)
    print(sweep_table(sweep))
    print(*(str(path) for path in paths if path.suffix != ".pdf"), sep="\n")
    print(verdict(sweep))
    failed = sum(cell["status"] == "failed" for cell in cells)
    if failed:
        print(f"{failed} of {len(cells)} cells failed; results.md names them, --resume {folder} and the same arguments "
              "try them again", file=sys.stderr)  # fmt: skip
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
