"""The pipeline: evaluate, rank, prune in rounds, compensate, fine-tune, profile.

    >>> import torch
    >>> from torch import nn
    >>> layers = nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    >>> model = nn.Sequential(*layers, nn.Linear(8, 4))
    >>> data = torch.utils.data.TensorDataset(torch.randn(32, 3, 12, 12), torch.arange(32) % 4)
    >>> loader = torch.utils.data.DataLoader(data, 16)
    >>> settings = PruningSettings(budget="macs", rounds=2)
    >>> pruning = EnhancedPruning(model, loader, loader, settings=settings, progress=False)
    >>> result = pruning.run_full_pruning(pruning_percentage=30, taylor_order=2, fine_tune_epochs=1)
    >>> [stage["stage"] for stage in result.stages]
    ['dense', 'pruned', 'compensated', 'fine-tuned']
    >>> result.stages[-1]["macs"] < 0.8 * result.stages[0]["macs"]
    True

`result.model` is the smaller network, `result.as_dict()` what results.json holds.
"""

import dataclasses
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from torch import Tensor, nn

from EnhancedFilterPruner import ChannelGraph, Rankings
from taylor_pruning.distributed import is_main
from taylor_pruning.errors import InputError, instance_of, one_of
from taylor_pruning.experiment.checkpoint import RoundsCheckpoint, RoundsState, fingerprint_of
from taylor_pruning.experiment.choices import BaselineChoice, TaylorChoice, TimedChoice
from taylor_pruning.experiment.images import PruningImages
from taylor_pruning.experiment.outcome import pruning_result, with_flow
from taylor_pruning.experiment.pruned_file import load_pruned, save_pruned
from taylor_pruning.experiment.pruned_graph import graph_for
from taylor_pruning.experiment.results import PruningResult, all_filters
from taylor_pruning.experiment.rounds import Rounds
from taylor_pruning.experiment.settings import TAYLOR_ORDERS, PruningSettings, settings_of
from taylor_pruning.files import checkpoint_file
from taylor_pruning.first_batch import Batches, check_inputs, check_training, device_of
from taylor_pruning.generators import seeded
from taylor_pruning.modes import own_precision
from taylor_pruning.options import check_argument
from taylor_pruning.repair.network import check_repairable
from taylor_pruning.scoring.curvature import check_scoring, no_third_order
from taylor_pruning.scoring.oracle import judge_estimates
from taylor_pruning.selection.greedy import check_reachable
from taylor_pruning.selection.latency import with_times
from taylor_pruning.surgery.copying import copy_of
from taylor_pruning.surgery.wrappers import unwrapped
from taylor_pruning.tasks.classification import is_classification, task_of
from taylor_pruning.tasks.task import Task, example_of
from taylor_pruning.training.fine_tuning import Recipe, check_recipe, fine_tune, reestimate_batchnorm
from taylor_pruning.training.measuring import Measuring

__all__ = ["EnhancedPruning", "InputError", "PruningResult", "PruningSettings", "load_pruned", "save_pruned"]


class EnhancedPruning:
    """Prunes and fine-tunes `model`, which comes back as it was given.

    Args:
        model: classifier that can be traced (see ChannelGraph), or a network for `task`.
        train_loader, val_loader: iterables with a length of (images [B, C, H, W], labels [B]) on the model's device, or of
            batches of `task`.
        task: what the network is for, as taylor_pruning.tasks.dense.Segmentation(); default: classification.
        calibration: list of such batches for scoring; default: the first `calibration_samples` images that `train_loader`
            gives, as it augments them; it should shuffle.
        compensation: list of such batches for compensation; default: `calibration`.
        held_out: list of such batches on which a round's choice is tried and the round is judged; default: where
            `calibration` comes from `train_loader` the images after it, else no choice is tried, and `calibration` judges.
            They should be none of `compensation`.
        dense_stage: the dense network's stage where it is known already.
        settings, recipe: PruningSettings, training.fine_tuning.Recipe.
        progress: show progress bars.

    Raises:
        InputError: empty loaders, a network that cannot be traced or pruned, something that the task does not define.
    """

    def __init__(
        self,
        model: nn.Module,
        train_loader: Iterable,
        val_loader: Iterable,
        *,
        task: Task | None = None,
        calibration: list | None = None,
        calibration_samples: int = 300,
        compensation: list | None = None,
        held_out: list | None = None,
        dense_stage: dict | None = None,
        settings: PruningSettings | None = None,
        recipe: Recipe | None = None,
        progress: bool = True,
    ):
        self.model, self.notes = unwrapped(model)
        self.task, device = task_of(task), device_of(self.model)
        self.train_loader = Batches(train_loader, "the training loader", device, self.task)
        self.val_loader = Batches(val_loader, "the validation loader", device, self.task)
        self.settings, self.recipe, self.progress = settings_of(settings), recipe or Recipe(), progress
        instance_of("recipe", self.recipe, Recipe)
        for name in ("evaluate", "main"):
            self.task.require(name, "every stage needs")
        check_scoring(self.task, self.settings, self.settings.compensate, use_gradient_flow=False)
        check_inputs(self.model, [self.train_loader, self.val_loader])
        self.images = PruningImages.gathered(self.model, self.train_loader, calibration_samples, calibration, compensation,
                                             held_out)  # fmt: skip
        if self.settings.repair == "network":
            check_repairable(self.images.compensation)
        example = example_of(self.task, self.images.calibration[0])
        self.graph = graph_for(self.task, self.model, self.images.calibration[0], self.settings)
        self.notes += tuple(f"{name} is left whole: {reason}" for name, reason in self.graph.left_whole.items())
        self.settings = with_times(self.settings, self.graph, example, print if progress and is_main() else None)
        amp = self.recipe.resolved(device).amp if self.recipe.amp_validation else None
        self.measuring = Measuring(self.model, self.val_loader, self.images.calibration, held_out=self.images.held_out,
                                   amp=amp, dense_stage=dense_stage, memory_limit=self.settings.memory_bytes,
                                   progress=progress, task=self.task)  # fmt: skip
        self.rankings = Rankings(self.graph, self.images, self.settings, progress, self.task)
        self.teacher = self.model if is_classification(self.task) and self.recipe.distillation_weight != 0 else None

    def run_full_pruning(
        self,
        pruning_percentage: float | None = None,
        taylor_order: int = 2,
        use_gradient_flow: bool = False,
        fine_tune_epochs: int | None = None,
        *,
        oracle_samples: int = 0,
        checkpoint: Path | str | None = None,
        resume: bool = False,
    ) -> PruningResult:
        """Evaluate, prune in rounds, fine-tune: `prune` and then `fine_tune`, whose arguments these are.

        The last round is kept beside the checkpoint of fine-tuning: for run.pt in run.pt.rounds.
        """
        if epochs := self.recipe.epochs if fine_tune_epochs is None else fine_tune_epochs:
            check_recipe(dataclasses.replace(self.recipe, epochs=epochs, warmup_epochs=0.0), self.task)
            check_training(self.model, self.train_loader)
        checkpoint = checkpoint_file(checkpoint, resume)
        rounds = checkpoint and checkpoint.with_name(f"{checkpoint.name}.rounds")
        result = self.prune(pruning_percentage, taylor_order, use_gradient_flow, oracle_samples=oracle_samples,
                            checkpoint=rounds, resume=resume)  # fmt: skip
        return self.fine_tune(result, fine_tune_epochs, checkpoint=checkpoint, resume=resume)

    @own_precision()
    def prune(
        self,
        pruning_percentage: float | None = None,
        taylor_order: int = 2,
        use_gradient_flow: bool = False,
        *,
        oracle_samples: int = 0,
        checkpoint: Path | str | None = None,
        resume: bool = False,
    ) -> PruningResult:
        """Evaluates the dense network, prunes it in rounds and evaluates it again.

        Args:
            pruning_percentage: in (0, 100), of the budget in the settings; default: their target, or else 30.
            taylor_order: 1, 2 or 3.
            use_gradient_flow: weigh scores by gradient flow and report it.
            oracle_samples: filters whose true loss change is measured, see `oracle`.
            checkpoint: file that is written after every round.
            resume: continue from that file, if it exists.

        Returns:
            PruningResult without fine-tuning.

        Raises:
            InputError: an argument, the data or the checkpoint is wrong, see the message.
        """
        pruning_percentage = self.settings.percentage(pruning_percentage, self.graph)
        check_reachable(self.graph, pruning_percentage, self.settings.constraints)
        one_of("taylor_order", taylor_order, TAYLOR_ORDERS)
        check_argument("use_gradient_flow", use_gradient_flow, bool)
        check_argument("oracle_samples", oracle_samples, int, low=0)
        check_scoring(self.task, self.settings, self.settings.compensate, use_gradient_flow)
        if oracle_samples:  # whose estimates are of removing without a repair
            check_scoring(self.task, self.settings, repairs=False, use_gradient_flow=False)
        taylor_order = int(taylor_order)  # a checkpoint holds no numbers of NumPy
        method = {"taylor_order": taylor_order, "use_gradient_flow": use_gradient_flow}
        state, store = RoundsState(self.model, all_filters(self.graph)), None
        if checkpoint := checkpoint_file(checkpoint, resume):
            decides = {**self.settings.as_dict(), "pruning_percentage": pruning_percentage, **method}
            decides.pop("memory_limit")  # results do not depend on it
            if self.settings.fine_tune_between:
                decides["recipe"] = repr(self.recipe)
            store = RoundsCheckpoint(checkpoint, self.graph, self.images.by_name(), decides)
            state = (store.load() if resume else None) or state
        choose = TaylorChoice(self.rankings, taylor_order, use_gradient_flow, self.settings.compensate)
        result = self._after_rounds(state, pruning_percentage, choose, self.settings, store)
        if oracle_samples:
            result.oracle = self.oracle(oracle_samples)
        return result

    @own_precision()
    def prune_by_baseline(
        self,
        criterion: str | Callable[[ChannelGraph], Tensor],
        pruning_percentage: float | None = None,
        *,
        widths: str = "own",
        compensate: bool = False,
    ) -> PruningResult:
        """Like `prune` under the same budget, by a published criterion.

        Args:
            criterion: a name of selection.baselines, or a function from a ChannelGraph to [units] scores, low ones first.
            widths: "own" or "uniform", see experiment.choices.BaselineChoice.
            compensate: with compensation, in the rounds of the settings, and with their repair across layers; without, in one
                shot. No round is guarded.
        """
        rounds = self.settings.rounds if compensate else 1
        repair = "none" if not compensate else "network" if self.settings.repair == "network" else "layer"
        settings = dataclasses.replace(
            self.settings, compensate=compensate, repair=repair, rounds=rounds, fine_tune_between=0, guard=False
        )
        choose = BaselineChoice(self.rankings, criterion, widths, settings.constraints, settings.seed)
        percentage = settings.percentage(pruning_percentage, self.graph)
        check_reachable(self.graph, percentage, choose.constraints)
        return self._after_rounds(RoundsState(self.model, all_filters(self.graph)), percentage, choose, settings)

    def fine_tune(
        self,
        result: PruningResult,
        epochs: int | None = None,
        *,
        checkpoint: Path | str | None = None,
        resume: bool = False,
    ) -> PruningResult:
        """Fine-tunes a pruned network and evaluates it.

        Args:
            result: of `prune`; it is not changed.
            epochs: default: the recipe's; 0 returns `result`.
            checkpoint, resume: see training.fine_tuning.fine_tune.

        Returns:
            PruningResult with the stage "fine-tuned".
        """
        instance_of("result", result, PruningResult)
        epochs = self.recipe.epochs if epochs is None else epochs
        if not epochs:
            return result
        if result.dense_fingerprint not in (None, fingerprint_of(self.graph)):  # None: of an older version
            raise InputError("result is of another dense network, or of other weights of it; give one of this pruning")
        warmup = min(self.recipe.warmup_epochs, epochs / 2)
        recipe = dataclasses.replace(self.recipe, epochs=epochs, warmup_epochs=warmup)
        start, model = time.perf_counter(), copy_of(result.model)
        before = self.measuring.metrics_of(result.stages[-1])
        if self.settings.reestimate_batchnorm:
            reestimate_batchnorm(model, self.images.calibration, self.task)
            before = None
        # Dropout does not depend on what ran before, as after an interruption.
        with seeded(self.settings.seed, device_of(model)):
            history = fine_tune(model, self.train_loader, self.measuring.validation, recipe, teacher=self.teacher,
                                before=before, monitor=self.measuring.monitor, checkpoint=checkpoint, resume=resume,
                                memory_limit=self.settings.memory_bytes, task=self.task, progress=self.progress,
                                start=result.identity)  # fmt: skip
        stages = [*result.stages, self.measuring.stage("fine-tuned", model, time.perf_counter() - start, history.best)]
        flow = result.gradient_flow and with_flow(result.gradient_flow, "fine-tuned", self.rankings, model)
        return dataclasses.replace(
            result,
            model=model,
            stages=stages,
            fine_tuning=history.epochs[1:],
            accuracy_at_steps=history.steps,
            gradient_flow=flow,
        )

    @own_precision()
    def oracle(self, samples: int) -> dict:
        """Every order's estimates against the true loss changes of random units, see scoring.oracle.judge_estimates.

        Beside these, "left_out": {"3": reason} where the network has no scores of order 3, else {}.
        """
        check_argument("samples", samples, int, low=1)
        reason = no_third_order(self.graph, self.settings.curvature, self.task)
        orders = [order for order in TAYLOR_ORDERS if order < 3 or not reason]
        ranked = self.rankings.of(self.model, max(orders))
        estimates = {str(order): ranked.scores(order) for order in orders}
        found = judge_estimates(self.model, self.graph, self.images.calibration, estimates, samples, self.settings.seed,
                                progress=self.progress, task=self.task)  # fmt: skip
        return {**found, "left_out": {"3": reason} if reason else {}}

    def dense_stage(self) -> dict:
        """The dense network's stage, measured once."""
        return self.measuring.dense_stage()

    def _after_rounds(self, state, percentage, choose, settings, store=None):
        """The PruningResult after what is left of the settings' rounds; `store` keeps every step."""
        self.dense_stage()
        rounds = Rounds(self.rankings, self.measuring, self.train_loader, self.recipe, self.teacher, settings,
                        self.progress)  # fmt: skip
        if settings.times:
            choose = TimedChoice(choose, self.rankings, settings.times)
        state = rounds.run(state, percentage, choose, store.save if store and is_main() else lambda state: None)
        return pruning_result(state, self.rankings, self.measuring, self.notes)
