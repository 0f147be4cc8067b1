"""Copies a model: with tensors of its own, with the model's, or with smaller ones."""

import copy
import pickle
from collections import OrderedDict
from types import FunctionType

import torch
from torch import nn

from taylor_pruning.errors import InputError
from taylor_pruning.held import copies_like, held_tensors
from taylor_pruning.memory import raise_out_of_memory

SHARED = (bool, int, float, str, type(None), torch.dtype, torch.jit.ScriptFunction)  # types of values that never change
COPY_ERRORS = (RuntimeError, TypeError, pickle.PickleError)


def copy_of(model, replaced=None):
    """A deep copy with the tensors in `replaced` {id: tensor} in the place of its own.

    A tensor that a forward left behind in an attribute or an object (a kept activation, the weight that pruning masks, weight
    norm or spectral norm compute before every forward) is copied without its history.

    Raises InputError if something in the model cannot be copied.
    """
    memo = dict(replaced or {})
    for tensor, _ in held_tensors(model, without=(FunctionType,)):  # copies share functions
        if tensor.grad_fn is not None:  # autograd refuses to copy it
            memo.setdefault(id(tensor), tensor.detach().clone())
    try:
        copied = _copied(model, memo)
        _keep_what_is_lost(model, copied, memo)
        return copied
    except COPY_ERRORS as error:
        raise_out_of_memory(error)
        raise InputError(
            f"{type(model).__name__} cannot be copied{_what_fails(model)} ({str(error).splitlines()[0]}); make it hold no "
            "locks, open files, generators or views of dictionaries"
        ) from error


def _what_fails(model):
    """Names the first attribute of a module that cannot be copied; "" if each alone can."""
    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            memo = {id(held): held for held in (*model.modules(), *(tensor for tensor, _ in held_tensors(value)))}
            try:
                copy.deepcopy(value, memo)
            except COPY_ERRORS:
                return f", for its {name}.{attribute}".replace(" .", " ")
    return ""


def _copied(value, memo):
    """`copy.deepcopy`, which spends most of its time on the twenty dictionaries of a module, nearly all of them empty."""
    if _is_shared(value):
        return value
    if id(value) in memo:
        return memo[id(value)]
    kind = type(value)
    if kind is set and not value:
        return memo.setdefault(id(value), set())
    if kind in (dict, OrderedDict):
        copied = memo[id(value)] = kind()
        copied.update((copy.deepcopy(key, memo), _copied(item, memo)) for key, item in value.items())
        return copied
    if isinstance(value, nn.Module) and copies_like(kind, nn.Module, "__slots__"):
        copied = memo[id(value)] = kind.__new__(kind)
        copied.__setstate__({name: _copied(item, memo) for name, item in vars(value).items()})
        return copied
    return copy.deepcopy(value, memo)


def _keep_what_is_lost(model, copied, memo):
    """Gives a copy the modes and forward hooks, which a `torch.fx.GraphModule` does not copy."""
    of_name = dict(model.named_modules())
    for name, module in copied.named_modules():
        own, kept = vars(of_name.get(name, module)), vars(module)
        hooks = [key for key in own if "forward" in key and "hooks" in key and own[key] and not kept.get(key)]
        kept.update((key, _copied(own[key], memo)) for key in hooks)
        if own.get("training") not in (None, kept.get("training")):
            module.training = own["training"]


def _is_shared(value):
    """Whether copies may share the value, because it never changes."""
    kind = type(value)
    return kind in SHARED or kind is tuple and all(type(item) in SHARED for item in value)


def structure_of(model):
    """A copy of the modules that shares parameters and buffers with the model; other tensors are its own."""
    return copy_of(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})
