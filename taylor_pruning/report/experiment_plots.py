"""Plots of one pruning experiment, from the content of results.json.

    paths = write_experiment_plots(results, "runs/vgg16")

The stages are "dense", "pruned", "compensated" or "trained", "repaired", and "fine-tuned", in the order of the run. A value
that was not measured is None or NaN. Every file is written whole or not at all.
"""

import math
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from taylor_pruning.report.figures import (
    BLACK,
    BLUE,
    COLUMN_WIDTH,
    GREY,
    KEPT,
    METHODS,
    REMOVED,
    SKY_BLUE,
    STAGE_COLOURS,
    STAGE_TICKS,
    TEXT_WIDTH,
    end_accuracies,
    layer_axis,
    layer_figure_width,
    positive_log_axis,
    saved_figure,
    signed_log_axis,
)
from taylor_pruning.report.tables import numbers


def write_experiment_plots(results: dict, folder) -> list[Path]:
    """Write the plots of one experiment as PNG into `folder` and return their paths.

    Always accuracy.png, filters_per_layer.png and score_distribution.png; cost_against_width.png, oracle.png,
    gradient_flow.png and flow_vs_score.png where `results` holds what they show.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    plots = {"accuracy.png": _plot_accuracy, "filters_per_layer.png": _plot_filters}
    plots["score_distribution.png"] = _plot_scores
    if results.get("oracle"):
        plots["oracle.png"] = _plot_oracle
    if results.get("gradient_flow"):
        plots |= {"gradient_flow.png": _plot_gradient_flow, "flow_vs_score.png": _plot_flow_and_score}
    if any(record.get("trade") for record in results["rounds"]):
        plots["cost_against_width.png"] = _plot_trade
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
            mark = "." if len(at_epochs) == 1 else ""  # of which there is no line
            lower.plot(at_epochs, train_loss, f"{mark}:", color=GREY, markersize=3, label="training")
            lower.legend()
        for stage in results["stages"]:
            if stage.get("top1") is not None:
                upper.annotate(f"{stage['top1']:.1f}", (places[stage["stage"]], stage["top1"]), (0, -5),
                               textcoords="offset points", ha="center", va="top", color=BLUE,
                               bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5})  # fmt: skip
        upper.margins(x=0.08, y=0.18)
        end_accuracies(upper)
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

    Where every round ends with compensation, the solid line connects the compensated networks and the dashed line the
    networks right after each round's cut. The pruned stage, which has no repair at all, is a separate marker.
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


def _plot_trade(results, path):
    """Predicted cost of every layer against its width, a line a layer, coloured from the first layer to the last."""
    lines = trade_lines(results)
    depth = {name: place for place, name in enumerate(results["layers"])}
    with saved_figure(path, width=COLUMN_WIDTH, height=3.0) as figure:
        axes = figure.subplots()
        colours = matplotlib.colormaps["viridis"]
        norm = Normalize(0, max(1, len(depth) - 1))
        for name, (width, cost) in lines.items():
            colour = colours(norm(depth[name]))
            axes.plot(width, cost, color=colour, linewidth=0.9)
            axes.plot(width[-1], cost[-1], "o", color=colour, markersize=3.5)
        positive_log_axis(axes, "y", np.concatenate([cost[1:] for _, cost in lines.values()]))
        axes.set_xlim(102, 0)
        axes.set_xlabel("filters kept (%)")
        axes.set_ylabel("predicted cost (nats)")
        bar = figure.colorbar(ScalarMappable(norm, colours), ax=axes, label="layer", fraction=0.05, aspect=30)
        bar.set_ticks([0, max(1, len(depth) - 1)], labels=["first", "last"])
        figure.legend(handles=[Line2D([], [], color=GREY, marker="o", markersize=3.5, label="width that was chosen")],
                      loc="outside upper center")  # fmt: skip


def trade_lines(results) -> dict:
    """{layer: (filters kept in per cent, predicted cost in nats)} over all rounds, from the dense width on."""
    lines = {}
    for record in results["rounds"]:
        for name, found in (record.get("trade") or {}).items():
            share = 100 * numbers(found["filters"]) / results["layers"][name]["filters"]
            width, cost = lines.get(name, (share[:1], np.zeros(1)))
            lines[name] = np.append(width, share[1:]), np.append(cost, cost[-1] + numbers(found["cost"])[1:])
    return lines


def _criterion(results):
    """What the scores are, in lines that are shorter than an axis."""
    return (results.get("criterion") or "score").replace(", ", ",\n")


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
        axes.set_ylabel(_criterion(results))
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
        for order, reason in oracle.get("left_out", {}).items():
            figure.supxlabel(f"without order {order}: {reason}", fontsize="medium")
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
        axes.set_xlabel(_criterion(results))
        axes.set_ylabel("gradient flow of the filter")
        figure.legend(loc="outside upper center", ncols=2, markerscale=1.5)
