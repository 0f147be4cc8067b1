"""The tensors of a network by name: a `state_dict` may be anything that a network makes of them."""

import torch
from torch import Tensor, nn


def stored(model: nn.Module) -> dict[str, Tensor]:
    """{name: tensor} of every parameter and buffer, detached, each once; they are the model's own."""
    return {name: tensor.detach() for name, tensor in (*model.named_parameters(), *model.named_buffers())}


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the `stored` tensors."""
    return {name: tensor.clone() for name, tensor in stored(model).items()}


@torch.no_grad()
def restore(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Gives the model the values of a `snapshot`; a buffer that the forward has made since stays.

    Raises KeyError for a parameter that the snapshot lacks, RuntimeError for other shapes.
    """
    parameters = dict(model.named_parameters())
    for name, tensor in stored(model).items():
        if name in tensors or name in parameters:
            value = tensors[name].to(tensor.device)
            if not torch.equal(tensor, value):  # an expanded tensor has no room for other values
                tensor.copy_(value)
