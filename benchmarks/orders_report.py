"""Tables and plots of orders.py from its rows."""

import statistics
from dataclasses import dataclass

FIGURES = ("top1", "imagenette top1", "tuned top1", "divergence")


@dataclass(frozen=True)
class Group:
    """Rows that one table compares: same network and level, made in the same way."""

    network: str
    left: float
    compensation: int
    settings: tuple

    def __str__(self):
        changed = "".join(f", {name}={value}" for name, value in self.settings)
        repair = f"{self.compensation} images compensate" if self.compensation else "no repair"
        return f"{self.network}, {self.left:g} % of the MACs left, {repair}{changed}"


def spread(values):
    return statistics.stdev(values) if len(values) > 1 else 0.0


def grouped(rows, figure):
    """{Group: {method: {images: [values, one a seed]}}}"""
    table = {}
    for row in rows:
        if row.get(figure) is not None:
            settings = tuple(map(tuple, row["settings"]))
            group = Group(row["network"], row["left"], row["compensation"], settings)
            methods = table.setdefault(group, {}).setdefault(row["method"], {})
            methods.setdefault(row["images"], []).append(row[figure])
    return table


def print_tables(results):
    for figure in FIGURES:
        digits, unit = (1, "%") if figure.endswith("top1") else (3, "nats")
        for group, methods in grouped(results["rows"], figure).items():
            dense = results["dense"].get(group.network, {}).get(figure)
            print(f"\n{group}: {figure}, {unit}" + (f" (dense {dense:.1f})" if dense else ""))
            for method, by_images in sorted(methods.items()):
                texts = []
                for images, values in sorted(by_images.items(), key=lambda item: item[0] or 0):
                    mean, deviation = statistics.mean(values), spread(values)
                    texts.append(f"{images or '-'}: {mean:.{digits}f} +- {deviation:.{digits}f} (n={len(values)})")
                print(f"  {method:22s} " + "   ".join(texts))


def plot(results, path):
    """Top-1 against the number of images that score, if there are several: one column a group of rows, before and after
    fine-tuning. Methods stand side by side."""
    scoring = sorted({row["images"] for row in results["rows"]} - {None})
    if len(scoring) < 2:
        return
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    labels = {"top1": "no training", "tuned top1": "after fine-tuning"}
    tables = {label: table for figure, label in labels.items() if (table := grouped(results["rows"], figure))}
    columns = list(tables["no training"])
    figure, axes = plt.subplots(
        len(tables), len(columns), figsize=(3.2 * len(columns), 3 * len(tables)), squeeze=False, sharex=True
    )
    lines = ["--", ":", "-.", (0, (1, 3)), (0, (5, 5))]
    for row, (label, table) in enumerate(tables.items()):
        for axis, column in zip(axes[row], columns, strict=True):
            plain = iter(lines * 4)
            for place, (method, by_images) in enumerate(sorted(table.get(column, {}).items())):
                if None in by_images:  # a baseline that looks at weights alone
                    axis.axhline(statistics.mean(by_images[None]), color="grey", linestyle=next(plain), label=method)
                    continue
                numbers = sorted(by_images)
                means = [statistics.mean(by_images[n]) for n in numbers]
                beside, deviations = [n * 1.05**place for n in numbers], [spread(by_images[n]) for n in numbers]
                axis.errorbar(beside, means, deviations, marker="o", capsize=3, label=method)
            axis.set_xscale("log")
            axis.set_title(str(column).replace(", ", "\n", 1), fontsize=8)
            axis.set_ylabel(f"top-1, {label} (%)", fontsize=8)
    for axis in axes[-1]:
        axis.set_xticks(scoring, map(str, scoring))
        axis.minorticks_off()
        axis.set_xlabel("images that score")
    axes[0, 0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def plot_trade_off(results, path):
    """Top-1 against what is left of the MACs and of the latency of one image, before and after fine-tuning.

    One column a network and cost; of several numbers of scoring images the largest is drawn.
    Solid lines: repaired; dashed: cut alone.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in results["rows"] if "latency" in row]
    columns = [(name, cost) for name in dict.fromkeys(row["network"] for row in rows) for cost in ("macs", "latency")]
    if not columns:
        return
    figure, axes = plt.subplots(2, len(columns), figsize=(4.6 * len(columns), 7.5), squeeze=False, sharey="row")
    methods = list(dict.fromkeys(row["method"] for row in rows))
    for line, (value, label) in enumerate((("top1", "no training"), ("tuned top1", "after fine-tuning"))):
        for axis, (network, cost) in zip(axes[line], columns, strict=True):
            for color, method in enumerate(methods):
                for repaired, style in ((True, "o-"), (False, "x--")):
                    here = [r for r in rows if (r["network"], r["method"]) == (network, method) and value in r]
                    points = _means([r for r in here if bool(r["compensation"]) == repaired], cost, value)
                    if points:
                        name = method if repaired else f"{method}, not repaired"
                        axis.plot(*zip(*points, strict=True), style, color=f"C{color}", label=name)
            dense = results["dense"].get(network, {}).get(value)
            if dense is not None:
                axis.axhline(dense, color="grey", linewidth=0.8)
                axis.annotate(
                    "dense", (1, dense), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=7
                )
            axis.set_xlim(left=0)
            axis.set_xlabel(f"left of the {'MACs' if cost == 'macs' else 'latency of one image'} (%)")
            axis.set_ylabel(f"top-1, {label} (%)")
            axis.set_title(network, fontsize=9)
    axes[0, 1].legend(fontsize=7, loc="lower left")  # times reach less far down than shares of the MACs
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _means(rows, cost, value):
    """[(cost in %, value)] of every level that was asked for, ascending: means over seeds with the most scoring images."""
    points = []
    for left in {row["left"] for row in rows}:
        level = [row for row in rows if row["left"] == left]
        most = max(row["images"] or 0 for row in level)
        level = [row for row in level if (row["images"] or 0) == most]
        points.append((100 * statistics.mean(row[cost] for row in level), statistics.mean(row[value] for row in level)))
    return sorted(points)
