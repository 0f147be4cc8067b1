"""Squeezing before the cut: filters that will go are faded out while the network trains, so that the cut changes nothing.

A cut leaves its damage to the training behind it. Here the gates of the chosen units fall from 1 to 0 over training steps,
and the other filters take over in time (growing penalties: Wang et al. 2021, arXiv:2012.09243, "GReg").
"""

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

CLOSED_AFTER = 0.8  # share of the forwards; the others train, and measure BatchNorm statistics, at closed gates


class SqueezedNetwork(nn.Module):
    """Runs `model` with gates that close, a little at every forward in training mode.

    The gates of a forward are 1 - (share of the forwards that were made / 0.8), at least 0, for the units that go.

    Args:
        model: the network, whose parameters are trained.
        gated: context in which `model` runs with the given gates [units] (ChannelGraph.gated).
        closing: [units] bool, the units that go.
        forwards: number of training forwards in all.
    """

    def __init__(
        self, model: nn.Module, gated: Callable[[Tensor], AbstractContextManager], closing: Tensor, forwards: int
    ):
        super().__init__()
        self.model, self.gated, self.forwards, self.made = model, gated, forwards, 0
        self.register_buffer("closing", closing)

    def gates(self) -> Tensor:
        """[units] gates of the next forward."""
        share = min(1.0, self.made / max(1.0, CLOSED_AFTER * self.forwards))
        like = next(self.model.parameters())
        return 1 - share * self.closing.to(like)

    def forward(self, images: Tensor) -> Tensor:
        with self.gated(self.gates()):
            logits = self.model(images)
        if self.training and torch.is_grad_enabled():
            self.made += 1
        return logits
