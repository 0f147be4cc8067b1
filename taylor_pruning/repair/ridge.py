"""Ridge least squares on centred rows that come in parts: by normal equations, or dual where rows are fewer than columns.

    solver = RidgeSolver(groups, columns, outputs, intercept=True, like=weight)
    solver.add(Rows(x, r))
    if not solver.factorise(ridge=1e-2):
        weights, bias = solver.solve()

minimises, a group at a time, sum |r - x D - b|^2 + ridge * mean(diag C) * |D|^2 with C the centred Gram matrix of x.
"""

from dataclasses import dataclass

import torch

from taylor_pruning.gram import add_gram

LARGE_RIDGE = 1e-2  # relative to mean(diag C), from which the rounding of single precision does no harm
AT_ONCE = 8192  # rows that are gathered before they are multiplied


@dataclass
class Rows:
    """Regressors x [groups, rows, columns], and r [groups, rows, outputs], what is to be explained."""

    x: torch.Tensor
    r: torch.Tensor

    def left(self, weights, bias, outputs=slice(None)):
        """r less the prediction of weights [groups, columns, outputs] and bias [groups, 1, outputs]."""
        return self.r[..., outputs] - self.x @ weights.to(self.x.dtype) - bias.to(self.x.dtype)


class RidgeSolver:
    """By normal equations: (C + ridge mean(diag C)) D = X^T R with C = X^T X, X and R centred.

    Products are taken in the precision of the rows, of many rows at once, and summed in float64. With an intercept the mean
    of the first rows is taken off x before, so that large means cost no digits. Their size is divided out of x, so that
    no square leaves the range of that precision.

    Args:
        intercept: whether there is a b; without it nothing is centred.
        like: a tensor of the rows' device and precision.
    """

    def __init__(self, groups, columns, outputs, intercept, like):
        def zeros(*shape):
            return torch.zeros(groups, *shape, dtype=torch.float64, device=like.device)

        self.gram, self.cross = zeros(columns, columns), zeros(columns, outputs)
        self.sum_x, self.sum_r = zeros(1, columns), zeros(1, outputs)
        self.rows, self.intercept, self.factor, self.pending = 0, intercept, None, []
        self.shift = self.size = None
        self.precision = torch.promote_types(like.dtype, torch.float32)

    def add(self, part):
        self.pending.append(part)
        self.rows += part.x.shape[1]
        if sum(p.x.shape[1] for p in self.pending) >= AT_ONCE:
            self._flush()

    def _flush(self):
        """Adds what is pending to the sums: many rows at once, as every addition goes over the whole matrix."""
        if not self.pending:
            return
        x, r = (torch.cat([getattr(part, name) for part in self.pending], 1) for name in ("x", "r"))
        self.pending = []
        if self.intercept:
            self.shift = centre(x) if self.shift is None else self.shift
            x = x - self.shift
        self.size = size_of(x) if self.size is None else self.size
        x = x / self.size
        add_gram(self.gram, x.mT)
        self.cross += x.mT @ r
        self.sum_x += x.sum(1, keepdim=True)
        self.sum_r += r.sum(1, keepdim=True)

    def factorise(self, ridge):
        """Whether it failed, a tensor []: the matrix is not positive definite with this ridge.

        With a large ridge the network's own precision will do.
        """
        self._flush()
        self.factor = None
        gram = self.gram.clone()
        if self.intercept:
            gram.baddbmm_(self.sum_x.mT, self.sum_x, alpha=-1 / self.rows)
        if ridge >= LARGE_RIDGE:
            gram = gram.to(self.precision)
        self.factor, failed = _cholesky(gram, ridge, gram.shape[1])
        return failed

    def solve(self, outputs=slice(None)):
        """Weights [groups, columns, outputs] and intercept [groups, 1, outputs]."""
        cross, sum_r = self.cross[..., outputs], self.sum_r[..., outputs]
        if self.intercept:
            cross = cross - self.sum_x.mT * (sum_r / self.rows)
        weights = torch.cholesky_solve(cross.to(self.factor), self.factor).to(cross)
        left, weights = sum_r - self.sum_x @ weights, weights / self.size
        if not self.intercept:
            return weights, torch.zeros_like(sum_r)
        return weights, left / self.rows - self.shift.to(weights) @ weights


class DualRidgeSolver:
    """Through a matrix of [rows, rows], for fewer rows than columns: D = X^T (X X^T + ridge mean(diag C))^-1 R."""

    def __init__(self, intercept):
        self.parts, self.intercept, self.factor, self.size = [], intercept, None, None

    @property
    def rows(self):
        return sum(part.x.shape[1] for part in self.parts)

    def add(self, part):
        self.parts.append(part)

    def _centred(self, rows):
        """(rows less their mean, the mean); the mean is 0 without an intercept."""
        mean = centre(rows) if self.intercept else torch.zeros_like(rows[:, :1])
        return rows - mean, mean

    def factorise(self, ridge):
        x, _ = self._centred(torch.cat([part.x for part in self.parts], 1))
        self.size = size_of(x)
        x = x / self.size
        self.factor, failed = _cholesky((x @ x.mT).double(), ridge, x.shape[2])
        return failed

    def solve(self, outputs=slice(None)):
        x, mean_x = self._centred(torch.cat([part.x for part in self.parts], 1))
        r, mean_r = self._centred(torch.cat([part.r[..., outputs] for part in self.parts], 1))
        weights = (x / self.size).mT @ torch.cholesky_solve(r.double(), self.factor).to(x.dtype) / self.size
        return weights, mean_r - mean_x @ weights


def centre(rows):
    """[..., 1, columns] mean of the rows [..., n, columns]; of a column that never varies, the number that it holds.

    Less a mean that is rounded, such a column is a tiny constant, to which a fit would give a weight of any size.
    """
    first = rows[..., :1, :]
    return torch.where((rows == first).all(-2, keepdim=True), first, rows.mean(-2, keepdim=True))


def size_of(x):
    """The largest power of two that is not above every absolute number of x, a tensor []; 1 where all are 0.

    Dividing by it rounds nothing.
    """
    largest = x.abs().max().to(torch.promote_types(x.dtype, torch.float32))
    power = torch.ldexp(torch.ones_like(largest), torch.frexp(largest).exponent - 1)
    return torch.where(largest > 0, power, 1.0)


def _cholesky(gram, ridge, columns):
    """(lower factor of gram + ridge x trace / columns, whether it failed); writes on `gram`, reads its lower triangle."""
    diagonal = gram.diagonal(dim1=1, dim2=2)
    diagonal += ridge * diagonal.sum(1, keepdim=True) / columns + torch.finfo(gram.dtype).tiny
    factor, failed = torch.linalg.cholesky_ex(gram)
    return factor, failed.any()
