"""Positions drawn of every image, where a layer has more of them than a matrix of its channels needs."""

import torch
from torch import Tensor

ENOUGH_ROWS = 16384  # (image, position) pairs of a layer
POSITIONS = 16  # of every image at least
STEP = 7919  # by which the drawn positions move from image to image; a prime


def drawn_count(positions: int, images: int, rows: int) -> int:
    """How many of the positions are drawn of each of the `images`, so that there are `rows` and ENOUGH_ROWS at least."""
    return min(positions, max(POSITIONS, -(-max(rows, ENOUGH_ROWS) // images)))


def shifted(drawn: Tensor, numbers: Tensor, positions: int) -> Tensor:
    """[images, drawn] the drawn positions of the images with these numbers, each a multiple of STEP further."""
    return (drawn + numbers[:, None] * STEP) % positions


def drawn_positions(values: Tensor, numbers: Tensor, images: int, rows: int) -> Tensor:
    """Values [B, groups, channels, positions] at the drawn positions, [B, groups, channels, drawn].

    Positions lie at random in an image, and shifted from image to image; they do not depend on the batch.

    Args:
        numbers: [B] which images of the pass these are. images: of the whole pass.
        rows: how many pairs are wanted over all images, see `drawn_count`.
    """
    positions = values.shape[3]
    drawn = drawn_count(positions, images, rows)
    if drawn == positions:
        return values
    some = torch.randperm(positions, generator=torch.Generator().manual_seed(0))[:drawn]
    at = shifted(some.to(values.device), numbers, positions)
    return values.gather(3, at[:, None, None].expand(*values.shape[:3], -1))
