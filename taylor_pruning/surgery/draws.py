"""Random numbers that are the same in every run of a forward."""

import random
from contextlib import contextmanager

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

NOISE = {"rand": 0.5, "rand_like": 0.5, "randn": 0.0, "randn_like": 0.0}  # operation: mean of what it draws
DRAWS = {
    *NOISE,
    *"native_dropout rrelu_with_noise rrelu_with_noise_ bernoulli bernoulli_ uniform_ normal_ exponential_".split(),
}


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


@contextmanager
def equal_draws(device: torch.device):
    """While open, networks of two widths on the device draw alike; afterwards all generators go on where they were."""
    with fixed_draws(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), MeanDraws():
        torch.manual_seed(0)
        yield


class MeanDraws(TorchDispatchMode):
    """Random draws become their means, so that networks of two widths draw alike: dropout becomes the identity."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name, kwargs = function.overloadpacket.__name__, kwargs or {}
        if name not in DRAWS:
            return function(*args, **kwargs)
        given = _arguments(function, args, kwargs)
        if name == "native_dropout":
            return args[0].clone(), torch.ones_like(args[0], dtype=torch.bool)
        if name in ("rrelu_with_noise", "rrelu_with_noise_"):
            x = torch.where(args[0] < 0, args[0] * (given["lower"] + given["upper"]) / 2, args[0])
            return args[0].copy_(x) if name.endswith("_") else x
        result = function(*args, **kwargs)
        if name in NOISE:
            return result.fill_(NOISE[name])
        if name in ("bernoulli", "bernoulli_"):
            return result.copy_(torch.as_tensor(given.get("p", args[0])))
        if name == "uniform_":
            return result.fill_((given["from"] + given["to"]) / 2)
        return result.fill_(given["mean"] if name == "normal_" else 1 / given["lambd"])


def _arguments(function, args, kwargs):
    """{name: value} of a call of an operation, with its defaults."""
    declared = function._schema.arguments
    defaults = {a.name: a.default_value for a in declared if a.has_default_value()}
    return {**defaults, **dict(zip((a.name for a in declared), args, strict=False)), **kwargs}
