"""Copies a model, with other tensors in the place of some of its own."""

import copy

import torch

from taylor_pruning.errors import InputError


def copy_of(model, replaced=None):
    """A deep copy with the tensors in `replaced` {id: tensor} in the place of its own.

    A tensor that a forward left behind as a plain attribute (a kept activation, the weight that pruning masks, weight norm
    or spectral norm compute before every forward) is copied without its history.

    Raises InputError if another tensor of the model cannot be copied.
    """
    replaced = dict(replaced or {})
    for module in model.modules():
        for value in vars(module).values():
            held = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else [value]
            for tensor in held:
                if torch.is_tensor(tensor) and tensor.grad_fn is not None:
                    replaced.setdefault(id(tensor), tensor.detach().clone())
    try:
        return copy.deepcopy(model, replaced)
    except (RuntimeError, TypeError) as error:
        raise InputError(
            f"{type(model).__name__} cannot be copied ({str(error).splitlines()[0]}); make it hold no tensors computed by "
            "earlier forwards, locks, open files or generators"
        ) from error
