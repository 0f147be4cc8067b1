"""What one pruning round costs, in passes of forward and backward over the same images: scores, selection, compensation.

    python benchmarks/round_cost.py                                                     # VGG-16 with BatchNorm, 32 pixels
    python benchmarks/round_cost.py --models mobilenet_v2 --image-size 224 --images 40 --classes 1000
    python benchmarks/round_cost.py --device cuda --models vgg16_bn resnet50 --images 1000 --batch-size 100 --profile

Noise images, random weights with the BatchNorm statistics of these images, one process, one row at a time. A pass has weight
gradients, as in training, and runs in the layout and precision of the model. Printed are seconds (on a CPU those of the
processor, which other programs disturb least; on a GPU those of the clock), the same in passes, the largest memory beyond
what was held before relative to that of a pass, the multiply-adds of convolutions and matrix products relative to three
forwards (a count, which no other program disturbs), and how often the host waited for a value of the device. Everything runs
once before it is measured on a GPU. The row of a whole round is EnhancedPruning.prune with default settings and one round,
with half as many validation images: the dense network is evaluated, the cut one before and after its repair.
"""

import argparse
import contextlib
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from EnhancedFilterPruner import EnhancedFilterPruner
from EnhancedPruning import EnhancedPruning, PruningSettings
from taylor_pruning.experiment.models import build_model
from taylor_pruning.experiment.results import all_filters, remaining
from taylor_pruning.memory import keep_freed_memory, peak_of
from taylor_pruning.repair.compensation import compensate
from taylor_pruning.surgery.graph import ChannelGraph


class HostWaits(TorchDispatchMode):
    """Counts the operations whose result the host reads, or whose size depends on values."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().split("::")[1].split(".")[0]
        self.count += name in ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "_unique2")
        return function(*args, **(kwargs or {}))


class Table:
    """`pass_flops`: of a forward and backward pass; PyTorch counts too many for weights of grouped convolutions."""

    def __init__(self, device, pass_flops):
        self.device, self.pass_flops, self.reference = device, pass_flops, None
        print(
            "| network | what | seconds | passes | work | memory | host waits |\n|---|---|---|---|---|---|---|",
            flush=True,
        )

    def clock(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()

    def row(self, network, what, action, prepare=lambda: None, profile=False):
        """Measures action(prepare()): time in one run, memory and waits in another; the first row is the reference."""
        if self.device.type == "cuda":
            action(prepare())
        given = prepare()
        start = self.clock()
        action(given)
        seconds = self.clock() - start
        given, waits, work = prepare(), HostWaits(), FlopCounterMode(display=False)
        counted = waits if self.device.type == "cuda" else contextlib.nullcontext()
        with peak_of(self.device) as taken, work, counted:
            action(given)
        found = seconds, work.get_total_flops() if self.reference else self.pass_flops, taken()
        self.reference = self.reference or found
        ratios = " | ".join(f"{a / max(b, 1e-9):.2f}" for a, b in zip(found, self.reference, strict=True))
        count = waits.count if self.device.type == "cuda" else "-"
        print(f"| {network} | {what} | {seconds:.3f} | {ratios} | {count} |", flush=True)
        if profile:
            given = prepare()
            activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
            with torch.profiler.profile(activities=activities[: 1 + (self.device.type == "cuda")]) as found:
                action(given)
            print(found.key_averages().table(sort_by="self_cpu_time_total", row_limit=12, max_name_column_width=40))


def measure(name, arguments, device):
    torch.manual_seed(0)
    size, classes = arguments.image_size, arguments.classes
    model = build_model(name, classes, image_size=size, weights="none").model.to(device)
    images = torch.randn(arguments.images, 3, size, size).to(device)
    labels = (torch.arange(arguments.images) % classes).to(device)
    batches = list(zip(images.split(arguments.batch_size), labels.split(arguments.batch_size), strict=True))
    with torch.no_grad():
        model(batches[0][0])
        model.eval()
        with FlopCounterMode(display=False) as work:
            model(images[:1])
    graph, table = ChannelGraph(model, images[:1]), Table(device, 3 * len(images) * work.get_total_flops())

    def passes(_):
        for x, y in batches:
            F.cross_entropy(model(x), y).backward()
        model.zero_grad(set_to_none=True)

    def pruner():
        return EnhancedFilterPruner(model, images[:1], arguments.order, graph=graph, progress=False)

    ranked = pruner()
    table.row(name, "forward and backward", passes)
    table.row(name, f"scores, order {arguments.order}", lambda p: p.rank(batches, batches), pruner, arguments.profile)
    ranked.rank(batches, batches)
    table.row(name, f"selection of {arguments.percentage:g} %", lambda _: ranked.select(arguments.percentage))
    plan = graph.plan_of(ranked.select(arguments.percentage))
    kept = remaining(all_filters(graph), plan)

    def repair(smaller):
        compensate(model, smaller, batches, kept, progress=False)

    table.row(name, "compensation", repair, lambda: graph.remove(plan), arguments.profile)
    settings = PruningSettings(rounds=1)

    def pipeline():
        half = batches[: -(-len(batches) // 2)]
        return EnhancedPruning(model, batches, half, calibration=batches, settings=settings, progress=False)

    if arguments.whole:
        table.row(name, "a whole round", lambda pruning: pruning.prune(arguments.percentage, arguments.order), pipeline)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["vgg16_bn"])
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--order", type=int, default=2)
    parser.add_argument("--percentage", type=float, default=50.0)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--whole", action="store_true", help="also a whole round, with tracing and evaluation")
    parser.add_argument("--profile", action="store_true", help="also print what operations take")
    arguments = parser.parse_args()
    keep_freed_memory()  # as the command line does
    device = torch.device(arguments.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} thread(s)"
    print(f"{name}, torch {torch.__version__}, {arguments.images} images of {arguments.image_size} pixels, "
          f"{arguments.classes} classes, batches of {arguments.batch_size}\n")  # fmt: skip
    for model in arguments.models:
        measure(model, arguments, device)


if __name__ == "__main__":
    main()
