"""Tables, JSON and plots of one pruning experiment: plain dictionaries in, files out.

    paths = write_experiment_plots(results, "runs/vgg16")
    print(summary_table(results))

`results` is the content of results.json. Its stages are "dense", "pruned", "compensated" or "trained", and "fine-tuned",
in the order of the run. Units: accuracy in per cent, loss in nats, files in bytes, latency in milliseconds. A value that was not
measured is None or NaN. Every file is written whole or not at all. Figures are made with matplotlib's object-oriented
interface, so they need no display and leave no figure or setting behind.
"""

import json
import math
import os
import re
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, NullLocator

from taylor_pruning.files import atomic_path

COLUMN_WIDTH, TEXT_WIDTH = 3.5, 7.16  # inches: one and two columns of a paper
LAYER_LABEL_SIZE = 7  # points

# Okabe and Ito (2008), distinguishable with every common colour vision deficiency; their yellow is too pale for lines.
BLACK, ORANGE, SKY_BLUE, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
BLUE, VERMILLION, PURPLE, GREY = "#0072B2", "#D55E00", "#CC79A7", "#888888"
DENSE, KEPT, REMOVED = BLACK, BLUE, VERMILLION
STAGE_COLOURS = {"dense": DENSE, "pruned": REMOVED, "compensated": PURPLE, "trained": PURPLE, "fine-tuned": GREEN}
STAGE_TICKS = {"compensated": "compen-\nsated", "fine-tuned": "fine-\ntuned"}


@dataclass(frozen=True)
class MethodStyle:
    """How a method looks in every plot."""

    label: str
    colour: str
    marker: str
    line: str


METHODS = {
    "order 1": MethodStyle("order 1", ORANGE, "o", "-"),
    "order 2": MethodStyle("order 2", BLUE, "s", "-"),
    "order 3": MethodStyle("order 3", GREEN, "D", "-"),
    "molchanov2017": MethodStyle("Molchanov 2017", VERMILLION, "v", "--"),
    "molchanov2019": MethodStyle("Molchanov 2019", PURPLE, "^", "--"),
    "magnitude": MethodStyle("L2 magnitude", SKY_BLUE, "P", "--"),
    "random": MethodStyle("random", GREY, "X", ":"),
}

PLOT_SETTINGS = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "legend.handlelength": 1.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.5,
    "lines.linewidth": 1.2,
    "lines.markersize": 3.5,
    "hatch.linewidth": 0.5,
    "savefig.dpi": 300,
    "pdf.fonttype": 42,  # TrueType: publishers refuse Type 3 fonts
}


# Values and text


def plain(value):
    """`value` as JSON can hold it: NaN and infinities become None, arrays lists, numpy scalars numbers, paths text.

    Raises TypeError for everything else that JSON does not know.
    """
    if isinstance(value, dict):
        return {key if isinstance(key, str) else str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, (np.ndarray, np.generic)):
        return plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if value is None or isinstance(value, (str, int)):
        return value
    raise TypeError(f"{type(value).__name__} cannot be written as JSON: {value!r}")


def write_json(path, value) -> None:
    """Write `value` as strict JSON, keys in the order they were put in (the layers' order carries meaning).

    Paths that are not UTF-8 reach Python as lone surrogates; they are written, and come back, as JSON's escapes.
    """
    text = json.dumps(plain(value), indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def numbers(values) -> np.ndarray:
    """Values of a results file as float64 [n]: None becomes NaN."""
    return np.array([math.nan if value is None else value for value in values], dtype=np.float64)


def text_table(header: list[str], rows: list[list[str]]) -> str:
    """Aligned text for a terminal: first column to the left, the others to the right."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]

    def line(row):
        return "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])

    rule = "  ".join("-" * width for width in widths)
    return "\n".join(part.rstrip() for part in [line(header), rule, *map(line, rows)])


def cost_unit(macs) -> tuple[str, float]:
    """Unit in which a number of multiply-accumulates reads well: its name and size."""
    return ("G", 1e9) if macs is not None and macs >= 1e9 else ("M", 1e6)


def summary_table(results: dict) -> str:
    """A row a stage, and beneath it the change against the dense network.

    Changes are in per cent of the dense value; those of top-1 and top-5 in percentage points.
    """
    dense = results["stages"][0]
    macs_unit, macs_size = cost_unit(dense.get("macs"))
    columns = [
        ("top-1 %", "top1", 1, ".2f"), ("top-5 %", "top5", 1, ".2f"), ("loss", "loss", 1, ".3f"),
        ("params M", "parameters", 1e6, ".3f"), (f"MACs {macs_unit}", "macs", macs_size, ".3f"),
        ("size MB", "file_bytes", 1e6, ".2f"), ("latency ms", "latency_ms", 1, ".2f"),
    ]  # fmt: skip

    def cells(stage, change):
        for _, key, size, style in columns:
            value, base = numbers([stage.get(key), dense.get(key)])
            if not math.isfinite(value) or change and not (math.isfinite(base) and (base or key.startswith("top"))):
                yield "-"
            elif not change:
                yield format(value / size, style)
            elif key.startswith("top"):
                yield f"{value - base:+.2f} pt"
            else:
                yield f"{100 * (value / base - 1):+.1f} %"

    rows = [[dense["stage"], *cells(dense, False)]]
    for stage in results["stages"][1:]:
        rows += [[stage["stage"], *cells(stage, False)], ["  vs dense", *cells(stage, True)]]
    return text_table(["stage", *(column[0] for column in columns)], rows)


def rounds_table(rounds: list) -> str:
    """A row a round of pruning: does the loss change by what the scores said?

    Predicted and measured are of the loss that the round keeps small, which the heading names; "labels" is the measured
    change of the cross-entropy with the labels. All are in nats, on the calibration images.
    """
    steps = ("after_selection", "after_compensation", "after_training")
    trained = any(record.get("after_training") for record in rounds)
    rows = []
    for record in rounds:
        changes = numbers(record[key] for key in ("predicted_loss_change", "measured_loss_change", "label_loss_change"))
        changes = [f"{value:+.4f}" if math.isfinite(value) else "-" for value in changes]
        top1 = [f"{record[key]['top1']:.1f}" if record.get(key) else "-" for key in steps[: 3 if trained else 2]]
        rows.append([str(record["round"]), f"{record['percentage']:g}", *changes, *top1])
    loss = rounds[0]["loss"] if rounds else "loss"
    header = ["round", "% removed", f"{loss}: predicted", "measured", "labels", "top-1 cut", "repaired", "trained"]
    return text_table(header if trained else header[:-1], rows)


# Figures


@contextmanager
def saved_figure(*paths, width=COLUMN_WIDTH, height=2.6):
    """Yield a figure of `width` x `height` inches; save it under every path when the block ends without error."""
    with matplotlib.rc_context(PLOT_SETTINGS):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure
        for path in paths:
            with atomic_path(path) as temporary:
                figure.savefig(temporary)


def short_layer_names(names: list[str]) -> tuple[list[str], str]:
    """Labels short enough for an axis, and the dotted prefix that all names share and the labels leave out.

    Words are cut to their first letters where a label has more than 12 characters, as far as the labels stay distinct.
    """
    shared = os.path.commonprefix([name.split(".")[:-1] for name in names])
    labels = [".".join(name.split(".")[len(shared) :]) for name in names]
    if max(map(len, labels), default=0) > 12:
        for letters in range(1, 12):
            cut = [re.sub(r"[A-Za-z]+", lambda word, n=letters: word[0][:n], label) for label in labels]
            if len(set(cut)) == len(set(labels)):
                return cut, ".".join(shared)
    return labels, ".".join(shared)


def layer_axis(axis, names: list[str], inches: float) -> None:
    """Name the layers on an axis (`axes.xaxis` or `axes.yaxis`) of this length, leaving out what would overlap."""
    labels, prefix = short_layer_names(names)
    step = max(1, math.ceil(len(names) * 1.35 * LAYER_LABEL_SIZE / 72 / inches))
    upright = {"rotation": 90} if axis.axis_name == "x" else {}
    axis.set_ticks(range(0, len(names), step), labels[::step], fontsize=LAYER_LABEL_SIZE, **upright)
    axis.set_label_text(f"layer ({prefix}.*)" if prefix else "layer")
    axis.grid(False)


def layer_figure_width(names) -> float:
    return COLUMN_WIDTH if len(names) <= 24 else TEXT_WIDTH


def signed_log_axis(axes, which: str, values) -> None:
    """Logarithmic on both sides of zero, straight between.

    The threshold is the lower quartile of the magnitudes, at most four decades below the largest.
    """
    sizes = np.abs(values[np.isfinite(values) & (values != 0)])
    if sizes.size:
        _symlog(axes, which, max(np.quantile(sizes, 0.25), sizes.max() * 1e-4), sizes.max())


def positive_log_axis(axes, which: str, values) -> None:
    """Logarithmic, with a place for exact zeros (dead layers) below the smallest positive value."""
    values = values[np.isfinite(values)]
    positive = values[values > 0]
    if positive.size == values.size:
        getattr(axes, f"set_{which}scale")("log")
    elif positive.size:
        threshold = _symlog(axes, which, max(positive.min(), positive.max() * 1e-8), positive.max())
        getattr(axes, f"set_{which}lim")(-0.3 * threshold, 2 * positive.max())


def _symlog(axes, which, threshold, largest):
    """Set a symmetric logarithmic scale with at most four ticks a side, none near zero; return its threshold."""
    first, last = math.floor(math.log10(threshold)), math.ceil(math.log10(largest))
    getattr(axes, f"set_{which}scale")("symlog", linthresh=10.0**first, linscale=max(0.5, (last - first) / 6))
    powers = 10.0 ** np.arange(first, last + 1, max(1, math.ceil((last - first) / 3)))
    axis = getattr(axes, f"{which}axis")
    axis.set_major_locator(FixedLocator([*-powers, 0, *powers]))
    axis.set_minor_locator(NullLocator())
    return 10.0**first


def write_experiment_plots(results: dict, folder) -> list[Path]:
    """Write the plots of one experiment as PNG into `folder` and return their paths.

    Always accuracy.png, filters_per_layer.png and score_distribution.png; oracle.png, gradient_flow.png and
    flow_vs_score.png where `results` holds what they show.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    plots = {"accuracy.png": _plot_accuracy, "filters_per_layer.png": _plot_filters}
    plots["score_distribution.png"] = _plot_scores
    if results.get("oracle"):
        plots["oracle.png"] = _plot_oracle
    if results.get("gradient_flow"):
        plots |= {"gradient_flow.png": _plot_gradient_flow, "flow_vs_score.png": _plot_flow_and_score}
    for name, plot in plots.items():
        plot(results, folder / name)
    return [folder / name for name in plots]


def _timeline(results):
    """Place of every stage, round and epoch on one axis: ({stage: x}, xs of rounds, xs of epochs).

    Rounds lie between the dense and the pruned network, epochs before the fine-tuned one; a single round is no more
    than the pruned network itself.
    """
    rounds = results["rounds"] if len(results["rounds"]) > 1 else []
    places, x, sections = {}, 0.0, {"pruned": np.empty(0), "fine-tuned": np.empty(0)}
    steps = {"pruned": len(rounds), "fine-tuned": len(results["fine_tuning"])}
    for stage in (stage["stage"] for stage in results["stages"]):
        start, count = x, steps.get(stage, 0)
        x += (2.0 if count else 1.0) if places else 0.0
        if count and places:
            sections[stage] = start + (x - start) * np.arange(1, count + 1) / (count + 1)
        places[stage] = x
    return places, sections["pruned"], sections["fine-tuned"]


def _plot_accuracy(results, path):
    places, at_rounds, at_epochs = _timeline(results)
    top5 = numbers(stage.get("top5") for stage in results["stages"])
    quantities = [("top1", "top-1", BLUE)]
    if (top5 < 100).any():  # with five classes or fewer top-5 is always 100
        quantities.append(("top5", "top-5", SKY_BLUE))

    with saved_figure(path, height=4.2) as figure:
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
        for key, label, colour in quantities:
            _trajectory(upper, results, key, places, at_rounds, at_epochs, colour, label)
        _trajectory(lower, results, "loss", places, at_rounds, at_epochs, BLUE, "validation")
        if len(at_epochs):
            train_loss = numbers(epoch.get("train_loss") for epoch in results["fine_tuning"])
            lower.plot(at_epochs, train_loss, ":", color=GREY, label="training")
            lower.legend()
        for stage in results["stages"]:
            if stage.get("top1") is not None:
                upper.annotate(f"{stage['top1']:.1f}", (places[stage["stage"]], stage["top1"]), (0, -5),
                               textcoords="offset points", ha="center", va="top", color=BLUE,
                               bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5})  # fmt: skip
        upper.margins(x=0.08, y=0.18)
        upper.set_ylim(top=min(101, upper.get_ylim()[1]))
        upper.set_ylabel("accuracy (%)")
        lower.set_ylabel("loss (nats)")
        ticks = {x: STAGE_TICKS.get(stage, stage) for stage, x in places.items()}
        for xs, word in ((at_rounds, "rounds"), (at_epochs, "epoch" if len(at_epochs) == 1 else "epochs")):
            if len(xs):
                ticks[float(xs.mean())] = f"{len(xs)}\n{word}"
                for axes in (upper, lower):
                    axes.axvspan(xs[0] - 0.1, xs[-1] + 0.1, color="#f3f3f3", zorder=0)
        lower.set_xticks(list(ticks), list(ticks.values()))
        lower.tick_params(axis="x", length=0)
        upper.tick_params(axis="x", length=0)
        figure.legend(*upper.get_legend_handles_labels(), loc="outside upper center", ncols=3, columnspacing=1)


def _trajectory(axes, results, key, places, at_rounds, at_epochs, colour, label):
    """One quantity along the run: a large marker a stage, small ones for rounds, training between them, and epochs.

    Where every round ends compensated, the line goes through the compensated networks, and a broken one through what
    each round's cut left of the network before it. The pruned stage, which has no repair at all, is a marker of its own.
    """
    stages = {stage["stage"]: stage.get(key) for stage in results["stages"]}
    points = {places[stage]: value for stage, value in stages.items()}
    steps = dict(zip(at_epochs, (epoch.get(key) for epoch in results["fine_tuning"]), strict=False))
    rounds = list(zip(at_rounds, results["rounds"], strict=False))
    steps |= {x: (step.get("after_compensation") or step["after_selection"]).get(key) for x, step in rounds}
    trained = [(x, step["after_training"]) for x, step in rounds if step.get("after_training")]  # never the last round
    steps |= {x + (at_rounds[1] - at_rounds[0]) / 2: step.get(key) for x, step in trained}
    line = points | steps
    if any((step.get("after_compensation") or {}).get(key) is not None for _, step in rounds):
        broken = {places["dense"]: stages["dense"], **{x: step["after_selection"].get(key) for x, step in rounds}}
        axes.plot(list(broken), numbers(broken.values()), "v--", color=REMOVED, mfc="white", linewidth=0.8,
                  markersize=3, label="before compensation" if key == "top1" else None)  # fmt: skip
    if {"compensated", "trained"} & stages.keys():
        line.pop(places["pruned"])
    joined = np.array(sorted((x, y) for x, y in line.items() if y is not None)).reshape(-1, 2)
    axes.plot(*joined.T, "-", color=colour, label=label)
    if len(steps) <= 40:
        axes.plot(list(steps), numbers(steps.values()), ".", color=colour, markersize=3)
    axes.plot(list(points), numbers(points.values()), "o", color=colour, markersize=4.5)


def _plot_filters(results, path):
    layers = results["layers"]
    there, kept = (numbers(layer[key] for layer in layers.values()) for key in ("filters", "kept"))
    protected = np.array([layer.get("reason") is not None for layer in layers.values()], dtype=bool)
    colours = np.where(protected, GREY, KEPT)
    width = layer_figure_width(layers)
    x = np.arange(len(layers))
    with saved_figure(path, width=width, height=3.8) as figure:
        upper, lower = figure.subplots(2, 1, sharex=True)
        upper.bar(x, there, 0.85, color="#f2c9ae")
        bars = [upper.bar(x, kept, 0.85, color=colours), lower.bar(x, 100 * kept / there, 0.85, color=colours)]
        for bar in (bar for group in bars for bar, guarded in zip(group, protected, strict=True) if guarded):
            bar.set(hatch="/////", facecolor="white", edgecolor=GREY, linewidth=0.5)
        upper.set_ylabel("filters")
        lower.set_ylabel("kept (%)")
        lower.set_ylim(0, 105)
        lower.set_xlim(-0.7, len(layers) - 0.3)
        layer_axis(lower.xaxis, list(layers), width - 0.6)
        handles = [Patch(color=KEPT, label="kept"), Patch(color="#f2c9ae", label="removed")]
        if protected.any():
            handles.append(Patch(hatch="/////", facecolor="white", edgecolor=GREY, label="protected"))
        figure.legend(handles=handles, loc="outside upper center", ncols=3)


def _plot_scores(results, path):
    scores = {name: numbers(values) for name, values in results["scores"].items()}
    scores = {name: values for name, values in scores.items() if np.isfinite(values).any()}
    width = layer_figure_width(scores)
    with saved_figure(path, width=width, height=3.0) as figure:
        axes = figure.subplots()
        if scores:
            signed_log_axis(axes, "y", np.concatenate(list(scores.values())))
            line = {"color": BLUE, "linewidth": 0.7}
            axes.boxplot([values[np.isfinite(values)] for values in scores.values()], positions=range(len(scores)),
                         whis=(5, 95), widths=0.7, showfliers=False, showcaps=False, manage_ticks=False,
                         boxprops=line, whiskerprops=line, medianprops={"color": BLACK, "linewidth": 1.0})  # fmt: skip
            for x, (name, values) in enumerate(scores.items()):
                gone = values[results["plan"].get(name, [])]
                spread = x + np.linspace(-0.25, 0.25, len(gone)) if len(gone) > 1 else np.full(len(gone), x)
                axes.plot(spread, gone, ".", color=REMOVED, markersize=2, alpha=0.7, markeredgewidth=0, zorder=1)
            axes.axhline(0, color=BLACK, linewidth=0.5)
            axes.set_xlim(-0.7, len(scores) - 0.3)
            layer_axis(axes.xaxis, list(scores), width - 0.7)
        axes.set_ylabel(results.get("criterion") or "score")
        handles = [Patch(facecolor="white", edgecolor=BLUE, label="all (5-25-50-75-95 %)"),
                   Line2D([], [], color=REMOVED, marker=".", linestyle="", markersize=5, label="removed")]  # fmt: skip
        figure.legend(handles=handles, loc="outside upper center", ncols=2)


def _plot_oracle(results, path):
    oracle = results["oracle"]
    true = numbers(oracle["true"])
    predicted = {order: numbers(values) for order, values in sorted(oracle["predicted"].items())}
    everything = np.concatenate([true, *predicted.values()])
    limits = np.nanmin(everything), np.nanmax(everything)
    width = COLUMN_WIDTH if len(predicted) == 1 else TEXT_WIDTH
    with saved_figure(path, width=width, height=3.1) as figure:
        panels = figure.subplots(1, len(predicted), sharex=True, sharey=True, squeeze=False)[0]
        for axes, (order, values) in zip(panels, predicted.items(), strict=True):
            style = METHODS[f"order {order}"]
            for which in "xy":
                signed_log_axis(axes, which, everything)
            axes.plot(limits, limits, color=BLACK, linewidth=0.7, label="identity")
            axes.plot(true, values, style.marker, color=style.colour, markersize=3, alpha=0.6, markeredgewidth=0)
            (rank,) = numbers([oracle["spearman"].get(order)])
            axes.set_title(f"{style.label}: Spearman {format(rank, '.3f') if math.isfinite(rank) else 'undefined'}")
            axes.set_box_aspect(1)
            axes.set_xlabel("true loss change (nats)")
            axes.tick_params(axis="x", rotation=45)
        panels[0].set_ylabel("estimated loss change (nats)")
        panels[0].legend(loc="upper left")


def _plot_gradient_flow(results, path):
    layers = results["gradient_flow"]["layers"]
    width = layer_figure_width(layers)
    markers = {"dense": "o", "pruned": "v", "fine-tuned": "s"}
    flows = {stage: numbers(layer.get(stage) for layer in layers.values()) for stage in markers}
    with saved_figure(path, width=width, height=2.8) as figure:
        axes = figure.subplots()
        positive_log_axis(axes, "y", np.concatenate(list(flows.values())))
        for stage, flow in flows.items():
            if np.isfinite(flow).any():
                axes.plot(flow, color=STAGE_COLOURS[stage], marker=markers[stage], markersize=2.5, label=stage)
        axes.set_xlim(-0.7, len(layers) - 0.3)
        axes.set_ylabel("gradient flow")
        layer_axis(axes.xaxis, list(layers), width - 0.7)
        figure.legend(loc="outside upper center", ncols=3)


def _plot_flow_and_score(results, path):
    units = results["gradient_flow"]["units"]
    flow, score, kept = numbers(units["flow"]), numbers(units["score"]), np.array(units["kept"], dtype=bool)
    with saved_figure(path, height=3.0) as figure:
        axes = figure.subplots()
        signed_log_axis(axes, "x", score)
        positive_log_axis(axes, "y", flow)
        for chosen, colour, marker, label in ((kept, KEPT, "o", "kept"), (~kept, REMOVED, "v", "removed")):
            axes.plot(score[chosen], flow[chosen], marker, color=colour, markersize=3, alpha=0.6, markeredgewidth=0,
                      label=f"{label} ({chosen.sum()})")  # fmt: skip
        axes.set_xlabel(results.get("criterion") or "score")
        axes.set_ylabel("gradient flow of the filter")
        figure.legend(loc="outside upper center", ncols=2, markerscale=1.5)
