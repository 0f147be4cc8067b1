"""Tables, CSV, JSON and plots that compare the cells of a sweep: pruning percentage x method x seed.

    paths = write_sweep(sweep, "runs/sweep")
    print(sweep_table(sweep), verdict(sweep), sep="\\n\\n")

`sweep` holds "dense" (the stage of the unpruned network), "cells", "arguments" and "environment". A cell has
"percentage", "method" (a key of report.experiment.METHODS), "seed", "status" ("done" or "failed") and "error"; a
finished one also has "stages", "layers" and "fine_tuning", as in the results of one experiment. Percentages count what
the argument "budget" says, filters where there is none. Failed cells are listed and enter no mean.
"""

import csv
import math
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.patches import Patch

from taylor_pruning.errors import InputError
from taylor_pruning.files import atomic_path
from taylor_pruning.report.experiment import (
    COLUMN_WIDTH,
    DENSE,
    METHODS,
    TEXT_WIDTH,
    cost_unit,
    layer_axis,
    numbers,
    plain,
    saved_figure,
    text_table,
    write_json,
)

CSV_COLUMNS = ("percentage", "method", "taylor_order", "seed", "stage", "top1", "top5", "loss", "parameters", "macs",
               "file_bytes", "latency_ms", "seconds", "status", "error")  # fmt: skip
COSTS = {"macs": "MACs", "parameters": "parameters", "file_bytes": "size", "latency_ms": "latency"}
COUNTED = {"filters": "filters", "params": "parameters", "macs": "MACs"}  # what the percentages count
WHEN = {"before": "before fine-tuning", "after": "after fine-tuning"}


# Numbers


@dataclass(frozen=True)
class Estimate:
    """Mean and sample standard deviation over `seeds` values; the deviation of a single one is NaN."""

    mean: float
    sd: float
    seeds: int

    @classmethod
    def of(cls, values) -> "Estimate":
        values = numbers(values)
        values = values[np.isfinite(values)]
        mean = float(values.mean()) if values.size else math.nan
        return cls(mean, float(values.std(ddof=1)) if values.size > 1 else math.nan, values.size)

    def text(self, style=".1f", sign="+-") -> str:
        if not self.seeds:
            return "-"
        return format(self.mean, style) + ("" if math.isnan(self.sd) else f" {sign} {self.sd:{style}}")


def stage_at(cell: dict, when: str) -> dict:
    """The cell's stage before or after fine-tuning, or the "dense" one; an empty dictionary where there is none.

    Before fine-tuning is the network as it goes into it: compensated where it was compensated.
    """
    names = {"dense": ("dense",), "before": ("pruned", "compensated", "trained"), "after": ("fine-tuned",)}[when]
    return ([{}] + [stage for stage in cell["stages"] if stage["stage"] in names])[-1]


def final_moment(sweep: dict) -> str:
    """"after" (fine-tuning), or "before" in a sweep without fine-tuning."""
    return "after" if any(stage_at(cell, "after") for cell in _done(sweep)) else "before"


def _done(sweep):
    return [cell for cell in sweep["cells"] if cell["status"] == "done"]


def _groups(sweep):
    """{(percentage, method): finished cells}, by percentage and then in the order of METHODS."""
    order = {method: place for place, method in enumerate(METHODS)}
    unknown = {cell["method"] for cell in sweep["cells"]} - set(order)
    if unknown:
        raise InputError(f"unknown methods in the sweep: {sorted(unknown)}; use one of {list(order)}")

    groups = {}
    for cell in sorted(_done(sweep), key=lambda cell: (cell["percentage"], order[cell["method"]])):
        groups.setdefault((cell["percentage"], cell["method"]), []).append(cell)
    return groups


def _methods(sweep):
    present = {cell["method"] for cell in sweep["cells"]}
    return [method for method in METHODS if method in present]


def _removed(sweep):
    return COUNTED[sweep["arguments"].get("budget", "filters")] + " removed"


def _percentages(sweep):
    return sorted({cell["percentage"] for cell in sweep["cells"]})


def _estimate(cells, key, when):
    return Estimate.of([stage_at(cell, when).get(key) for cell in cells])


def _reduction(sweep, cells, key, when):
    """Per cent saved against the dense network of the same cell, or of the sweep where the cell has none."""
    saved = []
    for cell in cells:
        dense = stage_at(cell, "dense") or sweep["dense"]
        before, now = numbers([dense.get(key), stage_at(cell, when).get(key)])
        saved.append(100 * (1 - now / before) if before else math.nan)
    return Estimate.of(saved)


# Tables


def _reference_rows(sweep, when, sign):
    """Rows of the reference layout: percentage removed, top-1 of every method, size reduction."""
    groups = _groups(sweep)
    for percentage in _percentages(sweep):
        row = [f"{percentage:g} %"]
        sizes = []
        for method in _methods(sweep):
            cells = groups.get((percentage, method), [])
            row.append(_estimate(cells, "top1", when).text(sign=sign))
            sizes.append(_reduction(sweep, cells, "file_bytes", when).mean)
        sizes = [f"{size:.1f}" for size in (np.nanmin(sizes), np.nanmax(sizes))] if np.isfinite(sizes).any() else ["-"]
        yield [*row, " to ".join(dict.fromkeys(sizes)) + (" %" if sizes != ["-"] else "")]


def _reference_header(sweep):
    return [_removed(sweep), *(METHODS[method].label for method in _methods(sweep)), "size reduction"]


def sweep_table(sweep: dict) -> str:
    """Top-1 (%) of every method at every percentage before and after fine-tuning, for the terminal."""
    moments = ["before", "after"] if final_moment(sweep) == "after" else ["before"]
    tables = [
        f"Top-1 (%) {WHEN[when]}\n" + text_table(_reference_header(sweep), list(_reference_rows(sweep, when, "+-")))
        for when in moments
    ]
    (dense,) = numbers([sweep["dense"].get("top1")])
    failed = len(sweep["cells"]) - len(_done(sweep))
    notes = [f"Dense network: {dense:.1f} %"] + ([f"{failed} of {len(sweep['cells'])} cells failed"] if failed else [])
    return "\n\n".join([*tables, "; ".join(notes)])


def _span(counts):
    counts = sorted(counts) or [0]
    return " to ".join(dict.fromkeys([str(counts[0]), str(counts[-1])]))


def _markdown_table(header, rows, labels=1):
    """The first `labels` columns to the left, the others to the right."""
    lines = [header, ["---"] * labels + ["---:"] * (len(header) - labels), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _full_rows(sweep):
    when = final_moment(sweep)
    for (percentage, method), cells in _groups(sweep).items():
        tops = [_estimate(cells, key, at).text(sign="±") for key in ("top1", "top5") for at in WHEN]
        costs = [_reduction(sweep, cells, key, when).text(sign="±") for key in COSTS]
        yield [f"{percentage:g} %", METHODS[method].label, *tops, *costs, str(len(cells))]


def _markdown(sweep):
    when = final_moment(sweep)
    dense = {key: Estimate.of([sweep["dense"].get(key)]).mean for key in ("top1", "top5", "loss", *COSTS)}
    unit, size = cost_unit(dense["macs"])
    seeds = _span(len(cells) for cells in _groups(sweep).values())
    parts = [
        "# Pruning sweep",
        verdict(sweep),
        f"## Top-1 (%) {WHEN[when]}",
        _markdown_table(_reference_header(sweep), list(_reference_rows(sweep, when, "±"))),
        f"Mean ± sample standard deviation over seeds (finished per entry: {seeds}; a single seed has no deviation)."
        " Size reduction: of the saved file, from the least to the most among the methods of the row.",
        f"Dense network: top-1 {dense['top1']:.1f} %, top-5 {dense['top5']:.1f} %, loss {dense['loss']:.3f} nats,"
        f" {dense['parameters'] / 1e6:.3f} M parameters, {dense['macs'] / size:.3f} {unit} MACs,"
        f" {dense['file_bytes'] / 1e6:.2f} MB, {dense['latency_ms']:.2f} ms.".replace("nan", "not measured"),
        "## All numbers",
        _markdown_table(
            [_removed(sweep), "method", *(f"{top} {at}" for top in ("top-1", "top-5") for at in WHEN.values()),
             *(f"{name} saved" for name in COSTS.values()), "seeds"], list(_full_rows(sweep)), labels=2),
        "All in per cent but the number of seeds. Saved: against the dense network.",
    ]  # fmt: skip
    failed = [cell for cell in sweep["cells"] if cell["status"] != "done"]
    if failed:
        lines = [f"- {cell['percentage']:g} %, {METHODS[cell['method']].label}, seed {cell['seed']}: "
                 + " ".join((cell["error"] or "no message").split()) for cell in failed]  # fmt: skip
        parts += ["## Failed cells", "\n".join(lines)]
    parts += ["## Arguments", "\n".join(f"- {key}: `{value}`" for key, value in plain(sweep["arguments"]).items())]
    return "\n\n".join(parts) + "\n"


def _csv_rows(sweep):
    yield {"percentage": 0.0, "method": "dense", "status": "done"} | _stage_columns(sweep["dense"])
    for cell in sweep["cells"]:
        shared = {key: cell[key] for key in ("percentage", "method", "seed", "status", "error")}
        order = cell["method"].removeprefix("order ")
        shared["taylor_order"] = order if order != cell["method"] else ""
        for stage in cell.get("stages") or [{}]:
            yield shared | _stage_columns(stage)


def _stage_columns(stage):
    return plain({key: value for key, value in stage.items() if key in CSV_COLUMNS})


def _open_text(path):
    return open(path, "w", newline="", encoding="utf-8", errors="backslashreplace")


def _write_csv(sweep, path):
    with atomic_path(path) as temporary, _open_text(temporary) as file:
        writer = csv.DictWriter(file, CSV_COLUMNS, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(_csv_rows(sweep))


# Verdict


@dataclass(frozen=True)
class Contender:
    """A method at one percentage: mean top-1 and its spread, both in points."""

    method: str
    top1: float
    spread: float
    seeds: int

    def lead_over(self, other) -> tuple[float, float]:
        """Difference and its spread, as they are printed: a lead must hold in the printed figures too."""
        return round(self.top1 - other.top1, 1), round(math.hypot(self.spread, other.spread), 1)


def _contender(method, cells, when):
    """Spread: standard deviation over seeds; where there is none, binomial standard error of the test images."""
    top1 = _estimate(cells, "top1", when)
    if top1.seeds > 1 and top1.sd > 0:
        return Contender(method, top1.mean, top1.sd, top1.seeds)
    images = numbers(stage_at(cell, when).get("images") for cell in cells).min()
    share = top1.mean / 100
    return Contender(method, top1.mean, 100 * math.sqrt(share * (1 - share) / images), 1)


def _contest(contenders):
    """(winner or those that cannot be told from the leader, the beaten one if they are two, lead, spread to quote)."""
    leader, *others = sorted(contenders, key=lambda contender: -contender.top1)
    tied = [other for other in others if not np.greater(*leader.lead_over(other))]
    lead, spread = leader.lead_over(tied[-1] if tied else others[0])
    order = list(METHODS)
    names = [METHODS[method].label for method in sorted((c.method for c in (leader, *tied)), key=order.index)]
    beaten = f" {METHODS[others[0].method].label}" if len(others) == 1 and not tied else ""
    return tuple(names), beaten, lead, spread


def _join(words):
    *front, last = words
    return f"{', '.join(front)} and {last}" if front else last


def _clauses(contests):
    """Clauses of the sentence, one for all percentages with the same outcome; `contests` is {percentage: contest}."""
    outcomes = {}
    for percentage, (names, beaten, lead, spread) in contests.items():
        places = outcomes.setdefault((names, beaten), [])
        known = "unknown" if math.isnan(spread) else f"{spread:.1f}"
        if len(names) == 1:
            places.append(f"at {percentage:g} % by {lead:.1f} points (spread {known})")
        else:
            places.append(f"at {percentage:g} % ({lead:.1f} of {known})")
    for (names, beaten), places in outcomes.items():
        claim = f"leads{beaten}" if len(names) == 1 else "are within the spread"
        who = _join(names)
        if len(names) > 1 and all(name.startswith("order ") for name in names):
            who = "orders " + who.replace("order ", "")
        yield f"{who} {claim} {_join(places)}"


def verdict(sweep: dict) -> str:
    """One sentence: which order leads where, by how much against the spread, and how the best stands to the baselines.

    A method leads where its mean top-1 exceeds every rival's by more than the spread of their difference: the root of
    the summed squares of both standard deviations over seeds, or, for a single seed, of both binomial standard errors.
    """
    when = final_moment(sweep)
    fields = {}
    for (percentage, method), cells in _groups(sweep).items():
        contender = _contender(method, cells, when)
        if math.isfinite(contender.top1):
            fields.setdefault(percentage, []).append(contender)
    failed = len(sweep["cells"]) - len(_done(sweep))
    loss = f"; {failed} of {len(sweep['cells'])} cells failed" if failed else ""
    if not fields:
        return f"No cell has a result, so there is nothing to compare{loss}."

    orders, baselines = {}, {}
    for percentage, field in fields.items():
        taylor = [contender for contender in field if contender.method.startswith("order")]
        others = [contender for contender in field if contender not in taylor]
        if len(taylor) > 1:
            orders[percentage] = _contest(taylor)
        if taylor and others:
            baselines[percentage] = _contest([max(taylor, key=lambda c: c.top1), max(others, key=lambda c: c.top1)])
    clauses = [
        f"{who}: {'; '.join(_clauses(contests))}"
        for who, contests in (("the orders among themselves", orders), ("best order against best baseline", baselines))
        if contests
    ]
    if not clauses:
        return f"Top-1 {WHEN[when]}: no percentage has two results to compare{loss}."
    return f"Top-1 {WHEN[when]}, {'; '.join(clauses)} {_spread_note(fields)}{loss}."


def _spread_note(fields):
    seeds = [contender.seeds for field in fields.values() for contender in field]
    several = [count for count in seeds if count > 1]
    kinds = [f"standard deviations over {_span(several)} seeds"] if several else []
    if len(several) < len(seeds):
        kinds.append("binomial standard errors of the test images, where there is one seed or all seeds agree")
    return f"(spread: of the difference, from the {' or the '.join(kinds)})"


# Plots


def _method_lines(axes, sweep, x_of, y_of, dodge=0.0):
    """A line a method with error bars, broken where a percentage has no finished cell.

    `x_of` and `y_of` map (percentage, cells) to an Estimate; `dodge` is the step in x between neighbouring methods.
    """
    groups, methods = _groups(sweep), _methods(sweep)
    for place, method in enumerate(methods):
        style = METHODS[method]
        points = [(p, groups.get((p, method), [])) for p in _percentages(sweep)]
        x, y = [x_of(*point) for point in points], [y_of(*point) for point in points]
        if not any(estimate.seeds for estimate in y):
            continue
        error = {name: numbers(estimate.sd for estimate in axis) for name, axis in (("xerr", x), ("yerr", y))}
        error = {name: np.nan_to_num(sd) for name, sd in error.items() if (sd > 0).any()}
        axes.errorbar(numbers(e.mean for e in x) + dodge * (place - (len(methods) - 1) / 2), numbers(e.mean for e in y),
                      **error, color=style.colour, marker=style.marker, linestyle=style.line, label=style.label,
                      capsize=1.5, elinewidth=0.8, zorder=3 if method.startswith("order") else 2)  # fmt: skip


def _exactly(percentage, cells):
    return Estimate(percentage, math.nan, len(cells))


def _shared_legend(figure, panels):
    handles = {text: handle for axes in panels for handle, text in zip(*axes.get_legend_handles_labels(), strict=True)}
    rows = math.ceil(len(handles) / int(figure.get_figwidth() / 1.3))
    columns = math.ceil(len(handles) / rows)
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=columns, columnspacing=1)


def _percentage_axis(axes, sweep):
    ticks = _percentages(sweep)
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xlabel(f"{_removed(sweep)} (%)")


def _plot_accuracy(sweep, paths):
    moments = ["before", "after"] if final_moment(sweep) == "after" else ["before"]
    # side by side, or the error bars of methods that lie together hide each other
    percentages = _percentages(sweep)
    several = any(len(cells) > 1 for cells in _groups(sweep).values())
    dodge = 0.007 * ((percentages[-1] - percentages[0]) or 10) if several else 0.0
    with saved_figure(*paths, width=TEXT_WIDTH if len(moments) > 1 else COLUMN_WIDTH, height=3.0) as figure:
        panels = figure.subplots(1, len(moments), squeeze=False)[0]
        for axes, when in zip(panels, moments, strict=True):
            if sweep["dense"].get("top1") is not None:
                axes.axhline(sweep["dense"]["top1"], color=DENSE, linestyle="--", linewidth=0.8, label="dense")
            _method_lines(axes, sweep, _exactly, lambda _, cells, at=when: _estimate(cells, "top1", at), dodge)
            _percentage_axis(axes, sweep)
            axes.set_title(WHEN[when])
        panels[0].set_ylabel("top-1 (%)")
        _shared_legend(figure, panels)


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
            _method_lines(axes, sweep, cost, lambda _, cells: _estimate(cells, "top1", when))
            axes.set_xlabel(f"{COSTS[key]} ({unit})")
        panels[0].set_ylabel(f"top-1 {WHEN[when]} (%)")
        _shared_legend(figure, panels)


def _plot_size(sweep, paths):
    """Size reduction, and beneath it what it exceeds the removed percentage by, as the lines lie close together."""
    when = final_moment(sweep)
    percentages = _percentages(sweep)

    def reduction(_, cells):
        return _reduction(sweep, cells, "file_bytes", when)

    def excess(percentage, cells):
        saved = reduction(percentage, cells)
        return Estimate(saved.mean - percentage, saved.sd, saved.seeds)

    with saved_figure(*paths, height=4.4) as figure:
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
        _method_lines(upper, sweep, _exactly, reduction)
        _method_lines(lower, sweep, _exactly, excess)
        upper.plot(percentages, percentages, color=DENSE, linewidth=0.7, label=_removed(sweep), zorder=1)
        lower.axhline(0, color=DENSE, linewidth=0.7)
        _percentage_axis(lower, sweep)
        upper.set_ylabel("size reduction (%)")
        lower.set_ylabel(f"above {_removed(sweep)}\n(points)")
        _shared_legend(figure, [upper])


def _plot_layers(sweep, paths):
    """Heat map layer x percentage of the filters kept, a panel an order (a method where no order was run)."""
    groups = _groups(sweep)
    finished = [method for method in _methods(sweep) if any(m == method for _, m in groups)]
    methods = [method for method in finished if method.startswith("order")] or finished
    layers = next(cell["layers"] for cell in _done(sweep) if cell["layers"])
    percentages = _percentages(sweep)
    width = TEXT_WIDTH if len(methods) > 1 else COLUMN_WIDTH
    height = float(np.clip(0.14 * len(layers), 1.6, 6.5))
    with saved_figure(*paths, width=width, height=height + 0.9) as figure:
        panels = figure.subplots(1, len(methods), sharey=True, squeeze=False)[0]
        colours = matplotlib.colormaps["viridis"].with_extremes(bad="#d9d9d9")
        for axes, method in zip(panels, methods, strict=True):
            kept = np.array([_kept(groups.get((percentage, method), []), layers) for percentage in percentages]).T
            image = axes.imshow(kept, aspect="auto", vmin=0, vmax=100, cmap=colours, interpolation="nearest")
            axes.set_xticks(range(len(percentages)), [f"{percentage:g}" for percentage in percentages])
            axes.set_xlabel(f"{_removed(sweep)} (%)")
            axes.set_title(METHODS[method].label)
            axes.grid(False)
        layer_axis(panels[0].yaxis, list(layers), height)
        for axes in panels[1:]:
            axes.tick_params(labelleft=False)
        figure.colorbar(image, ax=panels, label="filters kept (%)", fraction=0.05, aspect=30)
        figure.legend(handles=[Patch(color="#d9d9d9", label="protected or not run")], loc="outside upper center")


def _kept(cells, layers):
    """Share of the filters kept in per cent, mean over cells [layers]; NaN where protected or not run."""
    filters = numbers(layer["filters"] for layer in layers.values())
    kept = [numbers(cell["layers"][name]["kept"] for name in layers) for cell in cells]
    protected = [layer.get("reason") is not None for layer in layers.values()]
    return np.where(protected, math.nan, 100 * np.mean(kept, axis=0) / filters if kept else math.nan)


def _plot_fine_tuning(sweep, paths):
    """Top-1 over the epochs, a panel a percentage; epoch 0 is the network as it goes into fine-tuning."""
    groups = {key: [cell for cell in cells if cell["fine_tuning"]] for key, cells in _groups(sweep).items()}
    percentages = sorted({percentage for (percentage, _), cells in groups.items() if cells})
    columns = 2 if len(percentages) in (2, 4) else min(3, len(percentages))
    rows = math.ceil(len(percentages) / columns)
    with saved_figure(*paths, width=COLUMN_WIDTH if columns == 1 else TEXT_WIDTH, height=2.1 * rows + 0.7) as figure:
        panels = figure.subplots(rows, columns, sharex=True, squeeze=False)
        for axes, percentage in zip(panels.flat, percentages, strict=False):
            if sweep["dense"].get("top1") is not None:
                axes.axhline(sweep["dense"]["top1"], color=DENSE, linestyle="--", linewidth=0.8, label="dense")
            for (p, method), cells in groups.items():
                if p == percentage and cells:
                    _curve(axes, cells, METHODS[method])
            axes.set_title(f"{percentage:g} % of the {_removed(sweep)}")
            axes.xaxis.get_major_locator().set_params(integer=True, nbins=5)
        for axes in panels.flat[len(percentages) :]:
            axes.remove()
        for axes in panels.flat[max(0, len(percentages) - columns) : len(percentages)]:
            axes.set_xlabel("epoch")
            axes.tick_params(labelbottom=True)
        for axes in panels[:, 0]:
            axes.set_ylabel("top-1 (%)")
        _shared_legend(figure, panels.flat[: len(percentages)])


def _curve(axes, cells, style):
    """Mean over seeds, and a band of one standard deviation where there are several."""
    runs = [[stage_at(cell, "before").get("top1"), *(epoch["top1"] for epoch in cell["fine_tuning"])] for cell in cells]
    epochs = range(max(map(len, runs)))
    points = [Estimate.of([run[epoch] for run in runs if epoch < len(run)]) for epoch in epochs]
    mean, sd = (numbers(getattr(point, name) for point in points) for name in ("mean", "sd"))
    axes.plot(epochs, mean, color=style.colour, linestyle=style.line, marker=style.marker if len(mean) <= 12 else None,
              markersize=2.5, label=style.label)  # fmt: skip
    axes.fill_between(epochs, mean - sd, mean + sd, color=style.colour, alpha=0.2, linewidth=0)


def write_sweep(sweep: dict, folder) -> list[Path]:
    """Write results.json, results.csv, results.md and the comparison plots (PNG and PDF); return their paths.

    The CSV has one row a cell and stage after a row for the dense network; a failed cell keeps a row, with its error.
    Plots of what no cell has (no finished cell, no fine-tuning) are left out. Raises InputError on an unknown method.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    text = _markdown(sweep)
    _write_csv(sweep, folder / "results.csv")
    with atomic_path(folder / "results.md") as temporary, _open_text(temporary) as file:
        file.write(text)
    done = _done(sweep)
    plots = {}
    if done:
        plots |= {"accuracy": _plot_accuracy, "accuracy_against_cost": _plot_cost, "size_reduction": _plot_size}
    if any(cell["layers"] for cell in done):
        plots["filters_kept"] = _plot_layers
    if any(cell["fine_tuning"] for cell in done):
        plots["fine_tuning"] = _plot_fine_tuning
    paths = [folder / name for name in ("results.json", "results.csv", "results.md")]
    for name, plot in plots.items():
        files = [folder / f"{name}.{suffix}" for suffix in ("png", "pdf")]
        plot(sweep, files)
        paths += files
    write_json(folder / "results.json", sweep)  # the last one: it marks a sweep that is finished
    return paths
