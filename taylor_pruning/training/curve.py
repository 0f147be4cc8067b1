"""Accuracy against optimiser steps: measured at steps 0, 10, 30, 100, 300, ... and after the last."""

import math

from torch import nn

from taylor_pruning.training.evaluation import evaluate
from taylor_pruning.training.sampling import Batches


class StepCurve:
    """Measures a network in training, on the same few images every time.

    Args:
        images: list of batches (images, labels); under torch.distributed this process's share.
        last: number of the last step.

    Attributes:
        points: one dictionary a measurement, {"step", "top1" (per cent), "loss" (nats)}.
    """

    def __init__(self, images: Batches, last: int):
        self.images, self.last = images, last
        self.points: list[dict] = []

    def due(self, step: int) -> bool:
        """Whether step 0, the last, 10^n or 3 * 10^n with n >= 1 has just been made."""
        if step in (0, self.last):
            return True
        size = 10 ** int(math.log10(step) + 1e-9)
        return step >= 10 and step in (size, 3 * size)

    def measure(self, step: int, model: nn.Module) -> None:
        """Measures `model`, which has made `step` steps."""
        accuracy = evaluate(model, self.images, description=f"step {step}", progress=False)
        self.points.append({"step": step, "top1": accuracy.top1, "loss": accuracy.loss})
