"""Seconds and peak memory of compensation against one epoch of training on the same images.

    python benchmarks/compensation_cost.py --images 1000 --percentage 50 --repeats 3

VGG-16 with BatchNorm at 32x32 on noise images. Training is one epoch of SGD with momentum at `--batch-size`, compensation
repairs the network after the given percentage of each layer's filters was removed at random, from batches of the same
size. Each part runs in a process of its own, in turn; memory is the growth of the process's peak resident size (ru_maxrss)
beyond model, images and libraries. One line a repeat, then the ratios of the medians: at most 1 is the aim.
"""

import argparse
import copy
import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

from measuring import Start, in_turn, print_ratios

from taylor_pruning.experiment.models import build_model
from taylor_pruning.experiment.results import all_filters, remaining
from taylor_pruning.repair.compensation import compensate
from taylor_pruning.surgery.graph import ChannelGraph


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
    device = torch.device(args.device)
    model = build_model("vgg16_bn", 10, image_size=32, weights="none").model.to(device)
    images = torch.randn(args.images, 3, 32, 32).to(device)
    labels = torch.randint(10, (args.images,)).to(device)
    batches = list(zip(images.split(args.batch_size), labels.split(args.batch_size), strict=True))
    if device.type == "cuda":  # the first pass pays for libraries and algorithms
        train_epoch(copy.deepcopy(model), batches[:1])
    if args.part == "training":
        start = Start(device)
        train_epoch(model, batches)
    else:
        model.eval()
        graph = ChannelGraph(model, images[:1])
        plan = random_plan(graph, args.percentage)
        smaller = graph.remove(plan)
        kept = remaining(all_filters(graph), plan)
        start = Start(device)
        compensate(model, smaller, batches, kept, progress=False)
    print(json.dumps(start.since()))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--percentage", type=float, default=50.0, help="of every layer's filters removed")
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--part", choices=("training", "compensation"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        return run_part(args)
    results = in_turn(__file__, sys.argv[1:], ("training", "compensation"), args.repeats)
    print_ratios(results, "compensation", "training")


if __name__ == "__main__":
    main()
