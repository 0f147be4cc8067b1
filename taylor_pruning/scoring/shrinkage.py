"""Shrinks noisy scores towards the closed form, by the share of their spread that is noise."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def shrunk(values: Tensor, errors: Tensor, expected: Tensor, groups: Iterable[Sequence[int]]) -> Tensor:
    """The James-Stein estimate of every value from what is expected of its group (Efron & Morris 1973; James & Stein 1961).

        target + max(0, 1 - (n - 3) * mean squared error / sum of the squared distances from the targets) (value - target),
        target = expected * sum of the values / sum of the expected ones             of a group of n > 3 values

    n - 3 is n - 2 less one, for the scale of the targets, which the values themselves give.

    A greedy choice takes the smallest values, and among noisy ones those that came out too small. A filter that answers to
    one class looks free where no image shows that class, and its own standard error is then small too: so a group shares
    one factor.

    Args:
        values: [units], not negative. errors: [units] their standard errors; NaN (a single image) changes nothing.
        expected: [units], up to a factor that each group has; a unit of which nothing is expected (0) keeps its value.
        groups: indices of the units that are alike, no unit in two of them; others keep their values.

    Returns:
        [units], none negative.
    """
    found = values.clone()
    for members in groups:
        index = torch.as_tensor(members, device=values.device)
        index = index[expected[index] > 0]
        count, here = len(index), values[index]
        if count <= 3:
            continue
        target = expected[index] * (here.sum() / expected[index].sum())
        noise, distances = errors[index].square().mean().item(), (here - target).square().sum().item()
        if distances > 0 and noise >= 0:
            factor = max(0.0, 1 - (count - 3) * noise / distances)
            found[index] = target + factor * (here - target)
    return found
