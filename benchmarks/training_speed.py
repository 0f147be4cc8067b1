"""Images a second of `fine_tune` against the strongest simple loop, for VGG-16 and for one with 5 % of its MACs.

    python benchmarks/training_speed.py --device cuda --images 50000
    python benchmarks/training_speed.py --device cpu --images 2048 --batch-sizes 64 256

The bare loop keeps the padded, normalised images on the device, crops and flips them there with one gather a batch, and
trains in the same precision and memory layout with fused SGD and the same cosine; it checks, logs, validates and saves
nothing. Both train vgg16_bn in its form for 32 pixels, on noise, in turn, `--repeats` times. A repeat is a training of
`--epochs` epochs, of which the first (memory, algorithms, CUDA graphs) is not counted but shown. Printed: medians of images
a second (wall clock), the ratio of each repeat's medians (median and range), and on a CPU the ratio of CPU seconds, which
other programs disturb less. On CUDA also `fine_tune` without CUDA graphs; with `--distil` also with the dense network's
soft labels, which take its forward in every step. The last lines compare epochs of the
two networks.
"""

import argparse
import copy
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from taylor_pruning.experiment.data import IMAGENET_MEAN, IMAGENET_STD, TensorImages
from taylor_pruning.experiment.loaders import make_loader
from taylor_pruning.experiment.models import build_model
from taylor_pruning.surgery.graph import ChannelGraph
from taylor_pruning.training.fine_tuning import Accuracy, Recipe, fine_tune
from taylor_pruning.training.profile import profile
from taylor_pruning.training.recipe import AMP_DTYPES

SIZE, CLASSES, PADDING = 32, 10, 4
SMALL_MACS = 0.05  # of the dense network's
KNOWN = Accuracy(10.0, 50.0, 2.3, 1)  # of the start, so that it is not evaluated


# ---------------------------------------------------------------------------------------------------- bare loop


class BareImages:
    """Random crops and flips of images that are on the device, padded and normalised."""

    def __init__(self, images: Tensor, labels: Tensor):
        mean, std = (torch.tensor(v, device=images.device).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
        self.images = F.pad((images / 255 - mean) / std, [PADDING] * 4, mode="reflect")
        self.labels = labels

    def epoch(self, batch_size: int):
        count, device = len(self.labels), self.images.device
        position = torch.arange(SIZE, device=device)
        channel = torch.arange(3, device=device).view(3, 1, 1)
        down, right = torch.randint(2 * PADDING + 1, (2, count, 1), device=device)
        columns = torch.where(torch.rand(count, 1, device=device) < 0.5, position, position.flip(0))
        for index in torch.randperm(count, device=device).split(batch_size):
            row = (down[index] + position)[:, None, :, None]
            column = (right[index] + columns[index])[:, None, None, :]
            yield self.images[index[:, None, None, None], channel, row, column], self.labels[index]


def bare_training(model: nn.Module, data: BareImages, recipe: Recipe, batch_size: int) -> list[float]:
    """Seconds of every epoch."""
    device = data.images.device
    layout = torch.channels_last if recipe.channels_last else torch.contiguous_format
    model.to(memory_format=layout).train()
    optimizer = torch.optim.SGD(model.parameters(), recipe.lr, 0.9, weight_decay=1e-4, nesterov=True, fused=True)
    step, total, seconds = 0, recipe.epochs * math.ceil(len(data.labels) / batch_size), []
    for _ in range(recipe.epochs):
        start = time.perf_counter()
        for images, labels in data.epoch(batch_size):
            optimizer.param_groups[0]["lr"] = recipe.lr * (0.5 + 0.5 * math.cos(math.pi * step / total))
            with torch.autocast(device.type, AMP_DTYPES[recipe.amp], enabled=recipe.amp is not None):
                loss = F.cross_entropy(model(images.contiguous(memory_format=layout)), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            step += 1
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return seconds


# ---------------------------------------------------------------------------------------------------- comparison


def networks(name: str) -> dict[str, nn.Module]:
    """The dense network, and one in which all layers keep the same share of their filters."""
    torch.manual_seed(0)
    dense = build_model(name, CLASSES, image_size=SIZE, weights="none").model
    example = torch.zeros(1, 3, SIZE, SIZE)
    graph = ChannelGraph(dense, example)
    share = math.sqrt(SMALL_MACS) * 0.98  # MACs go with the square, but the first layer's
    plan = {name: list(range(round(share * info.filters), info.filters)) for name, info in graph.layers.items()}
    small = graph.remove(plan)
    macs = [profile(model, example)["macs"] for model in (dense, small)]
    return {"dense": dense, f"{macs[1] / macs[0]:.1%} of the MACs": small}


@dataclass
class Times:
    """Of one contender, an entry a repeat."""

    images_per_second: list[float] = field(default_factory=list)
    first_epoch: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)

    def measure(self, train: Callable[[], list[float]], images: int) -> None:
        start = time.process_time()
        first, *others = train()
        self.cpu_seconds.append(time.process_time() - start)
        self.first_epoch.append(first)
        self.images_per_second.append(images / statistics.median(others))


def contenders(
    model: nn.Module, images: Tensor, labels: Tensor, recipe: Recipe, batch_size: int, teacher: nn.Module | None
) -> dict[str, Callable]:
    """{name: a training of a copy of the model that returns the seconds of its epochs}."""
    device = images.device
    noise = TensorImages(images, labels, padding=PADDING, flip=True)
    loader = make_loader(noise, batch_size, shuffle=True, seed=0, device=device)
    one_image = [(torch.zeros(1, 3, SIZE, SIZE, device=device), labels[:1])]

    def ours(teacher=None, **changes) -> list[float]:
        changed = Recipe(**{**vars(recipe), **changes})
        history = fine_tune(
            copy.deepcopy(model), loader, one_image, changed, teacher=teacher, before=KNOWN, progress=False
        )
        return [epoch["seconds"] for epoch in history.epochs[1:]]

    bare = BareImages(images, labels)
    found = {"fine_tune": ours, "bare loop": lambda: bare_training(copy.deepcopy(model), bare, recipe, batch_size)}
    if teacher is not None:
        found["distilled"] = lambda: ours(teacher, distillation_weight=0.5)
    if device.type == "cuda":
        found["without graphs"] = lambda: ours(cuda_graphs=False)
    return found


def ratio(ours: list[float], theirs: list[float]) -> str:
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def compare(model: nn.Module, teacher: nn.Module | None, images: Tensor, labels: Tensor, recipe: Recipe, arguments,
            batch_size: int) -> dict:  # fmt: skip
    trainings = contenders(model, images, labels, recipe, batch_size, teacher)
    times = {name: Times() for name in trainings}
    for repeat in range(arguments.repeats):
        for name in sorted(trainings, reverse=repeat % 2 == 1):
            times[name].measure(trainings[name], len(labels))
    return times


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--images", type=int, default=2048)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--amp", choices=("auto", "none", "bf16", "fp16"), default="auto")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--distil", action="store_true", help="also train with the dense network's soft labels")
    parser.add_argument("--model", default="vgg16_bn")
    arguments = parser.parse_args()
    if arguments.epochs < 2:
        parser.error("--epochs must be at least 2: the first is not counted")
    device = torch.device(arguments.device)
    amp = None if arguments.amp == "none" else arguments.amp
    recipe = Recipe(epochs=arguments.epochs, amp=amp).resolved(device)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (arguments.images, 3, SIZE, SIZE), dtype=torch.uint8, generator=generator).to(device)
    labels = torch.randint(CLASSES, (arguments.images,), generator=generator).to(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} thread(s)"
    print(f"{name}, torch {torch.__version__}, {recipe.amp or 'float32'}, channels-last {recipe.channels_last}, "
          f"{arguments.images} images, n = {arguments.repeats}\n")  # fmt: skip
    print(
        "| network | batch | bare loop (images/s) | trained by | images/s | to bare loop | CPU seconds | first epoch (s) |"
    )
    print("|---|---|---|---|---|---|---|---|")
    seconds = {}
    models = {network: model.to(device) for network, model in networks(arguments.model).items()}
    teacher = models["dense"] if arguments.distil else None
    for network, model in models.items():
        for size in arguments.batch_sizes:
            times = compare(model, teacher, images, labels, recipe, arguments, size)
            bare = times.pop("bare loop")
            seconds[network, size] = arguments.images / statistics.median(times["fine_tune"].images_per_second)
            for trainer, found in times.items():
                print(f"| {network} | {size} | {statistics.median(bare.images_per_second):.0f} | {trainer} | "
                      f"{statistics.median(found.images_per_second):.0f} | "
                      f"{ratio(found.images_per_second, bare.images_per_second)} | "
                      f"{ratio(found.cpu_seconds, bare.cpu_seconds)} | "
                      f"{statistics.median(found.first_epoch):.2f} |", flush=True)  # fmt: skip
    dense, small = dict.fromkeys(name for name, _ in seconds)
    print()
    for size in arguments.batch_sizes:
        share = seconds[small, size] / seconds[dense, size]
        print(
            f"batch {size}: an epoch of the small network takes {share:.2f} of the dense one's ({seconds[small, size]:.2f} s)"
        )


if __name__ == "__main__":
    main()
