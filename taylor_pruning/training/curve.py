"""Accuracy against optimiser steps: measured at steps 0, 10, 30, 100, 300, ... and after the last."""

import math

from torch import nn

from taylor_pruning.tasks.classification import task_of
from taylor_pruning.tasks.task import Task
from taylor_pruning.training.evaluation import main_figures, measure


class StepCurve:
    """Measures a network in training, on the same few images every time.

    Args:
        images: list of batches (images, labels); under torch.distributed this process's share.
        last: number of the last step. task: default classification. memory_limit: see training.evaluation.evaluate.

    Attributes:
        points: one dictionary a measurement, {"step", "top1" (per cent; the task's main metric by its name), "loss" (nats)}.
    """

    def __init__(self, images: list, last: int, task: Task | None = None, memory_limit: int | None = None):
        self.images, self.last, self.task, self.memory_limit = images, last, task_of(task), memory_limit
        self.points: list[dict] = []

    def due(self, step: int) -> bool:
        """Whether step 0, the last, 10^n or 3 * 10^n with n >= 1 has just been made."""
        if step in (0, self.last):
            return True
        size = 10 ** int(math.log10(step) + 1e-9)
        return step >= 10 and step in (size, 3 * size)

    def measure(self, step: int, model: nn.Module) -> None:
        """Measures `model`, which has made `step` steps."""
        options = {"memory_limit": self.memory_limit, "description": f"step {step}", "progress": False}
        found = measure(self.task, model, self.images, **options)
        self.points.append({"step": step, **main_figures(self.task, found)})
