"""Random directions of the logits, along which one backward pass measures curvature without bias.

The second derivative of the cross-entropy along a change v of the logits is the variance of v under the predictions p,

    Var_p[v] = v^T F v,      F = diag(p) - p p^T = A A^T,      A = (I - p 1^T) diag(sqrt p).

For w = A s with independent random signs s, E[w w^T] = F, so that E[(w.v)^2] = Var_p[v]: the derivative of w.z along every
gate, from one backward pass, is one unbiased sample of the second derivative along all gates. Signs have the smallest
variance of all laws, and stay far below that of labels drawn from p where the network is confident.
"""

import torch
from torch import Tensor

SIGNS_AT_ONCE = 256  # images whose signs one generator draws


def random_signs(seed: int, first: int, samples: int, outputs: int) -> Tensor:
    """[samples, outputs] of -1 and 1 on the CPU: an image has the same signs however a pass is split into batches.

    Args:
        first: how many images of the pass come before these.
    """
    start, end = first // SIGNS_AT_ONCE, (first + samples - 1) // SIGNS_AT_ONCE + 1
    generators = [torch.Generator().manual_seed(1_000_003 * seed + block) for block in range(start, end)]
    blocks = [torch.randint(2, (SIGNS_AT_ONCE, outputs), generator=generator) for generator in generators]
    return 2 * torch.cat(blocks)[first % SIGNS_AT_ONCE :][:samples] - 1


def random_directions(logits: Tensor, signs: Tensor) -> Tensor:
    """[N, K] directions w = A s of the logits [N, K], one a sample; E[w w^T] over the signs [N, K] is F (module docstring)."""
    p = logits.softmax(1)
    rooted = p.sqrt() * signs.to(p)
    return rooted - p * rooted.sum(1, keepdim=True)
