"""Does the speed-up arrive? Latency of pruned networks against their multiply-accumulates, with and without --round-to 8.

    python benchmarks/latency.py --model resnet50 --image-size 224 --batch-size 8

Filters are removed by L2 magnitude with the default layer bound, from random weights: only shapes matter here. The networks
alternate, `--repeats` times each. Printed: the ratio of each median to the dense network's, and the interquartile range.
"""

import argparse
import statistics
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from taylor_pruning.experiment.models import build_model
from taylor_pruning.selection.baselines import magnitude
from taylor_pruning.selection.constraints import Constraints, Selection
from taylor_pruning.selection.greedy import select_by_score
from taylor_pruning.surgery.graph import ChannelGraph
from taylor_pruning.timing import seconds_of
from taylor_pruning.training.profile import profile


@torch.no_grad()
def milliseconds(model, images):
    return 1000 * seconds_of(lambda: model(images), images.device)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--percentages", type=float, nargs="+", default=[10, 30, 50, 70])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    dense = build_model(arguments.model, 1000, image_size=arguments.image_size, weights="none").model.eval()
    images = torch.randn(arguments.batch_size, 3, arguments.image_size, arguments.image_size)
    graph = ChannelGraph(dense, images[:1])
    scores = magnitude(graph)
    networks = {("dense", 1): dense}
    for percentage in arguments.percentages:
        for step in (1, 8):
            chosen = select_by_score(Selection(graph, percentage, Constraints(round_to=step)), scores)
            networks[f"{percentage:g} %", step] = graph.remove([graph.units[u] for u in chosen])
    macs = {key: profile(model, images[:1])["macs"] for key, model in networks.items()}
    times = {key: [] for key in networks}
    images = images.to(arguments.device)
    for model in networks.values():
        milliseconds(model.to(arguments.device), images)
    for _ in range(arguments.repeats):
        for key, model in networks.items():
            times[key].append(milliseconds(model, images))
    base = statistics.median(times["dense", 1])
    print(f"{arguments.model}, {arguments.batch_size} images of {arguments.image_size} pixels on {arguments.device}, "
          f"{torch.get_num_threads()} threads, n = {arguments.repeats}: dense {base:.1f} ms\n")  # fmt: skip
    print("| filters removed | multiple of | MACs left | time left | interquartile |\n|---|---|---|---|---|")
    for (name, step), values in times.items():
        low, middle, high = (value / base for value in statistics.quantiles(values, n=4))
        left = macs[name, step] / macs["dense", 1]
        print(f"| {name} | {step} | {left:.0%} | {middle:.0%} | {low:.0%} to {high:.0%} |")


if __name__ == "__main__":
    main()
