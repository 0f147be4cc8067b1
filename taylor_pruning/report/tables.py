"""Tables of one experiment for a terminal, from the content of results.json.

    print(rounds_table(results["rounds"]))
    print(summary_table(results))

Units: accuracy in per cent, loss in nats, files in bytes, latency in milliseconds. None and NaN are what was not measured.
"""

import math

import numpy as np


def numbers(values) -> np.ndarray:
    """Values of a results file as float64 [n]: None becomes NaN."""
    return np.array([math.nan if value is None else value for value in values], dtype=np.float64)


def standard_error(top1: float, images: float) -> float | None:
    """Of a top-1 (%) on so many images, in points; None where all or none are right, of which it would be 0."""
    return 100 * math.sqrt(top1 / 100 * (1 - top1 / 100) / images) if images and 0 < top1 < 100 else None


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


def signed(value: float, decimals: int) -> str:
    """The rounded value with its sign; zero is +0."""
    return f"{round(value, decimals) + 0.0:+.{decimals}f}"  # -0.0 + 0.0 is 0.0


def _loss_change(value: float) -> str:
    """Four decimals, or the size of what they would round to zero."""
    return signed(value, 4) if value == 0 or abs(value) >= 5e-5 else f"{value:+.0e}"


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
                yield f"{signed(value - base, 2)} pt"
            else:
                yield f"{signed(100 * (value / base - 1), 1)} %"

    rows = [[dense["stage"], *cells(dense, False)]]
    for stage in results["stages"][1:]:
        rows += [[stage["stage"], *cells(stage, False)], ["  vs dense", *cells(stage, True)]]
    return text_table(["stage", *(column[0] for column in columns)], rows)


def rounds_table(rounds: list) -> str:
    """A row a round of pruning: does the loss change by what the scores said?

    Predicted and measured are of the loss that the round keeps small, which the heading names: of a divergence, what is
    predicted is that from the network before the round, and what is measured is the change of that from the dense network.
    "labels" is the measured change of the cross-entropy with the labels. All are in nats, on the calibration images.
    """
    steps = ("after_selection", "after_compensation", "after_training")
    trained = any(record.get("after_training") for record in rounds)
    rows = []
    for record in rounds:
        changes = numbers(record[key] for key in ("predicted_loss_change", "measured_loss_change", "label_loss_change"))
        changes = [_loss_change(value) if math.isfinite(value) else "-" for value in changes]
        top1 = [f"{record[key]['top1']:.1f}" if record.get(key) else "-" for key in steps[: 3 if trained else 2]]
        rows.append([str(record["round"]), f"{record['percentage']:g}", *changes, *top1])
    loss = rounds[0]["loss"] if rounds else "loss"
    header = ["round", "% removed", f"{loss}: predicted", "measured", "labels", "top-1 cut", "repaired", "trained"]
    return text_table(header if trained else header[:-1], rows)
