"""Figures need no backend of matplotlib, which cannot be imported where MPLBACKEND names one that it does not know."""

import contextlib
import os
import sys

if "MPLBACKEND" in os.environ and "matplotlib" not in sys.modules:
    backend = os.environ.pop("MPLBACKEND")
    import matplotlib

    os.environ["MPLBACKEND"] = backend
    with contextlib.suppress(ValueError):
        matplotlib.rcParams["backend"] = backend  # as matplotlib does when it is imported
