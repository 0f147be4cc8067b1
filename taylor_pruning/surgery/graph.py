"""Units of filters that must go together, gates that switch them off, and the cut that really removes them."""

import copy
import fnmatch
import math
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.modules.conv import _ConvTransposeNd

from taylor_pruning.checks import check_weights
from taylor_pruning.errors import InputError
from taylor_pruning.surgery.copying import copy_of
from taylor_pruning.surgery.hooks import modules_with_changing_hooks
from taylor_pruning.surgery.proof import CutProof
from taylor_pruning.surgery.tracing import CONVS, ChannelIds, ChannelInterpreter, trace, undisturbed
from taylor_pruning.surgery.wrappers import check_example, unwrapped


class Unit(NamedTuple):
    """The smallest set of filters that must be removed together."""

    index: int
    filters: tuple  # ((layer name, filter index), ...)


@dataclass(frozen=True)
class LayerInfo:
    """One conv or prunable linear layer: how many filters, to which unit each belongs, why some may not go."""

    filters: int
    unit_of: torch.Tensor  # [filters] unit index, -1 where protected
    reason: str | None  # why filters are protected, None if all may be removed

    @property
    def removable(self):
        return self.unit_of >= 0


@dataclass(frozen=True)
class GateSite:
    """A place where gates multiply activations: the output of the `call`-th call of a module in the forward."""

    module: str
    call: int
    dim: int  # channel dimension of that output
    units: torch.Tensor  # [channels] unit index, -1 for channels without a gate


@dataclass(frozen=True)
class Reader:
    """A conv or linear layer that reads channels of units."""

    layer: str
    groups: int
    units: torch.Tensor  # [input channels or features] unit index, -1 for what always stays
    positions: int  # consecutive features of a linear layer's input that are one flattened channel
    is_linear: bool

    def to_rows(self, x):
        """The layer's input x [B, channels, ...] or [B, ..., features] as [B, groups, channels of a group, positions]."""
        if self.is_linear:
            x = x.reshape(len(x), -1, x.shape[-1]).mT
        return x.reshape(len(x), self.groups, len(self.units) // self.groups // self.positions, -1)

    def from_rows(self, rows, shape):
        """What `to_rows` made of an input of that shape, made undone."""
        if self.is_linear:
            rows = rows.reshape(len(rows), len(self.units), -1).mT
        return rows.reshape(shape)


class _Blend(torch.autograd.Function):
    """x + closed * estimate, of which only the estimate is kept for the backward passes, and no copy made at closed = 0."""

    @staticmethod
    def forward(ctx, x, closed, estimate):
        ctx.save_for_backward(estimate)
        ctx.shape = closed.shape
        return x + closed * estimate if closed.any() else x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        (estimate,) = ctx.saved_tensors
        return gradient, (gradient * estimate).sum_to_size(ctx.shape), None


@dataclass(frozen=True)
class CostTerm:
    """A tensor's share of the costs: `parameters` and `macs` for every element of the product of its dimensions."""

    parameters: int
    macs: int
    sizes: tuple  # full length of every dimension that can shrink
    dims: tuple  # for each of them: [length] unit index or -1


class ChannelGraph:
    """Which channels of `model` belong together.

    Args:
        model: any `nn.Module` that `torch.fx` can trace. It is not changed.
        example_input: [N, C, H, W] tensor of the shape that the network is used at. A copy of the model runs it if it
            has operations that are not known by name.
        exclude: patterns (`fnmatch`) of layer names whose filters are never removed.
        prune_linear: also make units of the outputs of hidden fully connected layers.
        verify: run the network with half of all gates closed and without those units, on random inputs, and protect
            units whose removal gives other outputs.

    Attributes:
        units: tuple of the removable `Unit`s.
        layers: {name: LayerInfo} of every conv layer (with `prune_linear` of every linear one), in order of execution.
            Depthwise convs have no entry: their filters go with the channels that they read.
        sites: tuple of `GateSite`. Closing the gates of units there gives the logits of removing them.
        readers: tuple of `Reader`s. Depthwise and transposed convs, functional ones and layers without units are none.
        tensors: {(parameter or buffer name, dim): [length] unit index or -1}, every tensor dimension that can shrink.
        model: the network without wrappers such as DataParallel or torch.compile, on the same parameters.
        notes: one line on each kind of wrapper that was taken off, () if there was none.
        smooth_operations: names of operations that are not piecewise linear, () if the network is.

    Raises:
        InputError: the network cannot be traced, copied, or run on the example, or a pattern matches no layer.
    """

    def __init__(self, model, example_input, exclude=(), prune_linear=False, verify=True):
        check_example(example_input)
        model, self.notes = unwrapped(model)
        check_weights(model)
        self.model = model
        book = ChannelIds(model)
        example = example_input[:1].expand(2, *example_input.shape[1:])  # batch statistics need two samples
        tracing, text = self._interpret(example, book, prune_linear, training=False)
        exposed = tracing.exposed()
        self._protect_functional_sources(tracing, exposed, book)
        seen = set(book.filters)
        in_training, _ = self._interpret(example, book, prune_linear, training=True, known=text)
        for layer in set(book.filters) - seen:
            book.protect(book.filters[layer], "used in training alone")
        self._exclude(book, exclude)
        self._proof_settings = example_input, (False,) if in_training is None else (False, True)
        self._build_units(book, prune_linear)
        self._build_sites(tracing, in_training)
        if verify and self._protect_faults(book):
            self._build_units(book, prune_linear)
            self._build_sites(tracing, in_training)
        self.readers = tuple(self._readers())
        smooth = {n.nonlinear for n in tracing.nodes.values() if n.nonlinear}
        smooth |= {f"hooks of {name}" for name in self._changing_hooks(example)}
        self.smooth_operations = tuple(sorted(smooth))
        self.positions = dict(tracing.positions)

    def _changing_hooks(self, example):
        parameter = next((p for p in self.model.parameters() if p.is_floating_point()), example)
        return modules_with_changing_hooks(self.model, example.to(parameter))

    def _interpret(self, example, book, prune_linear, training, known=None):
        """What a trace in the given mode shows, and the trace as text; (None, `known`) if the text is the known one."""
        with undisturbed(self.model, training):
            graph = trace(self.model)
            text = [f"{node} {node.target} {node.args} {node.kwargs}" for node in graph.nodes]
            if text == known:
                return None, known
            interpreter = ChannelInterpreter(self.model, graph, example, book, prune_linear)
            try:
                interpreter.run(example)
            except RuntimeError as error:
                cause, mode = str(error).strip().split("\n")[0], "in training mode " if training else ""
                raise InputError(
                    f"{type(self.model).__name__} cannot be run {mode}on an example of shape "
                    f"{tuple(example.shape[1:])} ({cause}); pass an example_input that the network can process"
                ) from error
            return interpreter.tracing, text

    @staticmethod
    def _protect_functional_sources(tracing, exposed, book):
        """A gate is a hook on a module; where zeros arise behind a plain function there is no place for one."""
        for node, info in tracing.nodes.items():
            if info.ids is not None and node.op != "call_module" and not info.reads and node in exposed:
                book.protect(info.ids, f"{node.name} does not keep zeros and is not a module")

    def _protect_faults(self, book):
        """Protects the units of which a trial shows that they cannot be removed; whether there are any."""
        faults = self._proof().faults(self.units, share=0.5)
        for unit, reason in faults.items():
            for name, index in unit.filters:
                book.protect(book.filters[name][index : index + 1], reason)
        return bool(faults)

    def _proof(self):
        def on(model):
            graph = copy.copy(self)
            graph.model = model
            return graph

        def run_gated(model, units, x):
            gates = torch.ones(len(self.units), dtype=torch.float64, device=x.device)
            gates[[unit.index for unit in units]] = 0
            with on(model).gated(gates):
                return model(x)

        example, modes = self._proof_settings
        return CutProof(self.model, example, run_gated, lambda model, units: on(model)._cut(units), modes)

    @staticmethod
    def _exclude(book, patterns):
        outputs = book.widths | book.filters
        for pattern in patterns:
            names = fnmatch.filter(outputs, pattern)
            if not names:
                raise InputError(f"--exclude {pattern} matches no layer; layers are: {', '.join(book.filters)}")
            for name in names:
                book.protect(outputs[name], f"excluded by {pattern}")

    def _build_units(self, book, prune_linear):
        roots = book.roots()
        reason_of = {}
        for ids, reason in book.reasons:
            for root in roots[ids].unique().tolist():
                reason_of.setdefault(root, reason)
        modules = dict(self.model.named_modules())
        names = [n for n in book.filters if prune_linear or isinstance(modules[n], CONVS)]
        classes = {name: roots[ids] for name, ids in book.filters.items()}
        for name, of_filter in classes.items():
            if (of_filter == of_filter[0]).all():
                reason_of.setdefault(int(of_filter[0]), f"all filters of {name} hang together")
        filters = [(name, index) for name, of_filter in classes.items() for index in range(len(of_filter))]
        members = group(filters, torch.cat([torch.zeros(0, dtype=torch.long), *classes.values()]))
        removable = [root for root in members if root not in reason_of]
        self.units = tuple(Unit(index, members[root]) for index, root in enumerate(removable))
        unit_of_root = torch.full((book.count,), -1, dtype=torch.long)
        unit_of_root[torch.tensor(removable, dtype=torch.long)] = torch.arange(len(removable))
        self._unit_of_id = unit_of_root[roots]
        self._widths = {name: self._unit_of_id[ids] for name, ids in book.widths.items()}
        vectors = {id(ids): ids for ids in book.tensors.values()}  # many tensors share one
        vectors = {key: self._unit_of_id[ids] for key, ids in vectors.items()}
        self.tensors = {key: vectors[id(ids)] for key, ids in book.tensors.items()}
        self.layers = {}
        for name in names:
            units = self._unit_of_id[book.filters[name]]
            protected = classes[name][units < 0].tolist()
            self.layers[name] = LayerInfo(len(units), units, reason_of[protected[0]] if protected else None)

    def _build_sites(self, tracing, in_training):
        self.sites = self._sites_of(tracing)
        self._training_sites = self.sites
        if in_training is not None:
            known = {(site.module, site.call) for site in self.sites}
            others = (site for site in self._sites_of(in_training) if (site.module, site.call) not in known)
            self._training_sites = *self.sites, *others

    def _sites_of(self, tracing):
        exposed, calls, sites = tracing.exposed(), defaultdict(int), []
        for node, info in tracing.nodes.items():
            if node.op != "call_module":
                continue
            call = calls[node.target]
            calls[node.target] += 1
            if info.ids is None or node not in exposed:
                continue
            along = [slice(None) if dim == info.dim else 0 for dim in range(info.ids.dim())]
            units = self._unit_of_id[info.ids[tuple(along)]]
            if (units >= 0).any():
                sites.append(GateSite(node.target, call, info.dim, units))
        return tuple(sites)

    def _readers(self):
        for (name, dim), units in self.tensors.items():
            layer, _, kind = name.rpartition(".")
            module = self.model.get_submodule(layer) if kind == "weight" and dim == 1 else None
            if not isinstance(module, (*CONVS, nn.Linear)) or isinstance(module, _ConvTransposeNd) or (units < 0).all():
                continue
            linear, groups = isinstance(module, nn.Linear), getattr(module, "groups", 1)
            runs = units.unique_consecutive(return_counts=True)[1].tolist()
            yield Reader(layer, groups, units.repeat(groups), math.gcd(*runs) if linear else 1, linear)

    def cost_terms(self):
        """Every parameter as a `CostTerm`; a layer's multiply-accumulates are counted at its weight."""
        dims = defaultdict(list)
        for (name, dim), units in self.tensors.items():
            dims[name].append((dim, units))
        terms = []
        for name, parameter in self.model.named_parameters():
            if name not in dims:
                continue
            sizes = tuple(len(units) for _, units in dims[name])
            constant = parameter.numel() // max(1, torch.Size(sizes).numel())
            layer, _, kind = name.rpartition(".")
            macs = constant * self.positions.get(layer, 0) if kind == "weight" else 0
            terms.append(CostTerm(constant, macs, sizes, tuple(units for _, units in dims[name])))
        return terms

    @contextmanager
    def gated(self, gates, on_gate=None, estimates=None):
        """While open, forwards of the model multiply every unit's channels by its gate.

        Args:
            gates: [units] or [batch, units] tensor, one value a unit (and sample).
            on_gate: called as on_gate(site, output) with every gated activation.
            estimates: {layer name: scoring.estimates.ChannelEstimate}; there the layer reads, in place of a channel whose
                gate is closed, what its other channels say of it.

        The hooks go away when the block ends, however it ends.
        """
        open_gates = torch.cat([gates, gates.new_ones(*gates.shape[:-1], 1)], -1)  # index -1: no gate
        handles, calls, by_module = [], defaultdict(int), defaultdict(dict)
        for site in self._training_sites if self.model.training else self.sites:
            by_module[site.module][site.call] = site

        def reset(module, inputs):
            calls.clear()

        def hook_for(name):
            def hook(module, inputs, output):
                site = by_module[name].get(calls[name])
                calls[name] += 1
                if site is None:
                    return None
                factor = open_gates[..., site.units.to(gates.device)]
                space = output.dim() - 1 - site.dim
                middle = (1,) * (site.dim - 1)
                batch = factor.shape[:-1] if factor.dim() > 1 else (1,)
                output = output * factor.reshape(*batch, *middle, -1, *(1,) * space).to(output.dtype)
                if on_gate is not None:
                    on_gate(site, output)
                return output

            return hook

        def estimate_for(estimate):
            reader = estimate.reader

            def hook(module, inputs):
                x = inputs[0]
                closed = 1 - open_gates[..., reader.units.to(gates.device)]
                space = x.dim() - 2
                shape = (*(1,) * space, len(reader.units)) if reader.is_linear else (len(reader.units), *(1,) * space)
                return _Blend.apply(x, closed.reshape(-1, *shape).to(x.dtype), estimate(x.detach())), *inputs[1:]

            return hook

        try:
            handles.append(self.model.register_forward_pre_hook(reset))
            for name, estimate in (estimates or {}).items():
                handles.append(self.model.get_submodule(name).register_forward_pre_hook(estimate_for(estimate)))
            for name in by_module:
                handles.append(self.model.get_submodule(name).register_forward_hook(hook_for(name)))
            yield self
        finally:
            for handle in handles:
                handle.remove()

    def units_of(self, plan):
        """The units that a plan {layer name: filter indices} (or an iterable of units) removes, as sorted indices.

        Raises InputError if the plan names an unknown layer, a protected filter, or a part of a unit.
        """
        if not isinstance(plan, dict):
            units = set(plan)
            if foreign := units.difference(self.units):
                raise InputError(f"{foreign.pop()} is no unit of this graph; take units from graph.units")
            return sorted(unit.index for unit in units)
        plan = {name: {int(index) for index in indices} for name, indices in plan.items()}
        chosen = set()
        for name, indices in plan.items():
            if name not in self.layers:
                raise InputError(f"the plan names {name}, which is not a prunable layer")
            unit_of = self.layers[name].unit_of.tolist()
            for index in indices:
                if not 0 <= index < len(unit_of) or unit_of[index] < 0:
                    reason = self.layers[name].reason or "no such filter"
                    raise InputError(f"filter {index} of {name} cannot be removed ({reason})")
                chosen.add(unit_of[index])
        for index in chosen:
            for name, filter_index in self.units[index].filters:
                if name in self.layers and filter_index not in plan.get(name, ()):
                    raise InputError(
                        f"filter {filter_index} of {name} must go together with {self.units[index].filters[0]}; "
                        "add it to the plan"
                    )
        return sorted(chosen)

    def plan_of(self, units):
        """The plan {layer name: sorted filter indices} that removes the units of the given indices."""
        plan = {name: [] for name in self.layers}
        for index in units:
            for name, filter_index in self.units[index].filters:
                plan[name].append(filter_index)
        return {name: sorted(indices) for name, indices in plan.items() if indices}

    def remove(self, plan, verify=True):
        """A copy of the model without the plan's filters: smaller tensors, same class, same forward.

        Args:
            plan: {layer name: filter indices} or an iterable of `Unit`s.
            verify: compare it on random inputs to the model with closed gates (`CutProof`).

        Raises:
            InputError: see `units_of`; a layer would lose its last filter; or the two differ.
        """
        units = [self.units[index] for index in self.units_of(plan)]
        smaller = self._cut(units)
        if verify and units:
            proof = self._proof()
            if reason := proof.failure(units):
                faults = proof.faults(units)
                layers = sorted({name for unit in faults for name, _ in unit.filters})
                reason = next(iter(faults.values()), reason)
                raise InputError(f"filters of {', '.join(layers)} cannot be removed: {reason}; exclude these layers")
        return smaller

    def _cut(self, units):
        stays = torch.ones(len(self.units) + 1, dtype=torch.bool)  # the last entry stands for index -1
        stays[[unit.index for unit in units]] = False
        shared = {id(units): units for units in self.tensors.values()}
        indices = {key: stays[units].nonzero()[:, 0] for key, units in shared.items()}
        kept = defaultdict(dict)
        for (name, dim), units in self.tensors.items():
            index = indices[id(units)]
            if not len(index):
                raise InputError(f"{name.rpartition('.')[0]} would lose its last channel; remove fewer filters")
            if len(index) < len(units):
                kept[name][dim] = index
        cut = {}  # id of a tensor of the model: what a deep copy has in its place
        for name, tensor in [*self.model.named_parameters(), *self.model.named_buffers()]:
            if name in kept:
                cut[id(tensor)] = _select(tensor, kept[name])
        smaller = copy_of(self.model, cut)
        for name, module in smaller.named_modules():
            if name not in self._widths and (f"{name}.weight", 0) in self.tensors:
                _refresh_layer(module)
        for name, units in self._widths.items():
            _refresh_width(smaller.get_submodule(name), int(stays[units].sum()))
        return smaller


def group(items, labels):
    """{label: tuple of the items that bear it}, in ascending order of the labels [len(items)]."""
    values, counts = labels.unique(return_counts=True)
    ordered = [items[i] for i in labels.argsort(stable=True).tolist()]
    ends = counts.cumsum(0)
    bounds = zip(values.tolist(), (ends - counts).tolist(), ends.tolist(), strict=True)
    return {value: tuple(ordered[start:end]) for value, start, end in bounds}


def _select(tensor, kept):
    """A new parameter or buffer with the given indices of every dimension."""
    data = tensor.detach()
    for dim, index in sorted(kept.items(), key=lambda item: item[0]):  # rows first: they are copied fastest
        data = data.index_select(dim, index.to(data.device))
    return nn.Parameter(data, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else data


def _refresh_layer(module):
    """Makes the attributes of a conv or linear layer agree with its cut weight."""
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, CONVS):
        rows, columns = module.weight.shape[:2]
        if isinstance(module, _ConvTransposeNd):
            module.in_channels, module.out_channels = rows, columns * module.groups
        else:
            module.in_channels, module.out_channels = columns * module.groups, rows


def _refresh_width(module, channels):
    """Makes the attributes of a layer with one setting a channel agree with its number of output channels."""
    if isinstance(module, CONVS):  # depthwise
        module.groups = module.in_channels = channels * module.in_channels // module.out_channels
        module.out_channels = channels
    for attribute in ("num_features", "num_channels", "num_groups", "num_parameters"):
        if hasattr(module, attribute):
            setattr(module, attribute, channels)
