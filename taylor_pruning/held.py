"""Tensors that Python objects of any type hold, and what modules keep under names."""

import copy
import dataclasses
import gc
import types
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Iterator

import torch
from torch import fx, nn

PLAIN = (dict, list, tuple)
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


def public_values(module: nn.Module) -> dict[str, tuple[dict, str]]:
    """{name: (dictionary, key)}: where a module keeps its values; those of its dictionaries and settings as "settings.dim"."""
    found: dict[str, tuple[dict, str]] = {}
    for name, value in vars(module).items():
        if name.startswith("_") or name == "training":
            continue
        found[name] = vars(module), name
        inner = value if type(value) in (dict, OrderedDict) else vars(value) if _has_values(value) else {}
        keys = (key for key in inner if type(key) is str and not key.startswith("_"))
        found.update((f"{name}.{key}", (inner, key)) for key in keys)
    return found


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
