"""Products of a matrix with its own transpose, of which the lower triangle alone is computed."""

import torch
from torch import Tensor

BLOCK = 256  # columns computed at once


def add_gram(total: Tensor, rows: Tensor) -> None:
    """Adds rows rows^T to the lower triangle of `total`; what stands above it has no meaning.

    Args:
        total: [groups, n, n], in the precision of `rows` or a higher one. rows: [groups, n, m].
    """
    for start in range(0, rows.shape[1], BLOCK):
        total[:, start:, start : start + BLOCK] += rows[:, start:] @ rows[:, start : start + BLOCK].mT


def symmetric(lower: Tensor) -> Tensor:
    """The symmetric matrices [..., n, n] with these lower triangles."""
    return torch.tril(lower) + torch.tril(lower, -1).mT
