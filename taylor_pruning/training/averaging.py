"""An exponential moving average of a model's weights and buffers."""

import itertools

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from taylor_pruning.surgery.copying import copy_of


class WeightAverage:
    """`model`, a copy of the given one, moves towards it: w <- decay w + (1 - decay) w_model at every `update`.

    Buffers are averaged too; those of whole numbers are copied. (torch's AveragedModel reads a counter on the device at
    every update, and so waits for it.)
    """

    def __init__(self, model: nn.Module, decay: float):
        self.model = copy_of(model)
        self._average = get_ema_multi_avg_fn(decay)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        by_dtype: dict[torch.dtype, list[tuple]] = {}
        for average, current in zip(_tensors(self.model), _tensors(model), strict=True):
            if average.is_floating_point():
                by_dtype.setdefault(average.dtype, []).append((average, current))
            else:
                average.copy_(current)
        for pairs in by_dtype.values():
            self._average(*map(list, zip(*pairs, strict=True)), None)


def _tensors(model: nn.Module):
    return itertools.chain(model.parameters(), model.buffers())
