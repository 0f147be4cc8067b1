"""The cut: a copy of a network with smaller tensors, and attributes that agree with them."""

from collections import defaultdict

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from taylor_pruning.errors import InputError
from taylor_pruning.held import own_values
from taylor_pruning.modes import modes_kept, set_mode
from taylor_pruning.surgery.copying import copy_of
from taylor_pruning.surgery.layers import owner


def cut(model, tensors, widths, settings, norms, places, stays):
    """A copy of `model` without some units.

    Args:
        tensors: {(parameter or buffer name, dim): [length] unit index or -1}.
        widths: {(module name, attribute, index or None): ([length] unit index or -1, factor)} of numbers that modules hold:
            what is left of the units divided by `factor`.
        settings: {module name: [channels] unit index or -1} of modules with one setting a channel.
        norms: of ChannelIds.
        places: {buffer name: [channels] unit index or -1} of those that hold places of such channels.
        stays: [units + 1] whether a unit stays; the last entry stands for index -1.

    Raises InputError if a layer, or a parameter or buffer of its own, would lose its last channel.
    """
    shared = {id(units): units for units in tensors.values()}
    indices = {key: stays[units].nonzero()[:, 0] for key, units in shared.items()}
    kept = defaultdict(dict)
    for (name, dim), units in tensors.items():
        index = indices[id(units)]
        if not len(index):
            raise InputError(f"{name.rpartition('.')[0] or name} would lose its last channel; remove fewer filters")
        if len(index) < len(units):
            kept[name][dim] = index
    replaced = {}  # id of a tensor of the model: what a deep copy has in its place
    named = dict([*model.named_parameters(), *model.named_buffers()])
    for name, tensor in named.items():
        if name in kept:
            replaced[id(tensor)] = _select(tensor, kept[name])
    for name, (scale, dim) in norms.items():
        if name in kept:
            _keep_scale(replaced, named[name], named[scale], dim, kept[name].get(dim))
    for name, units in places.items():
        now, held = stays[units].cumsum(0) - 1, replaced.get(id(named[name]), named[name])
        replaced[id(named[name])] = now.to(held)[held % len(units)]
    smaller = copy_of(model, replaced)
    for (name, attribute, index), (units, factor) in widths.items():
        _set(smaller.get_submodule(name), attribute, index, int(int(stays[units].sum()) / factor))
    for name in {owner(key) for key in kept}:
        _refresh(smaller.get_submodule(name))
    modules = dict(smaller.named_modules())
    for name, units in settings.items():
        if name in modules:
            _refresh_settings(modules[name], int(stays[units].sum()), len(units))
    with modes_kept(smaller):  # what a network keeps for evaluation has the dense shapes until it is computed anew
        set_mode(smaller, model.training)
    return smaller


def _select(tensor, kept):
    """A new parameter or buffer with the given indices of every dimension, in the memory format of the tensor."""
    data = tensor.detach()
    for dim, index in sorted(kept.items(), key=lambda item: item[0]):  # rows first: they are copied fastest
        data = data.index_select(dim, index.to(data.device))
    data = data.contiguous(memory_format=_memory_format(tensor))
    return nn.Parameter(data, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else data


@torch.no_grad()
def _keep_scale(replaced, weight, scale, dim, rows):
    """Multiplies what scales a weight by what its norm has lost."""
    before, after = (torch.norm_except_dim(tensor, 2, dim) for tensor in (weight, replaced[id(weight)]))
    before = before if rows is None else before.index_select(dim, rows.to(before.device))
    share = torch.where(before > 0, after / before, 1)
    data = replaced.get(id(scale), scale) * share
    replaced[id(scale)] = nn.Parameter(data, scale.requires_grad) if isinstance(scale, nn.Parameter) else data


def _memory_format(tensor):
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(tensor.dim(), torch.contiguous_format)
    return torch.contiguous_format if tensor.is_contiguous() else last


def _set(module, attribute, index, value):
    held, key = own_values(module)[attribute]
    if index is None:
        held[key] = value
        return
    items = list(held[key])
    items[index] = value
    held[key] = type(held[key])(items)


def _stored(module, *names):
    """The first weight of these names, None without any; one that hooks compute before a forward by what they compute it of."""
    for name in (f"{name}{computed}" for name in names for computed in ("_v", "_orig", "")):
        if (weight := getattr(module, name, None)) is not None:
            return weight
    return None


def _refresh(module):
    """Makes attributes that say the shape of a weight agree with it."""
    weight = _stored(module, "weight")
    if hasattr(module, "input_size") and hasattr(module, "hidden_size"):
        weight = _stored(module, "weight_ih_l0", "weight_ih")
        module.input_size = module.input_size if weight is None else weight.shape[1]
    elif weight is None:
        return
    elif weight.dim() == 2 and hasattr(module, "in_features") and hasattr(module, "out_features"):
        module.out_features, module.in_features = weight.shape
    elif weight.dim() == 2 and hasattr(module, "embedding_dim"):
        module.embedding_dim = weight.shape[1]
    elif weight.dim() > 2 and hasattr(module, "in_channels") and hasattr(module, "groups"):
        rows, columns = weight.shape[:2]
        if getattr(module, "transposed", False):
            module.in_channels, module.out_channels = rows, columns * module.groups
        else:
            module.in_channels, module.out_channels = columns * module.groups, rows
    elif isinstance(module, _NormBase):  # which the forward may not call, as where its scale is folded into a kernel
        module.num_features = len(weight)


def _refresh_settings(module, channels, before):
    for attribute in ("num_features", "num_channels", "num_parameters"):
        if getattr(module, attribute, None) == before:
            setattr(module, attribute, channels)
