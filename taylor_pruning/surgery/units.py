"""What a channel graph is made of: units, layers, places of gates, readers, costs."""

import math
from collections import defaultdict
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch
from torch import fx

from taylor_pruning.checks import describe
from taylor_pruning.errors import InputError


class Unit(NamedTuple):
    """The smallest set of filters that must be removed together."""

    index: int
    filters: tuple  # ((layer name, filter index), ...)


@dataclass(frozen=True)
class LayerInfo:
    """One conv or prunable linear layer: how many filters, to which unit each belongs, why some may not be removed."""

    filters: int
    unit_of: torch.Tensor  # [filters] unit index, -1 where protected
    reason: str | None  # why filters are protected, None if all may be removed

    @property
    def removable(self):
        return self.unit_of >= 0


@dataclass(frozen=True)
class GateSite:
    """A place where gates multiply activations: the result of one operation of the graph."""

    module: str  # in whose forward the operation runs
    call: int  # how many sites of that module come before
    dim: int  # channel dimension of that result
    units: torch.Tensor  # [channels] unit index, -1 for channels without a gate
    node: fx.Node = field(default=None, repr=False, compare=False)
    batch_dim: int = 0
    blocks: int = 1  # the rows of every sample, where there are several, lie in so many places: 2 behind cat([x, y])


@dataclass(frozen=True)
class Reader:
    """A conv or linear layer that reads channels of units."""

    layer: str
    groups: int
    units: torch.Tensor  # [input channels or features] unit index, -1 for what always stays
    positions: int  # consecutive features of a linear layer's input that are one flattened channel
    is_linear: bool
    nodes: tuple = field(default=(), repr=False, compare=False)  # where the graph applies it
    blocks: dict = field(default_factory=dict, repr=False, compare=False)  # {node: see GateSite} where it is not 1
    # {node: dimension of its input and result along which samples follow each other} where it is not 0
    batch_dims: dict = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def places(self):
        """[(units [n], their channels [n, m] in a group)] of the units that have m channels each, for every m.

        All groups of a grouped conv hold the same units.
        """
        channels = self.units[:: self.positions][: len(self.units) // self.groups // self.positions]
        places, kinds = defaultdict(list), defaultdict(dict)
        for channel, unit in enumerate(channels.tolist()):
            if unit >= 0:
                places[unit].append(channel)
        for unit, found in places.items():
            kinds[len(found)][unit] = found
        return [(torch.tensor([*kind]), torch.tensor([*kind.values()])) for kind in kinds.values()]

    def channels_of(self, units):
        """[n] channels, within a group, of the units that have some here, sorted."""
        wanted = torch.as_tensor(units)
        found = [at[torch.isin(members, wanted)].flatten() for members, at in self.places]
        return torch.cat(found).sort().values

    def samples_first(self, node, x):
        """The input or result x of the layer at a node, with the dimension of the samples first."""
        return x.movedim(self.batch_dims.get(node, 0), 0)

    def to_rows(self, x):
        """The layer's input x [B, channels, ...] or [B, ..., features] as [B, groups, channels of a group, positions]."""
        if self.is_linear:
            x = x.reshape(len(x), -1, x.shape[-1]).mT
        return x.reshape(len(x), self.groups, len(self.units) // self.groups // self.positions, -1)

    def from_rows(self, rows, shape):
        """Inverse of `to_rows` for an input of that shape."""
        if self.is_linear:
            rows = rows.reshape(len(rows), len(self.units), -1).mT
        return rows.reshape(shape)


@dataclass(frozen=True)
class CostTerm:
    """A share of the costs: `parameters` and `macs` for every element of the product of the dimensions."""

    parameters: float
    macs: float
    sizes: tuple  # full length of every dimension along which ids run
    dims: tuple  # for each of them: [length] unit index or -1


def group(items, labels):
    """{label: tuple of the items that have it}, in ascending order of the labels [len(items)]."""
    values, counts = labels.unique(return_counts=True)
    ordered = [items[i] for i in labels.argsort(stable=True).tolist()]
    ends = counts.cumsum(0)
    bounds = zip(values.tolist(), (ends - counts).tolist(), ends.tolist(), strict=True)
    return {value: tuple(ordered[start:end]) for value, start, end in bounds}


def by_filter(weight, dim, filters):
    """The weight as [filters, ...], where its filters run along `dim`.

    A transposed conv in groups has a shorter `dim`, of one group's filters; its other channels are those of all groups.
    """
    weight = weight.movedim(dim, 0)
    if len(weight) < filters:
        weight = weight.unflatten(1, (filters // len(weight), -1)).movedim(1, 0).flatten(0, 1)
    return weight


def by_layers(units):
    """{frozenset of layer names: indices of the units that have filters in exactly these layers}."""
    found = defaultdict(list)
    for unit in units:
        found[frozenset(name for name, _ in unit.filters)].append(unit.index)
    return dict(found)


def by_sample(x, images, blocks):
    """x [rows, ...] with all rows of the first image first, then all of the second, and so on; see GateSite for `blocks`."""
    return x if blocks == 1 else x.unflatten(0, (blocks, images, -1)).transpose(0, 1).flatten(0, 2)


def check_gates(gates, units):
    """Raises InputError unless there is one gate a unit (and sample)."""
    if not isinstance(gates, torch.Tensor) or gates.dim() not in (1, 2) or gates.shape[-1] != units:
        raise InputError(
            f"the gates are {describe(gates)}; give a tensor [{units}], one gate a unit, or [batch, {units}]"
        )


def gate_sites(places, unit_of_id):
    """The places of one mode at which some channel belongs to a unit, as a tuple of `GateSite`.

    Args:
        places: see surgery.analysis.Analysis.
        unit_of_id: [ids] unit index or -1.
    """
    calls, sites = defaultdict(int), []
    for node, along, dim, batch_dim, blocks in places:
        units = unit_of_id[along]
        if (units >= 0).any():
            module = node.meta.get("module", "")
            sites.append(GateSite(module, calls[module], dim, units, node, batch_dim, blocks))
            calls[module] += 1
    return tuple(sites)


def readers_of(layers, tensors, blocks):
    """Yields the `Reader`s of surgery.layers.Layers; `tensors` as in ChannelGraph, `blocks` {node that is read: blocks}."""
    for layer, (nodes, groups, linear) in layers.readers.items():
        units = tensors.get((f"{layer}.weight" if layer else "weight", 1))
        if units is None or (units < 0).all():
            continue
        runs = units.unique_consecutive(return_counts=True)[1].tolist()
        several = {n: b for n in nodes if (b := blocks.get(n.all_input_nodes[0], 1)) > 1}
        shapes = {n: n.all_input_nodes[0].meta["shape"] for n in nodes} if linear else {}
        batch_dims = {n: dim for n, shape in shapes.items() if (dim := sample_dim(shape, layers.batch))}
        positions = math.gcd(*runs) if linear else 1
        yield Reader(layer, groups, units.repeat(groups), positions, linear, tuple(nodes), several, batch_dims)


def sample_dim(shape, batch):
    """The dimension of a linear layer's input or result along which samples follow each other; 1 where tokens come first."""
    return shape.index(batch) if batch in shape[1:-1] else 0


def cost_terms(parameters, tensors, products):
    """Every parameter and every product of the forward as a `CostTerm`.

    Args:
        parameters: (name, parameter) of each. tensors, products: as in ChannelGraph.
    """
    dims = defaultdict(list)
    for (name, _), units in tensors.items():
        dims[name].append(units)
    terms = []
    for number, macs, along in (
        *((parameter.numel(), 0, dims[name]) for name, parameter in parameters),
        *((0, number, along) for number, along in products),
    ):
        sizes = tuple(map(len, along))
        elements = math.prod(sizes)
        terms.append(CostTerm(number / elements, macs / elements, sizes, tuple(along)))
    return terms
