"""Tensors of a recording that outlive it, because the forward keeps them outside of modules: in a global or class dictionary,
a list, a closure, a `functools.lru_cache`. They have no values or the wrong batch, and would be read by the next call."""

import gc
from collections import deque
from contextlib import contextmanager
from copy import copy
from functools import _lru_cache_wrapper
from types import CellType, FrameType
from weakref import ref

from torch import nn

CONTAINERS = (dict, list, set, deque)
DEPTH = 4  # of containers in containers


def forget(references: list[ref]) -> list:
    """Takes those of the tensors that are still alive out of what holds them; the containers from which it took some.

    A container that is empty then goes out of the one that holds it; a variable or attribute that is such a tensor is None.
    """
    if not any(reference() is not None for reference in references):
        return []
    gc.collect()  # modules and hooks may refer to each other
    held, found = [tensor for reference in references if (tensor := reference()) is not None], []
    for depth in range(DEPTH):
        holders = [h for h in gc.get_referrers(*held) if h is not held and not isinstance(h, FrameType)] if held else []
        wanted, held = {id(item) for item in held}, []
        for holder in holders:
            owner = _owner(holder)
            if owner is None and isinstance(holder, CONTAINERS):
                _take_out(holder, wanted)
                found.append(holder)
            elif isinstance(holder, _lru_cache_wrapper):
                holder.cache_clear()
                found.append(holder)
            elif depth == 0 and isinstance(holder, CellType):
                holder.cell_contents = None
            elif depth == 0 and owner is not None:
                for name in [name for name, value in vars(owner).items() if id(value) in wanted]:
                    setattr(owner, name, None)
            if isinstance(holder, tuple) or isinstance(holder, CONTAINERS) and not holder:
                held.append(holder)
    return found


def _owner(holder):
    """The module, class or object whose attributes the holder has; None if it is a container."""
    if not isinstance(holder, dict):
        return holder if hasattr(holder, "__dict__") and not isinstance(holder, (*CONTAINERS, nn.Module)) else None
    owners = gc.get_referrers(holder)
    return next((o for o in owners if isinstance(o, type) or getattr(o, "__dict__", None) is holder), None)


def _take_out(container, wanted):
    if isinstance(container, dict):
        for key in [key for key, value in container.items() if id(value) in wanted]:
            del container[key]
    else:
        _fill(container, [item for item in container if id(item) not in wanted])


def _fill(container, items):
    container.clear()
    (container.extend if isinstance(container, (list, deque)) else container.update)(items)


@contextmanager
def unchanged(containers: list):
    """While open, forwards run; then the containers hold again what they held before, and caches of functions nothing."""
    contents = [(c, copy(c)) for c in containers if isinstance(c, CONTAINERS)]
    try:
        yield
    finally:
        for container, items in contents:
            _fill(container, items)
        for function in containers:
            if isinstance(function, _lru_cache_wrapper):
                function.cache_clear()
