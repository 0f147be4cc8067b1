"""Finds the forward hooks that change what passes through a module. A symbolic trace does not see them."""

import torch
from torch import nn

from taylor_pruning.surgery.copying import copy_of
from taylor_pruning.surgery.proof import tensors_of


@torch.no_grad()
def modules_with_changing_hooks(model: nn.Module, x: torch.Tensor) -> list[str]:
    """Names of the modules with a forward hook or pre-hook that returns other tensors or changes them in place.

    A copy of the model runs on x, once in evaluation and once in training mode, if there are any hooks.
    Hooks that only look, such as those that record activations, are not counted.
    """
    if not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules()):
        return []
    model, found = copy_of(model), {}
    for name, module in model.named_modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key, hook in hooks.items():
                hooks[key] = _watched(hook, lambda name=name: found.setdefault(name))
    with torch.random.fork_rng(devices=[]):
        for training in (False, True):
            for module in model.modules():
                module.training = training
            model(x)
    return list(found)


def _watched(hook, report):
    """The hook, with a report of every call that changes something. Its last argument is what it may change."""

    def watched(module, *passed):
        tensors = list(tensors_of(passed))
        versions = [t._version for t in tensors]
        result = hook(module, *passed)
        known = {id(t) for t in tensors}
        if any(id(t) not in known for t in tensors_of(result)) or versions != [t._version for t in tensors]:
            report()
        return result

    return watched
