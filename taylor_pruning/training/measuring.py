"""What is measured of a network in an experiment: accuracy, costs, and how far its predictions are from the dense network's."""

import math
import time
from collections.abc import Iterable

import torch
from torch import nn
from torch.nn import functional as F

from taylor_pruning.distributed import on_main
from taylor_pruning.errors import InputError
from taylor_pruning.memory import Portions
from taylor_pruning.modes import frozen
from taylor_pruning.tasks.batches import size, split
from taylor_pruning.tasks.classification import is_classification, task_of
from taylor_pruning.tasks.portions import in_portions
from taylor_pruning.tasks.task import Task, example_of
from taylor_pruning.training.evaluation import Accuracy, figures, main_figures, measure
from taylor_pruning.training.profile import COSTS, profile
from taylor_pruning.training.sampling import are_all_images, spread_images

OF_STAGE = ("stage", "seconds", *COSTS)  # entries of a stage that are no metrics
MONITOR_IMAGES = 500  # validation images on which every round is evaluated


class Measuring:
    """Measures networks on the images of one experiment.

    Args:
        dense: the network before pruning.
        val_loader: validation images, of which MONITOR_IMAGES at equal distances evaluate a round.
        calibration: list of batches (images, labels) on which losses are measured.
        held_out: such batches that neither score nor repair; None: `calibration`.
        dense_stage: stage of the dense network where it is known already.
        amp: precision of evaluation. memory_limit: bytes. See training.evaluation.evaluate.
        progress: show progress bars.
        task: default classification.

    Attributes:
        monitor: list of batches that evaluate a round.
        validation: all validation images; the monitored ones, which are in memory, where these are all.
    """

    def __init__(
        self,
        dense: nn.Module,
        val_loader: Iterable,
        calibration: list,
        *,
        held_out: list | None = None,
        dense_stage: dict | None = None,
        amp: str | None = None,
        memory_limit: int | None = None,
        progress: bool = True,
        task: Task | None = None,
    ):
        self.dense, self.val_loader, self.calibration = dense, val_loader, calibration
        self.amp, self.memory_limit, self.progress, self.task = amp, memory_limit, progress, task_of(task)
        _check_stage(dense_stage, self.task)
        self.monitor = spread_images(val_loader, MONITOR_IMAGES)
        whole = are_all_images(self.monitor, val_loader, MONITOR_IMAGES)
        self.validation = self.monitor if whole else val_loader
        self.held_out = held_out or calibration
        self._dense_stage, self._dense_predictions, self._dense_held_out, self._last = dense_stage, None, None, None

    def dense_stage(self) -> dict:
        """The dense network's stage, measured once.

        Raises:
            InputError: its main metric is no finite number.
        """
        if self._dense_stage is None:
            stage = self.stage("dense", self.dense)
            if not math.isfinite(stage[main := self.task.main]):
                raise InputError(
                    f"{main} of the dense network is {stage[main]}; check the validation images and their labels"
                )
            self._dense_stage = stage
        return self._dense_stage

    def stage(
        self, name: str, model: nn.Module, seconds: float | None = None, accuracy: Accuracy | dict | None = None
    ) -> dict:
        """Metrics on all validation images, unless they are known, and costs of one network, as in results.json."""
        start, (measured, known) = time.perf_counter(), self._last or (None, None)
        if accuracy is None:
            accuracy = known if measured is model else self._measure(model, self.validation, name, self.progress)
        if taken := sorted(set(OF_STAGE).intersection(figures(accuracy))):
            raise InputError(
                f"the task {self.task.name} gives a metric called {taken[0]!r}, as a stage's own; rename it"
            )
        seconds = time.perf_counter() - start if seconds is None else seconds
        costs = on_main(lambda: profile(model, example_of(self.task, self.calibration[0])))
        return {"stage": name, **figures(accuracy), **costs, "seconds": seconds}

    def metrics_of(self, stage: dict) -> Accuracy | dict:
        """The metrics that a stage holds beside the costs."""
        metrics = {name: value for name, value in stage.items() if name not in OF_STAGE}
        return Accuracy(**metrics) if is_classification(self.task) else metrics

    def _measure(self, model, loader, description, progress):
        options = {"description": description, "progress": progress, "memory_limit": self.memory_limit}
        return measure(self.task, model, loader, amp=self.amp, **options)

    def quick(self, model: nn.Module) -> dict:
        """The main metric and "loss" on the monitored validation images.

        Where these are all, `stage` takes what was measured here last, if it is asked for that network next.
        """
        found = self._measure(model, self.monitor, "a round", progress=False)
        self._last = (model, found) if self.validation is self.monitor else None
        return main_figures(self.task, found)

    def losses(self, model: nn.Module) -> dict:
        """Mean over the calibration images: of the loss with the labels, by its name, and "divergence" from the dense network.

        For a classifier "cross-entropy" and KL(dense || model), in nats. A task without a divergence has no such entry.
        """
        if not is_classification(self.task):
            return self._task_losses(model)
        if self._dense_predictions is None:
            self._dense_predictions = self._predictions(self.dense, self.calibration)
        dense = self._dense_predictions
        answers = dense if model is self.dense else self._predictions(model, self.calibration)
        labels = torch.cat([labels for _, labels in self.calibration]).cpu()
        return {
            "cross-entropy": F.nll_loss(answers, labels).item(),
            "divergence": F.kl_div(answers, dense, reduction="batchmean", log_target=True).item(),
        }

    def fidelity(self, model: nn.Module) -> dict | None:
        """How far a classifier answers as the dense one does, on the held-out images; None for another task.

        Returns:
            {"divergence": mean KL(dense || model) in nats, "agreement": per cent of images with the dense network's top-1,
            "constant_divergence", "constant_agreement": the same of an answer that does not look at the image, the mean of the
            dense network's, "images": number of images}.
        """
        if not is_classification(self.task):
            return None
        if self._dense_held_out is None:
            self._dense_held_out = self._predictions(self.dense, self.held_out)
        dense, answers = self._dense_held_out, self._predictions(model, self.held_out)
        mean = (torch.logsumexp(dense, 0) - math.log(len(dense))).expand_as(dense)
        return {
            "divergence": F.kl_div(answers, dense, reduction="batchmean", log_target=True).item(),
            "agreement": 100 * (answers.argmax(1) == dense.argmax(1)).sum().item() / len(dense),
            "constant_divergence": F.kl_div(mean, dense, reduction="batchmean", log_target=True).item(),
            "constant_agreement": 100 * dense.argmax(1).bincount().max().item() / len(dense),
            "images": len(dense),
        }

    @torch.no_grad()
    def _predictions(self, model, batches):
        """[N, K] log-probabilities of all images, in evaluation mode, float64 on the CPU."""
        portions = Portions(next(model.parameters()).device, self.memory_limit, backward=False)

        def forward(part, _):
            return F.log_softmax(model(part[0]).cpu().double(), 1)

        with frozen(model):
            return torch.cat([found for batch in batches for found in in_portions(forward, batch, portions)])

    @torch.no_grad()
    def _task_losses(self, model):
        task, sums, samples = self.task, {}, 0
        apart = self.calibration if task.samples_apart else (x for batch in self.calibration for x in split(batch, 1))
        portions = Portions(next(model.parameters()).device, self.memory_limit, backward=False)

        def losses_of(part, _):
            outputs = task.forward(model, part)
            found = {task.loss_name: task.loss(outputs, part)}
            if task.defines("divergence"):
                found["divergence"] = task.divergence(outputs, task.forward(self.dense, part))
            return found

        with frozen(model), frozen(self.dense):
            for batch in apart:
                for found in in_portions(losses_of, batch, portions):
                    sums = {name: sums.get(name, 0.0) + losses.double().sum().item() for name, losses in found.items()}
                samples += size(batch)
        return {name: total / samples for name, total in sums.items()}


def _check_stage(stage: dict | None, task: Task) -> None:
    """Raises InputError if the dense network's stage is given, but is none of this task."""
    needed = {"stage", task.main, "loss", "parameters", "macs"}
    if stage is not None and not (isinstance(stage, dict) and needed <= stage.keys()):
        raise InputError(
            f"dense_stage must hold {', '.join(sorted(needed))}; give what dense_stage() of another pruning returned, or "
            "leave it out"
        )
