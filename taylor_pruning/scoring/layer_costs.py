"""Cost of removing a set of units when the layers that read them are repaired, to second order, in closed form.

A reader (a layer that reads the channels of units) has channels x and outputs W x. Its outputs' Fisher matrix is

    G = mean over images, sum over positions, of g g^T,     g = gradient at the reader's outputs of w.z,
    w a random direction of the task (tasks.directions), so that E[(w.v)^2] is the curvature of its divergence along any
    change v of the outputs; for logits, w = A s with A A^T = diag(p) - p p^T and random signs s. At order 1 w.z is the
    loss with labels: the empirical Fisher matrix, the same in expectation where labels are drawn from p.

With P = (Cov(x) + diag(ridge))^-1 and Q = sum over kernel offsets o of W_o^T G W_o, removing the channels S and refitting W on
those that stay by least squares leaves a residual of covariance (P_SS)^-1 - ridge_S, and costs

    cost(S) = 1/2 tr(Q_SS ((P_SS)^-1 - ridge_S))                                                            [nats]

(Optimal Brain Surgeon, Hassibi & Stork 1993, of a layer's inputs in the Fisher metric). The ridge is no variance of the
channels: left in, it would hide how their residuals go together. One set T after the other: with b = -(P_TT)^-1 P_T., the
cost is 1/2 tr(Q_TT (P_TT)^-1) less 1/2 tr(Q_TT ridge_T) of the Q before any removal, then

    Q <- Q + b^T Q_T. + Q_.T b + b^T Q_TT b,     P <- P + P_.T b,     rows and columns T vanish.

The Q of a remaining channel then includes the load that the repair puts on it, so that a layer whose channels are each
cheap is not emptied. A unit costs the sum over its readers. The residuals of different positions count as uncorrelated, and
ranks of single units by these costs are coarse; a level for every unit (`RemovalCosts.start_at`) corrects them.
"""

import itertools
import math
from collections import defaultdict

import numpy as np
import torch

from taylor_pruning.checks import too_large
from taylor_pruning.distributed import gather_objects
from taylor_pruning.errors import InputError
from taylor_pruning.gram import add_gram, symmetric
from taylor_pruning.positions import drawn_positions
from taylor_pruning.scoring.estimates import in_single

RIDGE_LEFT = 1e-2  # share of the ridge that stays in the costs: a level is divided by its cost, which may be rounding
BLOCK = 32  # removed channels that a reader gathers before its matrices are updated
TINY, EPSILON = np.finfo(np.float64).tiny, np.finfo(np.float64).eps


class OutputFisher:
    """Sums up G [outputs, outputs] of every reader in backward passes along directions w.

    Of a layer with many positions some are drawn for every image (positions), and stand for all.

    Args:
        readers: surgery.graph.Readers. images: number of images in all.

    Attributes:
        sums: {layer name: sum over the images seen, the lower triangle}; a reader whose outputs get no gradient has no
            entry.
    """

    def __init__(self, readers, images):
        self.readers, self.images = list(readers), images
        self.sums, self.seen = {}, 0

    def part(self, first):
        """`FisherPart` of one forward; `first`: how many images of the pass come before it."""
        return FisherPart(self, first)

    def mean(self):
        """{layer name: G}, of the images of all processes."""
        sums = gather_objects((self.seen, {name: total.cpu() for name, total in self.sums.items()}))
        if len(sums) == 1:
            return {name: symmetric(total) / self.seen for name, total in self.sums.items()}
        names, seen = [*dict.fromkeys(name for _, part in sums for name in part)], sum(count for count, _ in sums)
        return {name: symmetric(sum(part[name] for _, part in sums if name in part)) / seen for name in names}


class FisherPart:
    """G of the images of one forward, from the backward passes that run inside `with part:`."""

    def __init__(self, whole, first):
        self.whole, self.first, self.open, self.grams = whole, first, False, {}

    def outputs(self):
        """{node: function} that a forward calls with the outputs of readers (ChannelGraph.gated).

        They are not kept: they hold this part, whose matrices would then stay until Python looks for cycles.
        """
        return {node: self._watch(reader, node) for reader in self.whole.readers for node in reader.nodes}

    def _watch(self, reader, node):
        def add(gradient):
            if self.open:
                gradient, last = reader.samples_first(node, gradient), reader.is_linear
                rows = gradient.reshape(len(gradient), -1, gradient.shape[-1]).mT if last else gradient.flatten(2)
                positions = rows.shape[2]
                numbers = self.first + torch.arange(len(rows), device=rows.device)
                rows = drawn_positions(rows[:, None], numbers, self.whole.images, rows.shape[1])[:, 0]
                rows = in_single(rows.movedim(1, 0).flatten(1)) * math.sqrt(positions / rows.shape[2])
                if reader.layer not in self.grams:
                    self.grams[reader.layer] = rows.new_zeros(len(rows), len(rows))
                add_gram(self.grams[reader.layer][None], rows[None])

        def watch(output):
            if output.requires_grad:
                output.register_hook(add)
            return output

        return watch

    def __enter__(self):
        self.open = True
        return self

    def __exit__(self, *error):
        self.open = False

    def commit(self, images):
        """Adds what was found of so many images to the whole."""
        for name, gram in self.grams.items():
            self.whole.sums[name] = self.whole.sums.get(name, 0) + gram
        self.whole.seen += images


def output_costs(reader, weight, fisher):
    """Q [groups, channels, channels] of a reader from its weight and the Fisher matrix G of its outputs."""
    weight, fisher = weight.detach().double(), fisher.to(weight.device).double()
    outputs, groups = len(weight) // reader.groups, reader.groups
    if reader.is_linear:
        weight = weight.reshape(outputs, -1, reader.positions)
    weight = weight.reshape(groups, outputs, weight.shape[1], -1)
    blocks = torch.stack([fisher[o : o + outputs, o : o + outputs] for o in range(0, groups * outputs, outputs)])
    return sum(w.mT @ blocks @ w for w in weight.unbind(3))


class ReaderCosts:
    """P and Q of one reader, updated as units are removed; all groups of a grouped conv hold the same units.

    In numpy on the CPU, whose calls on small arrays take a fraction of the time of torch's.

    Args:
        places: [(units [n], their channels [n, m])], see surgery.units.Reader.
        precision, output_cost: P and Q [groups, channels, channels], float64. ridge: [groups, channels] that P contains.
    """

    def __init__(self, places, precision, output_cost, ridge):
        self.p, self.q = (matrix.to("cpu", copy=True).numpy() for matrix in (precision, output_cost))
        places = [(units.numpy(), at.numpy()) for units, at in places]
        self.places = {
            unit: channels for units, at in places for unit, channels in zip(units.tolist(), at, strict=True)
        }
        rows = max([BLOCK, *map(len, self.places.values())])
        # P_T., b and Q_T. + Q_TT b / 2 of removed channels that the matrices do not show yet: [3, groups, rows, channels]
        self.pending, self.filled = np.empty((3, len(self.p), rows, self.p.shape[2])), 0
        self.diagonals = [np.diagonal(matrix, axis1=1, axis2=2).copy() for matrix in (self.p, self.q)]
        self.of_ridge = (1 - RIDGE_LEFT) * (ridge.cpu().numpy() * self.diagonals[1]).sum(0)  # [channels]
        self.singles = [(units, at[:, 0]) for units, at in places if at.shape[1] == 1]
        self.kinds = []  # units of several channels: their indices, channels [n, m], blocks of P and Q
        for units, at in places:
            if at.shape[1] > 1:
                self.kinds.append((units, at, *(m[:, at[:, :, None], at[:, None, :]] for m in (self.p, self.q))))

    def costs(self):
        """[(units [n], cost [n] of removing each one next)]; the cost of a removed unit has no meaning."""
        found = []
        if self.singles:
            p, q = self.diagonals
            costs = ((q / np.maximum(p, TINY)).sum(0) - self.of_ridge) / 2
            found += [(units, costs[at]) for units, at in self.singles]
        for units, at, p, q in self.kinds:
            costs = np.linalg.solve(p, q).trace(axis1=2, axis2=3).sum(0) - self.of_ridge[at].sum(1)
            found.append((units, costs / 2))
        return found

    def remove(self, unit):
        """Removes the unit; the remaining channels replace it by least squares."""
        at = self.places[unit]
        p, q = self._rows(at)
        b = -p / p[..., at] if len(at) == 1 else -np.linalg.solve(p[..., at], p)
        r = q + q[..., at] @ b / 2
        for diagonal, change in zip(self.diagonals, ((p * b).sum(1), 2 * (b * r).sum(1)), strict=True):
            diagonal += change
        self.diagonals[0][:, at], self.diagonals[1][:, at] = 1, 0
        for units, places, block_p, block_q in self.kinds:
            here = [np.moveaxis(matrix[..., places], 1, 3) for matrix in (p, b, r)]  # [groups, n, m, removed]
            block_p += here[0] @ here[1].swapaxes(2, 3)
            cross = here[1] @ here[2].swapaxes(2, 3)
            block_q += cross + cross.swapaxes(2, 3)
            gone = units == unit
            block_p[:, gone], block_q[:, gone] = np.eye(block_p.shape[-1]), 0
        if self.filled + len(at) > self.pending.shape[2]:
            self._update_matrices()
        self.pending[:, :, self.filled : self.filled + len(at)] = p, b, r
        self.filled += len(at)

    def _update_matrices(self):
        p, b, r = torch.from_numpy(self.pending)[:, :, : self.filled]  # torch adds large products in place
        torch.from_numpy(self.p).baddbmm_(p.mT, b)
        torch.from_numpy(self.q).baddbmm_(b.mT, r).baddbmm_(r.mT, b)
        self.filled = 0

    def _rows(self, at):
        """Rows `at` of P and Q [groups, len(at), channels] after all removals."""
        p, b, r = self.pending[:, :, : self.filled]
        p_t, b_t, r_t = (matrix[..., at].swapaxes(1, 2) for matrix in (p, b, r))
        return self.p[:, at] + p_t @ b, self.q[:, at] + b_t @ r + r_t @ b


class RemovalCosts:
    """[units] `marginal`: cost (nats) of removing each unit next, updated by every removal.

    `total` is the cost of all removals so far, `history` [(unit, its cost)]. From few images the closed form may say that a
    removal lowers the cost, because the repair's penalty on the weights of that channel falls away. On other images the cost
    does not fall on the mean, so that such a removal counts as free; `total` is then above the closed form of the whole set.

    Args:
        readers: ReaderCosts of all layers. units: number of units.
    """

    def __init__(self, readers, units):
        self.readers = readers
        self.raw = np.zeros(units)
        self.held = [reader.costs() for reader in readers]
        for units_of, costs in itertools.chain.from_iterable(self.held):
            self.raw[units_of] += costs
        self.of_unit = defaultdict(list)
        for index, reader in enumerate(readers):
            for unit in reader.places:
                self.of_unit[unit].append(index)
        self.scale, self.constant = np.ones_like(self.raw), np.zeros_like(self.raw)
        self._marginal = self.raw.copy()
        self.marginal = torch.from_numpy(self._marginal)  # the same memory
        self.total, self.history = 0.0, []

    def start_at(self, levels):
        """Takes what the removal of each unit alone costs from exact derivatives; before any removal.

        The closed form says how costs grow from there: its cost of a unit is scaled by level / cost at the start. A unit
        that no reader reads, or whose closed form is zero but for rounding, keeps its level.

        Args:
            levels: [units], nats.
        """
        levels, read = levels.double().cpu().numpy(), self.raw > EPSILON * self.raw.max(initial=0.0)
        self.scale = np.where(read, levels / np.where(read, self.raw, 1.0), 0.0)
        self.constant = np.where(read, 0.0, levels)
        self._marginal[:] = self.raw * self.scale + self.constant

    def remove(self, unit):
        """Removes the unit and adds its cost to `total` and `history`; only costs in the layers that read it change."""
        cost = float(self._marginal[unit])
        self.history.append((unit, cost))
        self.total += cost
        for index in self.of_unit.get(unit, ()):
            self.readers[index].remove(unit)
            now = self.readers[index].costs()
            for (units, before), (_, after) in zip(self.held[index], now, strict=True):
                raw = self.raw[units] + after - before
                self.raw[units] = raw
                self._marginal[units] = np.maximum(raw, 0) * self.scale[units] + self.constant[units]
            self.held[index] = now


def removal_costs(model, moments, fisher, units):
    """RemovalCosts of the units of a graph, by the closed form alone.

    Args:
        moments: scoring.estimates.input_moments of the model.
        fisher: {layer name: G} of the readers' outputs (`OutputFisher.mean`).
        units: number of units.

    Raises InputError naming a layer at which sums of squares overflow.
    """
    weights, costs = dict(model.named_parameters(remove_duplicate=False)), []
    for layer, m in moments.items():
        if layer in fisher:
            inverse, _, ridge = m.precision(dtype=torch.float64)
            weight = weights[f"{layer}.weight" if layer else "weight"]
            output_cost = output_costs(m.reader, weight, fisher[layer])
            if not (inverse.isfinite().all() and output_cost.isfinite().all()):
                raise InputError(f"scores: {too_large(layer)}")
            costs.append(ReaderCosts(m.reader.places, inverse, output_cost, ridge))
    return RemovalCosts(costs, units)
