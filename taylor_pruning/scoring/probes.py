"""Second and third derivatives of a loss along every gate by random probes and Hessian-vector products.

For a classifier by request (curvature "hvp"), and for the loss of any other task. With the per-sample gate gradient
gamma = d loss / dg in R^U, its Hessian H and third derivative tensor T, and a probe z with independent entries,

    E[z * (H z)]      = diag H    if E z = 0, E z^2 = 1                  (Hutchinson 1989; Bekas et al. 2007)
    E[z * T(z, z)]    = E[z^3] diag T    for the same law                (entries of other indices vanish with E z)

Every sample has probes of its own (tasks.directions). The second order uses Rademacher probes, which have the smallest
variance; the third needs a skewed law: sqrt(2) with probability 1/3, -1/sqrt(2) with 2/3, whose third moment is 1/sqrt(2).
Double and triple backward passes run through the gates alone.
"""

import math
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from taylor_pruning.errors import InputError
from taylor_pruning.memory import Portions, raise_out_of_memory
from taylor_pruning.modes import frozen
from taylor_pruning.scoring.gates import gated_outputs, open_gates
from taylor_pruning.scoring.passes import over_batches
from taylor_pruning.surgery.graph import ChannelGraph
from taylor_pruning.tasks.classification import task_of
from taylor_pruning.tasks.directions import DRAWS, SKEW, random_signs, skewed_numbers
from taylor_pruning.tasks.task import Task

# PyTorch's third derivatives of these are wrong, and it does not say so in every version (central differences show it).
NO_THIRD_DERIVATIVE = ("batch_norm", "instance_norm", "layer_norm")


@dataclass
class ProbedDerivatives:
    """[units] float64 means over samples of phi, phi^2, h, t and their standard errors, on the CPU.

    h is None below order 2, t below order 3.
    """

    phi: Tensor
    phi_squared: Tensor
    phi_squared_error: Tensor
    h: Tensor | None = None
    h_error: Tensor | None = None
    t: Tensor | None = None
    t_error: Tensor | None = None

    @classmethod
    def of_parts(cls, parts: Sequence[dict]) -> "ProbedDerivatives":
        """From {"phi", "h" (from order 2 on), "t" (at order 3)} of the samples of every part of a pass, [n, units] each."""
        derivatives = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        phi = derivatives.pop("phi")
        return cls(
            phi.mean(0), *mean_and_error(phi.square()), *(x for d in derivatives.values() for x in mean_and_error(d))
        )


def probe_derivatives(
    model: nn.Module,
    graph: ChannelGraph,
    batches: Sequence,
    *,
    order: int = 2,
    probes: int = 8,
    task: Task | None = None,
    seed: int = 0,
    portions: Portions | None = None,
    progress: bool = True,
) -> ProbedDerivatives:
    """Estimates of the mean derivatives of a task's loss along every gate.

    Under torch.distributed every process takes its share of the batches and all get the same result. It does not depend on
    how batches are split.

    Args:
        batches: the task's batches on the model's device, at least one.
        order: 1, 2 for h as well, or 3 for t.
        probes: probes a sample and order.
        task: default: classification.
        portions: parts of batches that fit into memory; None: what is free.

    Returns:
        ProbedDerivatives.

    Raises:
        InputError: a batch that cannot be scored, or order 3 of a network with NO_THIRD_DERIVATIVE.
    """
    if order == 3:
        check_third_derivative(graph)
    derivatives = partial(_derivatives, graph, task_of(task), order, probes, seed)
    portions = portions or Portions(next(model.parameters()).device)
    with frozen(model), torch.enable_grad(), twice_differentiable():
        return ProbedDerivatives.of_parts(over_batches(derivatives, batches, portions, progress=progress))


def _derivatives(graph, task, order, probes, seed, batch, where, first):
    gates = open_gates(graph, batch)
    outputs = gated_outputs(graph, task, batch, gates, where)
    (gamma,) = torch.autograd.grad(task.loss(outputs, batch).sum(), gates, create_graph=order > 1)
    found = {"phi": gamma.detach().double().cpu()}
    if order > 1:
        found["h"] = probed_second(gamma, gates, probes, seed, first).cpu()
    if order == 3:
        found["t"] = probed_third(gamma, gates, probes, seed, first).cpu()
    return found


def wrong_third_derivative(graph: ChannelGraph) -> str | None:
    """Why third derivatives cannot be probed, where the network has an operation of NO_THIRD_DERIVATIVE; else None."""
    wrong = [name for name in graph.smooth_operations if name.startswith(NO_THIRD_DERIVATIVE)]
    return f"PyTorch has no right third derivative of {', '.join(wrong)}" if wrong else None


def check_third_derivative(graph: ChannelGraph) -> None:
    """Raises InputError if third derivatives of the network cannot be probed."""
    if reason := wrong_third_derivative(graph):
        raise InputError(
            f"order 3 cannot be probed here: {reason}. Use order 1 or 2; a classifier has order 3 with curvature exact, or "
            "with compensation"
        )


def twice_differentiable():
    """While open, attention runs as the operations that it is made of: fused kernels have no second derivative."""
    return sdpa_kernel(SDPBackend.MATH)


@contextmanager
def _known_derivatives():
    """Says what to do where an operation, of PyTorch or of others, has no second derivative."""
    try:
        yield
    except RuntimeError as error:
        raise_out_of_memory(error)
        raise InputError(
            f"orders 2 and 3 cannot be probed here: PyTorch {torch.__version__} says {str(error).splitlines()[0]}. "
            "Use order 1, compensate, or a newer PyTorch"
        ) from error


@_known_derivatives()
def probed_second(gamma: Tensor, gates: Tensor, probes: int, seed: int, first: int) -> Tensor:
    """[B, units] mean over probes of z * (H z); `first`: samples of the pass before these."""
    total = torch.zeros_like(gamma, dtype=torch.float64)
    if not gamma.requires_grad:  # the loss is linear along every gate
        return total
    for draw in range(probes):
        z = random_signs(DRAWS * seed + draw, first, *gates.shape).to(gates)
        (hz,) = torch.autograd.grad(gamma, gates, z, retain_graph=True, materialize_grads=True)
        total += (z * hz).double()
    return total / probes


@_known_derivatives()
def probed_third(gamma: Tensor, gates: Tensor, probes: int, seed: int, first: int) -> Tensor:
    """[B, units] mean over probes of z * T(z, z) / E z^3; `first`: samples of the pass before these."""
    total = torch.zeros_like(gamma, dtype=torch.float64)
    if not gamma.requires_grad:
        return total
    for draw in range(probes):
        z = skewed_numbers(DRAWS * seed + draw, first, *gates.shape).to(gates)
        (hz,) = torch.autograd.grad(gamma, gates, z, create_graph=True, materialize_grads=True)
        # where the loss is quadratic along every gate, H does not depend on the gates and T is zero
        if hz.requires_grad:
            (tzz,) = torch.autograd.grad(hz, gates, z, retain_graph=True, materialize_grads=True)
            total += (z * tzz).double()
    return total / probes / SKEW


def mean_and_error(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean over samples and its standard error, NaN of one sample; the spread over samples includes that of the probes."""
    mean = values.mean(0)
    return mean, values.std(0) / math.sqrt(len(values)) if len(values) > 1 else torch.full_like(mean, math.nan)
