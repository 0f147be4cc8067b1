"""Copies a model: with tensors of its own, with the model's, or with smaller ones."""

import copy

import torch

from taylor_pruning.errors import InputError


def copy_of(model, replaced=None):
    """A deep copy with the tensors in `replaced` {id: tensor} in the place of its own.

    A tensor that a forward left behind as a plain attribute (a kept activation, the weight that pruning masks, weight norm
    or spectral norm compute before every forward) is copied without its history.

    Raises InputError if something in the model cannot be copied.
    """
    memo = dict(replaced or {})
    for module in model.modules():
        for value in vars(module).values():
            for tensor in _computed(value):
                memo.setdefault(id(tensor), tensor.detach().clone())
    try:
        return copy.deepcopy(model, memo)
    except (RuntimeError, TypeError) as error:
        raise InputError(
            f"{type(model).__name__} cannot be copied ({str(error).splitlines()[0]}); make it hold no locks, "
            "open files or generators"
        ) from error


def structure_of(model):
    """A copy of the modules that shares every tensor with the model."""
    tensors = {}
    for module in model.modules():
        for value in vars(module).values():
            tensors.update((id(t), t) for t in _tensors(value))
    return copy_of(model, tensors)


def _tensors(value, depth=0):
    """All tensors in nested containers."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (dict, list, tuple, set)) and depth < 4:
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item, depth + 1)


def _computed(value):
    """Those that belong to a graph of autograd and have no deep copy."""
    return (tensor for tensor in _tensors(value) if tensor.grad_fn is not None)
