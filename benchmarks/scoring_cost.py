"""What scores and the selection cost: against a plain pass, and how it grows.

    python benchmarks/scoring_cost.py                                  # 10 classes, VGG-16 with BatchNorm at 32 pixels
    python benchmarks/scoring_cost.py --model resnet18 --classes 1000 --image-size 64
    python benchmarks/scoring_cost.py --growth                         # fitted exponents

The first two: seconds and peak memory of scores of `--order`, over one pass of forward and backward with weight
gradients over the same noise images; memory is the growth of the process's peak resident size beyond model and images,
that of scoring less the collected directions. With many classes the head is scaled until the predictions have
`--entropy` nats on the mean, as a trained network's: the curvature for which random directions stand depends on it.
"""

import argparse
import json
import math
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

from measuring import Start, in_turn, print_ratios

from EnhancedFilterPruner import EnhancedFilterPruner
from taylor_pruning.experiment.models import build_model, head_name
from taylor_pruning.scoring.collecting import CLASS_PROBES, Wanted, collect_directions
from taylor_pruning.scoring.taylor import Directions, class_basis
from taylor_pruning.selection.constraints import Constraints, Selection
from taylor_pruning.selection.greedy import select_jointly
from taylor_pruning.surgery.graph import ChannelGraph


def network(name, classes, image_size, images, entropy):
    """A network with random weights in evaluation mode, its head scaled to the mean entropy of the predictions."""
    torch.manual_seed(0)
    model = build_model(name, classes, image_size=image_size, weights="none").model
    with torch.no_grad():
        model(images)  # BatchNorm statistics of these images, for activations of a sensible scale
        model.eval()
        logits = model(images)
        low, high = 0.0, 1e6
        for _ in range(60):
            middle = math.sqrt(max(low, 1e-6) * high)
            p = (logits * middle).softmax(1)
            if -(p * p.clamp_min(1e-30).log()).sum(1).mean() > entropy:
                low = middle
            else:
                high = middle
        head = model.get_submodule(head_name(model))
        head.weight.mul_(middle)
        head.bias.mul_(middle)
    return model


def warm_up(model, images, labels, batch_size):
    """On a GPU the first pass pays for libraries and algorithms; on a CPU nothing is done."""
    if images.is_cuda:
        F.cross_entropy(model(images[:batch_size]), labels[:batch_size]).backward()
        model.zero_grad(set_to_none=True)


def run_part(arguments):
    torch.manual_seed(0)
    device, size = torch.device(arguments.device), arguments.batch_size
    images = torch.randn(arguments.images, 3, arguments.image_size, arguments.image_size)
    labels = torch.randint(arguments.classes, (arguments.images,)).to(device)
    model = network(arguments.model, arguments.classes, arguments.image_size, images[:size], arguments.entropy).to(
        device
    )
    images = images.to(device)
    warm_up(model, images, labels, size)
    batches = list(zip(images.split(size), labels.split(size), strict=True))
    graph, start = ChannelGraph(model, images[:1]), Start(device)
    if arguments.part == "pass":
        for x, y in batches:
            F.cross_entropy(model(x), y).backward()
        print(json.dumps(start.since()))
        return
    pruner = EnhancedFilterPruner(
        model, images[:1], arguments.order, graph=graph, class_probes=arguments.class_probes, progress=False
    )
    directions = pruner.rank(batches, batches if arguments.repairs else None).directions
    measured = start.since()
    kept = directions.coordinates.nbytes
    print(json.dumps({**measured, "peak bytes": measured["peak bytes"] - kept, "direction bytes": kept,
                      "sampled curvature": directions.sampled_curvature}))  # fmt: skip


# ------------------------------------------------------------------------------------------------------ growth


def seconds(action, repeats=3):
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        action()
        times.append(time.perf_counter() - start)
    return min(times)


def scoring_seconds(images=64, classes=10, image_size=32, model="vgg11_bn"):
    x, y = torch.randn(images, 3, image_size, image_size), torch.randint(classes, (images,))
    net = network(model, classes, image_size, x[:16], 1.0)
    graph = ChannelGraph(net, x[:1])
    batches = list(zip(x.split(32), y.split(32), strict=True))
    return seconds(lambda: collect_directions(net, graph, batches, Wanted(CLASS_PROBES), progress=False))


def selection_seconds(order, samples=1000, units=4224, classes=10, percentage=50):
    """Selection on VGG-16's graph, or of the layer widths that give that many units, from random directions."""
    torch.manual_seed(0)
    width = units / 4224
    model = torch.nn.Sequential()
    inputs = 3
    for filters in [64] * 2 + [128] * 2 + [256] * 3 + [512] * 6:
        filters = round(filters * width)
        model.append(torch.nn.Conv2d(inputs, filters, 1)).append(torch.nn.ReLU())
        inputs = filters
    model.append(torch.nn.Flatten()).append(torch.nn.Linear(inputs, classes))
    graph = ChannelGraph(model, torch.randn(1, 3, 1, 1))
    labels, logits = torch.randint(classes, (samples,)), torch.randn(samples, classes) * 3
    basis, sampled = class_basis(logits, labels, CLASS_PROBES, 2 * torch.randint(2, logits.shape) - 1)
    coordinates = torch.randn(samples, len(graph.units), basis.shape[2]) / len(graph.units) ** 0.5
    directions = Directions(coordinates, basis, logits, labels, sampled)
    return seconds(lambda: select_jointly(Selection(graph, percentage, Constraints()), directions, order), 1)


def exponent(sizes, times):
    """Slope of log(time) over log(size), least squares."""
    x, y = torch.tensor(sizes, dtype=torch.float64).log(), torch.tensor(times, dtype=torch.float64).log()
    x = x - x.mean()
    return ((x * (y - y.mean())).sum() / x.square().sum()).item()


def growth():
    print(f"| what | size | seconds | exponent |\n|---|---|---|---|  ({torch.get_num_threads()} threads)")
    studies = [("scoring, images", scoring_seconds, "images", (64, 128, 256)),
               ("scoring, pixels a side", scoring_seconds, "image_size", (32, 64, 128)),
               ("scoring, classes (12 probes at most)", scoring_seconds, "classes", (10, 20, 40))]  # fmt: skip
    for order in (2, 3):
        for key, sizes in (("samples", (500, 1000, 2000)), ("units", (2112, 4224, 8448)), ("classes", (5, 10, 20))):
            studies.append((f"selection of 50 %, order {order}, {key}",
                            lambda order=order, **size: selection_seconds(order, **size), key, sizes))  # fmt: skip
    for title, action, key, sizes in studies:
        times = [action(**{key: size}) for size in sizes]
        print(f"| {title} | {' / '.join(map(str, sizes))} | {' / '.join(f'{t:.2f}' for t in times)} | "
              f"{exponent(sizes, times):.2f} |", flush=True)  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vgg16_bn")
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--class-probes", type=int, help="directions of every sample; default: that of the order")
    parser.add_argument("--order", type=int, default=2)
    parser.add_argument("--entropy", type=float, default=1.0, help="nats, of the predictions")
    parser.add_argument("--repairs", action="store_true", help="score what compensation cannot repair")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--growth", action="store_true")
    parser.add_argument("--part", choices=("pass", "scoring"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part:
        run_part(arguments)
    elif arguments.growth:
        growth()
    else:
        results = in_turn(__file__, sys.argv[1:], ("pass", "scoring"), arguments.repeats)
        print_ratios(results, "scoring", "pass")
        cpu = [statistics.median(m["CPU seconds"] for m in results[part]) for part in ("scoring", "pass")]
        print(f"passes: {cpu[0] / cpu[1]:.2f} (CPU seconds)")
        print(f"random directions stand for {results['scoring'][0]['sampled curvature']:.2%} of the curvature")


if __name__ == "__main__":
    main()
