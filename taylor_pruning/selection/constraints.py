"""What a selection must respect, and the state of one: what is chosen, what may still be chosen, how far the target is."""

import math
from dataclasses import dataclass, field

import torch

from taylor_pruning.errors import InputError, OutOfReachError, instance_of
from taylor_pruning.options import check, has_type, option
from taylor_pruning.scoring.flow import weigh
from taylor_pruning.selection.costs import cost_model
from taylor_pruning.selection.latency_table import NetworkLatency

UNITS = {"filters": "filters", "params": "parameters", "macs": "multiply-accumulates", "latency": "ms"}
BUDGETS = tuple(UNITS)
FILTERS_BOUND = 1.03  # layer bound of a budget in filters


@dataclass(frozen=True)
class Constraints:
    """What a selection must respect.

    Attributes:
        budget: what the percentage counts: removable "filters", or "params", "macs" or milliseconds ("latency") of the whole
            network.
        layer_bound: no layer loses more than this multiple of the target share of its removable filters; math.inf: no
            bound. It yields where the target cannot be met otherwise. None: 1.03 for a budget in filters, no bound for
            the others.
        min_filters: filters that every layer keeps at least.
        round_to: filter counts of cut layers are multiples of it; a layer without such a count stays whole. Layers that share
            only some of their filters with others (grouped or concatenated channels) are cut as the scores say.
        min_share: share of its filters that every layer keeps at least; like the layer bound it yields where the target
            cannot be met otherwise.
        latency_batch: batch size of the forward that a budget of latency times.
        latency_table: file in which measured times are kept. None: one in the user's cache folder.
        times: NetworkLatency that a budget of latency counts with (selection.latency); EnhancedPruning and
            EnhancedFilterPruner measure it where it is None.
    """

    budget: str = option(
        "filters",
        "what the percentage counts",
        "macs, params and latency leave the widths of layers free: at the same cost the network is more accurate.",
        choices=BUDGETS,
        common=True,
    )
    layer_bound: float | None = option(
        None,
        "a layer loses at most this multiple of the target share of its filters; inf: no bound",
        "A budget in filters needs it with --no-compensate, or cheap filters of few layers all go.",
        low=1,
        infinite=True,
        default_text="1.03 for a budget in filters with --no-compensate or --selection independent, else inf",
    )
    min_filters: int = option(
        1,
        "filters that every layer keeps at least",
        "Where a layer must not become a bottleneck.",
        low=1,
    )
    round_to: int = option(
        1,
        "filter counts of cut layers are multiples of it; a layer without such a count stays whole",
        "8 suits most hardware: up to a tenth faster at the same size on a CPU.",
        low=1,
    )
    min_share: float = option(
        0.0,
        "share of its filters that every layer keeps at least",
        "For criteria without a scale that layers share, which would empty some of them.",
        low=0,
        high=1,
        command_line=False,
    )
    latency_batch: int = option(
        1,
        "batch size of the forward that a budget of latency times",
        "Give the batch size at which the network will be used.",
        low=1,
        needs=("--budget latency or --target-latency",),
    )
    latency_table: str | None = option(
        None,
        "file in which the measured times of layers are kept",
        "To keep the times of several devices apart, or to take them along. With one file a run can be repeated; "
        "remove it to measure anew.",
        default_text="one in the user's cache folder",
        needs=("--budget latency or --target-latency",),
        metavar="FILE",
    )
    times: NetworkLatency | None = field(default=None, repr=False, compare=False)

    def __post_init__(self):
        check(self)

    @property
    def bound(self) -> float | None:
        """The layer bound that holds."""
        if self.layer_bound is None:
            return FILTERS_BOUND if self.budget == "filters" else None
        return None if self.layer_bound == math.inf else self.layer_bound


def require_units(graph):
    """Raises InputError, with reasons, if no filter of the graph's network may be removed."""
    if not graph.units:
        reasons = "; ".join(f"{name}: {info.reason}" for name, info in list(graph.layers.items())[:3])
        raise InputError(
            f"no filter of this network may be removed ({reasons or 'it has no conv layer'}); exclude less, "
            "add --prune-linear, or take another network"
        )


@dataclass
class Ledger:
    """What has been removed from every layer, across rounds, against what the network had in the beginning.

    Attributes:
        removable: {layer: filters that may be removed in the beginning}.
        total: of the budget's kind, in the beginning.
        removed: {layer: filters removed so far}.
    """

    removable: dict
    total: float
    removed: dict = field(default_factory=dict)

    @classmethod
    def open(cls, graph, constraints):
        removable = {name: int(info.removable.sum()) for name, info in graph.layers.items()}
        require_units(graph)
        widest = max(graph.layers[name].filters for name, count in removable.items() if count)
        if constraints.round_to > 1 and widest <= constraints.round_to:
            raise InputError(
                f"no layer has more than {widest} filters, so that none can lose some and keep a multiple of "
                f"{constraints.round_to}; lower --round-to"
            )
        costs = cost_model(graph, constraints)
        return cls(removable, sum(removable.values()) if costs is None else costs.total())

    def record(self, plan):
        """Counts a plan {layer: filters} as removed."""
        for name, filters in plan.items():
            self.removed[name] = self.removed.get(name, 0) + len(filters)


def check_percentage(percentage):
    """Raises InputError if this is no share of a budget that can be removed."""
    if not (has_type(percentage, float) and 0 < percentage < 100):
        raise InputError(
            f"the pruning percentage must be a number between 0 and 100 (both excluded), not {percentage!r}"
        )


class Selection:
    """The state of one selection on one graph: what is chosen, what may still be chosen, how far the target is."""

    def __init__(self, graph, percentage, constraints, ledger=None):
        check_percentage(percentage)
        self.graph, self.constraints = graph, constraints
        self.ledger = Ledger.open(graph, constraints) if ledger is None else ledger
        instance_of("ledger", self.ledger, Ledger)
        self.chosen = []
        self.open = torch.ones(len(graph.units), dtype=torch.bool)
        self.layer_counts = [self._count_layers(unit) for unit in graph.units]
        self.sizes = torch.tensor([float(len(unit.filters)) for unit in graph.units])
        self.costs = cost_model(graph, constraints)
        self.goal = percentage / 100 * self.ledger.total
        self.removed = float(sum(self.ledger.removed.values()))  # filters, in all rounds
        self.largest = self.savings().max()  # savings shrink as units go
        self.room = {name: self._room(name, percentage / 100) for name in graph.layers}
        self.hard_room = {name: self._room(name, None) for name in graph.layers}
        self.bound_held = True  # False once the layer bound had to yield

    def _count_layers(self, unit):
        counts = {}
        for name, _ in unit.filters:
            if name in self.graph.layers:
                counts[name] = counts.get(name, 0) + 1
        return counts

    def _room(self, name, share):
        """How many more filters the layer may lose: by the bounds at the target share, or (None) at most."""
        now = self.graph.layers[name].filters
        room = now - min(now, self.constraints.min_filters)
        if share is None:
            return room
        removable, gone, bound = self.ledger.removable[name], self.ledger.removed.get(name, 0), self.constraints.bound
        if bound is not None:
            room = min(room, math.ceil(bound * share * removable - 1e-9) - gone)
        return min(room, math.floor((1 - self.constraints.min_share) * removable + 1e-9) - gone)

    def missing(self):
        """How much of the budget is still to be removed."""
        if self.costs is None:
            return self.goal - self.removed
        return self.costs.total() - (self.ledger.total - self.goal)

    def savings(self, units=slice(None)):
        """[units] what each unit's removal contributes to the budget."""
        return self.sizes[units] if self.costs is None else self.costs.savings(units).clamp_min(1e-9)

    def per_saving(self, scores, units=slice(None)):
        """[units] what a greedy choice goes by, lowest first: a score against what the unit saves.

        Scores are divided by the savings where they are positive, multiplied where they are not (scoring.flow.weigh): of two
        units the one that scores lower and saves more comes first, whatever the signs.

        Args:
            scores: [units] of the given units, low ones may go.
        """
        scores = scores.double()
        return weigh(scores, self.savings(units).to(scores).reciprocal())

    def take(self, unit):
        """Chooses the unit if its layers have room for it; True if it was chosen."""
        counts = self.layer_counts[unit]
        self.open[unit] = False
        if any(self.room[name] < count for name, count in counts.items()):
            return False
        for name, count in counts.items():
            self.room[name] -= count
            self.hard_room[name] -= count
        self.book(unit, 1)
        self.chosen.append(unit)
        return True

    def relax(self):
        """Gives up the layer bound when no unit is open; False if the target cannot be met at all."""
        if self.room == self.hard_room:
            return False
        self.room, self.bound_held = dict(self.hard_room), False
        self.open[:] = True
        self.open[self.chosen] = False
        return True

    def close_if_unreachable(self):
        """Gives up the layer bound where no unit is open; raises OutOfReachError where that does not help."""
        if not self.open.any() and not self.relax():
            left, unit = self.ledger.total - self.goal + self.missing(), UNITS[self.constraints.budget]
            most = math.floor(1e4 * (1 - left / self.ledger.total) + 1e-6) / 100
            amount = f"{left:.3g}" if unit == "ms" else f"{left:,.0f}"
            raise OutOfReachError(
                f"the layers cannot lose that much: at most {most:g} % of the budget can be removed, {amount} {unit} must "
                f"be left with at least {self.constraints.min_filters} filter(s) a layer; ask for a lower percentage or a "
                "larger target, or lower --min-filters"
            )

    def fitting(self):
        """[units] whether a unit is open and does not overshoot the goal by more than is missing now."""
        missing = self.missing()
        return self.open if missing >= self.largest / 2 else self.open & (self.savings() <= 2 * missing)

    def done(self):
        """True if the goal is reached, or removing any open unit would leave the budget further from it."""
        return self.missing() <= 0 or bool(self.open.any() and not self.fitting().any())

    def book(self, unit, number):
        """Counts `number` units like this one as removed, or as put back if it is negative."""
        if self.costs is not None:
            self.costs.remove(unit, number)
        self.removed += number * float(self.sizes[unit])

    def missing_without(self, unit, number):
        """How much of the budget would be missing if `number` units like this one were removed."""
        self.book(unit, number)
        missing = self.missing()
        self.book(unit, -number)
        return missing
