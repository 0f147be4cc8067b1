"""What a whole run does beside its work, in short."""

import contextlib
import functools

import pytest

from taylor_pruning.report.figures import PLOT_SETTINGS
from taylor_pruning.training import profile
from taylor_pruning.training.throughput import throughput

ROUGH = {"savefig.dpi": 30, "figure.constrained_layout.use": False, "pdf.fonttype": 3}
CAREFUL = {name: PLOT_SETTINGS[name] for name in ROUGH}


def quick_reports(patch):
    """Careful plots and timings would take more than half of a small run's time."""
    for name, value in ROUGH.items():
        patch.setitem(PLOT_SETTINGS, name, value)
    patch.setattr(profile, "LATENCY_RUNS", 1)
    patch.setattr(profile, "throughput", functools.partial(throughput, batch_sizes=(1, 2)))


@contextlib.contextmanager
def careful_plots():
    """Plots as users get them, where they are what is tested."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in CAREFUL.items():
            patch.setitem(PLOT_SETTINGS, name, value)
        yield
