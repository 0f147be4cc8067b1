"""Threads beside the one that traces: recording a forward replaces functions of torch and NumPy, which all threads share."""

import functools
import threading
from collections.abc import Callable

ONE_AT_A_TIME = threading.RLock()  # held while they are replaced


def here(replacement: Callable, original: Callable) -> Callable:
    """`replacement` where this thread calls it, `original` in all others."""
    thread = threading.get_ident()

    @functools.wraps(original)
    def chosen(*args, **kwargs):
        return (replacement if threading.get_ident() == thread else original)(*args, **kwargs)

    return chosen
