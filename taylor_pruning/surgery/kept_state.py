"""What a forward leaves in the attributes of modules."""

from collections import deque

from torch import nn

NO_STATE = {"_parameters", "_buffers", "_modules", "training"}  # of a module: what holds its parts, and the mode
CONTAINERS = (dict, list, set, deque)  # whose content can change
DEPTH = 4  # of nested containers


def fill(container, items) -> None:
    """Gives one of CONTAINERS this content in the place of its own."""
    container.clear()
    (container.extend if isinstance(container, (list, deque)) else container.update)(items)


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
