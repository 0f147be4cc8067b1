"""Refuses networks whose copies reach back into them, because a lambda or a hook has captured the network itself."""

from collections import deque
from contextlib import contextmanager

from torch import nn

from taylor_pruning.errors import InputError
from taylor_pruning.surgery.copying import SHARED

CONTAINERS = (dict, list, set, deque)
DEPTH = 4  # of nested containers


def captured_call(name: str) -> InputError:
    """The error on a copy that calls the module `name` of the network from which it was copied."""
    return InputError(
        f"the forward calls module {name or 'of the whole network'} through a lambda or hook that has captured the network, so "
        "that a copy of it would run the layers of the original; use a bound method instead of a lambda that captures the "
        "network, and in a hook the module that it is given"
    )


@contextmanager
def untouched(model: nn.Module):
    """While open, copies of the model run; what they have written into attributes of the model itself is undone.

    Raises InputError if there was anything to undo.
    """
    before = [
        (name, attribute, container, _content(container))
        for name, module in model.named_modules()
        for attribute, container in _containers(vars(module))
    ]
    try:
        yield
    finally:
        written = []
        for name, attribute, container, content in before:
            if keys := _changed(container, content):
                written.append(f"{name}.{attribute or keys[0]}".lstrip("."))
                container.clear()
                (container.extend if isinstance(content, list) else container.update)(content)
        if written:
            raise InputError(
                f"a lambda or hook that has captured the network writes to its attribute {written[0]}, so that a copy of it "
                "would write into the original; use a bound method instead, and in a hook the module that it is given"
            )


def _containers(attributes):
    """(attribute, container) of a module's attributes, which are a container themselves, and of all containers in them."""
    yield "", attributes
    for attribute, value in attributes.items():
        for container in _nested(value):
            yield attribute, container


def _nested(value, depth=0):
    if depth < DEPTH and isinstance(value, (*CONTAINERS, tuple)):
        if isinstance(value, CONTAINERS):
            yield value
        for item in value.values() if isinstance(value, dict) else value:
            yield from _nested(item, depth + 1)


def _content(container):
    kind = next(kind for kind in (dict, set, list) if isinstance(container, kind) or kind is list)
    return kind(container)


def _changed(container, content):
    """The keys of a container under which it holds something else than `content`; tensors are compared by identity."""
    if isinstance(content, set):
        return [*container ^ content]
    if isinstance(content, list):
        container, content = dict(enumerate(container)), dict(enumerate(content))
    keys = container.keys() | content.keys()
    return [k for k in keys if not (k in container and k in content and _alike(container[k], content[k]))]


def _alike(a, b):
    return a is b or type(a) is type(b) and type(a) in SHARED and a == b
