"""Tensors of a recording that outlive it, because the forward keeps them outside of modules: in a global or class dictionary,
a list, a closure, a `functools.lru_cache`. They have no values or the wrong batch, and would be read by the next call."""

import gc
from contextlib import contextmanager, suppress
from copy import copy
from functools import _lru_cache_wrapper
from types import CellType, FrameType
from weakref import ref

from torch import nn

from taylor_pruning.kept_state import CONTAINERS, DEPTH, fill


def forget(references: list[ref]) -> list:
    """Takes those of the tensors that are still alive out of what holds them; the containers from which it took some.

    A variable or attribute that is such a tensor becomes None, as before the first call. Containers stay, also empty ones. But
    an empty one under a key that is no name, such as a size, was an entry of a cache, and goes too.
    """
    if not any(reference() is not None for reference in references):
        return []
    gc.collect()  # modules and hooks may refer to each other
    held, holders, found = [tensor for reference in references if (tensor := reference()) is not None], [], []
    for _ in range(DEPTH):  # of containers in containers
        if not held:
            break
        mine = {id(held), id(holders), id(found)}
        holders = [h for h in gc.get_referrers(*held) if id(h) not in mine and not isinstance(h, FrameType)]
        owners = _owners([h for h in holders if isinstance(h, dict)])
        wanted = {id(item): isinstance(item, CONTAINERS) for item in held}
        held = [h for h in holders if isinstance(h, tuple) and any(wanted.get(id(item)) is False for item in h)]
        for holder in holders:
            if isinstance(holder, _lru_cache_wrapper):
                holder.cache_clear()
                found.append(holder)
            elif isinstance(holder, CONTAINERS) and id(holder) not in owners:
                if _take_out(holder, wanted):
                    found.append(holder)
                    held += [] if holder else [holder]
            elif any(wanted.values()):  # what is left belongs to its owner
                continue
            elif isinstance(holder, CellType):
                holder.cell_contents = None
            elif not isinstance(holder, (tuple, nn.Module)):
                _unset(owners.get(id(holder), holder), wanted)
    return found


def _owners(dicts):
    """{id of a dictionary: the module, class or object whose attributes it has}, of those that have an owner."""
    ids, found = {id(d) for d in dicts}, {}
    for owner in gc.get_referrers(*dicts) if dicts else ():
        if isinstance(owner, type):
            found.update((id(d), owner) for d in gc.get_referents(owner) if id(d) in ids)
        elif id(attributes := getattr(owner, "__dict__", None)) in ids:
            found[id(attributes)] = owner
    return found


def _unset(owner, wanted):
    for name, value in list(getattr(owner, "__dict__", {}).items()):
        if id(value) in wanted:
            with suppress(AttributeError, TypeError):  # of what cannot be changed
                setattr(owner, name, None)


def _take_out(container, wanted):
    """Takes out tensors and tuples, of a dictionary empty containers too, and says whether there were some.

    wanted: {id: whether it is an empty container}.
    """
    if isinstance(container, dict):
        left = {
            k: v for k, v in container.items() if wanted.get(id(v), True) and (id(v) not in wanted or type(k) is str)
        }
    else:
        left = [item for item in container if wanted.get(id(item), True)]
    if changed := len(left) < len(container):
        fill(container, left)
    return changed


@contextmanager
def unchanged(containers: list, emptied: bool = False):
    """While open, forwards run, with empty containers if asked; then these hold again what they held before, and caches of
    functions nothing."""
    contents = [(c, copy(c)) for c in containers if isinstance(c, CONTAINERS)]
    for container, _ in contents if emptied else ():
        container.clear()
    try:
        yield
    finally:
        for container, items in contents:
            fill(container, items)
        for function in containers:
            if isinstance(function, _lru_cache_wrapper):
                function.cache_clear()
