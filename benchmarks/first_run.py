"""Does the first run convince? The embedded data's dense network, trained on one thread and on two.

    python benchmarks/first_run.py --seeds 0 1

For every number of threads and seed: the seconds of dense training with its data, top-1 of the network, and top-1 after two
more epochs at the learning rate of fine-tuning. A converged network gains less than a point from them, and the number
of threads, which changes the order of sums, makes less than 1.5 points of difference. Each network is trained in a
process and a cache folder of its own.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from taylor_pruning.experiment.arguments import parse
from taylor_pruning.experiment.command import ExperimentTask
from taylor_pruning.experiment.setup import prepare
from taylor_pruning.training.fine_tuning import Recipe, fine_tune


def measure(seed: int, model: str) -> dict:
    """What one process finds."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder
        start, cpu = time.perf_counter(), time.process_time()
        command = parse(ExperimentTask, "", ["--seed", str(seed), "--model", model, "--device", "cpu", "--quiet"])
        experiment = prepare(command, Path(folder), torch.device("cpu"))
        seconds = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu}
        train = experiment.loader(experiment.data.train, shuffle=True, seed=seed + 1)
        val = experiment.loader(experiment.data.val)
        history = fine_tune(experiment.built.model, train, val, Recipe(epochs=2), progress=False)
        top1 = [epoch["top1"] for epoch in history.epochs]
        return {"threads": torch.get_num_threads(), "seed": seed, **seconds, "top1": top1[0], "two_more": top1[-1]}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--model", default="vgg7_bn")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)  # in this process
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.seeds[0], arguments.model)))
        return
    print("| threads | seed | seconds | CPU seconds | top-1 | after two more epochs |\n|---|---|---|---|---|---|")
    for threads in arguments.threads:
        for seed in arguments.seeds:
            child = [sys.executable, __file__, "--one", "--seeds", str(seed), "--model", arguments.model]
            environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
            out = subprocess.run(child, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
            found = json.loads(out.splitlines()[-1])
            times = f"{found['seconds']:.0f} | {found['cpu_seconds']:.0f}"
            print(f"| {threads} | {seed} | {times} | {found['top1']:.1f} | {found['two_more']:.1f} |", flush=True)


if __name__ == "__main__":
    main()
