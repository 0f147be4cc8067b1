"""Scores from few images, pulled towards what the closed form says of them by the share of their spread that is noise."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def shrunk(values: Tensor, errors: Tensor, expected: Tensor, groups: Iterable[Sequence[int]]) -> Tensor:
    """The James-Stein estimate of every value from what its group expects of it (Efron & Morris 1973; James & Stein 1961).

        target + max(0, 1 - (n - 4) * mean squared error / sum of squared distances) (value - target),
        target = the regression a + b * expected, fitted to the values of a group of n > 4, with a and b not negative

    A greedy choice takes the smallest values, and among noisy ones those that came out too small. A filter that answers to
    one class looks free where no image shows that class, and its own standard error is then small too: so a group shares
    one factor.

    Args:
        values: [units], not negative. errors: [units] their standard errors; NaN (a single image) changes nothing.
        expected: [units], up to a scale; a unit of which nothing is expected (0) keeps its value.
        groups: indices of the units that are alike, no unit in two of them; others keep their values.

    Returns:
        [units], none negative.
    """
    found = values.clone()
    for members in groups:
        index = torch.as_tensor(members, device=values.device)
        index = index[expected[index] > 0]
        if len(index) <= 4:
            continue
        here = values[index]
        target = _regression(here, expected[index])
        noise, distance = errors[index].square().mean().item(), (here - target).square().sum().item()
        if distance > 0 and noise >= 0:
            factor = max(0.0, 1 - (len(index) - 4) * noise / distance)
            found[index] = target + factor * (here - target)
    return found


def _regression(y: Tensor, x: Tensor) -> Tensor:
    """a + b x by least squares with a, b >= 0; y >= 0, x > 0. With a = 0 it keeps the sum of y."""
    centred = x - x.mean()
    slope = (centred * y).sum() / centred.square().sum().clamp_min(torch.finfo(x.dtype).tiny)
    slope = slope.clamp(torch.zeros_like(slope), y.mean() / x.mean())
    return y.mean() + slope * centred
