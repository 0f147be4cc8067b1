"""Accuracy at equal multiply-accumulates against the number of calibration images, for every Taylor order and baselines.

    python benchmarks/orders.py --data DIR --device cuda --workers 6 --minutes 7 --output orders.json
    python benchmarks/orders.py --output orders.json --minutes 0            # tables and plot of what there is

DIR holds cifar10-jpeg.tar.xz, imagenette.tar, imagenet-one-a-class.tar, resnet32.th, resnet44.th and
mobilenet_v2_imagenet.pth. Every network is pruned to shares of its multiply-accumulates in five rounds, compensated after
each, with widths left free; labels are needed by order 1 and by fine-tuning alone. Images that score are the first of
those that compensate. Baselines choose their own widths under the same budget, in one shot, and are compensated alike.
Cells run in order of importance, one a worker; an interrupted run continues with the unfinished cells.
"""

import argparse
import copy
import json
import multiprocessing
import statistics
import sys
import tarfile
import time
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from functools import lru_cache
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]

from cifar_resnets import cifar_resnet
from measuring import started

from EnhancedPruning import EnhancedPruning, PruningSettings
from taylor_pruning.experiment.data import TensorImages
from taylor_pruning.experiment.loaders import make_loader
from taylor_pruning.experiment.models import build_model
from taylor_pruning.experiment.results import all_filters, remaining
from taylor_pruning.repair.compensation import compensate
from taylor_pruning.report.json_files import write_json
from taylor_pruning.training.fine_tuning import Recipe, evaluate, fine_tune
from taylor_pruning.training.profile import profile

ORDERS = [f"order {order}" for order in (1, 2, 3)]
HELD_OUT = 500  # training images that choose the epoch of fine-tuning; compensation does not use them
VGG_EPOCHS, VGG_LR = 12, 0.1


@dataclass(frozen=True)
class Subject:
    """A network, its images and how it is pruned.

    levels: per cent of the multiply-accumulates that are left. tuning: images, epochs, learning rate; None: no training.
    tests: {name of the figure: file of images}. max_scoring: more images than these cannot score.
    """

    images: str
    tests: dict
    levels: tuple
    compensation: int
    batch: int
    tuning: tuple | None = None
    max_scoring: int = 1000


CIFAR = {"images": "cifar_train", "tests": {"top1": "cifar_test"}, "levels": (53, 35), "compensation": 1000, "batch": 500,
         "tuning": (8000, 2, 0.02)}  # fmt: skip
SUBJECTS = {
    "resnet32": Subject(**CIFAR),
    "resnet44": Subject(**CIFAR),
    "vgg11_bn": Subject(**CIFAR),
    "mobilenet_v2": Subject("nette_train", {"top1": "nette_val"}, (50, 35, 25), 240, 60, (1100, 2, 0.005), 240),
    "mobilenet_v2, one image a class": Subject(
        "one", {"top1": "one_rest", "imagenette top1": "nette_val"}, (80,), 240, 60, None, 240
    ),
}
BASELINES = ("magnitude", "lamp")


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", help="folder of the archives and weights")
    parser.add_argument("--scratch", default="/tmp/orders", help="folder for decoded images and the trained VGG")
    parser.add_argument("--networks", nargs="+", choices=SUBJECTS, default=list(SUBJECTS))
    parser.add_argument("--methods", nargs="+", choices=(*ORDERS, *BASELINES), default=[*ORDERS, *BASELINES])
    parser.add_argument("--images", type=int, nargs="+", default=[40, 10, 1000, 100, 20, 300], help="images that score, "
                        "in order of importance")  # fmt: skip
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=PruningSettings.rounds)
    parser.add_argument("--compensation-images", type=int, help="instead of each network's own number")
    parser.add_argument("--test-images", type=int, default=2000)
    parser.add_argument("--fine-tune-images", type=int, help="instead of each network's own number; 0: no fine-tuning")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--workers", type=int, default=1, help="processes that share the device")
    parser.add_argument("--minutes", type=float, default=60, help="no cell starts that would probably end later")
    parser.add_argument("--output", default="orders.json", help="the plot is written beside it")
    return parser.parse_args()


# ------------------------------------------------------------------------------------------------------------ data


def decode(path):
    """uint8 [H, W, 3], of large images the centre of 224 pixels."""
    with Image.open(path) as image:
        pixels = np.array(image.convert("RGB"))
    top, left = (max(0, side - 224) // 2 for side in pixels.shape[:2])
    return pixels[top : top + 224, left : left + 224]


def in_turn(folder, each):
    """[(path, its class)] of `each` images a class, the classes in turn."""
    classes = sorted(path for path in folder.iterdir() if path.is_dir())
    files = [sorted(path.iterdir())[:each] for path in classes]
    return [(file, file.parent.name) for group in zip(*files, strict=True) for file in group]


def prepare(arguments):
    """Unpacks and decodes what the networks need into the scratch folder, as (uint8 images, labels)."""
    scratch, data = Path(arguments.scratch), Path(arguments.data)
    scratch.mkdir(parents=True, exist_ok=True)
    wanted = {SUBJECTS[name].images for name in arguments.networks}
    sets = {}
    if "cifar_train" in wanted:
        sets |= {
            "cifar_train": ("cifar10-jpeg.tar.xz", "train", 2000),
            "cifar_test": ("cifar10-jpeg.tar.xz", "test", 1000),
        }
    if wanted & {"nette_train", "one"}:
        sets |= {
            "nette_train": ("imagenette.tar", "nette/train", 120),
            "nette_val": ("imagenette.tar", "nette/val", 40),
        }
    if "one" in wanted:
        sets["one"] = ("imagenet-one-a-class.tar", "one_a_class", None)
    synsets = (Path(__file__).parent.parent / "taylor_pruning/experiment/imagenet_synsets.txt").read_text().split()
    for name, (archive, folder, each) in sets.items():
        if (scratch / f"{name}.pt").exists():
            continue
        if not (scratch / folder).exists():
            with tarfile.open(data / archive) as tar:
                tar.extractall(scratch, filter="data")
        if each is None:
            items = [(path, path.stem) for path in sorted((scratch / folder).iterdir())]
        else:
            items = in_turn(scratch / folder, each)
        names = synsets if items[0][1] in synsets else sorted({name for _, name in items})
        place = {name: label for label, name in enumerate(names)}
        with ThreadPool() as pool:
            images = torch.from_numpy(np.stack(pool.map(decode, [path for path, _ in items]))).permute(0, 3, 1, 2)
        torch.save((images.contiguous(), torch.tensor([place[name] for _, name in items])), scratch / f"{name}.pt")


@lru_cache(maxsize=8)
def images_of(scratch, name):
    images, labels = torch.load(Path(scratch) / f"{name}.pt", weights_only=True)
    return TensorImages(images, labels)


def loader(images, index, batch, device, *, padding=0, flip=False, **settings):
    part = TensorImages(images.images[index], images.targets[index], padding=padding, flip=flip)
    return make_loader(part, batch, device=device, **settings)


@lru_cache(maxsize=8)
def dense_network(name, data, scratch, device):
    """The dense network in eval mode."""
    name = name.partition(",")[0]
    if name.startswith("resnet"):
        model = cifar_resnet(name, Path(data) / f"{name}.th")
    elif name == "mobilenet_v2":
        weights = Path(data) / "mobilenet_v2_imagenet.pth"
        model = build_model(name, 1000, image_size=224, weights=weights, imagenet_labels=True).model.float()
    else:
        model = build_model(name, 10, image_size=32, weights=Path(scratch) / f"{name}.pth").model
    return model.eval().to(device)


def train_vgg(arguments):
    """Trains the VGG on the decoded CIFAR images, once, and keeps it."""
    path = Path(arguments.scratch) / "vgg11_bn.pth"
    if path.exists():
        return
    torch.manual_seed(0)
    device, images = torch.device(arguments.device), images_of(arguments.scratch, "cifar_train")
    model = build_model("vgg11_bn", 10, image_size=32, weights="none").model.to(device)
    train = loader(images, slice(0, -HELD_OUT), 128, device, shuffle=True, padding=4, flip=True)
    held_out = loader(images, slice(-HELD_OUT, None), 250, device)
    amp = "bf16" if device.type == "cuda" else None
    fine_tune(model, train, held_out, Recipe(epochs=VGG_EPOCHS, lr=VGG_LR, weight_decay=5e-4, amp=amp), progress=False)
    torch.save(model.state_dict(), path)


# ----------------------------------------------------------------------------------------------------------- one cell


@dataclass(frozen=True)
class Cell:
    network: str
    method: str
    images: int | None  # None: a baseline, which sees no images
    seed: int

    def __str__(self):
        return f"{self.network:31s} {self.method:9s} {self.images or '-':>4} images, seed {self.seed}"


@dataclass
class Draw:
    """The images of one seed: those that score are the first of those that compensate."""

    scoring: list
    compensation: list
    rest: torch.Tensor  # indices of all others
    tests: dict = field(default_factory=dict)


def drawn(subject, cell, arguments):
    device, everything = arguments.device, images_of(arguments.scratch, subject.images)
    generator = torch.Generator().manual_seed(cell.seed)
    classes = 1 if subject.images == "one" else 10
    blocks = torch.randperm(len(everything) // classes, generator=generator)
    order = (blocks[:, None] * classes + torch.arange(classes)).flatten()
    count = arguments.compensation_images or subject.compensation
    scoring = order[: min(cell.images or count, count)]
    batches = [list(loader(everything, index, subject.batch, device)) for index in (scoring, order[:count])]
    draw = Draw(*batches, order[count:])
    for figure, name in subject.tests.items():
        if name == "one_rest":
            draw.tests[figure] = list(loader(everything, draw.rest, 60, device))
        else:
            images = images_of(arguments.scratch, name)
            draw.tests[figure] = list(loader(images, slice(0, arguments.test_images), subject.batch, device))
    return draw


def tuned(model, subject, draw, arguments, seed):
    """A fine-tuned copy; the epoch is chosen on training images that are used for nothing else."""
    count, epochs, lr = subject.tuning
    count = arguments.fine_tune_images or count
    everything, device = images_of(arguments.scratch, subject.images), arguments.device
    held_out = min(HELD_OUT, len(draw.rest) // 5)
    train = loader(everything, draw.rest[held_out:][:count], 64, device, shuffle=True, seed=seed, flip=True,
                   padding=4 if subject.images.startswith("cifar") else 0)  # fmt: skip
    choose = list(loader(everything, draw.rest[:held_out], 250, device))
    model = copy.deepcopy(model)
    fine_tune(model, train, choose, Recipe(epochs=epochs, lr=lr), progress=False)
    return model


@torch.no_grad()
def divergence(dense, model, batches):
    """Mean Kullback-Leibler divergence (nats) of the network's predictions from the dense network's."""
    total = 0.0
    for images, _ in batches:
        p, q = (network(images).double().log_softmax(1) for network in (dense, model))
        total += (p.exp() * (p - q)).sum().item()
    return total / sum(len(images) for images, _ in batches)


def run_cell(cell, arguments):
    """[row] of one cell, one a level."""
    start, subject = time.perf_counter(), SUBJECTS[cell.network]
    dense = dense_network(cell.network, arguments.data, arguments.scratch, arguments.device)
    draw = drawn(subject, cell, arguments)
    settings = PruningSettings(rounds=arguments.rounds, seed=cell.seed, budget="macs")
    monitor = draw.compensation[:1]
    pruning = EnhancedPruning(dense, monitor, monitor, calibration=draw.scoring, compensation=draw.compensation,
                              settings=settings, progress=False)  # fmt: skip
    before, rows = profile(dense, pruning.example), []
    for level in subject.levels:
        if cell.method in BASELINES:
            result = pruning.prune_by_baseline(cell.method, 100 - level)
            kept = remaining(all_filters(pruning.graph), result.plan)
            compensate(dense, result.model, draw.compensation, kept, progress=False)
        else:
            result = pruning.prune(100 - level, int(cell.method[-1]))
        model, after = result.model, profile(result.model, pruning.example)
        row = {**vars(cell), "left": level, "macs": after["macs"] / before["macs"],
               "params": after["parameters"] / before["parameters"],
               "widths": {name: layer["kept"] for name, layer in result.layers.items()},
               "predicted": sum(r["predicted_loss_change"] for r in result.rounds) if result.rounds else None,
               "divergence": divergence(dense, model.eval(), draw.tests["top1"])}  # fmt: skip
        row |= {figure: evaluate(model, test, progress=False).top1 for figure, test in draw.tests.items()}
        if subject.tuning and arguments.fine_tune_images != 0:
            model = tuned(model, subject, draw, arguments, cell.seed)
            row["tuned top1"] = evaluate(model, draw.tests["top1"], progress=False).top1
        row["seconds"] = time.perf_counter() - start
        rows.append(row)
    return rows


def dense_rows(name, arguments):
    """Top-1 of the dense network on its test images."""
    cell, subject = Cell(name, "dense", None, 0), SUBJECTS[name]
    model = dense_network(name, arguments.data, arguments.scratch, arguments.device)
    tests = drawn(subject, cell, arguments).tests
    return {figure: evaluate(model, test, progress=False).top1 for figure, test in tests.items()}


# ------------------------------------------------------------------------------------------------------------- the run


def cells(arguments):
    """In order of importance: all networks and methods with the first number of images, seed after seed; then the next."""
    found = []
    for number in arguments.images:
        for seed in arguments.seeds:
            for name in arguments.networks:
                limit = SUBJECTS[name].max_scoring
                for method in arguments.methods:
                    images = None if method in BASELINES else min(number, limit)
                    found.append(Cell(name, method, images, seed))
    return list(dict.fromkeys(found))


def show(row):
    figures = ", ".join(f"{key} {row[key]:.1f}" for key in row if key.endswith("top1"))
    cell = Cell(row["network"], row["method"], row["images"], row["seed"])
    print(f"{cell}, {100 * row['macs']:4.1f} % of the MACs: {figures} ({row['seconds']:.0f} s)", flush=True)


def run(arguments):
    end = time.perf_counter() + 60 * arguments.minutes
    free = ("seeds", "images", "networks", "methods", "minutes", "workers", "output", "device", "data", "scratch")
    results = started(arguments, free, {"rows": [], "dense": {}})
    done = {Cell(*(row[key] for key in ("network", "method", "images", "seed"))) for row in results["rows"]}
    context, threads = multiprocessing.get_context("spawn"), max(1, torch.get_num_threads() // arguments.workers)
    pool = ProcessPoolExecutor(arguments.workers, context, torch.set_num_threads, (threads,))
    prepare(arguments)
    if "vgg11_bn" in arguments.networks:
        pool.submit(train_vgg, arguments).result()
    for name in arguments.networks:
        if name not in results["dense"]:
            results["dense"][name] = pool.submit(dense_rows, name, arguments).result()
        print(f"{name}, dense: {results['dense'][name]}", flush=True)
    waiting = [cell for cell in cells(arguments) if cell not in done]
    print(f"prepared; {(end - time.perf_counter()) / 60:.1f} minutes are left for {len(waiting)} cells", flush=True)
    running, seconds, failed = {}, {}, []
    while waiting or running:
        while waiting and len(running) < arguments.workers:
            cell = waiting.pop(0)
            if time.perf_counter() + seconds.get(cell.network, 0) < end:
                running[pool.submit(run_cell, cell, arguments)] = cell
        finished, _ = wait(running, return_when=FIRST_COMPLETED)
        for future in finished:
            cell = running.pop(future)
            if future.exception():
                print(f"{cell} FAILED: {future.exception()!r}", flush=True)
                failed.append(cell)
                continue
            rows = future.result()
            seconds[cell.network] = max(seconds.get(cell.network, 0), rows[-1]["seconds"])
            for row in rows:
                show(row)
            results["rows"] += rows
            write_json(arguments.output, results)
    pool.shutdown()
    if failed:
        print(f"{len(failed)} cells failed; the same command runs them again", flush=True)
    return results


# -------------------------------------------------------------------------------------------------------------- report


def spread(values):
    return statistics.stdev(values) if len(values) > 1 else 0.0


def grouped(rows, figure):
    """{(network, left): {method: {images: [values, one a seed]}}}"""
    table = {}
    for row in rows:
        if row.get(figure) is not None:
            methods = table.setdefault((row["network"], row["left"]), {}).setdefault(row["method"], {})
            methods.setdefault(row["images"], []).append(row[figure])
    return table


def print_tables(results):
    for figure in ("top1", "imagenette top1", "tuned top1", "predicted", "divergence"):
        digits, unit = (1, "%") if figure.endswith("top1") else (3, "nats")
        for (network, left), methods in grouped(results["rows"], figure).items():
            dense = results["dense"].get(network, {}).get(figure.removeprefix("tuned "))
            print(
                f"\n{network}, {left} % of the MACs left: {figure}, {unit}" + (f" (dense {dense:.1f})" if dense else "")
            )
            for method, by_images in sorted(methods.items()):
                texts = []
                for images, values in sorted(by_images.items(), key=lambda item: item[0] or 0):
                    mean, deviation = statistics.mean(values), spread(values)
                    texts.append(f"{images or '-'}: {mean:.{digits}f} +- {deviation:.{digits}f} (n={len(values)})")
                print(f"  {method:10s} " + "   ".join(texts))


def plot(results, path):
    """Top-1 against the number of images that score: one column a network and level, before and after fine-tuning."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    tables = [grouped(results["rows"], figure) for figure in ("top1", "tuned top1")]
    columns = list(tables[0])
    figure, axes = plt.subplots(2, len(columns), figsize=(3.2 * len(columns), 6), squeeze=False, sharex=True)
    for row, (table, label) in enumerate(zip(tables, ("no training", "after fine-tuning"), strict=True)):
        for axis, column in zip(axes[row], columns, strict=True):
            for method, by_images in sorted(table.get(column, {}).items()):
                if method in BASELINES:
                    values = by_images[None]
                    style = "--" if method == "lamp" else ":"
                    axis.axhline(statistics.mean(values), color="grey", linestyle=style, label=method)
                    continue
                numbers = sorted(by_images)
                means = [statistics.mean(by_images[n]) for n in numbers]
                axis.errorbar(
                    numbers, means, [spread(by_images[n]) for n in numbers], marker="o", capsize=3, label=method
                )
            axis.set_xscale("log")
            axis.set_title(f"{column[0]}\n{column[1]} % of the MACs", fontsize=9)
            axis.set_ylabel(f"top-1, {label} (%)", fontsize=8)
    for axis in axes[-1]:
        axis.set_xlabel("images that score")
    axes[0, 0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main():
    arguments = parse_arguments()
    results = run(arguments) if arguments.minutes > 0 else json.loads(Path(arguments.output).read_text())
    print_tables(results)
    if results["rows"]:
        plot(results, Path(arguments.output).with_suffix(".png"))


if __name__ == "__main__":
    main()
