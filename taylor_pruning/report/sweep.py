"""Tables, CSV and JSON that compare the cells of a sweep: pruning percentage x method x seed.

    paths = write_sweep(sweep, "runs/sweep")
    print(sweep_table(sweep))

`sweep` is described in report.sweep_numbers.
"""

import csv
import math
from pathlib import Path

import numpy as np

from taylor_pruning.files import atomic_path
from taylor_pruning.report.figures import METHODS
from taylor_pruning.report.json_files import plain, write_json
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
)
from taylor_pruning.report.sweep_plots import write_sweep_plots
from taylor_pruning.report.sweep_steps import steps_to_reach
from taylor_pruning.report.tables import cost_unit, numbers, standard_error, text_table
from taylor_pruning.report.warnings import sweep_warnings

CSV_COLUMNS = ("percentage", "method", "taylor_order", "seed", "stage", "top1", "top5", "loss", "parameters", "macs",
               "file_bytes", "latency_ms", "seconds", "status", "error")  # fmt: skip


def _reference_rows(sweep, when, sign, mark):
    """Rows of the reference layout: percentage removed, top-1 of every method, size reduction.

    `mark(text, best)` formats a top-1, `best` for the highest mean of its row.
    """
    groups = cells_by_method(sweep)
    for percentage in percentages_of(sweep):
        cells = [groups.get((percentage, method), []) for method in methods_of(sweep)]
        top1 = [estimate_of(some, "top1", when) for some in cells]
        highest = max((round(estimate.mean, 1) for estimate in top1 if estimate.seeds), default=None)
        texts = [mark(estimate.text(sign=sign), round(estimate.mean, 1) == highest) for estimate in top1]
        sizes = [reduction_of(sweep, some, "file_bytes", when).mean for some in cells]
        sizes = [f"{size:.1f}" for size in (np.nanmin(sizes), np.nanmax(sizes))] if np.isfinite(sizes).any() else ["-"]
        size = " to ".join(dict.fromkeys(sizes)) + (" %" if sizes != ["-"] else "")
        yield [f"{percentage:g} %", *texts, size]


def _starred(text, best):
    return text + ("*" if best else " ")


def _bold(text, best):
    return f"**{text}**" if best else text


def _reference_header(sweep):
    return [removed_label(sweep), *(METHODS[method].label for method in methods_of(sweep)), "size reduction"]


def sweep_table(sweep: dict) -> str:
    """Top-1 (%) of every method at every percentage before and after fine-tuning, for the terminal."""
    moments = ["before", "after"] if final_moment(sweep) == "after" else ["before"]
    tables = [
        f"Top-1 (%) {WHEN[when]}\n"
        + text_table(_reference_header(sweep), list(_reference_rows(sweep, when, "+-", _starred)))
        for when in moments
    ]
    (dense,) = numbers([sweep["dense"].get("top1")])
    failed = len(sweep["cells"]) - len(finished_cells(sweep))
    notes = [f"Dense network: {dense:.1f} %", f"* the highest of its row; {_chance(sweep)}"]
    notes += [f"{failed} of {len(sweep['cells'])} cells failed"] if failed else []
    return "\n\n".join([*tables, "\n".join(notes)])


def _chance(sweep):
    """The standard error from the finite number of test images, in words."""
    top1, images = numbers([sweep["dense"].get("top1"), sweep["dense"].get("images")])
    if not images > 0 or math.isnan(top1):
        return "no test images"
    error = standard_error(top1, images)
    if error is None:
        return f"{images:.0f} test images are too few to tell a standard error"
    return f"one standard error of {images:.0f} test images: {error:.1f} points"


def _span(counts):
    counts = sorted(counts) or [0]
    return " to ".join(dict.fromkeys([str(counts[0]), str(counts[-1])]))


def _markdown_table(header, rows, labels=1):
    """The first `labels` columns to the left, the others to the right."""
    lines = [header, ["---"] * labels + ["---:"] * (len(header) - labels), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _steps_rows(sweep):
    """Rows: percentage, the top-1 of the best order before training, and after how many steps every method has it."""
    for found in steps_to_reach(sweep):
        texts = [_reached(found, method) for method in methods_of(sweep)]
        yield [f"{found.percentage:g} %", f"{found.top1:.1f} ({METHODS[found.best].label})", *texts]


def _reached(found, method):
    if method not in found.steps:
        return "-"
    step = found.steps[method]
    return f"more than {found.last[method]}" if step is None else str(step)


def _full_rows(sweep):
    when = final_moment(sweep)
    for (percentage, method), cells in cells_by_method(sweep).items():
        tops = [estimate_of(cells, key, at).text(sign="±") for key in ("top1", "top5") for at in WHEN]
        costs = [reduction_of(sweep, cells, key, when).text(sign="±") for key in COSTS]
        yield [f"{percentage:g} %", METHODS[method].label, *tops, *costs, str(len(cells))]


def _markdown(sweep):
    when = final_moment(sweep)
    dense = {key: Estimate.of([sweep["dense"].get(key)]).mean for key in ("top1", "top5", "loss", *COSTS)}
    unit, size = cost_unit(dense["macs"])
    seeds = _span(len(cells) for cells in cells_by_method(sweep).values())
    parts = [
        "# Pruning sweep",
        f"## Top-1 (%) {WHEN[when]}",
        _markdown_table(_reference_header(sweep), list(_reference_rows(sweep, when, "±", _bold))),
        f"Mean ± sample standard deviation over seeds (finished per entry: {seeds}; a single seed has no deviation)."
        f" Bold: the highest mean of its row; {_chance(sweep)}."
        " Size reduction: of the saved file, from the least to the most among the methods of the row.",
        f"Dense network: top-1 {dense['top1']:.1f} %, top-5 {dense['top5']:.1f} %, loss {dense['loss']:.3f} nats,"
        f" {dense['parameters'] / 1e6:.3f} M parameters, {dense['macs'] / size:.3f} {unit} MACs,"
        f" {dense['file_bytes'] / 1e6:.2f} MB, {dense['latency_ms']:.2f} ms.".replace("nan", "not measured"),
        "## All numbers",
        _markdown_table(
            [removed_label(sweep), "method", *(f"{top} {at}" for top in ("top-1", "top-5") for at in WHEN.values()),
             *(f"{name} saved" for name in COSTS.values()), "seeds"], list(_full_rows(sweep)), labels=2),
        "All in per cent but the number of seeds. Saved: against the dense network.",
    ]  # fmt: skip
    parts[3:3] = [f"**Warning:** {text}" for text in sweep_warnings(sweep)]
    if steps := list(_steps_rows(sweep)):
        header = [removed_label(sweep), "top-1 to reach", *(METHODS[method].label for method in methods_of(sweep))]
        place = parts.index("## All numbers")
        parts[place:place] = ["## Training steps until a method has what the best order has before training",
                      _markdown_table(header, steps),
                      "Means over seeds, on at most 500 validation images, at 0, 10, 30, 100, 300, ... steps."]  # fmt: skip
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


def write_sweep(sweep: dict, folder: Path | str) -> list[Path]:
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
    paths = [folder / name for name in ("results.json", "results.csv", "results.md")]
    paths += write_sweep_plots(sweep, folder)
    write_json(folder / "results.json", sweep)  # the last one: it marks a sweep that is finished
    return paths
