"""What a forward leaves in the attributes of modules."""

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy

import torch
from torch import nn

NO_STATE = {"_parameters", "_buffers", "_modules", "training"}  # of a module: what holds its parts, and the mode
CONTAINERS = (dict, list, set, deque)  # whose content can change
DEPTH = 4  # of nested containers


def fill(container, items) -> None:
    """Gives one of CONTAINERS this content in the place of its own."""
    container.clear()
    (container.extend if isinstance(container, (list, deque)) else container.update)(items)


def containers(value) -> Iterator:
    """The value, if its content can change, and all such values in it."""
    level = [value]
    for _ in range(DEPTH + 2):
        yield from (held for held in level if isinstance(held, CONTAINERS))
        nested = (held.values() if isinstance(held, dict) else held for held in level)
        level = [item for items in nested for item in items if isinstance(item, (*CONTAINERS, tuple))]


@contextmanager
def state_kept(model: nn.Module) -> Iterator[None]:
    """Gives modules their buffers and attributes back at the end: a forward may count its calls, average, or keep results.

    Nothing is given back where the first forward has made layers: the network would make others in the next one.
    """
    parameters = set(model.parameters())
    found = {id(held): held for module in model.modules() for held in containers(vars(module))}
    contents = [(container, copy(container)) for container in found.values()]
    items = [item for _, held in contents for item in (held.values() if isinstance(held, dict) else held)]
    tensors = {id(t): t for t in items if type(t) is not nn.Parameter and isinstance(t, torch.Tensor)}
    values = [(t, t.detach().clone()) for t in tensors.values() if not t.is_inference()]
    try:
        yield
    finally:
        if parameters.issuperset(model.parameters()):
            _give_back(contents, values)


@torch.no_grad()
def _give_back(contents, values):
    for container, content in contents:
        if not _holds(container, content):
            fill(container, content)
    for tensor, value in values:
        if not torch.equal(tensor, value):
            tensor.resize_(value.shape).copy_(value)


def _holds(container, content):
    """Whether a container holds the very items of its copy."""
    if isinstance(container, dict):
        return list(container) == list(content) and all(container[key] is item for key, item in content.items())
    if isinstance(container, (list, deque)):
        return len(container) == len(content) and all(a is b for a, b in zip(container, content, strict=True))
    return container == content


def attributes_of(model: nn.Module) -> dict[str, object]:
    """{name: value} of everything that modules hold besides parts and parameters; containers are copied."""
    return {
        f"{name}.{attribute}".lstrip("."): _held(value)
        for name, module in model.named_modules()
        for attribute, value in [*vars(module).items(), *module._buffers.items()]
        if attribute not in NO_STATE
    }


def _held(value, depth=0):
    """The value, with lists, dictionaries and sets in it copied, so that changes in them show."""
    if depth < DEPTH and isinstance(value, dict):
        return {key: _held(item, depth + 1) for key, item in value.items()}
    if depth < DEPTH and isinstance(value, (list, tuple, set, deque)):
        return [_held(item, depth + 1) for item in value]
    return value


def changed(before: dict, after: dict) -> list[str]:
    """Names of the attributes that are new or hold something else. A tensor that was written to is the same tensor."""
    return [name for name, value in after.items() if name not in before or not _same(before[name], value)]


def _same(a, b):
    if a is b:
        return True
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_same, a, b))
    return isinstance(a, (bool, int, float, str)) and type(a) is type(b) and a == b
