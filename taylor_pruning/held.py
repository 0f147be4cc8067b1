"""Tensors that Python objects of any type hold, and what modules keep under names."""

import copy
import dataclasses
import functools
import gc
import types
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Iterator

import torch
from torch import fx, nn

PLAIN = (dict, list, tuple)
OF_MODULES = frozenset(vars(nn.Module()))  # what every module keeps for itself
DEPTH = 4  # of settings in settings
PROTOCOL = ("__new__", "__deepcopy__", "__reduce__", "__reduce_ex__", "__getstate__")  # how an object is copied
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


def own_values(module: nn.Module) -> dict[str, tuple[dict | list, str | int]]:
    """{name: (container, key)}: where a module keeps its values; those of its dictionaries, lists, settings and the named
    arguments of `functools.partial`, and of such in them, as "settings.stages.0.dim"."""
    found: dict[str, tuple[dict | list, str | int]] = {}
    seen = set()

    def visit(inner, prefix, depth):
        for key, value in enumerate(inner) if isinstance(inner, list) else inner.items():
            if inner is vars(module) and key in OF_MODULES or type(key) not in (str, int):
                continue
            name = f"{prefix}{key}"
            found[name] = inner, key
            nested = _values_in(value)
            if nested and depth < DEPTH and id(nested) not in seen:
                seen.add(id(nested))
                visit(nested, f"{name}.", depth + 1)

    visit(vars(module), "", 0)
    return found


def _values_in(item):
    """The container in which it keeps values; None of what keeps none, and of a list of numbers, which is one value."""
    if type(item) is functools.partial:
        return item.keywords
    if type(item) is list:
        return None if all(type(value) in (int, float) for value in item) else item
    return item if type(item) in (dict, OrderedDict) else vars(item) if _has_values(item) else None


def _has_values(item):
    """Whether it is an object with attributes that `copy.deepcopy` copies one by one."""
    kind = type(item)
    if kind in (types.SimpleNamespace, Namespace):
        return True
    if isinstance(item, (type, nn.Module)) or kind in copy._deepcopy_dispatch or not hasattr(item, "__dict__"):
        return False
    return copies_like(kind, object, "__setstate__")


def copies_like(kind: type, base: type, *more: str) -> bool:
    """Whether `copy.deepcopy` copies the type as it does its base: it overrides no method that says how, nor one of `more`."""
    return all(getattr(kind, name, None) == getattr(base, name, None) for name in (*PROTOCOL, *more))


def _referents(item):
    if isinstance(item, types.FunctionType):  # not the module in which it is defined
        return [item.__closure__, item.__defaults__, item.__kwdefaults__]
    return gc.get_referents(item)
