"""How far a network's predictions are from the labels and from another network's predictions."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from taylor_pruning.modes import frozen


@torch.no_grad()
def log_probabilities(model: nn.Module, batches: Iterable) -> list[Tensor]:
    """[B, K] log-probabilities of every batch (images, labels), in evaluation mode, float64 on the CPU."""
    with frozen(model):
        return [F.log_softmax(model(images).cpu().double(), 1) for images, _ in batches]


def mean_losses(model: nn.Module, batches: list, reference: list[Tensor]) -> dict:
    """Losses of a network on a list of batches, mean over the images, in nats.

    Args:
        reference: `log_probabilities` of the network to compare with, on the same batches.

    Returns:
        {"cross-entropy": with the labels, "divergence": KL(reference || model)}.
    """
    answers = log_probabilities(model, batches)
    labels = torch.cat([labels for _, labels in batches]).cpu()
    ours, theirs = torch.cat(answers), torch.cat(reference)
    return {
        "cross-entropy": F.nll_loss(ours, labels).item(),
        "divergence": F.kl_div(ours, theirs, reduction="batchmean", log_target=True).item(),
    }
