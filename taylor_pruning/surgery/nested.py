"""Tensors in nested lists, tuples, dictionaries and dataclasses, as forwards take and return them."""

import copy
import dataclasses
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Slot:
    """The place of a tensor: its position among the tensors of a nested structure."""

    index: int


def map_tensors(value, function, kinds=torch.Tensor):
    """`value` with every tensor in nested lists, tuples, dicts and dataclasses replaced by function(tensor)."""
    if isinstance(value, kinds):
        return function(value)
    if isinstance(value, dict):
        items = {key: map_tensors(item, function, kinds) for key, item in value.items()}
        if type(value) is dict:
            return items
        result = copy.copy(value)
        for key, item in items.items():
            result[key] = item
        return result
    if isinstance(value, (list, tuple)):
        items = [map_tensors(item, function, kinds) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items) if items else value
    if dataclasses.is_dataclass(value) and not isinstance(value, (type, Slot)):
        result = copy.copy(value)
        for item in dataclasses.fields(value):
            object.__setattr__(result, item.name, map_tensors(getattr(value, item.name), function, kinds))
        return result
    return value


def tensors_in(value):
    """All tensors in nested lists, tuples, dicts and dataclasses, in the order of `map_tensors`."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        items = value.values()
    elif isinstance(value, (list, tuple)):
        items = value
    elif dataclasses.is_dataclass(value) and not isinstance(value, (type, Slot)):
        items = [getattr(value, item.name) for item in dataclasses.fields(value)]
    else:
        return []
    return [tensor for item in items for tensor in tensors_in(item)]
