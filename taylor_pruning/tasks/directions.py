"""Random directions of a task's outputs, in which the divergence from the network's own outputs curves.

Let F be the Hessian of the divergence in a sample's outputs z, at the network's own outputs. A direction is w = A s with
A A^T = F and independent random signs s. For any change v of the outputs then

    E[(w.v)^2] = v^T F v,

the second derivative of the divergence along v: along a gate, v = dz/dg, this is the gate's second derivative (Gauss-Newton,
exact because the divergence has no slope at the network's own outputs), measured by one backward pass for all gates. The
scores and the outputs' Fisher matrices of layers (scoring.output_curvature, scoring.layer_costs) both take their curvature
from such directions.

Random numbers are drawn by sample: a sample has the same ones however a pass is split into batches, parts and processes.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from taylor_pruning.errors import InputError

LANCZOS_STEPS = 24
DRAWS = 1009  # seeds that one seed of a user stands for, where a sample has several draws: `DRAWS * seed + draw`
SAMPLES_AT_ONCE = 256  # whose numbers one generator draws,
NUMBERS_AT_ONCE = 2**20  # fewer samples where they would have more numbers than this
SKEW = 1 / math.sqrt(2)  # third moment of `skewed_numbers`
NEGATIVE = 1e-3  # share of the largest eigenvalue down to which a negative one is rounding


def random_signs(seed: int, first: int, samples: int, numbers: int) -> Tensor:
    """[samples, numbers] of -1 and 1 with equal probability, on the CPU.

    Args:
        first: how many samples of the pass come before these. numbers: of every sample.
    """
    return 2 * _by_sample(partial(torch.randint, 2), seed, first, samples, numbers) - 1


def skewed_numbers(seed: int, first: int, samples: int, numbers: int) -> Tensor:
    """The same of sqrt(2) with probability 1/3 and -1/sqrt(2) with 2/3: mean 0, variance 1, third moment SKEW."""
    rare = _by_sample(torch.rand, seed, first, samples, numbers) < 1 / 3
    return torch.where(rare, math.sqrt(2), -SKEW)


def _by_sample(draw, seed, first, samples, numbers):
    """[samples, numbers] of what draw(shape, generator=generator) gives, one generator for every block of samples."""
    at_once = max(1, min(SAMPLES_AT_ONCE, NUMBERS_AT_ONCE // max(1, numbers)))
    start, end = first // at_once, (first + samples - 1) // at_once + 1
    generators = [torch.Generator().manual_seed(1_000_003 * seed + block) for block in range(start, end)]
    blocks = [draw((at_once, numbers), generator=generator) for generator in generators]
    return torch.cat(blocks)[first % at_once :][:samples]


def random_directions(logits: Tensor, signs: Tensor) -> Tensor:
    """[N, K, ...] directions w = A s of class logits [N, K, ...], one a sample, for random signs of that shape.

    F = diag(p) - p p^T = A A^T, A = (I - p 1^T) diag(sqrt p), at every position on its own: v^T F v is the variance of v under
    the predictions p. Signs have the smallest variance of all laws, and stay far below that of labels drawn from p where the
    network is confident.
    """
    p = logits.softmax(1)
    rooted = p.sqrt() * signs.to(p)
    return adding_to_zero(rooted - p * rooted.sum(1, keepdim=True), logits.argmax(1))


def adding_to_zero(values: Tensor, classes: Tensor) -> Tensor:
    """Values [N, K, ...] whose sum over the classes is zero, with the entry at `classes` [N, ...] taken from all others.

    An entry that is 1 - p, as a slope p - 1, has no digits where p is nearly 1. Without it a direction of a sure network would
    take a change of all logits by one number for a change of the predictions.
    """
    at = classes.unsqueeze(1)
    values = values.scatter(1, at, 0.0)
    return values.scatter(1, at, -values.sum(1, keepdim=True))


def bernoulli_directions(logits: Tensor, signs: Tensor) -> Tensor:
    """The same for logits of independent yes-or-no probabilities p, of any shape: F = diag(p (1 - p))."""
    p, others = logits.sigmoid(), (-logits).sigmoid()  # 1 - p has no digits in single precision where p is nearly 1
    return (p * others).sqrt() * signs.to(p)


def root_times(product: Callable[[Tensor], Tensor], signs: Tensor, steps: int = LANCZOS_STEPS) -> Tensor:
    """F^(1/2) s of every sample by the Lanczos process (Higham 2008, Functions of Matrices, section 13.2.2).

    Args:
        product: maps vectors [B, D] to F times them, one F a sample. signs: s [B, D].
        steps: products that are taken; fewer eigenvalues of F than that make the result exact.

    Returns:
        [B, D].

    Raises:
        InputError: an F has a clearly negative eigenvalue, so that it is of no divergence.
    """
    length = signs.norm(dim=1, keepdim=True)
    vectors, diagonal, beside = [signs / length], [], []
    for _ in range(min(steps, signs.shape[1])):
        image = product(vectors[-1])
        diagonal.append((vectors[-1] * image).sum(1))
        for _ in range(2):  # once more against rounding
            for vector in vectors:
                image = image - (vector * image).sum(1, keepdim=True) * vector
        beside.append(image.norm(dim=1))
        scale = torch.stack(diagonal).abs().amax(0).clamp_min(torch.finfo(image.dtype).tiny)
        goes_on = beside[-1] > 100 * torch.finfo(image.dtype).eps * scale  # else the space is exhausted
        beside[-1] = torch.where(goes_on, beside[-1], 0.0)
        vectors.append(torch.where(goes_on, 1 / beside[-1].clamp_min(1e-300), 0.0)[:, None] * image)
    off = torch.stack(beside[:-1], 1) if beside[1:] else signs[:, :0]
    matrix = torch.diag_embed(torch.stack(diagonal, 1)) + torch.diag_embed(off, 1) + torch.diag_embed(off, -1)
    values, axes = torch.linalg.eigh(matrix.double())
    if (values[:, 0] < -NEGATIVE * values[:, -1].abs()).any():
        raise InputError(
            "the task's divergence curves downwards at the network's own outputs; let it be smallest, zero, where both are "
            "equal"
        )
    first = axes @ (values.clamp_min(0).sqrt() * axes[:, 0])[:, :, None]
    basis = torch.stack(vectors[:-1], 2)
    return length * (basis @ first.to(basis)).squeeze(2)
