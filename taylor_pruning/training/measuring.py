"""What is measured of a network in an experiment: accuracy, costs, and how far its predictions are from the dense network's."""

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
        amp: precision of evaluation, see training.evaluation.evaluate.
        progress: show progress bars.
    """

    def __init__(
        self,
        dense: nn.Module,
        val_loader: Iterable,
        calibration: list,
        *,
        amp: str | None = None,
        progress: bool = True,
    ):
        self.dense, self.val_loader, self.calibration = dense, val_loader, calibration
        self.amp, self.progress = amp, progress
        self.monitor = spread_images(val_loader, MONITOR_IMAGES)
        self._dense_predictions = None

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


@torch.no_grad()
def log_probabilities(model: nn.Module, batches: Iterable) -> Tensor:
    """[N, K] log-probabilities of all images, in evaluation mode, float64 on the CPU."""
    with frozen(model):
        return torch.cat([F.log_softmax(model(images).cpu().double(), 1) for images, _ in batches])
