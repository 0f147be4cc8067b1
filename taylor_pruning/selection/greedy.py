"""Which units go: greedy selection under a budget, with what earlier choices did to the logits taken into account."""

import math

import torch

from taylor_pruning.errors import InputError
from taylor_pruning.scoring.flow import weigh
from taylor_pruning.scoring.taylor import loss_change
from taylor_pruning.selection.constraints import Selection
from taylor_pruning.selection.rounding import round_widths
from taylor_pruning.surgery.units import by_layers

POOL = 256  # units of which a joint selection chooses before it scores all units again


def select_by_score(selection, scores):
    """Chooses units by ascending score per unit of budget (Selection.per_saving) until the selection is done.

    Args:
        scores: [units] estimated loss change, or any criterion that is low for units that may go; either may be negative.

    Returns:
        the chosen unit indices.
    """
    while not selection.done():
        selection.close_if_unreachable()
        _take_lowest(selection, selection.per_saving(scores))
    round_widths(selection, scores)
    return selection.chosen


def select_uniformly(selection, scores):
    """Chooses the same share of every layer: units by their rank among those of the same layers, the lowest score first.

    Args:
        scores: [units] as in `select_by_score`; only their order within a layer counts.

    Returns:
        the chosen unit indices.
    """
    ranks = torch.empty(len(scores), dtype=torch.float64)
    for units in by_layers(selection.graph.units).values():
        ranks[units] = (scores[units].argsort().argsort().double() + 0.5) / len(units)
    while not selection.done():
        selection.close_if_unreachable()
        _take_lowest(selection, ranks)
    round_widths(selection, ranks)
    return selection.chosen


def _take_lowest(selection, values):
    """Chooses open units that fit, the lowest value first, until the selection is done."""
    for unit in values.masked_fill(~selection.open, torch.inf).argsort().tolist():
        if not selection.open[unit] or selection.done():
            break
        if selection.fitting()[unit]:
            selection.take(unit)


def select_behind_repair(selection, costs):
    """Chooses the unit of lowest marginal cost per unit of budget, one after the other, until the selection is done.

    After every choice only what it changes is computed anew: the costs in the layers that read the unit, and the savings.

    Args:
        costs: scoring.layer_costs.RemovalCosts of the selection's graph; the chosen units are removed from it.

    Returns:
        the chosen unit indices.
    """
    while not selection.done():
        selection.close_if_unreachable()
        fitting = selection.fitting()
        unit = int(selection.per_saving(costs.marginal).masked_fill(~fitting, torch.inf).argmin())
        if fitting[unit] and selection.take(unit):
            costs.remove(unit)
    round_widths(selection, costs.marginal)
    return selection.chosen


def check_reachable(graph, percentage, constraints):
    """Tries the percentage by a selection that knows no scores.

    Raises:
        OutOfReachError: no choice of units reaches it. InputError: it is so small that no unit would go.
    """
    selection = Selection(graph, percentage, constraints)
    if selection.done():
        raise InputError(
            f"{percentage:g} % of the budget would remove nothing, because filters go whole; ask for a larger percentage, as "
            "30 for 30 %, or a smaller target"
        )
    select_by_score(selection, torch.zeros(len(graph.units)))


def select_jointly(selection, directions, order, correction=None, weights=None):
    """Greedy on the marginal loss change at the logits that the units chosen so far leave, one unit after the other.

    The logits without a set S are, to first order in the network, z - sum of v_u over S. All open units are scored there,
    and the `POOL` lowest are chosen from, until what is left of them is no better than the best outside of them was. A choice
    changes the slopes of the loss most, and these are cheap: they are computed anew for the whole pool. The terms of
    orders 2 and 3 are computed anew for the lowest unit only, until it stays the lowest (lazy greedy, Minoux 1978).
    (Several units chosen at once by the same scores would be those that move the logits the same way: each alone lowers the
    loss, and together they overshoot.)

    Args:
        directions: scoring.taylor.Directions on the selection's graph.
        order: 2 or 3.
        correction: [units] loss change that the directions do not see, or None.
        weights: [units] of gradient flow (see GradientFlowAnalyzer.weigh), or None.

    Returns:
        the chosen unit indices.
    """
    shift = directions.logits.new_zeros(len(directions.labels), directions.basis.shape[2])
    expansion = directions.expansion(shift)
    last = torch.zeros(len(selection.graph.units), dtype=torch.float64)

    def note(units, changes):
        """Stores in `last` the loss change of removing each unit next, from `changes` by the directions."""
        if correction is not None:
            changes = changes + correction[units]
        last[units] = changes if weights is None else weigh(changes, weights[units])

    while not selection.done():
        selection.close_if_unreachable()
        units = selection.fitting().nonzero().flatten()
        if not len(units):
            continue  # the layer bound has yielded, and no unit is small enough
        changes = directions.scores(order, shift, units).double().cpu()
        note(units, changes)
        values, ranks = selection.per_saving(last[units], units).sort()
        # Savings shrink as units go, which raises what the others count, whatever their sign: the bound stays below them.
        bound = values[POOL] if len(units) > POOL else math.inf
        pool = units[ranks[:POOL]]
        coordinates = directions.coordinates[:, pool].transpose(0, 1).contiguous()  # a unit's are read together
        slopes, current = expansion.mean_slopes(coordinates), torch.ones(len(pool), dtype=torch.bool)
        higher = changes[ranks[:POOL]] + slopes  # the change less its first order, -slopes
        while not selection.done():
            fitting = selection.fitting()[pool]
            values = selection.per_saving(last[pool], pool).masked_fill(~fitting, math.inf)
            first = values.argmin()
            if not fitting[first] or values[first] > bound:
                break
            if not current[first]:
                moments = expansion.moments(coordinates[first][:, None], order)
                higher[first] = loss_change(order, *moments).mean().double().cpu() + slopes[first]
                current[first] = True
            elif selection.take(int(pool[first])):
                shift += coordinates[first]
                expansion = directions.expansion(shift)
                slopes, current[:] = expansion.mean_slopes(coordinates), False
            note(pool, higher - slopes)
    round_widths(selection, last)
    return selection.chosen
