"""Contexts that change the mode of a model and give it back as it was."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from taylor_pruning.kept_state import state_kept


@contextmanager
def modes_kept(*models: nn.Module) -> Iterator[None]:
    """Gives every submodule its train or eval mode back at the end."""
    modes = {module: module.training for model in models for module in model.modules()}
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def requirements_kept(model: nn.Module) -> Iterator[None]:
    """Lets every parameter require a gradient at the end if it did at the beginning."""
    wanted = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        yield
    finally:
        for parameter, flag in wanted.items():
            parameter.requires_grad_(flag)


@contextmanager
def own_precision() -> Iterator[None]:
    """Without the caller's torch.autocast: under it the sums of scores and fits would be in half precision."""
    with ExitStack() as stack:
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


@contextmanager
def in_evaluation(*models: nn.Module) -> Iterator[None]:
    """While open, the models are in eval mode; at the end they hold what they held, whatever their forwards have written."""
    with modes_kept(*models), ExitStack() as stack:
        for model in models:
            stack.enter_context(state_kept(model.eval()))
        yield


@contextmanager
def frozen(model: nn.Module) -> Iterator[nn.Module]:
    """The same, and its parameters require no gradient, and the caller's torch.autocast is off."""
    with in_evaluation(model), requirements_kept(model), own_precision():
        yield model.requires_grad_(False)


def set_mode(model: nn.Module, training: bool) -> nn.Module:
    """Sets the mode of all submodules, by way of training mode: there, networks drop what they have kept for evaluation."""
    return model.train(True).train(training)
