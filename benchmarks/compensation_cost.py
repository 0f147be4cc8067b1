"""Seconds and peak memory of compensation against one epoch of training on the same images.

    python benchmarks/compensation_cost.py --images 1000 --percentage 30 --repeats 3

VGG-16 with BatchNorm at 32x32 on noise images. Training is one epoch of SGD with momentum at `--batch-size`, compensation
repairs the network after the given percentage of each layer's filters went at random, from batches of the same size. Each
part runs in a process of its own, in turn; memory is the growth of the process's peak resident size (ru_maxrss) beyond
model, images and libraries. One line a repeat, then the ratios of the medians: at most 1 is the aim.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ExperimentModels import build_model
from FilterCompensation import compensate
from FilterSurgery import ChannelGraph


def peak_bytes():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Start:
    """Clocks and peak memory at the start of a part. CPU seconds bear other programs on the machine better than wall time."""

    def __init__(self):
        self.wall, self.cpu, self.bytes = time.perf_counter(), time.process_time(), peak_bytes()

    def since(self):
        return {
            "wall seconds": time.perf_counter() - self.wall,
            "CPU seconds": time.process_time() - self.cpu,
            "peak bytes": peak_bytes() - self.bytes,
        }


def random_plan(graph, percentage):
    """`percentage` of the removable filters of every layer of a network without coupled layers."""
    plan = {}
    for name, info in graph.layers.items():
        removable = info.removable.nonzero().flatten()
        plan[name] = removable[torch.randperm(len(removable))[: round(len(removable) * percentage / 100)]].tolist()
    return plan


def train_epoch(model, batches):
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, nesterov=True, weight_decay=5e-4)
    model.train()
    for images, labels in batches:
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def run_part(args):
    """One part in this process; prints its seconds and the growth of its peak memory as JSON."""
    torch.manual_seed(0)
    model = build_model("vgg16_bn", 10, image_size=32, weights="none").model
    images = torch.randn(args.images, 3, 32, 32)
    labels = torch.randint(10, (args.images,))
    batches = list(zip(images.split(args.batch_size), labels.split(args.batch_size), strict=True))
    if args.part == "training":
        start = Start()
        train_epoch(model, batches)
    else:
        model.eval()
        graph = ChannelGraph(model, images[:1])
        plan = random_plan(graph, args.percentage)
        smaller = graph.remove(plan)
        kept = {name: sorted(set(range(graph.layers[name].filters)) - set(gone)) for name, gone in plan.items()}
        start = Start()
        compensate(model, smaller, batches, kept, progress=False)
    print(json.dumps(start.since()))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--percentage", type=float, default=30.0, help="of every layer's filters removed")
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--part", choices=("training", "compensation"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        return run_part(args)
    results = {"training": [], "compensation": []}
    for repeat in range(args.repeats):
        for part, measured in results.items():
            process = subprocess.run(
                [sys.executable, __file__, *sys.argv[1:], "--part", part], check=True, capture_output=True, text=True
            )
            measured.append(json.loads(process.stdout.splitlines()[-1]))
            print(f"{repeat + 1} {part:12s}", ", ".join(f"{value:.4g} {unit}" for unit, value in measured[-1].items()))
    for unit in measured[-1]:
        medians = {part: statistics.median(m[unit] for m in measured) for part, measured in results.items()}
        print(f"{unit}: compensation / training epoch = {medians['compensation'] / medians['training']:.2f}")


if __name__ == "__main__":
    main()
