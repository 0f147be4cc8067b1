"""Parts of torchvision's detectors and segmentation networks, as they are: 30 % of the parameters of the backbone go.

    python benchmarks/detectors.py                                   # all five, random weights, no downloads
    python benchmarks/detectors.py --networks ssdlite320_mobilenet_v3_large

Of every network a line says how many parameters its backbone had and has, the relative difference (norms) of the cut
network's outputs from those with closed gates, which must be rounding, and from the dense network's, which must not, and how
many of the backbone's tensors a training step changes.
"""

import argparse
import math
import sys
import time
from pathlib import Path

import torch
import torchvision

sys.path[:0] = [str(Path(__file__).parent.parent)]

from taylor_pruning.selection.constraints import Constraints, Selection
from taylor_pruning.selection.greedy import select_by_score
from taylor_pruning.surgery.parts import PartsGraph
from taylor_pruning.tasks.dense import Segmentation
from taylor_pruning.tasks.detection import Detection
from taylor_pruning.tasks.task import flatten
from taylor_pruning.training.fine_tuning import reestimate_batchnorm

DETECTORS = ("fasterrcnn_mobilenet_v3_large_fpn", "retinanet_resnet50_fpn", "ssdlite320_mobilenet_v3_large")
SEGMENTERS = ("deeplabv3_mobilenet_v3_large", "fcn_resnet50")


def network(name, pixels):
    """(network, task, a batch of two images), in double precision."""
    torch.manual_seed(0)
    options = {"weights": None, "weights_backbone": None}
    images = torch.rand(2, 3, pixels, pixels, dtype=torch.float64)
    if name in SEGMENTERS:
        model = torchvision.models.get_model(name, num_classes=5, **options)
        return model.double(), Segmentation(), (images, torch.randint(5, (2, pixels, pixels)))
    sizes = {} if name.startswith("ssdlite") else {"min_size": pixels, "max_size": pixels}
    model = torchvision.models.get_model(name, num_classes=5, **options, **sizes)
    box = torch.tensor([[1, 1, 3, 3]], dtype=torch.float64) * pixels / 4
    targets = [{"boxes": box, "labels": torch.tensor([1])}] * 2
    return model.double(), Detection(), (list(images), targets)


def judged(outputs):
    """What of the outputs is compared: what the heads say, without losses that draw anchors."""
    return flatten(outputs["heads"] if isinstance(outputs, dict) else outputs)


def examine(name, pixels, share):
    model, task, batch = network(name, pixels)
    start = time.process_time()
    reestimate_batchnorm(
        model, [batch], task
    )  # without it, signals of random weights fade and no cut changes the outputs
    model.eval()
    graph = PartsGraph(model, ["backbone"], lambda net: task.forward(net, batch), 2)
    constraints = Constraints(budget="params", layer_bound=math.inf)
    scores = torch.rand(len(graph.units), generator=torch.Generator().manual_seed(0))
    units = select_by_score(Selection(graph, 100 * share, constraints), scores)
    smaller = graph.remove(graph.plan_of(units))
    gates = torch.ones(2, len(graph.units))
    gates[:, units] = 0
    with torch.no_grad():
        dense = judged(task.forward(model, batch))
        with graph.gated(gates):
            closed = judged(task.forward(model, batch))
        cut = judged(task.forward(smaller.eval(), batch))
        smaller.eval()(batch[0])
    before, after = (sum(p.numel() for p in net.backbone.parameters()) for net in (model, smaller))
    smaller.train()
    optimizer = torch.optim.SGD(smaller.parameters(), 1e-3)
    old = [p.detach().clone() for p in smaller.backbone.parameters()]  # frozen layers and tiny gradients change none
    task.loss(task.forward(smaller, batch), batch).mean().backward()
    optimizer.step()
    moved = sum(bool((p != o).any()) for p, o in zip(smaller.backbone.parameters(), old, strict=True))
    error, change = (((cut - other).norm() / other.norm()).item() for other in (closed, dense))
    gone, seconds = 100 * (1 - after / before), time.process_time() - start
    print(f"{name:36s} backbone {before:>11,} -> {after:>11,} ({gone:.1f} % gone), cut against closed gates {error:.1e}, "
          f"against dense {change:.1e}, {moved} of {len(old)} tensors trained, {seconds:.0f} CPU s", flush=True)  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", default=[*DETECTORS, *SEGMENTERS], choices=[*DETECTORS, *SEGMENTERS])
    parser.add_argument("--pixels", type=int, default=160, help="side of the images; SSDlite scales to 320")
    parser.add_argument("--share", type=float, default=0.3, help="of the backbone's parameters that goes")
    arguments = parser.parse_args()
    for name in arguments.networks:
        examine(name, arguments.pixels, arguments.share)


if __name__ == "__main__":
    main()
