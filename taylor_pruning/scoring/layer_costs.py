"""Cost of removing a set of units when the layers that read them are repaired, to second order, in closed form.

A reader (a layer that reads the channels of units) has channels x and outputs W x. Its outputs' Fisher matrix is

    G = mean over images, sum over positions, of g g^T,     g = gradient at the reader's outputs of w.z,
    w = A s with A A^T = diag(p) - p p^T and random signs s, so that E[(w.v)^2] = Var_p[v] for any logit direction v.

With P = (Cov(x) + ridge)^-1 and Q = sum over kernel offsets o of W_o^T G W_o, removing the channels S and refitting W on
those that stay by least squares leaves a residual of covariance (P_SS)^-1, and costs

    cost(S) = 1/2 tr(Q_SS (P_SS)^-1)                                                                        [nats]

(Optimal Brain Surgeon, Hassibi & Stork 1993, of a layer's inputs in the Fisher metric). One set T after the other: with
b = -(P_TT)^-1 P_T., the cost is 1/2 tr(Q_TT (P_TT)^-1), then

    Q <- Q + b^T Q_T. + Q_.T b + b^T Q_TT b,     P <- P + P_.T b,     rows and columns T vanish.

The Q of a remaining channel then includes the load that the repair puts on it, so that a layer whose channels are each
cheap is not emptied. A unit costs the sum over its readers. The residuals of different positions count as uncorrelated, and
ranks of single units by these costs are coarse; a level for every unit (`RemovalCosts`) corrects them at the start.
"""

import torch

from taylor_pruning.modes import frozen
from taylor_pruning.scoring.directions import random_directions, random_signs

BLOCK = 32  # removed channels that a reader gathers before its matrices are updated


def fisher_of_outputs(model, graph, readers, batches):
    """{layer name: G [outputs, outputs] float64} of the readers, from one forward and backward pass of the batches.

    A reader whose outputs get no gradient has no entry.
    """
    found, images_seen = {}, 0

    def collect(reader):
        def of_gradient(gradient):
            last = reader.is_linear
            gradient = gradient.reshape(-1, gradient.shape[-1]).mT if last else gradient.movedim(1, 0).flatten(1)
            found[reader.layer] = found.get(reader.layer, 0) + (gradient @ gradient.mT).double()

        def change(output):
            leaf = not output.requires_grad  # nothing before this layer has a gradient
            output = output.detach().requires_grad_() if leaf else output
            output.register_hook(of_gradient)
            return output.clone() if leaf else output  # a leaf must not be changed in place

        return change

    changes = {node: collect(reader) for reader in readers for node in reader.nodes}
    with frozen(model), torch.enable_grad(), graph.executed(change=changes):
        for images, _ in batches:
            logits = model(images)
            directions = random_directions(logits.detach(), random_signs(0, images_seen, *logits.shape))
            if logits.requires_grad:
                (logits * directions).sum().backward()
            images_seen += len(images)
    return {name: gram / images_seen for name, gram in found.items()}


def output_costs(reader, weight, fisher):
    """Q [groups, channels, channels] of a reader from its weight and the Fisher matrix G of its outputs."""
    weight = weight.detach().double()
    outputs, groups = len(weight) // reader.groups, reader.groups
    if reader.is_linear:
        weight = weight.reshape(outputs, -1, reader.positions)
    weight = weight.reshape(groups, outputs, weight.shape[1], -1)
    blocks = torch.stack([fisher[o : o + outputs, o : o + outputs] for o in range(0, groups * outputs, outputs)])
    return sum(w.mT @ blocks @ w for w in weight.unbind(3))


class ReaderCosts:
    """P and Q of one reader, updated as units are removed; all groups of a grouped conv hold the same units.

    Args:
        units: [channels of a group] unit index, -1 for what always stays.
        precision, output_cost: P and Q [groups, channels, channels], float64.
    """

    def __init__(self, units, precision, output_cost):
        self.p, self.q = precision.cpu().clone(), output_cost.cpu().clone()
        places = {}
        for channel, unit in enumerate(units.tolist()):
            if unit >= 0:
                places.setdefault(unit, []).append(channel)
        self.places = {unit: torch.tensor(channels) for unit, channels in places.items()}
        rows = max([BLOCK, *map(len, places.values())])
        # P_T., b and Q_T. + Q_TT b / 2 of removed channels that the matrices do not show yet: [3, groups, rows, channels]
        self.pending, self.filled = self.p.new_empty(3, len(self.p), rows, self.p.shape[2]), 0
        self.kinds = []  # units with equally many channels: their indices, channels [n, m], blocks of P and Q
        for size in {len(channels) for channels in places.values()}:
            some = [unit for unit, channels in places.items() if len(channels) == size]
            at = torch.stack([self.places[unit] for unit in some])
            blocks = [matrix[:, at[:, :, None], at[:, None, :]] for matrix in (self.p, self.q)]
            self.kinds.append((torch.tensor(some), at, *blocks))

    def costs(self):
        """Yields (units [n], cost [n] of removing each one next); the cost of a removed unit has no meaning."""
        for units, _, p, q in self.kinds:
            if p.shape[-1] == 1:
                yield units, (q / p.clamp_min(torch.finfo(p.dtype).tiny)).sum((0, 2, 3)) / 2
            else:
                yield units, torch.linalg.solve(p, q).diagonal(dim1=2, dim2=3).sum((0, 2)) / 2

    def remove(self, unit):
        """Removes the unit; the remaining channels replace it by least squares."""
        at = self.places[unit]
        p, q = self._rows(at)
        b = -torch.linalg.solve(p[..., at], p)
        r = q + q[..., at] @ b / 2
        for _, places, block_p, block_q in self.kinds:
            here = [matrix[..., places].movedim(1, 3) for matrix in (p, b, r)]  # [groups, n, m, removed]
            block_p += here[0] @ here[1].mT
            cross = here[1] @ here[2].mT
            block_q += cross + cross.mT
        for units, _, block_p, block_q in self.kinds:
            gone = units == unit
            block_p[:, gone] = torch.eye(block_p.shape[-1], dtype=block_p.dtype)
            block_q[:, gone] = 0
        if self.filled + len(at) > self.pending.shape[2]:
            p_t, b_t, r_t = self.pending[:, :, : self.filled]
            self.p.baddbmm_(p_t.mT, b_t)
            self.q.baddbmm_(b_t.mT, r_t).baddbmm_(r_t.mT, b_t)
            self.filled = 0
        self.pending[:, :, self.filled : self.filled + len(at)] = torch.stack([p, b, r])
        self.filled += len(at)

    def _rows(self, at):
        """Rows `at` of P and Q [groups, len(at), channels] after all removals."""
        p, b, r = self.pending[:, :, : self.filled]
        cross = b[..., at].mT @ r + r[..., at].mT @ b
        return self.p[:, at] + p[..., at].mT @ b, self.q[:, at] + cross


class RemovalCosts:
    """[units] `marginal`: cost (nats) of removing each unit next, updated by every removal; `total` so far.

    Args:
        readers: ReaderCosts of all layers.
        levels: [units] cost of removing each unit alone, from exact derivatives. The closed form says how costs grow from
            there: its cost of a unit is scaled by level / cost at the start. A unit that no reader reads keeps its level.
            None: the closed form as it is.
        units: number of units, where there are no levels.
    """

    def __init__(self, readers, levels=None, units=None):
        self.readers = readers
        self.raw = torch.zeros(len(levels) if units is None else units, dtype=torch.float64)
        self.held = [[(units, costs.clone()) for units, costs in reader.costs()] for reader in readers]
        for parts in self.held:
            for units_of, costs in parts:
                self.raw[units_of] += costs
        self.of_unit = {}
        for index, reader in enumerate(readers):
            for unit in reader.places:
                self.of_unit.setdefault(unit, []).append(index)
        self.scale, self.constant = torch.ones_like(self.raw), torch.zeros_like(self.raw)
        if levels is not None:
            levels = levels.double().cpu()
            read = self.raw > 0
            self.scale = torch.where(read, levels / self.raw.clamp_min(torch.finfo(self.raw.dtype).tiny), 0.0)
            self.constant = torch.where(read, 0.0, levels)
        self.marginal = self.raw * self.scale + self.constant
        self.total = 0.0

    def remove(self, unit):
        """Removes the unit and adds its cost to `total`; only the costs in the layers that read it change."""
        self.total += self.marginal[unit].item()
        for index in self.of_unit.get(unit, ()):
            reader = self.readers[index]
            reader.remove(unit)
            now = list(reader.costs())
            for (units, before), (_, after) in zip(self.held[index], now, strict=True):
                self.raw[units] += after - before
                self.marginal[units] = self.raw[units].clamp_min(0) * self.scale[units] + self.constant[units]
            self.held[index] = now


def removal_costs(model, graph, moments, batches, levels=None):
    """RemovalCosts of a graph's units.

    Args:
        moments: scoring.estimates.input_moments of the model.
        batches: list of (images, labels) for the outputs' Fisher matrices; labels are not used.
        levels: see RemovalCosts.
    """
    readers = [m.reader for m in moments.values()]
    fisher = fisher_of_outputs(model, graph, readers, batches)
    weights, costs = dict(model.named_parameters(remove_duplicate=False)), []
    for reader in (r for r in readers if r.layer in fisher):
        precision, _ = moments[reader.layer].precision()
        q = output_costs(reader, weights[f"{reader.layer}.weight" if reader.layer else "weight"], fisher[reader.layer])
        costs.append(ReaderCosts(reader.units[:: reader.positions][: q.shape[1]], precision, q))
    return RemovalCosts(costs, levels, len(graph.units))
