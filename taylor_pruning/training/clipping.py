"""Gradient clipping relative to the weights of each filter."""

import torch
from torch import Tensor, nn

SMALLEST = 0.01  # norm below which weights count as this large, so that what starts at zero can grow


class FilterClipping:
    """Scales down the gradient of a filter that is long beside the filter's weights.

    A filter is all that makes one output channel of a layer: a row of its weight with the bias, the scale and the shift of a
    BatchNorm. Parameters are split along their first dimension, so that a transposed convolution is split by input channels.
    After Brock et al. 2021, "High-performance large-scale image recognition without normalization" (arXiv:2102.06171, eq. 3).

    Args:
        ratio: largest norm of a filter's gradient, as a share of the norm of its weights.
    """

    def __init__(self, model: nn.Module, ratio: float):
        layers = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and parameter.numel():
                rows = len(parameter) if parameter.ndim else 1
                layers.setdefault((name.rpartition(".")[0], rows), []).append(parameter)
        self.ratio, self.layers = ratio, list(layers.values())

    @torch.no_grad()
    def clip(self) -> None:
        """Scales the gradients in place, without waiting for the device. Parameters without one count as fixed."""
        for layer in self.layers:
            trained = [parameter for parameter in layer if parameter.grad is not None]
            if trained:
                longest = self.ratio * _norms(layer).clamp(min=SMALLEST)
                shares = (longest / _norms([parameter.grad for parameter in trained])).clamp(max=1)
                for parameter in trained:
                    parameter.grad.mul_(shares.reshape(parameter.shape[:1] + (1,) * (parameter.ndim - 1)))


def _norms(layer: list[Tensor]) -> Tensor:
    """[rows] norm of each row of all tensors together."""
    tensors = [tensor if tensor.ndim > 1 else tensor.reshape(-1, 1) for tensor in layer]
    return torch.stack([torch.linalg.vector_norm(t, dim=tuple(range(1, t.ndim))) for t in tensors]).norm(dim=0)
