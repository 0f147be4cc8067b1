"""Two processes rank one network, also on one GPU: the scores equal those of one process, and the time is shorter.

    torchrun --standalone --nproc-per-node 2 benchmarks/sharded_ranking.py --device cuda

The processes talk by gloo, as nccl wants a GPU for each. Printed: the largest difference to the scores of one process,
relative to the largest score, and the seconds of both. Fails where a score differs by more than 1e-4.
"""

import argparse
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from EnhancedFilterPruner import EnhancedFilterPruner
from taylor_pruning.experiment.models import build_model


def ranked(model, batches):
    """Scores [units] of order 2 and seconds."""
    pruner = EnhancedFilterPruner(model, batches[0][0][:1], 2, progress=False)
    start = time.perf_counter()
    scores = pruner.rank(batches).scores()
    return scores.double().cpu(), time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--batch-size", type=int, default=128)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    model = build_model("vgg16_bn", 10, image_size=32, weights="none").model.eval().to(arguments.device)
    images = torch.randn(arguments.images, 3, 32, 32)
    labels = torch.randint(10, (arguments.images,))
    batches = [
        (x.to(arguments.device), y.to(arguments.device))
        for x, y in zip(images.split(arguments.batch_size), labels.split(arguments.batch_size), strict=True)
    ]
    ranked(model, batches[:2])  # warm-up
    alone, seconds_alone = ranked(model, batches)
    dist.init_process_group("gloo")
    together, seconds_together = ranked(model, batches)
    difference = ((together - alone).abs().max() / alone.abs().max()).item()
    if dist.get_rank() == 0:
        print(f"{dist.get_world_size()} processes on {arguments.device}: scores differ by {difference:.1e} of the largest, "
              f"{seconds_together:.2f} s against {seconds_alone:.2f} s of one (both at once)")  # fmt: skip
    dist.destroy_process_group()
    return int(not difference <= 1e-4)


if __name__ == "__main__":
    sys.exit(main())
