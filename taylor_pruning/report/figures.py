"""How every plot looks: sizes, colours, a style for each method, axes for layers and for values of many magnitudes.

Figures are made with matplotlib's object-oriented interface: they need no display and leave no figure or setting behind.
They look alike whatever the user's matplotlibrc says: `text.usetex` would need LaTeX, and a dark style would hide black lines.
"""

import math
import os
import re
from contextlib import contextmanager
from dataclasses import dataclass, replace

import matplotlib.style
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from taylor_pruning.files import atomic_path

COLUMN_WIDTH, TEXT_WIDTH = 3.5, 7.16  # inches: one and two columns of a paper
LAYER_LABEL_SIZE = 7  # points

# Okabe and Ito (2008), distinguishable with every common colour vision deficiency; their yellow is too pale for lines.
BLACK, ORANGE, SKY_BLUE, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
BLUE, VERMILLION, PURPLE, GREY, BROWN, VIOLET = "#0072B2", "#D55E00", "#CC79A7", "#888888", "#7F4F24", "#5D5FA8"
DENSE, KEPT, REMOVED = BLACK, BLUE, VERMILLION
STAGE_COLOURS = {"dense": DENSE, "pruned": REMOVED, "compensated": PURPLE, "trained": PURPLE, "repaired": SKY_BLUE,
                 "fine-tuned": GREEN}  # fmt: skip
STAGE_TICKS = {"compensated": "compen-\nsated", "repaired": "re-\npaired", "fine-tuned": "fine-\ntuned"}


@dataclass(frozen=True)
class MethodStyle:
    """How a method looks in every plot."""

    label: str
    colour: str
    marker: str
    line: str | tuple  # as matplotlib takes it


ORDERS = {
    "order 1": MethodStyle("order 1", ORANGE, "o", "-"),
    "order 2": MethodStyle("order 2", BLUE, "s", "-"),
    "order 3": MethodStyle("order 3", GREEN, "D", "-"),
}
CRITERIA = {
    "molchanov2017": MethodStyle("Molchanov 2017", VERMILLION, "v", "--"),
    "molchanov2019": MethodStyle("Molchanov 2019", PURPLE, "^", "--"),
    "magnitude": MethodStyle("L2 magnitude", SKY_BLUE, "P", "--"),
    "lamp": MethodStyle("LAMP", BROWN, "h", "--"),
    "fpgm": MethodStyle("FPGM", VIOLET, "<", "--"),
    "random": MethodStyle("random", GREY, "X", ":"),
}
VARIANTS = {  # of a published criterion: addition to its name, to its label, line
    "": ("", None),
    " uniform": (", uniform", (0, (1, 1))),
    " compensated": (", repaired", "-."),
    " uniform compensated": (", uniform, repaired", (0, (4, 1, 1, 1, 1, 1))),
}
METHODS = ORDERS | {
    f"{name}{variant}": replace(style, label=style.label + label, line=line or style.line)
    for name, style in CRITERIA.items()
    for variant, (label, line) in VARIANTS.items()
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
    "figure.autolayout": False,
    "figure.constrained_layout.use": True,
    "savefig.dpi": 300,
    "pdf.fonttype": 42,  # TrueType: publishers refuse Type 3 fonts
}


@contextmanager
def saved_figure(*paths, width=COLUMN_WIDTH, height=2.6):
    """Yield a figure of `width` x `height` inches; save it under every path when the block ends without error."""
    with matplotlib.style.context(["default", PLOT_SETTINGS]):
        figure = Figure(figsize=(width, height))
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


def end_accuracies(axes) -> None:
    """Ends the axis of accuracies in per cent where there are none: 100, with room for a marker."""
    axes.set_ylim(top=min(101, axes.get_ylim()[1]))


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
