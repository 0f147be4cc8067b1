"""Estimates from few images, pulled towards the mean of their group by the share of their spread that is noise."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def shrunk(values: Tensor, errors: Tensor, groups: Iterable[Sequence[int]]) -> Tensor:
    """The James-Stein estimate of every value from its group (Efron & Morris 1973; James & Stein 1961).

        mean + (1 - (n - 3) / (n - 1) * mean squared error / variance) (value - mean)        of a group of n > 3 values

    A greedy choice takes the smallest values, and among noisy ones those that came out too small. A filter that answers to
    one class looks free where no image shows that class, and its own standard error is then small too: so a group shares
    one factor.

    Args:
        values: [units]. errors: [units] their standard errors; NaN (a single image) leaves the group as it is.
        groups: indices of the units whose values are alike, no unit in two of them; others keep their values.

    Returns:
        [units] in the order of every group: no factor is below 0.
    """
    found = values.clone()
    for members in groups:
        index, count = torch.as_tensor(members, device=values.device), len(members)
        here, noise = values[index], errors[index].square().mean().item()
        variance = here.var().item() if count > 3 else 0.0
        if variance > 0 and noise >= 0:
            factor = max(0.0, 1 - (count - 3) / (count - 1) * noise / variance)
            found[index] = here.mean() + factor * (here - here.mean())
    return found
