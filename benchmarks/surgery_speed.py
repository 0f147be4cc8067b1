"""Time to find the coupled channels of ResNet-50 and to cut a third of its units, against Torch-Pruning 1.6.1.

    pip install -r benchmarks/requirements.txt
    python benchmarks/surgery_speed.py --runs 9

Both sides remove the same filters. `ChannelGraph.remove` gives a new network; Torch-Pruning cuts in place, so that it
works on a copy, whose time is a line of its own. Runs alternate, the garbage collector is off while the clock runs (as in
`timeit`). Printed: the median and the quartiles over n runs.
"""

import argparse
import copy
import gc
import statistics
import sys
import time
from pathlib import Path

import torch
import torch_pruning
from torchvision import models

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from taylor_pruning.surgery.graph import ChannelGraph


def ours(model, example, plan):
    """Seconds to copy, to build and to cut, and the cut network."""
    start = time.perf_counter()
    graph = ChannelGraph(model, example)
    built = time.perf_counter()
    smaller = graph.remove(plan)
    return 0.0, built - start, time.perf_counter() - built, smaller


def theirs_in_place(model, example, roots):
    """The same by the dependency graph; `roots`: {layer name: filters}, one layer of every coupled group."""
    start = time.perf_counter()
    model = copy.deepcopy(model)
    copied = time.perf_counter()
    graph = torch_pruning.DependencyGraph().build_dependency(model, example)
    built = time.perf_counter()
    for name, filters in roots.items():
        layer = model.get_submodule(name)
        graph.get_pruning_group(layer, torch_pruning.prune_conv_out_channels, filters).prune()
    return copied - start, built - copied, time.perf_counter() - built, model


def same_removal(model, example, every=3):
    """A plan that removes every third unit, and the same as one layer of every coupled group."""
    graph = ChannelGraph(model, example)
    units = [unit for unit in graph.units if unit.index % every == 0]
    roots = {}
    for unit in units:
        name, index = unit.filters[0]
        roots.setdefault(name, []).append(index)
    return graph.plan_of([unit.index for unit in units]), roots


def spread(seconds):
    low, median, high = statistics.quantiles(seconds, n=4)
    return f"{median * 1e3:7.1f} ms (quartiles {low * 1e3:.1f} to {high * 1e3:.1f})"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--runs", type=int, default=9, help="timed runs of each side")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    model = models.get_model(arguments.model, weights=None).eval()
    example = torch.randn(1, 3, 224, 224)
    plan, roots = same_removal(model, example)

    times = {ours: [], theirs_in_place: []}
    shapes = {}
    for run in range(arguments.runs + 1):  # the first one warms up
        for tool, removal in ((ours, plan), (theirs_in_place, roots)):
            gc.collect()
            gc.disable()
            copying, build, cut, smaller = tool(model, example, removal)
            gc.enable()
            shapes[tool] = {name: tuple(p.shape) for name, p in smaller.named_parameters()}
            if run:
                times[tool].append((build, cut, build + cut, copying + build + cut))
    if shapes[ours] != shapes[theirs_in_place]:
        raise SystemExit("the two networks differ in shape: the times cannot be compared")

    print(f"{arguments.model}, n = {arguments.runs} runs, {arguments.threads} thread(s), torch {torch.__version__}")
    for part, label in enumerate(("build", "cut", "both", "both and a copy")):
        mine, theirs = ([t[part] for t in times[tool]] for tool in (ours, theirs_in_place))
        ratio = statistics.median(mine) / statistics.median(theirs)
        print(f"{label:15} ours {spread(mine)}   Torch-Pruning {spread(theirs)}   ratio {ratio:.2f}")


if __name__ == "__main__":
    main()
