"""Milliseconds of a network as its layers get narrower, from times measured on the device at hand.

    latency = measure_latency(graph, example, batch_size=1)
    LatencyCosts(graph, latency).total()                      # milliseconds of one forward of the batch

Every conv and linear layer is timed at a grid of input and output widths, with random weights. What the other operations
take is not timed one by one: the time of the network is taken to be

    fixed + scale * (sum of the layers' times) + each * (number of elements of the layers' outputs),

with coefficients that are not negative, fitted to the whole network at some uniform widths. Between the widths of the grid
times are interpolated linearly. (Tables of measured layers: Shen et al. 2022, HALP, arXiv:2110.10811.)
"""

import hashlib
import itertools
import math
import platform
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from taylor_pruning.distributed import on_main
from taylor_pruning.errors import InputError
from taylor_pruning.files import cache_folder
from taylor_pruning.memory import is_out_of_memory
from taylor_pruning.modes import frozen
from taylor_pruning.selection.costs import LatencyCosts
from taylor_pruning.selection.latency_table import LatencyTable, LayerTimes, NetworkLatency
from taylor_pruning.selection.layer_calls import layer_calls, literals
from taylor_pruning.stored import stored
from taylor_pruning.surgery.graph import ChannelGraph
from taylor_pruning.surgery.parts import PartsGraph
from taylor_pruning.surgery.recorded_calls import operation_name
from taylor_pruning.surgery.units import by_layers
from taylor_pruning.timing import least_milliseconds

NETWORK_SHARES = (1, 3 / 4, 1 / 2, 1 / 4)  # of the filters, at which the whole network is timed
# The least time of several passes counts, so that other programs, which come and go, count little. Networks are timed
# until so many passes in a row lower no time by more than this share.
PASSES, MOST_PASSES, IMPROVEMENT = 3, 20, 0.01


def measure_latency(
    graph: ChannelGraph,
    example: Tensor,
    *,
    batch_size: int = 1,
    table: str | Path | None = None,
    round_to: int = 1,
    progress: Callable[[str], None] | None = None,
) -> NetworkLatency:
    """Times the graph's network on the device of `example` [1, ...]; under several processes the first one does it for all.

    Args:
        batch_size: images of the forward that is to become faster.
        table: file of measured times, which is read first and to which every new time is added; None: none is kept.
        round_to: widths of the grid are multiples of it.
        progress: called with a line of text while layers are timed.

    Raises:
        InputError: the graph is of parts of a network, the table cannot be read, one image and the batch give different
            graphs, or memory does not hold the batch.
    """
    if isinstance(graph, PartsGraph):
        raise InputError("parts of a network cannot be timed, only whole networks; give a budget of macs or params")
    try:
        return on_main(lambda: _measured(graph, example, batch_size, table, round_to, progress))
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise InputError(
            f"out of memory while layers are timed on {batch_size} images; lower --latency-batch"
        ) from error


def with_times(
    settings,
    graph: ChannelGraph,
    example: Tensor,
    progress: Callable[[str], None] | None = None,
    folder: Path | None = None,
):
    """The settings (a dataclass derived from Constraints), with measured times where their budget needs them.

    The table is that of the settings, else in the user's cache, else, where there is none that can be written, in `folder`.
    """
    if settings.budget != "latency" or settings.times is not None:
        return settings
    folder = cache_folder() or folder
    table = settings.latency_table or (folder and folder / "latency.json")
    times = measure_latency(
        graph, example, batch_size=settings.latency_batch, table=table, round_to=settings.round_to, progress=progress
    )
    return replace(settings, times=times)


def _measured(graph, example, batch_size, table, round_to, progress):
    like = next(graph.model.parameters()).detach()
    known = LatencyTable(table, *_place(like))
    calls, layers = list(layer_calls(graph)), []
    if not calls:
        raise InputError("no layer of this network can be timed; give a budget of macs or params")
    for number, call in enumerate(calls, 1):
        inputs, outputs = call.grid(round_to)
        missing = [
            pair for pair in itertools.product(outputs, inputs) if (call.key(batch_size), *pair[::-1]) not in known
        ]
        if missing and progress:
            progress(f"timing layer {number} of {len(calls)}, {call.weight}")
        passes = [[call.milliseconds(into, out, batch_size, like) for out, into in missing] for _ in range(PASSES)]
        keys = [(call.key(batch_size), into, out) for out, into in missing]
        known.update(zip(keys, map(min, zip(*passes, strict=True)), strict=True))
        times = tuple(tuple(known[call.key(batch_size), into, out] for into in inputs) for out in outputs)
        layers.append(LayerTimes(call.weight, inputs, outputs, times, call.elements * batch_size))
    plain = NetworkLatency(tuple(layers), 0.0, 1.0, 0.0, batch_size, device_name(like.device), known.path)
    return _fitted(plain, graph, example, known)


def _fitted(latency, graph, example, known):
    """The latency with coefficients from the network's own times at uniform widths, which the table keeps too.

    They are scaled so that the time of the whole network is the measured one.
    """
    rows, networks = [], []
    for share in NETWORK_SHARES:
        costs, units = LatencyCosts(graph, latency), uniform_units(graph, 1 - share)
        for unit in units:
            costs.remove(unit)
        rows.append([1.0, *costs.parts()])
        networks.append(graph.remove([graph.units[u] for u in units], verify=False) if units else graph.model)
    keys = [network_key(graph, network, latency.batch_size) for network in networks]
    if not all(key in known for key in keys):
        known.update(zip(keys, networks_milliseconds(networks, example, latency.batch_size), strict=True))
    times = [known[key] for key in keys]
    coefficients = nonnegative_fit(rows, times)
    off = sum(c * part for c, part in zip(coefficients, rows[0], strict=True)) / times[0]
    fixed, scale, each = (c / off for c in coefficients)
    return replace(latency, fixed=fixed, scale=scale, each=each)


def network_key(graph: ChannelGraph, model: nn.Module, batch_size: int) -> tuple:
    """Key in the table of all that the time of `model`, the graph's network or one cut from it, depends on."""
    nodes = [n for n in graph.executions[False].trace.graph.nodes if n.op != "get_attr"]
    operations = [
        (operation_name(n) if n.op == "call_function" else n.op, n.meta.get("shape"), literals(n)) for n in nodes
    ]
    widths = [tuple(tensor.shape) for tensor in stored(model).values()]
    return f"network {hashlib.sha256(repr((operations, widths)).encode()).hexdigest()[:16]} batch {batch_size}", "whole"


def measured_share(graph: ChannelGraph, model: nn.Module, latency: NetworkLatency, example: Tensor) -> float:
    """Time of `model`, cut from the graph's network, over the time of that network.

    Both are measured in turn, unless the latency's table has the time; it keeps what is measured. So every selection with
    the same table is the same, also that of an interrupted run. Under several processes the first one measures.
    """
    return on_main(lambda: _measured_share(graph, model, latency, example))


def _measured_share(graph, model, latency, example):
    if model is graph.model:
        return 1.0
    known = LatencyTable(latency.table, *_place(next(graph.model.parameters())))
    dense, smaller = (network_key(graph, network, latency.batch_size) for network in (graph.model, model))
    if dense not in known or smaller not in known:
        whole, time = networks_milliseconds([graph.model, model], example, latency.batch_size)
        if dense in known:  # the device may be faster or slower now than it was then
            known.update([(smaller, time / whole * known[dense])])
        else:
            known.update([(dense, whole), (smaller, time)])
    return known[smaller] / known[dense]


def uniform_units(graph: ChannelGraph, share: float) -> list[int]:
    """The first units of every set of layers that shrinks together, of each this share, but never all of them."""
    return [
        u for units in by_layers(graph.units).values() for u in units[: min(round(share * len(units)), len(units) - 1)]
    ]


def nonnegative_fit(rows: list[list[float]], values: list[float]) -> list[float]:
    """Coefficients >= 0 with the least squared relative error of rows @ coefficients; of few columns, by trying all sets."""
    x, y = torch.tensor(rows, dtype=torch.float64), torch.tensor(values, dtype=torch.float64)
    x, columns, best = x / y[:, None], range(len(rows[0])), None
    for size in range(1, len(rows[0]) + 1):
        for chosen in itertools.combinations(columns, size):
            part = x[:, chosen]
            found = torch.linalg.lstsq(part, torch.ones_like(y)[:, None], driver="gelsd").solution[:, 0]
            error = (part @ found - 1).square().sum().item()
            if (found >= 0).all() and (best is None or error < best[0]):
                best = error, dict(zip(chosen, found.tolist(), strict=True))
    return [best[1].get(column, 0.0) for column in columns]


def networks_milliseconds(models: list[nn.Module], example: Tensor, batch_size: int) -> list[float]:
    """[models] least time of several passes in which the models take turns, see PASSES."""
    least, idle = [math.inf] * len(models), 0
    for _ in range(MOST_PASSES):
        times = [network_milliseconds(model, example, batch_size) for model in models]
        lower = any(time < (1 - IMPROVEMENT) * known for time, known in zip(times, least, strict=True))
        idle = 0 if lower else idle + 1
        least = list(map(min, times, least))
        if idle == PASSES:
            break
    return least


def network_milliseconds(model: nn.Module, example: Tensor, batch_size: int) -> float:
    """Least time of a forward in evaluation mode, without gradients, of the example repeated to a batch."""
    images = example[:1].expand(batch_size, *example.shape[1:]).contiguous()
    with frozen(model):
        return least_milliseconds(lambda: model(images), example.device)


def latency_report(
    graph: ChannelGraph, model: nn.Module, latency: NetworkLatency, example: Tensor, shares: dict
) -> dict:
    """What results.json says of a pruned network's time: asked, predicted, and measured in turn with the dense network.

    Args:
        graph: of the dense network. model: the pruned one. example: [1, ...] on its device.
        shares: of the last choice, see experiment.choices.TimedChoice.
    """
    dense_ms, pruned_ms = on_main(lambda: networks_milliseconds([graph.model, model], example, latency.batch_size))
    return {
        "dense_ms": dense_ms,
        "pruned_ms": pruned_ms,
        "asked_ms": shares["asked"] * dense_ms,
        "predicted_ms": shares["predicted"] * dense_ms,
        "batch_size": latency.batch_size,
        "device": latency.device,
    }


def _place(like):
    """(device, version) under which the times of networks like this tensor stand in a table."""
    return device_name(like.device), f"{like.dtype} torch {torch.__version__}"


def device_name(device: torch.device) -> str:
    """The device's name and, of a CPU, the number of threads: times hold for both."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return f"{model or platform.processor() or platform.machine()}, {torch.get_num_threads()} thread(s)"
