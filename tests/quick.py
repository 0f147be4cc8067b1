"""What a whole run does beside its work, in short."""

import functools

from taylor_pruning.report.figures import PLOT_SETTINGS
from taylor_pruning.training import profile
from taylor_pruning.training.throughput import throughput


def quick_reports(patch):
    """Careful plots and timings would take more than half of a small run's time."""
    patch.setitem(PLOT_SETTINGS, "savefig.dpi", 30)
    patch.setitem(PLOT_SETTINGS, "figure.constrained_layout.use", False)
    patch.setattr(profile, "LATENCY_RUNS", 1)
    patch.setattr(profile, "throughput", functools.partial(throughput, batch_sizes=(1, 2)))
