"""Refuses networks whose outputs depend on the call before: a graph repeats the recorded call, a cut network would not."""

import torch
from torch import nn

from taylor_pruning.errors import InputError
from taylor_pruning.modes import set_mode
from taylor_pruning.surgery.copying import copy_of
from taylor_pruning.surgery.draws import equal_draws
from taylor_pruning.surgery.nested import map_tensors, tensors_in
from taylor_pruning.surgery.proof import alike, tensors_of
from taylor_pruning.surgery.recording import call, typical_tensor
from taylor_pruning.surgery.trial_inputs import FORWARD_ERRORS, random_inputs


def check_calls(model: nn.Module, example, kept: dict[bool, list[str]]) -> None:
    """Checks that the outputs of a call do not depend on the call before.

    Args:
        model: the network; copies of it run. example: see ChannelGraph.
        kept: {training mode: attributes that a forward in it changes}; where there are none, nothing is run.

    Raises InputError naming the attributes if the outputs depend on them.
    """
    for training, attributes in kept.items():
        if attributes and not _repeats(model, example, training):
            raise InputError(
                f"{type(model).__name__} gives other outputs on a second call, because it keeps something from the first "
                f"in {', '.join(attributes[:5])}; make it an input and an output of the forward"
            )


@torch.no_grad()
def _repeats(model, example, training):
    """Whether a network that has been called gives the outputs of one that has not. True if it does not run: a proof says so.

    What a call writes into buffers, as a BatchNorm does, a graph repeats: both go on from the same buffers.
    """
    tensor = typical_tensor(model, tensors_in(example)[0])
    used, fresh = (set_mode(copy_of(model), training) for _ in range(2))
    x = random_inputs(example, 3, tensor.dtype, tensor.device)
    buffers = list(used.buffers())
    with equal_draws(tensor.device):
        try:
            call(used, map_tensors(x, lambda t: t.flip(0) / 2 if t.is_floating_point() else t.clone()))
            for own, written in zip(fresh.buffers(), buffers, strict=True):
                own.copy_(written)
            outputs = [list(tensors_of(call(network, map_tensors(x, torch.Tensor.clone)))) for network in (fresh, used)]
        except FORWARD_ERRORS:
            return True
    return alike(*outputs, tensor.dtype)
