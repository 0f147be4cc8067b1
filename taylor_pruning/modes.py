"""Contexts that change the mode of a model and give it back as it was."""

from contextlib import contextmanager


@contextmanager
def frozen(model):
    """While open, the model is in eval mode and its parameters require no gradient; then all is as it was."""
    modes = {module: module.training for module in model.modules()}
    wanted = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        model.eval().requires_grad_(False)
        yield model
    finally:
        for module, mode in modes.items():
            module.training = mode
        for parameter, flag in wanted.items():
            parameter.requires_grad_(flag)
