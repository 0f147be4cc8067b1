"""Accuracy at equal multiply-accumulates against the number of calibration images, for every Taylor order and baselines.

    python benchmarks/orders.py --data DIR --device cuda --workers 6 --minutes 4 --output orders.json
    python benchmarks/orders.py --data DIR --networks resnet32 --levels 50 30 15 --no-compensate --output orders.json
    python benchmarks/orders.py --data DIR --networks mobilenet_v2 --levels 75 50 35 --images 240 --seeds 0 --set rounds=2 \\
        --methods "order 1" "order 2" "order 3" lamp magnitude "TP LAMP" "TP Taylor" --output trade-off.json
    python benchmarks/orders.py --output orders.json --minutes 0            # tables and plots of what there is

DIR holds cifar10-jpeg.tar.xz, imagenette.tar, imagenet-one-a-class.tar, resnet32.th, resnet44.th, mobilenet_v2_imagenet.pth
and vgg7_bn.pt or vgg16_bn.pt, the dense_model.pt of a run of run_single_experiment.py on CIFAR-10. Every network is pruned to
shares of its multiply-accumulates in rounds, compensated after each, with widths left free; labels are needed by order 1 and
by fine-tuning alone. Images that score are the first of those that compensate, and the next 100 try every choice. Baselines
prune under the same budget and are compensated in the same rounds; "lamp uniform" takes the same share of every layer, and
"TP ..." are Torch-Pruning's criteria.

A cell is one network, method, number of images, seed and level. Cells run in order of importance, one a worker, and every
row is on disk when its cell ends. An interrupted cell continues with its next round, an interrupted run with the unfinished
cells. Runs with different options may share one output: a row says how it was made, and rows made alike are averaged.
"""

import argparse
import copy
import json
import multiprocessing
import statistics
import sys
import time
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from functools import lru_cache, partial
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]

from orders_data import HELD_OUT, SUBJECTS, dense_network, images_of, loader, prepare, training_loader
from orders_report import plot, plot_trade_off, print_tables
from torch_pruning_peers import PEERS, peer_scores

from EnhancedPruning import EnhancedPruning, PruningSettings
from taylor_pruning.options import options, value_type
from taylor_pruning.report.json_files import write_json
from taylor_pruning.selection.baselines import BASELINES
from taylor_pruning.selection.latency import network_milliseconds
from taylor_pruning.training import sampling
from taylor_pruning.training.fine_tuning import Recipe, evaluate, fine_tune
from taylor_pruning.training.profile import profile

TIMED_PAIRS = 11  # the speed of a shared machine changes: the median of ratios to the dense network, timed just behind
ORDERS = [f"order {order}" for order in (1, 2, 3)]
CRITERIA = [name + widths for name in (*sorted(BASELINES), *PEERS) for widths in ("", " uniform")]


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder of the archives and weights")
    parser.add_argument("--scratch", default="/tmp/orders", help="folder for decoded images and rounds")
    parser.add_argument("--networks", nargs="+", choices=SUBJECTS, default=list(SUBJECTS))
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=(*ORDERS, *CRITERIA),
        default=[*ORDERS, "lamp", "lamp uniform", "magnitude uniform"],
    )
    parser.add_argument("--images", type=int, nargs="+", default=[40, 10, 1000, 100, 20, 300], help="images that score, "
                        "in order of importance")  # fmt: skip
    parser.add_argument(
        "--levels", type=float, nargs="+", help="per cent of the MACs left, instead of each network's own"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--compensation-images", type=int, help="instead of each network's own number")
    parser.add_argument("--no-compensate", action="store_true", help="cut alone; no network is repaired")
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="NAME=VALUE", help="fields of PruningSettings, as rounds=8"
    )
    parser.add_argument("--test-images", type=int, default=2000)
    parser.add_argument("--fine-tune-images", type=int, help="instead of each network's own number; 0: no fine-tuning")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--workers", type=int, default=1, help="processes that share the device")
    parser.add_argument("--minutes", type=float, default=60, help="no cell starts that would probably end later")
    parser.add_argument("--output", default="orders.json", help="the plot is written beside it")
    return parser.parse_args()


# ----------------------------------------------------------------------------------------------------------- one cell


@dataclass(frozen=True)
class Cell:
    """What one row is about.

    images: that score; None: a baseline that looks at weights alone. left: per cent of the MACs. compensation: images of the
    repair, 0 without it. settings: (name, value) pairs that differ from the defaults.
    """

    network: str
    method: str
    images: int | None
    seed: int
    left: float
    compensation: int
    settings: tuple

    @classmethod
    def of(cls, row):
        values = {name: row[name] for name in cls.__dataclass_fields__}
        return cls(**values | {"settings": tuple(map(tuple, row["settings"]))})

    def __str__(self):
        changed = "".join(f", {name}={value}" for name, value in self.settings)
        repair = f"{self.compensation} compensate" if self.compensation else "no repair"
        who = f"{self.network}, {self.method}, {self.left:g} % left"
        return f"{who}: {self.images or '-'} images score, {repair}, seed {self.seed}{changed}"


@dataclass
class Draw:
    """The images of one seed: those that score are the first of those that compensate; held-out ones come next."""

    scoring: list
    compensation: list
    held_out: list
    rest: torch.Tensor  # indices of all others
    tests: dict = field(default_factory=dict)


def drawn(name, images, compensation, seed, arguments):
    subject, device = SUBJECTS[name], arguments.device
    everything = images_of(arguments.scratch, subject.images)
    generator = torch.Generator().manual_seed(seed)
    classes = 1 if subject.images == "one" else 10
    blocks = torch.randperm(len(everything) // classes, generator=generator)
    order = (blocks[:, None] * classes + torch.arange(classes)).flatten()
    count = compensation or subject.compensation
    scoring = order[: min(images or count, count)]
    held_out, rest = order[count:].split([sampling.HELD_OUT, len(order) - count - sampling.HELD_OUT])
    batches = [list(loader(everything, index, subject.batch, device)) for index in (scoring, order[:count], held_out)]
    draw = Draw(*batches, rest)
    for figure, test in subject.tests.items():
        if test == "one_rest":
            draw.tests[figure] = list(loader(everything, draw.rest, 60, device))
        else:
            few = slice(0, arguments.test_images)
            draw.tests[figure] = list(loader(images_of(arguments.scratch, test), few, subject.batch, device))
    return draw


@lru_cache(maxsize=1)
def pruning_of(network, images, compensation, seed, settings, arguments):
    """The pipeline that all levels and orders of one draw share, with their ranking of the dense network."""
    arguments = argparse.Namespace(**dict(arguments))
    dense = dense_network(network, arguments.data, arguments.device)
    draw = drawn(network, images, compensation, seed, arguments)
    chosen = PruningSettings(**{"seed": seed, "budget": "macs", "compensate": bool(compensation), **dict(settings)})
    monitor = draw.compensation[:1]
    pruning = EnhancedPruning(dense, monitor, monitor, calibration=draw.scoring, compensation=draw.compensation,
                              held_out=draw.held_out, settings=chosen, progress=False)  # fmt: skip
    return pruning, draw


def tuned_top1(model, subject, draw, arguments, seed):
    """Top-1 after fine-tuning of a copy; the epoch is chosen on training images that are used for nothing else."""
    count, epochs, lr = subject.tuning
    count = arguments.fine_tune_images or count
    everything, device = images_of(arguments.scratch, subject.images), arguments.device
    held_out = min(HELD_OUT, len(draw.rest) // 5)
    train = training_loader(arguments.scratch, subject, draw.rest[held_out:][:count], device, seed)
    choose = list(loader(everything, draw.rest[:held_out], 250, device))
    model = copy.deepcopy(model)
    fine_tune(model, train, choose, Recipe(epochs=epochs, lr=lr), progress=False)
    return evaluate(model, draw.tests["top1"], progress=False).top1


@torch.no_grad()
def divergence(dense, model, batches):
    """Mean Kullback-Leibler divergence (nats) of the network's predictions from the dense network's."""
    total = 0.0
    for images, _ in batches:
        p, q = (network(images).double().log_softmax(1) for network in (dense, model))
        total += (p.exp() * (p - q)).sum().item()
    return total / sum(len(images) for images, _ in batches)


def run_cell(cell, arguments):
    """The row of one cell."""
    start, subject = time.perf_counter(), SUBJECTS[cell.network]
    names = ("data", "scratch", "device", "test_images")
    key = tuple((name, getattr(arguments, name)) for name in names)
    pruning, draw = pruning_of(cell.network, cell.images, cell.compensation, cell.seed, cell.settings, key)
    if cell.method in ORDERS:
        rounds = Path(arguments.scratch) / "rounds" / f"{str(cell).replace(' ', '-').replace('/', '-')}.pt"
        rounds.parent.mkdir(parents=True, exist_ok=True)
        result = pruning.prune(100 - cell.left, int(cell.method[-1]), checkpoint=rounds, resume=True)
    else:
        name = cell.method.removesuffix(" uniform")
        criterion = partial(peer_scores, name, batches=draw.scoring) if name in PEERS else name
        widths = "own" if name == cell.method else "uniform"
        result = pruning.prune_by_baseline(
            criterion, 100 - cell.left, widths=widths, compensate=bool(cell.compensation)
        )
    model, example = result.model, pruning.rankings.example
    before, after = profile(pruning.model, example), profile(model, example)
    pairs = [[network_milliseconds(m, example, 1) for m in (model, pruning.model)] for _ in range(TIMED_PAIRS)]
    row = {**asdict(cell), "macs": after["macs"] / before["macs"], "params": after["parameters"] / before["parameters"],
           "latency": statistics.median(pruned / dense for pruned, dense in pairs),
           "widths": {name: layer["kept"] for name, layer in result.layers.items()},
           "rounds": [{key: r[f"{key}_loss_change"] for key in ("predicted", "measured")} for r in result.rounds],
           "seconds": dict(result.seconds),
           "divergence": divergence(pruning.model, model.eval(), draw.tests["top1"])}  # fmt: skip
    row |= {figure: evaluate(model, test, progress=False).top1 for figure, test in draw.tests.items()}
    if subject.tuning and arguments.fine_tune_images != 0:
        begin = time.perf_counter()
        row["tuned top1"] = tuned_top1(model, subject, draw, arguments, cell.seed)
        row["seconds"]["tune"] = time.perf_counter() - begin
    row["wall seconds"] = time.perf_counter() - start
    if cell.method in ORDERS:
        rounds.unlink()
    return row


def dense_rows(name, arguments):
    """Top-1 of the dense network on its test images, and after the fine-tuning that the pruned ones get (first seed)."""
    seed, subject = arguments.seeds[0], SUBJECTS[name]
    model = dense_network(name, arguments.data, arguments.device)
    draw = drawn(name, None, arguments.compensation_images, seed, arguments)
    found = {figure: evaluate(model, test, progress=False).top1 for figure, test in draw.tests.items()}
    if subject.tuning and arguments.fine_tune_images != 0:
        found["tuned top1"] = tuned_top1(model, subject, draw, arguments, seed)
    return found


# ------------------------------------------------------------------------------------------------------------- the run


def settings_of(texts):
    """((name, value), ...) of "NAME=VALUE" texts, in the types of PruningSettings."""
    fields, found = {f.name: f for f in options(PruningSettings())}, {}
    for text in texts:
        name, _, value = text.partition("=")
        if name not in fields:
            raise SystemExit(f"--set: PruningSettings has no {name}")
        kind, *_ = value_type(fields[name])
        found[name] = value.lower() in ("1", "true", "yes") if kind is bool else kind(value)
    return tuple(sorted(found.items()))


def cells(arguments):
    """In order of importance: the first number of images, seed after seed, level after level; then the next number."""
    found, settings = [], settings_of(arguments.set)
    for number in arguments.images:
        for seed in arguments.seeds:
            for name in arguments.networks:
                subject = SUBJECTS[name]
                compensation = 0 if arguments.no_compensate else arguments.compensation_images or subject.compensation
                for left in arguments.levels or subject.levels:
                    for method in arguments.methods:
                        images = min(number, subject.max_scoring)
                        if method not in ORDERS and not method.startswith(("molchanov", "TP")):
                            images = None
                        found.append(Cell(name, method, images, seed, left, compensation, settings))
    return list(dict.fromkeys(found))


def show(row):
    figures = ", ".join(f"{key} {row[key]:.1f}" for key in row if key.endswith("top1"))
    parts = ", ".join(f"{step} {seconds:.0f}" for step, seconds in row["seconds"].items() if seconds >= 1)
    costs = f"{100 * row['macs']:.1f} % of the MACs, {100 * row['latency']:.0f} % of the latency"
    print(f"{Cell.of(row)}, {costs}: {figures} ({row['wall seconds']:.0f} s: {parts})", flush=True)


def run(arguments):
    end = time.perf_counter() + 60 * arguments.minutes
    output = Path(arguments.output)
    results = json.loads(output.read_text()) if output.exists() else {"rows": [], "dense": {}}
    done = {Cell.of(row) for row in results["rows"]}
    context, threads = multiprocessing.get_context("spawn"), max(1, torch.get_num_threads() // arguments.workers)
    pool = ProcessPoolExecutor(arguments.workers, context, torch.set_num_threads, (threads,))
    prepare(arguments)
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
            if time.perf_counter() + seconds.get((cell.network, cell.method), 0) < end:
                running[pool.submit(run_cell, cell, arguments)] = cell
        finished, _ = wait(running, return_when=FIRST_COMPLETED)
        for future in finished:
            cell = running.pop(future)
            if future.exception():
                print(f"{cell} FAILED: {future.exception()!r}", flush=True)
                failed.append(cell)
                continue
            row = future.result()
            kind = cell.network, cell.method
            seconds[kind] = max(seconds.get(kind, 0), row["wall seconds"])
            show(row)
            results["rows"].append(row)
            write_json(output, results)
    pool.shutdown()
    if failed:
        print(f"{len(failed)} cells failed; the same command runs them again", flush=True)
    return results


def main():
    arguments = parse_arguments()
    results = run(arguments) if arguments.minutes > 0 else json.loads(Path(arguments.output).read_text())
    print_tables(results)
    if results["rows"]:
        plot(results, Path(arguments.output).with_suffix(".png"))
        plot_trade_off(results, Path(arguments.output).with_suffix(".trade-off.png"))


if __name__ == "__main__":
    main()
