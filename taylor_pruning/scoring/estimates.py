"""Every channel estimated from the other channels of its layer: the part of it that compensation can repair.

The layers that read removed channels are refitted (repair.compensation). A removal then costs not the channel x_u but its
residual after least squares on the other channels, over calibration images and positions:

    x_u - e_u = [P (x - mean)]_u / P_uu,        P = (C + diag(ridge))^-1,   C = Cov(x)

(the inverse of Optimal Brain Surgeon, Hassibi & Stork 1993, on activations; of a unit that has several channels in one
layer, the block of P takes the place of P_uu). `ChannelGraph.gated(..., estimates=...)` puts e_u where a gate closes.

Estimates are cross-fitted: an image is scored with estimates that were fitted on the other folds (scoring.folds). A layer
with few rows a channel (a classifier after pooling has one row an image) explains almost everything on the images that
fitted it, and would be emptied.

The ridge of a channel is RIDGE, or more where rows are few, times the variance at which the channel would have the mean share
in the layer's outputs. So scores stay as they are if the weights before a ReLU are multiplied by a positive number and those
behind it are divided by it. A channel that is rarely active has a small share and a ridge far above its variance. If the
ridge were a share of its own variance, a single image on which it is active would decide the estimates of all others.
"""

import itertools
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch

from taylor_pruning.gram import add_gram
from taylor_pruning.memory import Portions
from taylor_pruning.modes import frozen
from taylor_pruning.positions import drawn_positions
from taylor_pruning.scoring.folds import FOLDS, folds_of
from taylor_pruning.surgery.gating import moved
from taylor_pruning.surgery.units import by_sample
from taylor_pruning.tasks import batches as samples
from taylor_pruning.tasks.classification import Classification
from taylor_pruning.tasks.portions import in_portions

RIDGE = 1e-2  # relative to the variance of a channel of mean share; the number of channels over that of rows is added
TINY = torch.finfo(torch.float64).tiny
LEAST_SHARE = 1e-9  # in the outputs, relative to the mean share; a smaller one is raised to it
ROWS_PER_CHANNEL = 32  # but at least `positions.ENOUGH_ROWS` in all, as far as the images have so many positions
FEW_POSITIONS = 32  # up to here reading the matrix once an image would take longer than the products: images are joined


class ChannelEstimate:
    """Estimates of a reader's input channels from each other; a grouped conv's from those of the same group.

    Args:
        reader: surgery.graph.Reader.
        precision: [groups, channels, channels] P. mean: [groups, channels, 1] of the inputs.
    """

    def __init__(self, reader, precision, mean):
        left = precision / precision.diagonal(dim1=1, dim2=2)[:, :, None]
        for _, at in reader.places:
            if at.shape[1] > 1:  # channels of one unit are removed together
                at = moved(at, left.device)
                block = precision[:, at[:, :, None], at[:, None, :]]
                left[:, at] = torch.linalg.solve_ex(block, precision[:, at])[0]
        left.neg_()
        self.offset = -(left @ mean)
        left.diagonal(dim1=1, dim2=2).add_(1)
        self.reader, self.matrix = reader, left

    def __call__(self, x):
        """The estimates, in the shape of the reader's input x."""
        rows = applied(self.matrix.to(x), self.reader.to_rows(x))
        return self.reader.from_rows(rows.add_(self.offset.to(x)), x.shape)


class SetEstimate:
    """Estimates of several of a reader's input channels from all others: what repair makes of their removal together.

        e_S = mean_S - (P_SS)^-1 P_SR (x_R - mean_R)          of the channels S from the channels R that stay

    Args:
        channels: [n] S, within a group; all groups of a grouped conv hold the same units.
        reader, precision, mean: see ChannelEstimate.
    """

    def __init__(self, reader, channels, precision, mean):
        self.reader, self.channels = reader, moved(channels, precision.device)
        rows = precision[:, self.channels]
        self.matrix = -torch.linalg.solve_ex(rows[:, :, self.channels], rows)[0]
        self.matrix[:, :, self.channels] = 0
        self.offset = mean[:, self.channels] - self.matrix @ mean

    def __call__(self, x):
        """The estimates, in the shape of the reader's input x; zero at channels that stay."""
        rows = self.reader.to_rows(x)
        found = torch.zeros_like(rows)
        found[:, :, self.channels] = applied(self.matrix.to(x), rows).add_(self.offset.to(x))
        return self.reader.from_rows(found, x.shape)


def applied(matrix, rows):
    """matrix [groups, n, channels] times the rows [B, groups, channels, positions] of every image."""
    if rows.shape[3] > FEW_POSITIONS:
        return matrix @ rows
    found = matrix @ rows.permute(1, 2, 0, 3).flatten(2)
    return found.unflatten(2, (len(rows), -1)).permute(2, 0, 1, 3)


class Precision(NamedTuple):
    """Of a reader's inputs: P = (C + ridge)^-1 [groups, channels, channels], mean [groups, channels, 1] and ridge
    [groups, channels].
    """

    matrix: torch.Tensor
    mean: torch.Tensor
    ridge: torch.Tensor


@dataclass
class InputMoments:
    """Moments of a reader's inputs over (image, position) pairs, one set a fold.

    Attributes:
        reader: surgery.graph.Reader. weight: of its layer.
        shift: [groups, channels, 1], subtracted from the inputs first, so that large means cost no digits.
        total: [folds, groups, channels] sums over pairs. products: [folds, groups, channels, channels] sums over pairs, the
            lower triangle.
        rows: [folds] number of pairs.
    """

    reader: object
    weight: torch.Tensor
    shift: torch.Tensor
    total: torch.Tensor
    products: torch.Tensor
    rows: list = field(default_factory=lambda: [0] * FOLDS)

    @classmethod
    def empty(cls, reader, weight, rows):
        """No moments yet; the shift is the mean of these rows [images, groups, channels, positions]."""
        shift = rows.mean((0, 3))[..., None]
        total = rows.new_zeros(FOLDS, *shift.shape[:2])
        return cls(reader, weight, shift, total, total.new_zeros(*total.shape, total.shape[-1]))

    def add(self, fold, rows):
        """Adds rows [images, groups, channels, positions] of a fold."""
        rows = rows.movedim(0, 2).flatten(2) - self.shift
        self.rows[fold] += rows.shape[2]
        self.total[fold] += rows.sum(2)
        add_gram(self.products[fold], rows)

    def precision(self, without=None, dtype=None):
        """`Precision` of all folds, or of all but one; None without rows. Its dtype is that of the sums, or `dtype`."""
        kept = [fold for fold in range(FOLDS) if fold != without and self.rows[fold]]
        if not kept:
            return None
        rows = sum(self.rows[fold] for fold in kept)
        total, covariance = (sum(sums[f] for f in kept).to(dtype) / rows for sums in (self.total, self.products))
        mean = total[:, :, None]
        covariance.baddbmm_(mean, mean.mT, alpha=-1)
        diagonal = covariance.diagonal(dim1=1, dim2=2)
        # A channel that never varies has a variance of rounding, against which its ridge has to be large.
        rounding = 2**10 * torch.finfo(self.total.dtype).eps * total.double().square()
        usual, limits = self._usual(diagonal.double().clamp_min(0) + rounding), torch.finfo(covariance.dtype)
        ridge = (RIDGE + covariance.shape[1] / rows) * usual
        ridge = ridge.clamp(2**20 * limits.tiny, limits.max / 2**20).to(covariance)  # the inverse stays finite
        diagonal += ridge
        inverse = torch.cholesky_inverse(torch.linalg.cholesky_ex(covariance)[0])  # which reads the lower triangle
        return Precision(inverse, mean + self.shift.to(mean), ridge)

    @cached_property
    def effects(self):
        """[groups, outputs, channels] squared weights that the reader has for a channel, up to a factor of every output."""
        weight = self.weight.detach()
        weight = weight.reshape(len(weight), -1, self.reader.positions) if self.reader.is_linear else weight.flatten(2)
        norms = torch.linalg.vector_norm(weight, dim=2, dtype=torch.float64)
        norms = norms / norms.amax(1, keepdim=True).clamp_min(TINY)
        return norms.square().float().unflatten(0, (self.reader.groups, -1))

    def _usual(self, variances):
        """[groups, channels]: the variance at which each channel would have the mean share in the variance of the outputs.

        Outputs count alike, whatever their size, and channels as uncorrelated.

        Args:
            variances: [groups, channels] that they have, float64.
        """
        effects = self.effects.double()
        spread = effects @ variances[:, :, None]
        shares = torch.where(spread > 0, effects / spread, 0.0).sum(1)  # of a variance of 1
        shares = torch.where(shares.any(1, keepdim=True), shares, 1.0)  # else they count alike
        mean = (shares * variances).mean(1, keepdim=True)
        return mean / torch.maximum(shares, LEAST_SHARE * mean / variances.clamp_min(TINY)).clamp_min(TINY)


def in_single(values):
    """Values in single precision at least, in which sums and factorisations keep their digits."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def input_moments(model, graph, batches, portions=None, task=None):
    """{layer name: InputMoments} of the layers that compensation refits, from one forward of the task's batches.

    Of a layer with many positions some are drawn for every image (positions). Layers that are called more than once
    are not refitted (repair.compensation) and have no entry.

    Args:
        portions: memory.Portions, parts of batches that fit into memory; None: what is free.
        task: default classification.
    """
    task = task or Classification()
    found, calls = {}, dict.fromkeys((reader.layer for reader in graph.readers), 0)
    numbers, counts, forwards = None, [], 0  # of the samples of one forward, sorted by fold
    folds, images_in_all = folds_of(batches, task), sum(map(samples.size, batches))

    def record(reader, node):
        def read(args):
            x = by_sample(reader.samples_first(node, args[0]), len(numbers), reader.blocks.get(node, 1))
            rows = in_single(reader.to_rows(x))
            wanted = ROWS_PER_CHANNEL * rows.shape[2]
            several = len(rows) // len(numbers)  # rows an image, where a forward puts parts of it into the batch
            rows = drawn_positions(rows, numbers.repeat_interleave(several), images_in_all, wanted)
            calls[reader.layer] += 1
            if reader.layer not in found:
                found[reader.layer] = InputMoments.empty(reader, weights[reader.layer], rows)
            for fold, part in enumerate(rows.split([count * several for count in counts])):
                if len(part):
                    found[reader.layer].add(fold, part)
            return args

        return read

    weights = {reader.layer: model.get_parameter(f"{reader.layer}.weight".lstrip(".")) for reader in graph.readers}
    reads = {node: record(reader, node) for reader in graph.readers for node in reader.nodes}
    device = next(model.parameters()).device
    portions = portions or Portions(device, backward=False)
    firsts = itertools.accumulate(map(samples.size, batches), initial=0)

    def forward(part, first):
        nonlocal numbers, counts, forwards
        fold = folds[first : first + samples.size(part)]
        order, counts = fold.argsort(stable=True), fold.bincount(minlength=FOLDS).tolist()
        numbers, forwards = (first + order).to(device), forwards + 1
        task.forward(model, samples.select(part, order))

    with frozen(model), torch.no_grad(), graph.executed(read=reads):
        for start, batch in zip(firsts, batches, strict=False):
            in_portions(lambda part, before, start=start: forward(part, start + before), batch, portions)
    return {name: moments for name, moments in found.items() if calls[name] == forwards}


def channel_estimates(moments, without=None):
    """{layer name: ChannelEstimate} fitted on all folds of `input_moments`, or on all but one.

    Where no other fold has images there is no estimate: a closed channel is then zero.
    """
    fits = {name: (m.reader, m.precision(without)) for name, m in moments.items()}
    return {name: ChannelEstimate(reader, fit.matrix, fit.mean) for name, (reader, fit) in fits.items() if fit}


def set_estimates(moments, sets):
    """[{layer name: SetEstimate}] of every set of units, of the layers that read some of them, fitted on all folds.

    The sets share no unit, so that all estimates of a layer together take no more memory than its covariance.
    """
    found = [{} for _ in sets]
    for name, m in moments.items():
        fit = m.precision(dtype=torch.float64)
        for estimates, units in zip(found, sets, strict=True):
            channels = m.reader.channels_of(units)
            if len(channels):
                estimates[name] = SetEstimate(m.reader, channels, fit.matrix, fit.mean)
    return found
