"""CPU time to find the coupled channels of ResNet-50 and to cut a third of its units, against Torch-Pruning 1.6.1.

    pip install -r benchmarks/requirements.txt
    python benchmarks/surgery_speed.py --runs 9

Both sides build their graph and remove the same filters of every coupled group, from the same network, in one process.
`ChannelGraph` gives a new network, and compares it with the gated one unless `verify=False`; Torch-Pruning compares nothing and
cuts in place, so that it works on a copy, whose time is a line of its own. Runs alternate, the garbage collector is off
while the clock runs (as in `timeit`). Printed: the least of n runs, and the quartiles.
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


def ours(model, example, plan, verify):
    """Seconds to copy, to build and to cut, and the cut network."""
    start = time.process_time()
    graph = ChannelGraph(model, example, verify=verify)
    built = time.process_time()
    smaller = graph.remove(plan, verify=verify)
    return 0.0, built - start, time.process_time() - built, smaller


def theirs_in_place(model, example, roots):
    """The same by the dependency graph; `roots`: {layer name: filters}, one layer of every coupled group."""
    start = time.process_time()
    model = copy.deepcopy(model)
    copied = time.process_time()
    graph = torch_pruning.DependencyGraph().build_dependency(model, example)
    built = time.process_time()
    for name, filters in roots.items():
        layer = model.get_submodule(name)
        graph.get_pruning_group(layer, torch_pruning.prune_conv_out_channels, filters).prune()
    return copied - start, built - copied, time.process_time() - built, model


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
    low, _, high = statistics.quantiles(seconds, n=4)
    return f"{min(seconds) * 1e3:7.1f} ms (quartiles {low * 1e3:.1f} to {high * 1e3:.1f})"


def measured(tools, runs):
    """{name: [(build, cut, both, both and a copy)] of every run}; the first run of each warms up."""
    times, shapes = {name: [] for name in tools}, {}
    for run in range(runs + 1):
        for name, tool in tools.items():
            gc.collect()
            gc.disable()
            copying, build, cut, smaller = tool()
            gc.enable()
            shapes[name] = {name: tuple(p.shape) for name, p in smaller.named_parameters()}
            if run:
                times[name].append((build, cut, build + cut, copying + build + cut))
    if any(shape != shapes["Torch-Pruning"] for shape in shapes.values()):
        raise SystemExit("the networks differ in shape: the times cannot be compared")
    return times


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--runs", type=int, default=9, help="timed runs of each side")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = models.get_model(arguments.model, weights=None).eval()
    example = torch.randn(1, 3, 224, 224)
    plan, roots = same_removal(model, example)
    tools = {
        "proved": lambda: ours(model, example, plan, verify=True),
        "not proved": lambda: ours(model, example, plan, verify=False),
        "Torch-Pruning": lambda: theirs_in_place(model, example, roots),
    }
    times = measured(tools, arguments.runs)
    print(f"{arguments.model}, n = {arguments.runs} runs, one thread, torch {torch.__version__}")
    for part, label in enumerate(("build", "cut", "both", "both and a copy")):
        theirs = min(t[part] for t in times["Torch-Pruning"])
        for name, found in times.items():
            seconds = [t[part] for t in found]
            print(f"{label:15} {name:13} {spread(seconds)}   ratio {min(seconds) / theirs:.2f}")


if __name__ == "__main__":
    main()
