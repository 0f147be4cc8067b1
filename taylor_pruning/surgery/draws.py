"""Random numbers of Python and NumPy that are the same in every run of a forward."""

import random
from contextlib import contextmanager

import numpy as np


@contextmanager
def fixed_draws():
    """While open, the global generators of Python and NumPy draw from a fixed seed; afterwards they go on where they were.

    A forward that leaves a layer out by `random.random()` is then recorded, and run in two widths, with the same choice.
    """
    of_python, of_numpy = random.getstate(), np.random.get_state()
    random.seed(0)
    np.random.seed(0)
    try:
        yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)
