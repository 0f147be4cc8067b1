"""Ranks conv filters by Taylor estimates of orders 1 to 3 and plans which of them to remove.

    >>> import torch
    >>> from torch import nn
    >>> layers = nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    >>> model = nn.Sequential(*layers, nn.Linear(8, 4))
    >>> images, labels = torch.randn(16, 3, 12, 12), torch.arange(16) % 4
    >>> pruner = EnhancedFilterPruner(model, images[:1], taylor_order=2, progress=False)
    >>> pruner.rank([(images, labels)]).filter_ranks["2"].shape
    torch.Size([8])
    >>> plan = pruner.get_pruning_plan(25)
    >>> smaller = pruner.graph.remove(plan)
    >>> sum(map(len, plan.values())), smaller(images).shape
    (4, torch.Size([16, 4]))

`ChannelGraph` finds the filters that must go together, closes their gates and removes them (surgery.graph). The estimates
are in scoring.taylor, the choice under a budget in selection.greedy.
"""

import copy
import dataclasses
import functools
import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from GradientFlowAnalyzer import GradientFlowAnalyzer, GradientFlowReport
from taylor_pruning.checks import check_gradient_mode
from taylor_pruning.errors import InputError, one_of
from taylor_pruning.experiment.images import PruningImages
from taylor_pruning.experiment.pruned_graph import graph_for
from taylor_pruning.experiment.settings import TAYLOR_ORDERS, PruningSettings, settings_of
from taylor_pruning.first_batch import device_of
from taylor_pruning.memory import Portions
from taylor_pruning.modes import frozen, own_precision
from taylor_pruning.scoring.behind_repair import collect_behind_repair
from taylor_pruning.scoring.collected import Collected
from taylor_pruning.scoring.collecting import CLASS_PROBES, Wanted, collect_directions, read_batches
from taylor_pruning.scoring.curvature import check_scoring, choose_curvature, curvature_report
from taylor_pruning.scoring.flow import relative_flow, weigh
from taylor_pruning.scoring.gradient_check import check_gradients
from taylor_pruning.scoring.layer_costs import removal_costs
from taylor_pruning.scoring.probes import probe_derivatives
from taylor_pruning.scoring.taylor import Directions
from taylor_pruning.scoring.trials import trial_divergences
from taylor_pruning.selection.chosen import chosen_behind_repair, chosen_by_score, chosen_jointly, chosen_uniformly
from taylor_pruning.selection.constraints import Ledger, Selection, require_units
from taylor_pruning.selection.latency import with_times
from taylor_pruning.surgery.graph import ChannelGraph, checked_graph
from taylor_pruning.surgery.parts import PartsGraph
from taylor_pruning.tasks.classification import is_classification, task_of
from taylor_pruning.tasks.task import Task, example_of

__all__ = ["ChannelGraph", "EnhancedFilterPruner"]


class EnhancedFilterPruner:
    """Scores every removable filter of `model` and selects which to remove.

    Args:
        model: network that can be traced (see ChannelGraph), from images to class logits or to the outputs of `task`. It
            comes back as given.
        example_input: [N, C, H, W] tensor like the images, see ChannelGraph.
        taylor_order: 1, 2 or 3.
        use_gradient_flow: multiply the scores by weights from the gradient flow (scoring.flow).
        settings: PruningSettings; those of rounds and training are not used here.
        loss: per-sample loss (logits [B, K], labels [B]) -> [B] in place of the cross-entropy; it has no divergence, and
            cannot be scored behind compensation. task: what the network is for (taylor_pruning.tasks), default:
            classification by that loss. Without compensation other tasks are scored by random probes, unit by unit.
        graph: ChannelGraph of `model` where there is one already; `exclude`, `prune_linear` and `prune_heads` are then its own.
        progress: show a progress bar.
        fields: single fields of the settings by name, as in `budget="macs"`.

    Attributes:
        graph: the model's ChannelGraph.
        curvature_path, curvature_reason: scoring.curvature.choose_curvature of it, for scores without compensation.
        chosen: selection.chosen.Chosen, what the last plan is made of; None before the first.

    Raises:
        InputError: an argument outside its range, a network that cannot be traced or has no removable filter.
    """

    def __init__(
        self,
        model: nn.Module,
        example_input: Tensor,
        taylor_order: int = 2,
        use_gradient_flow: bool = False,
        *,
        settings: PruningSettings | None = None,
        loss: Callable[[Tensor, Tensor], Tensor] | None = None,
        task: Task | None = None,
        graph: ChannelGraph | PartsGraph | None = None,
        progress: bool = True,
        **fields,
    ):
        one_of("taylor_order", taylor_order, TAYLOR_ORDERS)
        settings = dataclasses.replace(settings_of(settings), **fields)
        self.taylor_order, self.use_gradient_flow = taylor_order, use_gradient_flow
        self.task = task_of(task, loss)
        self.progress, self.has_logits = progress, is_classification(self.task)
        self.graph = checked_graph(graph, model) or settings.graph_of(model, example_input)
        self.model = self.graph.model
        require_units(self.graph)
        self.settings = settings = with_times(settings, self.graph, example_input)
        self.curvature_path, self.curvature_reason = choose_curvature(self.graph, settings.curvature, self.task)
        self.collected = self.behind_repair = self.measure = self.chosen = None

    # -- collecting --------------------------------------------------------------------------------------------------

    def rank(
        self, batches: Iterable, compensation: Iterable | None = None, held_out: Iterable | None = None
    ) -> "EnhancedFilterPruner":
        """One pass over the calibration images collects what the scores need.

        Args:
            batches: iterable of (images, labels) on the model's device.
            compensation: such batches on which the layers behind will be refitted after the cut (repair.compensation). Then
                all scores are of what the other channels of a layer cannot repair (scoring.estimates), and those of
                orders 2 and 3 are of the divergence from the network's own predictions, which compensation keeps small.
            held_out: such batches of other images: on them a joint selection behind compensation is tried and corrected
                (selection.corrected), where the settings want it.

        Returns:
            self.

        Raises:
            InputError: no images, NaN images, logits or derivatives, labels outside the logits' range; something that the task
                does not define, or that needs class logits; gradients are switched off.
        """
        check_gradient_mode("scoring")
        read = functools.partial(read_batches, self.task, self.model)
        batches, settings = read(batches, "calibration"), self.settings
        compensation = [] if compensation is None else read(compensation, "compensation")
        check_scoring(self.task, settings, bool(compensation), self.use_gradient_flow)
        with frozen(self.model):
            check_gradients(self.graph, batches[0], self.task)
        self.behind_repair = self.measure = directions = probed = None
        by_probes, orders = self.curvature_path == "hvp" and not compensation, TAYLOR_ORDERS
        shared, limit = {"seed": settings.seed, "progress": self.progress}, settings.memory_bytes
        if compensation:
            joint = settings.selection != "independent"
            self.behind_repair = found = collect_behind_repair(
                self.model, self.graph, batches, compensation, self.taylor_order, class_probes=settings.class_probes,
                joint=joint, flow=self.use_gradient_flow, memory_limit=limit, task=self.task,
                third_probes=settings.hessian_probes, **shared)  # fmt: skip
            directions, orders, probed = found.directions, found.orders, found.probed
            if settings.correct_levels and held_out:
                held_out = read(held_out, "held-out")
                self.measure = functools.partial(trial_divergences, self.model, self.graph, found.moments, held_out,
                                                 self.task, memory_limit=limit, progress=self.progress)  # fmt: skip
        elif self.has_logits:
            probes = max(2, settings.class_probes or CLASS_PROBES)
            wanted = Wanted(probes, flow=self.use_gradient_flow, seed=settings.seed)
            portions = Portions(batches[0][0].device, limit)
            directions = collect_directions(self.model, self.graph, batches, wanted, progress=self.progress,
                                            portions=portions)  # fmt: skip
        if probed is None and (directions is None or (by_probes and self.taylor_order > 1)):
            order, probes = self.taylor_order, settings.hessian_probes
            portions = Portions(device_of(self.model), limit)
            probed = probe_derivatives(self.model, self.graph, batches, order=order, probes=probes, task=self.task,
                                       portions=portions, **shared)  # fmt: skip
        self.collected = Collected(directions, probed, bool(compensation), by_probes, orders).checked(self.graph)
        return self

    def provides(self, taylor_order: int, use_gradient_flow: bool = False) -> bool:
        """Whether `rank` has collected what `with_order` needs for that order."""
        one_of("taylor_order", taylor_order, TAYLOR_ORDERS)
        return self.collected is not None and self.collected.provides(taylor_order, use_gradient_flow)

    def with_order(self, taylor_order: int, use_gradient_flow: bool = False) -> "EnhancedFilterPruner":
        """A pruner of another order that shares what this one has collected. Raises InputError if that is too little."""
        self._collected(taylor_order, use_gradient_flow)
        other = copy.copy(self)
        other.taylor_order, other.use_gradient_flow = taylor_order, use_gradient_flow
        return other

    # -- scores ------------------------------------------------------------------------------------------------------

    @own_precision()
    def scores(self, order: int | None = None) -> Tensor:
        """[units] estimated signed loss change (nats) of removing each unit alone; `order` defaults to `taylor_order`."""
        return self._collected(order or self.taylor_order).scores(order or self.taylor_order)

    @property
    def directions(self) -> Directions | None:
        """What `rank` collected under cross-entropy, None for another task."""
        return self._collected(self.taylor_order).directions

    def _collected(self, order, flow=False):
        one_of("taylor_order", order, TAYLOR_ORDERS)
        if self.collected is None:
            raise InputError("call rank(batches) first")
        self.collected.require(order, flow)
        return self.collected

    def criterion(self) -> tuple[Tensor, str]:
        """What one-by-one selection goes by, low scores first, and what it is.

        Order 1 goes by the mean squared per-sample first-order term (Molchanov et al. 2019, arXiv:1906.10771, eq. 8),
        orders 2 and 3 by `scores`; under gradient flow both are weighed.

        Returns:
            [units] scores, and their name with its unit.
        """
        if self.taylor_order > 1:
            scores, name = self.scores(), "estimated loss change (nats)"
        else:
            scores, name = self._collected(1).squared_first_order(), "mean squared first-order term (nats²)"
        weights = self.flow_weights()
        return (scores, name) if weights is None else (weigh(scores, weights), f"{name}, weighed by gradient flow")

    def by_filter(self, values: Tensor) -> dict[str, Tensor]:
        """[units] values as {layer: [filters]}: a filter has the value of its unit, nan where it is protected."""
        padded = torch.cat([values.double().cpu(), torch.tensor([torch.nan], dtype=torch.float64)])
        return {name: padded[info.unit_of] for name, info in self.graph.layers.items()}

    @property
    def filter_ranks(self) -> dict[str, Tensor]:
        """{layer: [filters] estimated signed loss change (nats) of removing that filter alone, nan where protected}.

        A filter that must go together with others has the value of its unit.
        """
        return self.by_filter(self.scores())

    def flow_weights(self) -> Tensor | None:
        """[units] weights by which scores are multiplied, or None without gradient flow."""
        return relative_flow(self.graph, self._collected(self.taylor_order).flow()) if self.use_gradient_flow else None

    def flow_report(self) -> GradientFlowReport:
        """The gradient flow of the images that `rank` saw."""
        return GradientFlowReport.from_flow(self.graph, self._collected(self.taylor_order).flow())

    def curvature_report(self) -> dict:
        """How the second and third derivatives of the scores were computed, see scoring.curvature.curvature_report."""
        collected = self._collected(self.taylor_order)
        return curvature_report(collected, self.taylor_order, self.curvature_path, self.curvature_reason)

    # -- selection ---------------------------------------------------------------------------------------------------

    def get_pruning_plan(self, percentage: float, ledger: Ledger | None = None) -> dict[str, list[int]]:
        """The filters to remove.

        A joint selection goes by the signed loss change given the units chosen already; others, and order 1, go by
        `criterion`. After `rank` with compensation a joint selection, of any order, goes by the closed form of
        scoring.layer_costs, which starts from `levels`. With `correct_levels` and held-out images it is made once more after
        a trial of every group of layers (selection.corrected). `chosen.predicted_loss_change` (nats) is what is predicted for
        the whole plan: the change of the cross-entropy with the labels or, after `rank` with compensation, the divergence from
        `model`. It is None where the criterion predicts none, as for order 1 without the closed form.

        Args:
            percentage: of the budget in the settings (default: of the filters that may be removed), in (0, 100),
                counted from the beginning of `ledger`.
            ledger: selection.constraints.Ledger of earlier rounds; None: this is the first.

        Returns:
            {layer: sorted filter indices}.

        Raises:
            InputError: percentage outside (0, 100) or out of reach for the constraints.
        """
        return self.graph.plan_of(self.select(percentage, ledger))

    @own_precision()
    def select(self, percentage: float, ledger: Ledger | None = None) -> list[int]:
        """Like `get_pruning_plan`; returns the indices of the chosen units."""
        order, constraints = self.taylor_order, self.settings.constraints
        collected, joint = self._collected(order), self.settings.selection != "independent"
        closed_form, weights = joint and collected.behind_repair, self.flow_weights()
        if closed_form and self.settings.layer_bound is None:
            constraints = dataclasses.replace(constraints, layer_bound=math.inf)  # these costs compare between layers
        selection_of = functools.partial(Selection, self.graph, percentage, constraints, ledger)
        if closed_form and not collected.costs_compare(order):
            self.chosen = chosen_uniformly(selection_of(), self.levels())
        elif closed_form:
            levels_of = functools.partial(collected.shrunk_levels, order, self.graph.units)
            self.chosen = chosen_behind_repair(selection_of, self._removal_costs, levels_of, self.measure, weights)
        elif joint and self.has_logits and order > 1:
            self.chosen = chosen_jointly(selection_of(), collected, order, weights)
        else:
            self.chosen = chosen_by_score(selection_of(), self.criterion()[0], collected, order)
        return self.chosen.units

    @own_precision()
    def levels(self, order: int | None = None) -> Tensor:
        """[units] what removing each unit alone costs behind compensation (nats), see scoring.collected.Collected.levels.

        Where the closed form is known they are shrunk towards it, within each group of coupled layers (scoring.shrinkage).
        Raises InputError after `rank` without compensation.
        """
        order = order or self.taylor_order
        collected = self._collected(order)
        if self.behind_repair is None or self.behind_repair.fisher is None:
            return collected.levels(order)
        return collected.shrunk_levels(order, self.graph.units, self._removal_costs().marginal)

    def _removal_costs(self):
        found = self.behind_repair
        return removal_costs(self.model, found.moments, found.fisher, len(self.graph.units))


class Rankings:
    """Rankings of the networks of one experiment: orders share what they can of the dense network's.

    Of the networks cut from it only the last ranking is kept, until `release`, because it can take much memory: a network of
    which filters are chosen several times in a row is scored once. `graph` is that of the dense network, `example` what a
    network is called with for the first calibration image.
    """

    def __init__(self, graph: ChannelGraph | PartsGraph, images: PruningImages, settings: PruningSettings, progress: bool,
                 task: Task | None = None):  # fmt: skip
        self.graph, self.images, self.settings = graph, images, settings
        self.progress, self.task = progress, task_of(task)
        self.example = example_of(self.task, images.calibration[0])
        self._dense, self._last, self._of_last = {}, None, {}  # graph of the last network cut from it, and its ranking

    def of(self, model: nn.Module, order: int, use_gradient_flow: bool = False,
           repairs: bool = False) -> EnhancedFilterPruner:  # fmt: skip
        """A pruner that has ranked `model`; with `repairs` it scores what compensation cannot repair."""
        kept = self._dense if self.graph_of(model) is self.graph else self._of_last
        key = (repairs, order if repairs else None)  # behind compensation every order takes directions of its own
        ranked = kept.get(key)
        if ranked is None or not ranked.provides(order, use_gradient_flow):
            self._of_last.clear()
            kept[key] = ranked = self._ranked(model, order, use_gradient_flow, repairs)
        return ranked.with_order(order, use_gradient_flow)

    def release(self) -> None:
        """Drops the ranking of the last network that was cut from the dense one."""
        self._of_last.clear()

    def _ranked(self, model, order, use_gradient_flow, repairs):
        pruner = EnhancedFilterPruner(model, None, order, use_gradient_flow, settings=self.settings, task=self.task,
                                      graph=self.graph_of(model), progress=self.progress)  # fmt: skip
        compensation = self.images.compensation if repairs else None
        return pruner.rank(self.images.calibration, compensation, self.images.held_out)

    def flow_of(self, model: nn.Module) -> GradientFlowReport:
        """The gradient flow of the calibration images through `model`."""
        return GradientFlowAnalyzer(model, None, self.graph_of(model)).analyze(self.images.calibration)

    def graph_of(self, model: nn.Module) -> ChannelGraph | PartsGraph:
        """The ChannelGraph of the dense network or of one cut from it, with the settings' excluded layers."""
        if model is self.graph.model:
            return self.graph
        if self._last is None or self._last.model is not model:
            self._last, self._of_last = graph_for(self.task, model, self.images.calibration[0], self.settings), {}
        return self._last
