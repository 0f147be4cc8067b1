"""One pruning round: train what came before, score, select, cut, compensate, measure. And the repair behind the last."""

import dataclasses
import functools
from collections.abc import Callable, Iterable

from torch import nn

from taylor_pruning.distributed import broadcast_object, broadcast_state, check_equal_shapes
from taylor_pruning.experiment.checkpoint import RoundsState
from taylor_pruning.experiment.choices import BaselineChoice, TaylorChoice, TimedChoice
from taylor_pruning.experiment.results import Stopwatch, all_filters, remaining, removed, round_record
from taylor_pruning.experiment.settings import PruningSettings
from taylor_pruning.memory import return_freed_memory
from taylor_pruning.repair.network import repair_network, split
from taylor_pruning.repair.parts import compensate_parts
from taylor_pruning.selection.constraints import Ledger
from taylor_pruning.surgery.copying import copy_of
from taylor_pruning.surgery.parts import parts_of
from taylor_pruning.tasks.classification import is_classification, kl_divergence
from taylor_pruning.training.checkpoint import check_same_loss
from taylor_pruning.training.fine_tuning import Recipe, train_steps
from taylor_pruning.training.measuring import Measuring

SMALLER_STEPS = 2  # rounds that are split in all, before the guard ends them


class Rounds:
    """Takes the network of one experiment from round to round.

    Args:
        rankings: EnhancedFilterPruner.Rankings of the experiment, with the graph of its dense network.
        measuring: what measures the network after every step of a round.
        train_loader, recipe, teacher: of the training between the rounds, where the settings want it.
        settings: PruningSettings.
        progress: show progress bars.
    """

    def __init__(
        self,
        rankings,
        measuring: Measuring,
        train_loader: Iterable,
        recipe: Recipe,
        teacher: nn.Module | None,
        settings: PruningSettings,
        progress: bool,
    ):
        self.rankings, self.measuring, self.settings, self.progress = rankings, measuring, settings, progress
        self.train_loader, self.recipe, self.teacher = train_loader, recipe, teacher
        self.graph = rankings.graph

    def run(
        self,
        state: RoundsState,
        percentage: float,
        choose: TaylorChoice | BaselineChoice | TimedChoice,
        keep: Callable = lambda state: None,
    ) -> RoundsState:
        """The state after the rounds of the settings that are not in `state` yet, and the repair across layers.

        With the guard, a round after which the repaired network says less than a constant answer on held-out images is not
        taken: it is tried in smaller steps, and where these fail too the rounds end with what was reached.

        Args:
            keep: called with the state after every step.
        """
        if state.losses:  # of rounds that a checkpoint held
            now = self.measuring.losses(state.model)
            for name, loss in state.losses.items():
                check_same_loss("on the calibration images, the pruned network", loss, now[name])
        rounds = max(1, min(self.settings.rounds, len(self.graph.units)))  # more would have nothing to remove
        goals, smaller_steps = [percentage * (number / rounds) for number in range(1, rounds + 1)], 0
        while not state.stopped:
            reached = state.rounds[-1]["percentage"] if state.rounds else 0.0
            goal = min((goal for goal in goals if goal > reached), default=None)
            if goal is None:
                break
            after = self.next(state, len(state.rounds) + 1, goal, choose)
            if not (self.settings.guard and self.settings.compensate and broadcast_object(is_destroyed(after))):
                state = after
            elif smaller_steps < SMALLER_STEPS:
                goals.append((reached + goal) / 2)
                smaller_steps += 1
                continue
            else:
                why = {"asked": percentage, "reached": reached, "tried": goal, "held_out": after.rounds[-1]["held_out"]}
                state = dataclasses.replace(state, seconds=after.seconds, stopped=why)
            keep(state)
        repaired = self.repaired(state)
        if repaired is not state:
            keep(repaired)
        return repaired

    def next(
        self, state: RoundsState, number: int, percentage: float, choose: TaylorChoice | BaselineChoice | TimedChoice
    ) -> RoundsState:
        """The state after round `number`, in which `percentage` of the budget is gone since the dense network."""
        state = self._trained(state)
        seconds, repairs = Stopwatch(state.seconds), self.settings.compensate
        ledger = Ledger.open(self.graph, self.settings.constraints)
        ledger.record(removed(self.graph, state.kept))
        choice = choose(state.model, percentage, ledger, seconds.lap)
        self.rankings.release()
        return_freed_memory()
        plan = broadcast_object(choice.plan)
        smaller, kept = choice.graph.remove(plan), remaining(state.kept, plan)
        check_equal_shapes(smaller)
        seconds.lap("surgery")
        after = {"selection": self.measuring.quick(smaller), "compensation": None, "training": None}
        seconds.lap("evaluate")
        report = None
        if repairs:
            smaller, report = self._compensated(state, smaller, plan, kept)
            return_freed_memory()
            seconds.lap("compensate")
            after["compensation"] = self.measuring.quick(smaller)
        losses, before = self.measuring.losses(smaller), state.losses or self.measuring.losses(state.model)
        seconds.lap("evaluate")
        record = round_record(number, percentage, choice, plan, before, losses, after, report)
        record["held_out"] = self.measuring.fidelity(smaller)
        return RoundsState(
            smaller, kept, [*state.rounds, record], seconds.total, losses, state.ranking or choice.ranking
        )

    def repaired(self, state: RoundsState) -> RoundsState:
        """The state after the repair across layers; as it is where the settings want none, or where it was done.

        The layers are fitted again, without the images that judge the repair; those that judge the rounds judge it too. The
        last one is fitted by least squares, which are closer to what the repair minimises, at a higher temperature. It is
        fitted to the predictions at the end.
        """
        if self.settings.repair != "network" or state.repair:
            return state
        seconds, dense, seed = Stopwatch(state.seconds), self.graph.model, self.settings.seed
        task = self.rankings.task
        before = self.measuring.stage("compensated", state.model, state.seconds["compensate"])
        seconds.lap("evaluate")
        images, held_out = split(self.rankings.images.compensation, seed)
        held_out += self.rankings.images.held_out or []
        model = self.graph.remove(removed(self.graph, state.kept))
        if images:
            self._fit(dense, model, images, state.kept, to_predictions=False)
        losses = task.divergence
        if is_classification(task):
            losses = functools.partial(kl_divergence, temperature=self.recipe.temperature)
        report = repair_network(dense, model, images, held_out, losses, task=task, parts=parts_of(self.graph), seed=seed,
                                passes=self.settings.repair_passes, progress=self.progress)  # fmt: skip
        broadcast_state(model)
        if report.steps:
            self._fit(dense, model, self.rankings.images.compensation, state.kept, only_logits=True)
        else:  # nothing was gained: the fit to all images is better
            model = state.model
        seconds.lap("repair")
        found = {**report.as_dict(), "before": before}
        return dataclasses.replace(state, model=model, seconds=seconds.total, losses=None, repair=found)

    def _compensated(self, state, smaller, plan, kept):
        """The cut network with new weights, the same in all processes, and the report on every layer."""
        target = self.graph.model
        if self.settings.fine_tune_between:  # see PruningSettings
            target, kept = state.model, remaining(all_filters(self.rankings.graph_of(state.model)), plan)
        else:
            smaller = self.graph.remove(removed(self.graph, kept))
        return smaller, self._fit(target, smaller, self.rankings.images.compensation, kept).as_dict()

    def _fit(self, target, smaller, batches, kept, **which):
        """Fits the layers of `smaller` to `target`, in all processes alike; returns the report on every layer."""
        report = compensate_parts(self.graph, target, smaller, batches, self.rankings.task, kept,
                                  progress=self.progress, seed=self.settings.seed,
                                  memory_limit=self.settings.memory_bytes, **which)  # fmt: skip
        broadcast_state(smaller)
        return report

    def _trained(self, state):
        """The state after the training that lies between two rounds; without any, and for the dense network, as it is."""
        steps = self.settings.fine_tune_between
        if not (state.rounds and steps):
            return state
        seconds, last, model = Stopwatch(state.seconds), state.rounds[-1], copy_of(state.model)
        before = (last["after_compensation"] or last["after_selection"])["loss"]
        train_steps(model, self.train_loader, self.recipe, steps, loss_before=before, teacher=self.teacher,
                    task=self.rankings.task,
                    round_index=last["round"] - 1, seed=self.settings.seed,
                    description=f"train after round {last['round']}", progress=self.progress)  # fmt: skip
        seconds.lap("train")
        rounds = [*state.rounds[:-1], {**last, "after_training": self.measuring.quick(model)}]
        return dataclasses.replace(state, model=model, rounds=rounds, seconds=seconds.total, losses=None)


def is_destroyed(state: RoundsState) -> bool:
    """Whether the network after the last round is further from the dense one than a constant answer is, in both measures."""
    found = state.rounds[-1]["held_out"]
    if found is None:  # a task without such a measure
        return False
    further = found["divergence"] > found["constant_divergence"]
    return further and found["agreement"] < found["constant_agreement"]
