"""What is measured of a network in an experiment: accuracy, costs, and how far its predictions are from the dense network's."""

import math
import time
from collections.abc import Iterable
from dataclasses import asdict

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from taylor_pruning.modes import frozen
from taylor_pruning.training.fine_tuning import Accuracy, evaluate
from taylor_pruning.training.profile import profile
from taylor_pruning.training.sampling import spread_images

MONITOR_IMAGES = 500  # validation images on which every round is evaluated


class Measuring:
    """Measures networks on the images of one experiment.

    Args:
        dense: the network before pruning.
        val_loader: validation images, of which MONITOR_IMAGES at equal distances evaluate a round.
        calibration: list of batches (images, labels) on which losses are measured.
        held_out: such batches that neither score nor repair; None: `calibration`.
        amp: precision of evaluation, see training.evaluation.evaluate.
        progress: show progress bars.
    """

    def __init__(
        self,
        dense: nn.Module,
        val_loader: Iterable,
        calibration: list,
        *,
        held_out: list | None = None,
        amp: str | None = None,
        progress: bool = True,
    ):
        self.dense, self.val_loader, self.calibration = dense, val_loader, calibration
        self.amp, self.progress = amp, progress
        self.monitor = spread_images(val_loader, MONITOR_IMAGES)
        self.held_out = held_out or calibration
        self._dense_predictions = self._dense_held_out = None

    def stage(
        self, name: str, model: nn.Module, seconds: float | None = None, accuracy: Accuracy | None = None
    ) -> dict:
        """Accuracy on all validation images, unless it is known, and costs of one network, as in results.json."""
        start = time.perf_counter()
        if accuracy is None:
            accuracy = evaluate(model, self.val_loader, amp=self.amp, description=name, progress=self.progress)
        seconds = time.perf_counter() - start if seconds is None else seconds
        costs = profile(model, self.calibration[0][0][:1])
        return {"stage": name, **asdict(accuracy), **costs, "seconds": seconds}

    def quick(self, model: nn.Module) -> dict:
        """{"top1", "loss"} on the monitored validation images."""
        accuracy = evaluate(model, self.monitor, progress=False)
        return {"top1": accuracy.top1, "loss": accuracy.loss}

    def losses(self, model: nn.Module) -> dict:
        """Mean over the calibration images, in nats: {"cross-entropy": with the labels, "divergence": KL(dense || model)}."""
        if self._dense_predictions is None:
            self._dense_predictions = log_probabilities(self.dense, self.calibration)
        answers = log_probabilities(model, self.calibration)
        labels = torch.cat([labels for _, labels in self.calibration]).cpu()
        return {
            "cross-entropy": F.nll_loss(answers, labels).item(),
            "divergence": F.kl_div(answers, self._dense_predictions, reduction="batchmean", log_target=True).item(),
        }

    def fidelity(self, model: nn.Module) -> dict:
        """How far the network answers as the dense one does, on the held-out images.

        Returns:
            {"divergence": mean KL(dense || model) in nats, "agreement": per cent of images with the dense network's top-1,
            "constant_divergence", "constant_agreement": the same of an answer that does not look at the image, the mean of the
            dense network's, "images": number of images}.
        """
        if self._dense_held_out is None:
            self._dense_held_out = log_probabilities(self.dense, self.held_out)
        dense, answers = self._dense_held_out, log_probabilities(model, self.held_out)
        mean = (torch.logsumexp(dense, 0) - math.log(len(dense))).expand_as(dense)
        return {
            "divergence": F.kl_div(answers, dense, reduction="batchmean", log_target=True).item(),
            "agreement": 100 * (answers.argmax(1) == dense.argmax(1)).sum().item() / len(dense),
            "constant_divergence": F.kl_div(mean, dense, reduction="batchmean", log_target=True).item(),
            "constant_agreement": 100 * dense.argmax(1).bincount().max().item() / len(dense),
            "images": len(dense),
        }


@torch.no_grad()
def log_probabilities(model: nn.Module, batches: Iterable) -> Tensor:
    """[N, K] log-probabilities of all images, in evaluation mode, float64 on the CPU."""
    with frozen(model):
        return torch.cat([F.log_softmax(model(images).cpu().double(), 1) for images, _ in batches])
