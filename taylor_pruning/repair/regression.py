"""The ridge regression of one layer on calibration images."""

import math
from dataclasses import dataclass

import torch

from taylor_pruning.checks import too_large
from taylor_pruning.errors import InputError
from taylor_pruning.positions import ENOUGH_ROWS, shifted
from taylor_pruning.repair.fitted_layer import as_columns, by_position, patches_at
from taylor_pruning.repair.ridge import DualRidgeSolver, RidgeSolver, Rows

RIDGES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8)  # relative to the mean of the Gram matrix's diagonal
LAST_RIDGE = 1.0  # tried where the first is of no use
HELD_OUT = 0.2  # share of the images that chooses the ridge, drawn: their order may follow the classes
AGREES = 1e-5  # largest deviation from the targets, relative to the largest of them, that counts as none
ROWS_PER_COLUMN = 2
GRAM_COST = 2**34  # multiply-adds of a Gram matrix, up to which a layer gets ENOUGH_ROWS rows
WEAK = 1e-2  # relative to the mean scale of the channels
TRIAL_OUTPUTS = 64  # of each group, on which ridges are compared
LARGEST_MATRIX = 6144  # columns; above, the dual problem is solved on at most as many rows


@dataclass(frozen=True)
class LayerFit:
    """How one layer was refitted. Errors are of the held-out images, relative to the spread of the dense outputs.

    Where the fit is to predictions, they are the roots of the mean divergence over that of a constant answer.
    """

    name: str
    error_before: float
    error_after: float
    ridge: float | None  # None: the weights stay, because no ridge was better or the fit failed
    rows: int  # output positions used, over all images
    columns: int  # input channels of a group x kernel positions
    matches: str  # "layer", "sum" or, of the layer that gives the logits, "predictions" (repair.logits)


def relative_error(squared: float, spread: float) -> float:
    """Root of a squared error over the spread, infinite without any."""
    return math.sqrt(squared / spread) if spread else math.inf


class LayerRegression:
    """The rows of one layer, and its fit to them.

    `images`: of every batch. The layer may see several parts of each, as windows, one after the other in the batch dimension.
    """

    def __init__(self, layer, seed, images):
        weight, self.images, images = layer.weight, images, sum(images)
        self.layer, self.seen = layer, 0
        self.groups = layer.groups
        self.columns, self.outputs = weight[0].numel(), len(weight) // self.groups
        self.generator = torch.Generator().manual_seed(seed)
        self.is_held_out = torch.randperm(images, generator=self.generator) < int(HELD_OUT * images)
        if self.columns > LARGEST_MATRIX:
            self.solver, rows = DualRidgeSolver(layer.has_intercept), LARGEST_MATRIX
        else:
            shape = self.groups, self.columns, self.outputs
            self.solver = RidgeSolver(*shape, layer.has_intercept, weight)
            rows = max(ROWS_PER_COLUMN * self.columns, min(ENOUGH_ROWS, GRAM_COST // self.columns**2))
        self.positions = max(1, round(rows / images))
        self.held_out, self.held_out_targets, self.largest = [], [], []
        self.drawn = None  # positions of the first part of the first image
        self.weight = as_columns(self.groups, weight)
        self.scale = layer.scale
        # A channel that all but vanishes behind its BatchNorm cannot repair the sum.
        weak = self.scale.abs() <= WEAK * self.scale.abs().mean()
        self.divisor = torch.where(weak, torch.inf, self.scale)

    def add(self, batch, x, *outputs):
        """Add one batch: the layer's input and what `_target` takes."""
        images = self.images[batch]
        parts = max(1, len(x) // images)  # of an image
        held_out = self.is_held_out[self.seen + torch.arange(len(x)) * images // len(x)]
        for chosen in (~held_out, held_out):
            some = chosen.nonzero().flatten().to(x.device, non_blocking=True)
            if not len(some):
                continue
            rows, wanted = self._rows(x, some, parts, outputs)
            self.largest.append((batch, torch.stack([rows.r.abs().max(), wanted.abs().max()])))
            self._keep(rows, wanted, chosen is held_out)
        self.seen += images

    def _keep(self, rows, wanted, is_held_out):
        if is_held_out:
            self.held_out.append(rows)
            self.held_out_targets.append(wanted)
        else:
            self.solver.add(rows)

    def agrees(self):
        """Whether the layer answers as it should, up to rounding; waits for the device once for all batches.

        Raises InputError if there was NaN or Inf, or if squares overflow.
        """
        batches, largest = zip(*self.largest, strict=True)
        deviations, targets = torch.stack(largest).T.tolist()
        for batch, deviation in zip(batches, deviations, strict=True):
            if not math.isfinite(deviation):
                raise InputError(
                    f"compensation: NaN or Inf in {self.layer.name} on batch {batch}; check the images and both networks' "
                    "weights"
                )
        if not max(targets) < torch.finfo(torch.promote_types(self.weight.dtype, torch.float32)).max ** 0.5:
            raise InputError(f"compensation: {too_large(self.layer.name)}")
        return max(deviations) <= (AGREES + 4 * torch.finfo(self.weight.dtype).eps) * max(targets)

    def _target(self, at, dense_output, dense_stream, stream):
        """What the layer should answer at the given images and positions: [..., filters]."""
        layer = self.layer
        output, dense_stream, stream = (
            None if values is None else by_position(layer, values)[at]
            for values in (dense_output, dense_stream, stream)
        )
        target = output[..., layer.kept]
        return target if stream is None else target + (dense_stream[..., layer.kept] - stream) / self.divisor

    def _rows(self, x, some, parts, outputs):
        """The rows of some of x [images x parts, ...], at positions shifted from one to the next, and the targets there."""
        layer, positions = self.layer, by_position(self.layer, outputs[0]).shape[1]
        if self.drawn is None:
            count = max(1, round(self.positions / parts))
            self.drawn = torch.randperm(positions, generator=self.generator)[:count].to(x.device)
        drawn = shifted(self.drawn, self.seen * parts + some, positions)
        patches = patches_at(layer, x[some], drawn)
        target = self._target((some[:, None], drawn), *outputs)
        wanted = target.reshape(-1, self.groups, self.outputs).transpose(0, 1)
        present = patches @ self.weight
        if layer.bias is not None:
            present = present + layer.bias.view(self.groups, 1, -1)
        return Rows(patches, wanted - present), wanted

    def solve(self):
        """Choose the ridge on the held-out images, solve with all, change the layer."""
        judged = self.held_out and self.solver.rows
        return self._solve_with(*(self._choose_ridge() if judged else (LAST_RIDGE, math.nan, math.nan)))

    def _solve_with(self, ridge, before, after):
        """What `_choose_ridge` found, with all images."""
        layer, solver = self.layer, self.solver
        for rows in self.held_out:
            solver.add(rows)
        if ridge is not None and solver.factorise(ridge):
            ridge, after = None, before
        if ridge is not None:
            self._change(*solver.solve())
        matches = "layer" if layer.stream is None else "sum"
        return LayerFit(layer.name, before, after, ridge, solver.rows, self.columns, matches)

    def _choose_ridge(self):
        """(ridge, relative held-out error before, after): from the first ridge down until the error rises."""
        some = (
            torch.linspace(0, self.outputs - 1, min(self.outputs, TRIAL_OUTPUTS)).round().long().to(self.weight.device)
        )
        importance = self.scale.double().square().view(self.groups, 1, -1)[..., some]
        targets = torch.cat(self.held_out_targets, 1)[..., some].double()
        spread = (importance * (targets - targets.mean(1, keepdim=True)).square()).sum()

        def error(left):
            return sum((importance * rest.double().square()).sum() for rest in left)

        def error_with(ridge):
            failed = self.solver.factorise(ridge)
            solution = self.solver.solve(some)
            return error(rows.left(*solution, some) for rows in self.held_out).masked_fill(failed, math.inf).item()

        def best_of(ridges):
            best, chosen = before, None
            for ridge in ridges:
                after = error_with(ridge)
                if not after < best:  # NaN too
                    break
                best, chosen = after, ridge
            return best, chosen

        before, spread = torch.stack([error(rows.r[..., some] for rows in self.held_out), spread]).tolist()
        best, chosen = best_of(RIDGES)
        if chosen is None:
            best, chosen = best_of([LAST_RIDGE])
        return chosen, *(relative_error(error, spread) for error in (before, best))

    def _change(self, change, bias):
        layer, norm = self.layer, self.layer.batchnorm
        shape = layer.weight.shape
        change = change.mT.reshape(shape[0], -1, shape[1]).mT.reshape(shape)
        layer.weight.add_(change.to(layer.weight.dtype))
        bias = bias.flatten().to(layer.weight.dtype)
        if norm is not None:
            norm.running_mean.sub_(bias)
        elif layer.bias is not None:
            layer.bias.add_(bias)
