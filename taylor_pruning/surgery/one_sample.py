"""Refuses networks that compute something else for one sample than for several: a graph repeats one of the two forwards."""

import torch

from taylor_pruning.errors import InputError
from taylor_pruning.modes import set_mode
from taylor_pruning.surgery.copying import copy_of
from taylor_pruning.surgery.draws import equal_draws
from taylor_pruning.surgery.nested import map_tensors, tensors_in
from taylor_pruning.surgery.proof import alike, tensors_of
from taylor_pruning.surgery.recording import call, typical_tensor
from taylor_pruning.surgery.trial_inputs import FORWARD_ERRORS, random_inputs


def check_one_sample(graph, examples: list) -> None:
    """Checks that a network gives for one sample the outputs of its graph, in evaluation mode.

    Shapes may differ, where dimensions of one are dropped. A network that does not run on one sample is not checked.

    Args:
        graph: ChannelGraph. examples: inputs of its network, see surgery.trial_inputs; the first that agrees decides, else the
            last on which the network runs.

    Raises InputError if the outputs differ.
    """
    differs = False
    for example in examples:
        try:
            differs = _differs(graph, example)
        except FORWARD_ERRORS:
            continue
        if not differs:
            return
    if differs:
        raise InputError(
            f"{type(graph.model).__name__} computes something else for one sample than for several; make its forward the same "
            "for every size of the batch"
        )


@torch.no_grad()
def _differs(graph, example):
    model, recorded = (set_mode(copy_of(graph.model), False) for _ in range(2))
    tensor = typical_tensor(model, tensors_in(example)[0])
    x = random_inputs(example, 1, tensor.dtype, tensor.device)
    own = _outputs(model, x)
    with graph.on(recorded).executed():
        repeated = _outputs(recorded, x)
    return not alike(own, repeated, tensor.dtype)


def _outputs(network, x):
    with equal_draws(next(iter(tensors_in(x))).device):
        return [tensor.flatten() for tensor in tensors_of(call(network, map_tensors(x, torch.Tensor.clone)))]
