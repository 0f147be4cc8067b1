"""The tensors of a BatchNorm, and their update to the inputs that it has behind fitted layers."""

from dataclasses import dataclass

import torch


@dataclass
class BatchNorm:
    """The tensors of a BatchNorm with running statistics."""

    running_mean: torch.Tensor
    running_var: torch.Tensor
    weight: torch.Tensor | None
    bias: torch.Tensor | None
    eps: float


def update_statistics(norm, count, total, squares):
    """Gives a BatchNorm the statistics of its present inputs, and the scale and shift with which its outputs stay.

    The outputs of fitted layers have other variances than the running statistics say. Training normalises by the batch, so
    that without this update its first step would undo the fits.

    Args:
        count: inputs a channel. total, squares: [channels] float64 sums of them and of their squares.
    """
    mean = total / count
    var = (squares / count - mean.square()).clamp_min(0)
    before, now = ((v.double() + norm.eps).sqrt() for v in (norm.running_var, var))
    norm.bias.add_(norm.weight * (mean - norm.running_mean) / before)
    norm.weight.mul_(now / before)
    norm.running_mean.copy_(mean)
    norm.running_var.copy_(var)
