"""Random numbers that are the same in every run of a forward."""

import math
import random
from contextlib import contextmanager

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from taylor_pruning.generators import seed_torch, seeded

SHARE = 0.6  # of a range: not its middle, where 2 * rand - 1 would hide what it multiplies
DEVIATIONS = 0.6  # from a mean, for the same reason
DRAWN = {  # operation: what it gives here, by its arguments
    "rand": lambda of: SHARE,
    "rand_like": lambda of: SHARE,
    "randn": lambda of: DEVIATIONS,
    "randn_like": lambda of: DEVIATIONS,
    "uniform_": lambda of: of["from"] + SHARE * (of["to"] - of["from"]),
    "normal_": lambda of: of["mean"] + DEVIATIONS * of["std"],
    "normal": lambda of: of["mean"] + DEVIATIONS * torch.as_tensor(of["std"]),
    "log_normal_": lambda of: math.exp(of["mean"] + DEVIATIONS * of["std"]),
    "cauchy_": lambda of: of["median"] + DEVIATIONS * of["sigma"],
    "geometric_": lambda of: 1 / of["p"],
    "poisson": lambda of: of["self"],
    "binomial": lambda of: of["count"] * of["prob"],
    "_standard_gamma": lambda of: of["self"],
    "_sample_dirichlet": lambda of: of["self"] / of["self"].sum(-1, keepdim=True),
    "exponential_": lambda of: 1 / of["lambd"],
    "bernoulli": lambda of: of.get("p", of["self"]),
    "bernoulli_": lambda of: of["p"],
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
def unchecked_distributions():
    """While open, torch.distributions do not look at the values of their arguments."""
    before = torch.distributions.Distribution._validate_args
    torch.distributions.Distribution.set_default_validate_args(False)
    try:
        yield
    finally:
        torch.distributions.Distribution.set_default_validate_args(before)


@contextmanager
def equal_draws(device: torch.device):
    """While open, networks of two widths on the device draw alike; afterwards all generators go on where they were."""
    with fixed_draws(), seeded(0, device), EqualDraws(device):
        yield


class EqualDraws(TorchDispatchMode):
    """Random draws become one fixed number, so that networks of two widths draw alike: dropout becomes the identity.

    Others, such as permutations, come from one seed each: how much a network has drawn before, which its width says, is nothing
    to them.
    """

    supports_higher_order_operators = True  # as torch.cond; what their branches draw is left as it is

    def __init__(self, device):
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunction():  # what is called here is no step of a forward that is recorded meanwhile
            return self._equal(function, args, kwargs or {})

    def _equal(self, function, args, kwargs):
        if isinstance(function, torch._ops.HigherOrderOperator):
            return function(*args, **kwargs)
        name = function.overloadpacket.__name__
        if name == "native_dropout":
            return args[0].clone(), torch.ones_like(args[0], dtype=torch.bool)
        if name in ("rrelu_with_noise", "rrelu_with_noise_"):
            given = _arguments(function, args, kwargs)
            x = torch.where(args[0] < 0, args[0] * (given["lower"] + given["upper"]) / 2, args[0])
            return args[0].copy_(x) if name.endswith("_") else x
        if torch.Tag.nondeterministic_seeded in function.tags:
            seed_torch(0, self.device)
        result = function(*args, **kwargs)
        if name in DRAWN:
            result.copy_(torch.as_tensor(DRAWN[name](_arguments(function, args, kwargs))))
        return result


def _arguments(function, args, kwargs):
    """{name: value} of a call of an operation, with its defaults."""
    declared = function._schema.arguments
    defaults = {a.name: a.default_value for a in declared if a.has_default_value()}
    return {**defaults, **dict(zip((a.name for a in declared), args, strict=False)), **kwargs}
