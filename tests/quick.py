"""What a whole run does beside its work, in short."""

import contextlib
import functools
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from taylor_pruning.report import figures
from taylor_pruning.report.figures import PLOT_SETTINGS
from taylor_pruning.training import profile
from taylor_pruning.training.throughput import throughput

ROUGH = {"savefig.dpi": 30, "figure.constrained_layout.use": False, "pdf.fonttype": 3}
CAREFUL = {name: PLOT_SETTINGS[name] for name in ROUGH}


class Undrawn(Figure):
    """A figure that is made, but leaves an empty file: most runs are not there for their plots."""

    def savefig(self, path):
        Path(path).touch()


def quick_reports(patch):
    """Plots and careful timings would take more than half of a small run's time."""
    patch.setattr(figures, "Figure", Undrawn)
    for name, value in ROUGH.items():
        patch.setitem(PLOT_SETTINGS, name, value)
    patch.setattr(profile, "LATENCY_RUNS", 1)
    patch.setattr(profile, "throughput", functools.partial(throughput, batch_sizes=(1,)))


@contextlib.contextmanager
def drawn_plots(settings=ROUGH):
    """Plots are drawn, where they are part of what is tested."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "Figure", Figure)
        for name, value in settings.items():
            patch.setitem(PLOT_SETTINGS, name, value)
        yield


def careful_plots():
    """Plots as users get them."""
    return drawn_plots(CAREFUL)
