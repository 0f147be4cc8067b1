"""How far a network's predictions are from the labels and from another network's predictions."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from taylor_pruning.modes import frozen


class Comparison:
    """Losses of networks on a list of batches (images, labels), next to one network's predictions there."""

    def __init__(self, reference: nn.Module, batches: list):
        self.reference, self.batches, self._predictions = reference, batches, None

    def losses(self, model: nn.Module) -> dict:
        """Mean over the images, in nats: {"cross-entropy": with the labels, "divergence": KL(reference || model)}."""
        if self._predictions is None:
            self._predictions = log_probabilities(self.reference, self.batches)
        answers = log_probabilities(model, self.batches)
        labels = torch.cat([labels for _, labels in self.batches]).cpu()
        return {
            "cross-entropy": F.nll_loss(answers, labels).item(),
            "divergence": F.kl_div(answers, self._predictions, reduction="batchmean", log_target=True).item(),
        }


@torch.no_grad()
def log_probabilities(model: nn.Module, batches: Iterable) -> Tensor:
    """[N, K] log-probabilities of all images, in evaluation mode, float64 on the CPU."""
    with frozen(model):
        return torch.cat([F.log_softmax(model(images).cpu().double(), 1) for images, _ in batches])
