"""How a round's filters are chosen: by Taylor scores, or by a published criterion."""

import copy
import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from taylor_pruning.checks import describe
from taylor_pruning.errors import InputError, OutOfReachError, one_of
from taylor_pruning.experiment.results import plain_scores, ranking_of
from taylor_pruning.selection.baselines import OF_GRADIENTS, baseline_scores
from taylor_pruning.selection.chosen import Chosen
from taylor_pruning.selection.constraints import Constraints, Ledger, Selection
from taylor_pruning.selection.costs import LatencyCosts
from taylor_pruning.selection.greedy import select_by_score, select_uniformly
from taylor_pruning.selection.latency import measured_share
from taylor_pruning.selection.latency_table import NetworkLatency
from taylor_pruning.surgery.graph import ChannelGraph
from taylor_pruning.tasks.classification import is_classification

WIDTHS = ("own", "uniform")
LEAST_SHARE = 0.25  # of its filters that a published criterion leaves every layer, where the budget allows it

TRIES, CLOSE = 3, 0.03  # choices under a budget of time, and the error of the time that is good enough
LARGEST_SHARE = 0.9999  # of the time that a choice may aim at: less than all must be left

TRADE_POINTS = 25  # of every layer and round that results.json keeps


@dataclass(frozen=True)
class Choice:
    """What a round removes.

    Attributes:
        graph: ChannelGraph of the network before the round. plan: {layer: filter indices} in it.
        ranking: what results.json says of the scores (experiment.results.ranking_of), of the dense network alone.
        chosen: the units of the plan, and what is predicted of them.
        trade: {layer: {"filters", "cost"}}, see `trade_of`; {} where no costs behind compensation chose.
        times: of a budget of time, see `TimedChoice`.
    """

    graph: ChannelGraph
    plan: dict[str, list[int]]
    ranking: dict
    chosen: Chosen
    trade: dict = field(default_factory=dict)
    times: dict | None = None


class TaylorChoice:
    """Chooses by Taylor scores of one order.

    Args:
        rankings: EnhancedFilterPruner.Rankings. repairs: whether compensation follows.
    """

    def __init__(self, rankings, taylor_order: int, use_gradient_flow: bool, repairs: bool):
        self.rankings, self.method = rankings, (taylor_order, use_gradient_flow, repairs)

    def __call__(self, model: nn.Module, percentage: float, ledger: Ledger, lap: Callable[[str], None]) -> Choice:
        """The choice on `model`; `lap` is called with the name of every finished step."""
        pruner = self.rankings.of(model, *self.method)
        ranking = ranking_of(pruner) if model is self.rankings.graph.model else {}
        lap("score")
        plan = pruner.get_pruning_plan(percentage, ledger)
        lap("select")
        return Choice(pruner.graph, plan, ranking, pruner.chosen, trade_of(pruner.graph, pruner.chosen.removal_history))


class BaselineChoice:
    """Chooses by a published criterion (selection.baselines), or by any function from a graph to [units] scores.

    Args:
        criterion: a name, or a function of the user. It gets a copy of the graph, whose network it may train or derive.
        widths: "own": the lowest scores per unit of budget go, and no layer keeps less than a quarter of its filters, where
            the budget allows it, because some criteria would empty layers; "uniform": the same share of every layer goes.
        constraints: the budget and the least widths, which may ask for more than a quarter; their layer bound is not used.
    """

    def __init__(
        self,
        rankings,
        criterion: str | Callable[[ChannelGraph], Tensor],
        widths: str,
        constraints: Constraints,
        seed: int,
    ):
        one_of("widths", widths, WIDTHS)
        self.rankings, self.criterion, self.seed = rankings, criterion, seed
        share = max(constraints.min_share, LEAST_SHARE if widths == "own" else 0.0)
        self.constraints = dataclasses.replace(constraints, layer_bound=math.inf, min_share=share)
        self.select = {"own": select_by_score, "uniform": select_uniformly}[widths]

    def __call__(self, model: nn.Module, percentage: float, ledger: Ledger, lap: Callable[[str], None]) -> Choice:
        """As of TaylorChoice."""
        graph = self.rankings.graph_of(model)
        if callable(self.criterion):
            name = getattr(self.criterion, "__name__", "scores")
            scores = _checked(self.criterion(copy.deepcopy(graph)), len(graph.units), name)
        else:
            directions, name = None, self.criterion
            if name in OF_GRADIENTS and is_classification(self.rankings.task):
                directions = self.rankings.of(model, 1).directions
            scores = baseline_scores(name, graph, directions, self.seed)
        lap("score")
        selection = Selection(graph, percentage, self.constraints, ledger)
        units, uniform = self.select(selection, scores), self.select is select_uniformly
        lap("select")
        by_layer = {layer: scores_of(scores, info.unit_of) for layer, info in graph.layers.items()}
        ranking = {"scores": plain_scores(by_layer), "criterion": name}
        chosen = Chosen(units, None, layer_bound_held=selection.bound_held, uniform_widths=uniform)
        return Choice(graph, graph.plan_of(units), ranking, chosen)


def _checked(scores, units: int, name: str) -> Tensor:
    """[units] the scores of a user's function, floating. Raises InputError if they are something else, or not numbers."""
    try:
        scores = torch.as_tensor(scores).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"the criterion {name} gives {describe(scores)}; give a tensor of one score a unit") from error
    wrong = {
        "NaN": scores.isnan().any(),
        "complex scores": scores.is_complex(),
        f"scores of the shape {[*scores.shape]}": scores.shape != (units,),
    }
    for kind in (kind for kind, found in wrong.items() if found):
        raise InputError(
            f"the criterion {name} gives {kind}; give one number for each of the {units} units of the graph"
        )
    return scores if scores.is_floating_point() else scores.double()


class TimedChoice:
    """Makes a choice under a budget of time until the network that it leaves takes the time that is asked for.

    The times of layers do not quite add up to that of a network (docs/measurements.md). So the network that a choice leaves
    is timed. Where its time is off by more than CLOSE, the next choice aims at another time, at which the same error would
    give the wanted one. The choice that comes closest counts. Its `times` are {"asked", "predicted", "measured"}, shares
    of the dense network's time.

    Args:
        choose: TaylorChoice or BaselineChoice.
        latency: selection.latency_table.NetworkLatency of the dense network.
    """

    def __init__(self, choose: Callable, rankings, latency: NetworkLatency):
        self.choose, self.rankings, self.latency = choose, rankings, latency

    def __call__(self, model: nn.Module, percentage: float, ledger: Ledger, lap: Callable[[str], None]) -> Choice:
        """As of TaylorChoice."""
        asked, best = 1 - percentage / 100, None
        error = self._measured(model) / self._predicted(self.rankings.graph_of(model), [], ledger)
        lap("time")
        for _ in range(TRIES):
            aim = min(asked / error, LARGEST_SHARE)  # of the layers' times
            try:
                choice = self.choose(model, 100 * (1 - aim), ledger, lap)
            except OutOfReachError:
                if best is not None:
                    break
                if error == 1:
                    raise
                error = 1.0
                continue
            measured = self._measured(choice.graph.remove(choice.plan, verify=False))
            predicted = self._predicted(choice.graph, choice.chosen.units, ledger)
            times = {"asked": asked, "predicted": error * predicted, "measured": measured}
            lap("time")
            if best is None or abs(measured - asked) < abs(best.times["measured"] - asked):
                best = dataclasses.replace(choice, times=times)
            if abs(measured / asked - 1) <= CLOSE:
                break
            error = measured / predicted
        return best

    def _measured(self, model):
        return measured_share(self.rankings.graph, model, self.latency, self.rankings.example)

    def _predicted(self, graph, units, ledger):
        """Share of the dense network's time that the layers' times give for the graph's network without the units."""
        costs = LatencyCosts(graph, self.latency)
        for unit in units:
            costs.remove(unit)
        return costs.total() / ledger.total


def trade_of(graph: ChannelGraph, history: list[tuple[int, float]]) -> dict:
    """How the predicted cost of every layer grew as it got narrower.

    Args:
        history: [(unit, cost in nats)] in the order of removal. A unit of several layers counts in the first of them.

    Returns:
        {layer: {"filters": widths, "cost": sum of the costs so far (nats)}}, at most TRADE_POINTS of each, from the full width
        on.
    """
    trade = {}
    for unit, cost in history:
        layer = graph.units[unit].filters[0][0]
        found = trade.setdefault(layer, {"filters": [graph.layers[layer].filters], "cost": [0.0]})
        found["filters"].append(found["filters"][-1] - sum(name == layer for name, _ in graph.units[unit].filters))
        found["cost"].append(found["cost"][-1] + cost)
    for found in trade.values():
        last = len(found["cost"]) - 1
        points = sorted({round(k * last / (TRADE_POINTS - 1)) for k in range(TRADE_POINTS)})
        for name, values in found.items():
            found[name] = [values[point] for point in points]
    return trade


def scores_of(scores: Tensor, unit_of: Tensor) -> Tensor:
    """[filters] scores of a layer's filters from those of units; nan where a filter belongs to none."""
    padded = scores.new_full((len(scores) + 1,), math.nan)
    padded[:-1] = scores
    return padded[unit_of]
