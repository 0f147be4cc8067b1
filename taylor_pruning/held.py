"""Tensors that Python objects of any type hold."""

import dataclasses
import gc
import types
from collections.abc import Iterator

import torch
from torch import fx

PLAIN = (dict, list, tuple)
WITHOUT = (type, types.ModuleType, types.CodeType, fx.Node, fx.Graph, str, bytes, int, float)  # hold none of interest


def held_tensors(value, without: tuple = ()) -> Iterator[tuple[torch.Tensor, object]]:
    """(tensor, outermost object that holds it and is no plain container) of all that `value` refers to, at any depth.

    Args:
        without: further types that are not looked into.
    """
    found, seen = [(value, None)], set()
    while found:
        item, holder = found.pop()
        if id(item) in seen or isinstance(item, (*WITHOUT, *without)):
            continue
        seen.add(id(item))
        if isinstance(item, torch.Tensor):
            yield item, holder
            continue
        if holder is None and type(item) not in PLAIN and not dataclasses.is_dataclass(item):
            holder = item
        found.extend((inner, holder) for inner in _referents(item))


def _referents(item):
    if isinstance(item, types.FunctionType):  # not the module in which it is defined
        return [item.__closure__, item.__defaults__, item.__kwdefaults__]
    return gc.get_referents(item)
