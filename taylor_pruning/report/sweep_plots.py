"""Plots that compare the cells of a sweep (report.sweep_numbers), as PNG and PDF."""

import math
from pathlib import Path

import numpy as np

from taylor_pruning.report.figures import (
    COLUMN_WIDTH,
    DENSE,
    METHODS,
    TEXT_WIDTH,
    end_accuracies,
    layer_axis,
    layer_figure_width,
    saved_figure,
)
from taylor_pruning.report.sweep_numbers import (
    COSTS,
    WHEN,
    Estimate,
    cells_by_method,
    estimate_of,
    final_moment,
    finished_cells,
    methods_of,
    percentages_of,
    reduction_of,
    removed_label,
    stage_at,
)
from taylor_pruning.report.sweep_steps import mean_curve, steps_to_reach
from taylor_pruning.report.tables import cost_unit, numbers

LEGEND_ROWS, LEGEND_ROW = 4, 0.16  # rows for which a figure has room, and inches that each further one takes
MOST_ROWS = 8  # of a narrow figure, whose legend would else be taller than its plot
DODGE = 0.007  # distance of neighbouring methods, as a share of the range of x
DODGED = 0.7  # largest distance of the first method from the last, as a share of the smallest gap in x
LABEL_ROOM = 0.08  # of a percentage under the x axis, as a share of the range of x


def _method_lines(axes, sweep, x_of, y_of, dodge=0.0, methods=None):
    """A line a method with error bars, broken where a percentage has no finished cell.

    `x_of` and `y_of` map (percentage, cells) to an Estimate; `dodge` is the step in x between neighbouring methods;
    `methods` are all of the sweep by default.
    """
    groups, methods = cells_by_method(sweep), methods or methods_of(sweep)
    for place, method in enumerate(methods):
        style = METHODS[method]
        points = [(p, groups.get((p, method), [])) for p in percentages_of(sweep)]
        x, y = [x_of(*point) for point in points], [y_of(*point) for point in points]
        if not any(estimate.seeds for estimate in y):
            continue
        error = {name: numbers(estimate.sd for estimate in axis) for name, axis in (("xerr", x), ("yerr", y))}
        error = {name: np.nan_to_num(sd) for name, sd in error.items() if (sd > 0).any()}
        axes.errorbar(numbers(e.mean for e in x) + dodge * (place - (len(methods) - 1) / 2), numbers(e.mean for e in y),
                      **error, color=style.colour, marker=style.marker, linestyle=style.line, label=style.label,
                      capsize=1.5, elinewidth=0.8, zorder=3 if method.startswith("order") else 2)  # fmt: skip


def _removed(percentage, cells):
    """Per cent of the budget that the networks lost: less than was asked where the guard ended the rounds."""
    return Estimate.of(cell["stopped"]["reached"] if cell.get("stopped") else percentage for cell in cells)


def _shared_legend(figure, panels):
    handles = {text: handle for axes in panels for handle, text in zip(*axes.get_legend_handles_labels(), strict=True)}
    rows = math.ceil(len(handles) / int(figure.get_figwidth() / 1.3))
    while True:
        columns = math.ceil(len(handles) / rows)
        # lines long enough to show their dashes
        legend = figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=columns, columnspacing=1,
                               handlelength=2.4)  # fmt: skip
        if columns == 1 or legend.get_tightbbox().width <= figure.bbox.width:
            break
        legend.remove()
        rows = math.ceil(len(handles) / (columns - 1))
    if rows > MOST_ROWS and figure.get_figwidth() < TEXT_WIDTH:
        legend.remove()
        figure.set_figwidth(TEXT_WIDTH)
        return _shared_legend(figure, panels)
    figure.set_figheight(figure.get_figheight() + LEGEND_ROW * max(0, rows - LEGEND_ROWS))


def _percentage_axis(axes, sweep):
    ticks = percentages_of(sweep)
    room, named = LABEL_ROOM * (ticks[-1] - ticks[0]), []
    for tick in ticks:
        if not named or tick - named[-1] >= room:
            named.append(tick)
    axes.set_xticks(ticks, [f"{tick:g}" if tick in named else "" for tick in ticks])
    axes.set_xlabel(f"{removed_label(sweep)} (%)")


def _plot_accuracy(sweep, paths):
    """Top-1 of all methods and, below it on a scale of its own, how far the Taylor orders are from the dense network."""
    moments = ["before", "after"] if final_moment(sweep) == "after" else ["before"]
    percentages, dense = percentages_of(sweep), sweep["dense"].get("top1")
    # side by side, or methods with close values hide each other
    gap = min(np.diff(percentages), default=10)
    dodge = min(DODGE * ((percentages[-1] - percentages[0]) or 10), DODGED * gap / len(methods_of(sweep)))
    finished = {method for _, method in cells_by_method(sweep)}
    orders = [method for method in methods_of(sweep) if method.startswith("order") and method in finished]
    rows = 2 if dense is not None and orders else 1
    width, height = TEXT_WIDTH if len(moments) > 1 else COLUMN_WIDTH, 3.0 if rows == 1 else 4.6
    with saved_figure(*paths, width=width, height=height) as figure:
        panels = figure.subplots(rows, len(moments), squeeze=False, sharex=True, height_ratios=[3, 2][:rows])
        for column, when in enumerate(moments):
            upper, lowest = panels[0, column], panels[-1, column]
            _method_lines(upper, sweep, _removed, lambda _, cells, at=when: estimate_of(cells, "top1", at), dodge)
            if dense is not None:
                upper.axhline(dense, color=DENSE, linestyle="--", linewidth=0.8, label="dense")
            if rows == 2:

                def difference(_, cells, at=when):
                    top1 = estimate_of(cells, "top1", at)
                    return Estimate(top1.mean - dense, top1.sd, top1.seeds)

                _method_lines(lowest, sweep, _removed, difference, dodge, orders)
                lowest.axhline(0, color=DENSE, linestyle="--", linewidth=0.8)
            end_accuracies(upper)
            _percentage_axis(lowest, sweep)
            upper.set_title(WHEN[when])
        panels[0, 0].set_ylabel("top-1 (%)")
        if rows == 2:
            panels[1, 0].set_ylabel("orders against dense\n(points)")
        _shared_legend(figure, panels[0])


def _plot_cost(sweep, paths):
    when = final_moment(sweep)
    units = {"macs": cost_unit(sweep["dense"].get("macs")), "parameters": ("M", 1e6)}
    with saved_figure(*paths, width=TEXT_WIDTH, height=3.0) as figure:
        panels = figure.subplots(1, 2, sharey=True)
        for axes, (key, (unit, size)) in zip(panels, units.items(), strict=True):

            def cost(_, cells, key=key, size=size):
                return Estimate.of(numbers(stage_at(cell, when).get(key) for cell in cells) / size)

            (x, y) = numbers([sweep["dense"].get(key), sweep["dense"].get("top1")])
            axes.plot(x / size, y, "*", color=DENSE, markersize=8, linestyle="", label="dense")
            _method_lines(axes, sweep, cost, lambda _, cells: estimate_of(cells, "top1", when))
            axes.set_xlabel(f"{COSTS[key]} ({unit})")
        end_accuracies(panels[0])
        panels[0].set_ylabel(f"top-1 {WHEN[when]} (%)")
        _shared_legend(figure, panels)


def _plot_size(sweep, paths):
    """Size reduction, and below it its excess over the removed percentage, because the lines are close to each other."""
    when = final_moment(sweep)
    percentages = percentages_of(sweep)

    def reduction(_, cells):
        return reduction_of(sweep, cells, "file_bytes", when)

    def excess(percentage, cells):
        saved = reduction(percentage, cells)
        return Estimate(saved.mean - percentage, saved.sd, saved.seeds)

    with saved_figure(*paths, height=4.4) as figure:
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
        _method_lines(upper, sweep, _removed, reduction)
        _method_lines(lower, sweep, _removed, excess)
        upper.plot(percentages, percentages, color=DENSE, linewidth=0.7, label=removed_label(sweep), zorder=1)
        lower.axhline(0, color=DENSE, linewidth=0.7)
        _percentage_axis(lower, sweep)
        upper.set_ylabel("size reduction (%)")
        lower.set_ylabel(f"above {removed_label(sweep)}\n(points)")
        _shared_legend(figure, [upper])


def _plot_layers(sweep, paths):
    """Filters kept layer by layer, a panel a percentage and a line an order (a method where no order was run).

    All cells of a percentage removed the same share of the budget, so that the lines differ in where they took it.
    """
    groups = cells_by_method(sweep)
    finished = [method for method in methods_of(sweep) if any(m == method for _, m in groups)]
    methods = [method for method in finished if method.startswith("order")] or finished
    layers = next(cell["layers"] for cell in finished_cells(sweep) if cell["layers"])
    percentages = [p for p in percentages_of(sweep) if any((p, method) in groups for method in methods)]
    width = layer_figure_width(layers)
    with saved_figure(*paths, width=width, height=1.5 * len(percentages) + 1.0) as figure:
        panels = figure.subplots(len(percentages), 1, sharex=True, squeeze=False)[:, 0]
        for axes, percentage in zip(panels, percentages, strict=True):
            for method in methods:
                if cells := groups.get((percentage, method)):
                    style, kept = METHODS[method], _kept(cells, layers)
                    axes.plot(kept, color=style.colour, marker=style.marker, linestyle=style.line, linewidth=0.9,
                              markersize=2.5, label=style.label)  # fmt: skip
            axes.set_ylim(0, 105)
            axes.set_xlim(-0.7, len(layers) - 0.3)
            axes.set_title(f"{percentage:g} % of the {removed_label(sweep)}")
            axes.set_ylabel("kept (%)")
        layer_axis(panels[-1].xaxis, list(layers), width - 0.6)
        _shared_legend(figure, panels)


def _kept(cells, layers):
    """Share of the filters kept in per cent, mean over cells [layers]; NaN where protected or not run."""
    filters = numbers(layer["filters"] for layer in layers.values())
    kept = [numbers(cell["layers"][name]["kept"] for name in layers) for cell in cells]
    protected = [layer.get("reason") is not None for layer in layers.values()]
    return np.where(protected, math.nan, 100 * np.mean(kept, axis=0) / filters if kept else math.nan)


def _plot_fine_tuning(sweep, paths):
    """Top-1 over the epochs; epoch 0 is the network before fine-tuning."""

    def of(cell):
        return enumerate([stage_at(cell, "before").get("top1"), *(epoch["top1"] for epoch in cell["fine_tuning"])])

    def finish(axes, percentage):
        axes.xaxis.get_major_locator().set_params(integer=True, nbins=5)

    _plot_training(sweep, paths, "fine_tuning", of, "epoch", finish, sweep["dense"].get("top1"))


def _plot_steps(sweep, paths):
    """Top-1 over the optimiser steps, on a few validation images (the dense network's top-1 is of all).

    A dotted line is what the best order has before training; a ring, with a line down to the number of steps, is where
    another method has it.
    """
    aims = {found.percentage: found for found in steps_to_reach(sweep)}

    def of(cell):
        return [(point["step"], point["top1"]) for point in cell["accuracy_at_steps"]]

    def finish(axes, percentage):
        aim, bottom = aims[percentage], axes.get_ylim()[0]
        best = "best order" if aim.best.startswith("order") else "best method"
        axes.axhline(aim.top1, color=DENSE, linestyle=":", linewidth=0.8, zorder=1, label=f"{best}, untrained")
        for method, step in aim.steps.items():
            if step:
                top1 = mean_curve(groups[percentage, method])[step]
                colour = METHODS[method].colour
                axes.plot(step, top1, "o", markersize=8, markerfacecolor="none", color=colour)
                axes.vlines(step, bottom, top1, color=colour, linestyle=":", linewidth=0.8)
        axes.set_ylim(bottom=bottom)
        axes.set_xscale("symlog", linthresh=10)
        axes.set_xlim(left=-0.4)  # whole markers at 0
        axes.set_xticks(sorted(ticks))  # the same in all panels, which share them
        axes.xaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()

    groups, last = cells_by_method(sweep), max(max(found.last.values()) for found in aims.values())
    ticks = {0, last, *(step for found in aims.values() for step in found.steps.values() if step)}
    ticks |= {step for power in range(1, 9) for step in (10**power, 3 * 10**power) if step <= last / 1.25}
    _plot_training(sweep, paths, "accuracy_at_steps", of, "training steps", finish)


def _plot_training(sweep, paths, key, points_of, label, finish, dense=None):
    """A panel a percentage with a curve a method, of the cells that have `key`.

    `points_of` maps a cell to its points (x, top-1), `finish` is called with every panel and its percentage, `dense` is a
    line in all.
    """
    groups = {k: [cell for cell in cells if cell.get(key)] for k, cells in cells_by_method(sweep).items()}
    percentages = sorted({percentage for (percentage, _), cells in groups.items() if cells})
    columns = 2 if len(percentages) in (2, 4) else min(3, len(percentages))
    rows = math.ceil(len(percentages) / columns)
    with saved_figure(*paths, width=COLUMN_WIDTH if columns == 1 else TEXT_WIDTH, height=2.1 * rows + 0.7) as figure:
        panels = figure.subplots(rows, columns, sharex=True, squeeze=False)
        for axes, percentage in zip(panels.flat, percentages, strict=False):
            if dense is not None:
                axes.axhline(dense, color=DENSE, linestyle="--", linewidth=0.8, label="dense")
            for (p, method), cells in groups.items():
                if p == percentage and cells:
                    _curve(axes, [dict(points_of(cell)) for cell in cells], METHODS[method])
            axes.set_title(f"{percentage:g} % of the {removed_label(sweep)}")
            finish(axes, percentage)
            end_accuracies(axes)
        for axes in panels.flat[len(percentages) :]:
            axes.remove()
        for axes in panels.flat[max(0, len(percentages) - columns) : len(percentages)]:
            axes.set_xlabel(label)
            axes.tick_params(labelbottom=True)
        for axes in panels[:, 0]:
            axes.set_ylabel("top-1 (%)")
        _shared_legend(figure, panels.flat[: len(percentages)])


def _curve(axes, runs, style):
    """Mean over seeds, and a band of one standard deviation where there are several. runs: [{x: top-1}], one a seed."""
    at = sorted(set().union(*runs))
    points = [Estimate.of([run[x] for run in runs if x in run]) for x in at]
    mean, sd = (numbers(getattr(point, name) for point in points) for name in ("mean", "sd"))
    axes.plot(at, mean, color=style.colour, linestyle=style.line, marker=style.marker if len(mean) <= 12 else None,
              markersize=2.5, label=style.label)  # fmt: skip
    axes.fill_between(at, mean - sd, mean + sd, color=style.colour, alpha=0.2, linewidth=0)


def write_sweep_plots(sweep: dict, folder: Path) -> list[Path]:
    """Write the plots of what the cells have (finished cells, layers, fine-tuning) into `folder`; return their paths."""
    done, plots, paths = finished_cells(sweep), {}, []
    if done:
        plots |= {"accuracy": _plot_accuracy, "accuracy_against_cost": _plot_cost, "size_reduction": _plot_size}
    if any(cell["layers"] for cell in done):
        plots["filters_kept"] = _plot_layers
    if any(cell["fine_tuning"] for cell in done):
        plots["fine_tuning"] = _plot_fine_tuning
    if any(cell.get("accuracy_at_steps") for cell in done):
        plots["accuracy_against_steps"] = _plot_steps
    for name, plot in plots.items():
        files = [folder / f"{name}.{suffix}" for suffix in ("png", "pdf")]
        plot(sweep, files)
        paths += files
    return paths
