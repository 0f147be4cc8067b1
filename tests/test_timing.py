"""Times that do not take in what else the machine does."""

import itertools

import torch

from taylor_pruning import timing


def test_a_time_is_that_of_the_fastest_run(monkeypatch):
    """Most runs beside another process take 46 ms; one that is let alone takes 1.5 ms."""
    seconds = itertools.chain([0.046, 0.046, 0.046, 0.0015], itertools.repeat(0.046))
    monkeypatch.setattr(timing, "seconds_of", lambda call, device, calls=1: next(seconds))
    assert timing.least_milliseconds(lambda: None, torch.device("cpu"), runs=15) == 1.5
