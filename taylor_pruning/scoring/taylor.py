"""Taylor estimates, orders 1 to 3, of the loss change of closing a gate, from per-sample logit directions.

Notation: a sample has logits z in R^K, probabilities p = softmax(z) and label y; unit u has gate g_u = 1 and
v_u = dz/dg_u. Along one gate of a piecewise linear network the logits are a straight line, so that the derivatives of
the cross-entropy along the gate are moments of v_u under p (cumulants of the exponential family). In other networks v_u is the
slope at g = 1, and h and t are the Gauss-Newton parts:

    phi = E_p[v_u] - v_u[y]        h = Var_p[v_u]        t = E_p[(v_u - E_p v_u)^3]

Removing the unit is the step g_u: 1 -> 0. Its estimated loss change is

    order 1   -phi
    order 2   -phi + h/2
    order 3   -phi + log(w+ exp(-x+) + w- exp(-x-))        (`closed_third_order`)

The directions are kept in a per-sample basis Q [K, R]: v_u ~ Q c_u with R numbers c_u = Q^T v_u instead of K. Up to K - 1
directions it is orthonormal and exact. With more classes it holds p - e_y, the leading eigenvectors of diag(p) - p p^T, and
one random direction that stands for the rest of the curvature, right on the mean over its signs (a low-rank part and a
stochastic remainder, as in Hutch++: Meyer, Musco, Musco, Woodruff 2021, arXiv:2010.09649).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from taylor_pruning.tasks.directions import adding_to_zero, random_directions

SUPPORT = 32  # classes, most probable first, over which third moments are taken; all others count as one more
PER_SAMPLE = ("coordinates", "basis", "logits", "labels", "flow")  # tensors of Directions
LARGEST_EXPONENT = 700.0  # exp of a larger one is beyond float64
BLOCK = 2**17  # units x samples that are scored at once: what they need stays in a core's cache


def closed_third_order(phi: Tensor, h: Tensor, t: Tensor) -> Tensor:
    """Loss change -phi + log E[exp(-x)] for the two-point law x of mean 0, variance h and third central moment t.

    For a skewness s = t / h^1.5 >= 0 the points are sqrt(h) f with probability 1 / (1 + f^2) and -sqrt(h) / f with the rest,
    f = s / 2 + sqrt(1 + s^2 / 4); for s < 0 they are mirrored. The log-sum-exp of a two-point law agrees with
    -phi + h/2 - t/6 to third order in the step, is convex in it, and is bounded where the raw cubic explodes. Computed in
    float64, with a relative error of about 1e-15 / sqrt(h), so that sure networks have digits too, and for any t.

    Args:
        phi, h, t: tensors of one shape; h >= 0 (rounding below 0 is clipped).

    Returns:
        float64 tensor of that shape.
    """
    h = h.double().clamp_min(0)
    root = h.sqrt()
    skewness = t / (h * root).clamp_min(torch.finfo(torch.float64).tiny)
    half = skewness.clamp(-1e6, 1e6) / 2  # a larger one only arises from rounding at h ~ 0
    far = half.abs() + (1 + half.square()).sqrt()
    root, odds = root.copysign(half), far.square()
    one, other = -root * far, root / far  # the two values of -x
    beyond = torch.maximum(one, other).clamp_min(LARGEST_EXPONENT) - LARGEST_EXPONENT  # 0 but where exp would overflow
    one, other = (value.clamp_max(LARGEST_EXPONENT).expm1() - value for value in (one, other))
    return ((one + odds * other) / (1 + odds)).log1p() + beyond - phi  # E[exp(-x)] is 1 + E[exp(-x) - 1 + x]


def loss_change(order: int, phi: Tensor, h: Tensor | None = None, t: Tensor | None = None) -> Tensor:
    """Signed loss change of closing a gate, from the first `order` derivatives along it (module docstring)."""
    if order == 1:
        return -phi
    if order == 2:
        return -phi + h / 2
    return closed_third_order(phi, h, t)


def class_basis(
    logits: Tensor, labels: Tensor | None, probes: int, signs: Tensor | None = None
) -> tuple[Tensor, float]:
    """Per-sample basis of the logit directions that matter.

    Args:
        logits: [N, K]. labels: [N], None where no first derivative is wanted: the basis then does not hold p - e_y.
        probes: number R of directions, at most K - 1 are needed (a shift along the vector of ones changes no probability).
        signs: [N, K] of random -1 and 1, for the last direction where R < K - 1; None where no curvature is wanted.

    Returns:
        basis [N, K, R] and the share of the curvature tr(diag(p) - p p^T) for which the random direction stands.
    """
    n, k = logits.shape
    if probes >= k - 1:
        ones = torch.ones(k, 1, dtype=logits.dtype, device=logits.device)
        complement = torch.linalg.qr(torch.cat([ones, torch.eye(k, dtype=logits.dtype, device=logits.device)], 1))[0]
        return complement[:, 1:k].expand(n, k, k - 1), 0.0
    p, exactly = logits.softmax(1), logits.double().softmax(1)
    columns = [] if labels is None else [adding_to_zero(exactly, labels).to(p)[:, :, None]]
    exact = probes - len(columns) - (signs is not None)  # leading eigenvectors
    top, classes = exactly.topk(min(k, max(SUPPORT, 2 * probes)), 1)
    first, others = classes[:, :1], exactly.scatter(1, classes[:, :1], 0.0).sum(1, keepdim=True)
    diagonal = (exactly * (1 - exactly)).scatter(1, first, top[:, :1] * others)  # of a sure class 1 - p has no digits
    if exact > 0:
        fisher = -top[:, :, None] * top[:, None, :]
        fisher.diagonal(dim1=1, dim2=2).copy_(diagonal.gather(1, classes))
        leading = torch.linalg.eigh(fisher)[1][:, :, -exact:].flip(-1).to(p)
        spread = torch.zeros(n, k, exact, dtype=p.dtype, device=p.device)
        columns.append(spread.scatter_(1, classes[:, :, None].expand_as(leading), leading))
    basis = torch.linalg.qr(torch.cat(columns, 2))[0] if columns else p.new_empty(n, k, 0)
    trace = diagonal.sum().clamp_min(torch.finfo(exactly.dtype).tiny)
    rest = 1 - (_variance(p, basis).double().sum() / trace).item()
    if signs is None:
        return basis, rest
    return torch.cat([basis, _remainder(logits, basis, signs)[:, :, None]], 2), rest


def _centred(p, values):
    """Values [N, K, R] less their mean under p [N, K]; variances of a sure network are lost in E[v^2] - E[v]^2."""
    return values - torch.bmm(p[:, None], values)


def _variance(p, values):
    """[N, R] variances of values [N, K, R] under p [N, K]."""
    return torch.einsum("nk,nkr->nr", p, _centred(p, values).square())


def _support(p, basis):
    """p [N, K], basis [N, K, R] on the SUPPORT most probable classes and one that stands for all others by their mean."""
    if p.shape[1] <= SUPPORT + 1:
        return p, basis
    top, classes = p.topk(SUPPORT, 1)
    held = basis.gather(1, classes[:, :, None].expand(-1, -1, basis.shape[2]))
    rest = p.scatter(1, classes, 0)  # one less the others has no digits where the network is sure
    others = rest.sum(1, keepdim=True).clamp_min(torch.finfo(p.dtype).tiny)
    mean = torch.einsum("nk,nkr->nr", rest, basis) / others
    return torch.cat([top, others], 1), torch.cat([held, mean[:, None]], 1)


def _remainder(logits, basis, signs):
    """[N, K] random direction b for what lies outside of the orthonormal `basis` [N, K, R - 1].

    With w of `random_directions` and P = 1 - Q Q^T, E[P w w^T P] = P F P over the signs, so that E[(P w.v)^2] is the
    curvature of v there; w below is P w. b is w scaled so that a vector b (b.v) has the curvature (w.v)^2.
    """
    p, w = logits.softmax(1), random_directions(logits, signs)
    for _ in range(2):  # once more against rounding
        w = w - torch.einsum("nkr,nr->nk", basis, torch.einsum("nkr,nk->nr", basis, w))
    tiny = torch.finfo(p.dtype).tiny
    length = w.norm(dim=1, keepdim=True)
    q = w / length.clamp_min(tiny)
    curvature = _variance(p, q[:, :, None])
    return q * (length / curvature.clamp_min(tiny).sqrt()).clamp_max(p.shape[1] ** 0.5).sqrt()


@dataclass
class Expansion:
    """Derivatives of the loss of every sample along directions of its logits, at one point; each is computed once.

    Attributes:
        p: [N, K] probabilities there. slope: [N, K] of the loss in the logits, p less what it compares with, taken in double
            precision: single has no digits of it where the network is sure. basis: [N, K, R].
    """

    p: Tensor
    slope: Tensor
    basis: Tensor

    @cached_property
    def gradient(self) -> Tensor:
        """[N, R] first derivatives along the basis."""
        return torch.bmm(self.slope[:, None], self.basis).squeeze(1)

    def mean_slopes(self, c: Tensor) -> Tensor:
        """[U] mean over samples of phi, float64 on the CPU, of the directions with coordinates c [U, N, R]."""
        return (c.flatten(1) @ self.gradient.flatten()).double().cpu() / len(self.gradient)

    @cached_property
    def supported(self) -> tuple[Tensor, Tensor]:
        """[N, K'] probabilities of the most probable classes and of the others together, [N, K', R] the basis less its mean."""
        p, basis = _support(self.p, self.basis)
        return p, _centred(p, basis)

    @cached_property
    def fisher(self) -> Tensor:
        """[N, R, R] second derivatives along the basis, over all classes: many improbable ones have much of the curvature."""
        centred = _centred(self.p, self.basis)
        return torch.bmm((centred * self.p[:, :, None]).transpose(1, 2), centred)

    def moments(self, c: Tensor, order: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """phi, h, t [N, U] of the directions with coordinates c [N, U, R]; None where the order needs none."""
        phi = torch.bmm(c, self.gradient[:, :, None]).squeeze(2)
        if order == 1:
            return phi, None, None
        h = (torch.bmm(c, self.fisher) * c).sum(2)
        if order == 2:
            return phi, h, None
        p, centred = self.supported
        v = torch.bmm(centred, c.transpose(1, 2))
        return phi, h, (v.square() * p[:, :, None] * v).sum(1)  # v^3 alone is beyond float32 far earlier


@dataclass
class Directions:
    """What one pass over the calibration images collects.

    Attributes:
        coordinates: [N, U, R] of v_u in the sample's basis.
        basis: [N, K, R]. logits: [N, K]. labels: [N].
        sampled_curvature: share of the curvature for which random directions stand (`class_basis`).
        flow: [N, U] norm of the loss gradient that flows back through the unit's channels, or None.
        own_targets: the loss is the cross-entropy against the network's own probabilities at no shift instead of the
            labels. Then phi = 0 at no shift, and along one gate h is the whole second derivative in any network.
    """

    coordinates: Tensor
    basis: Tensor
    logits: Tensor
    labels: Tensor
    sampled_curvature: float
    flow: Tensor | None = None
    own_targets: bool = False

    def targets(self) -> Tensor:
        """[N, K] probabilities that the loss compares with, float64."""
        if self.own_targets:
            return self.logits.double().softmax(1)
        return F.one_hot(self.labels, self.logits.shape[1]).double()

    def moments(
        self, shift: Tensor | None = None, units=None, order: int = 3
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """phi, h, t [N, U'] of the units (a slice or index, default all) at the logits z - Q shift.

        Args:
            shift: [N, R] coordinates of the change of the logits by the units removed so far, with sign reversed.
            order: h and t are None where the order does not need them.
        """
        c = self.coordinates if units is None else self.coordinates[:, units]
        return self.expansion(shift).moments(c, order)

    def expansion(self, shift: Tensor | None = None) -> "Expansion":
        """The loss of every sample around the logits z - Q shift, with `shift` as in `moments`."""
        logits = self.logits if shift is None else self.logits - torch.bmm(self.basis, shift[:, :, None]).squeeze(2)
        p = logits.double().softmax(1)
        slope = adding_to_zero(p - self.targets(), logits.argmax(1) if self.own_targets else self.labels)
        return Expansion(p.to(logits), slope.to(logits), self.basis)

    def scores(self, order: int, shift: Tensor | None = None, units=None) -> Tensor:
        """[U'] mean over samples of the signed loss change of removing each unit alone at the shifted logits."""
        return sum(part.sum(0) for part in self.loss_changes(order, shift, units)) / len(self.labels)

    def loss_changes(self, order: int, shift: Tensor | None = None, units=None) -> Iterator[Tensor]:
        """Yields [some samples, U'] signed loss changes of removing each unit alone, see `scores`."""
        samples, width = self.coordinates.shape[:2]
        for rows in torch.arange(samples).split(max(1, BLOCK // width)):
            rows = slice(rows[0], rows[-1] + 1)
            here = None if shift is None else shift[rows]
            yield loss_change(order, *self.rows(rows).moments(here, units, order))

    def rows(self, rows: slice) -> "Directions":
        """The directions of a slice of the samples."""
        tensors = {name: getattr(self, name) for name in PER_SAMPLE}
        return replace(self, **{name: None if tensor is None else tensor[rows] for name, tensor in tensors.items()})

    @classmethod
    def join(cls, parts: Sequence["Directions"]) -> "Directions":
        """The directions of several batches as one."""
        values = {}
        for name in PER_SAMPLE:
            tensors = [getattr(part, name) for part in parts]
            values[name] = None if tensors[0] is None else torch.cat(tensors)
        samples = sum(len(part.labels) for part in parts)
        sampled = sum(part.sampled_curvature * len(part.labels) for part in parts) / samples
        return cls(sampled_curvature=sampled, **values)

    def to(self, device: torch.device | str) -> "Directions":
        """The same directions on another device."""
        tensors = {name: getattr(self, name) for name in PER_SAMPLE}
        return replace(
            self, **{name: None if tensor is None else tensor.to(device) for name, tensor in tensors.items()}
        )

    def loss_change_at(self, shift: Tensor) -> float:
        """Mean loss at the logits z - Q shift minus the loss at z, in nats."""
        targets = self.targets()
        logits, change = self.logits.double(), torch.einsum("nkr,nr->nk", self.basis, shift)
        return (F.cross_entropy(logits - change, targets) - F.cross_entropy(logits, targets)).item()
