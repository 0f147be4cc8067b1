"""The channel graph of parts of a network: of submodules whose inputs are recorded from the whole network's forward.

For networks that cannot be traced as a whole, as detectors: their backbone, neck and heads can. The whole network runs and is
scored, and each part is gated, cut and proved on its own; what lies outside of the parts stays as it is.
"""

import copy
from collections.abc import Callable, Iterable
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from fnmatch import fnmatch

import torch
from torch import nn

from taylor_pruning.errors import InputError
from taylor_pruning.modes import in_evaluation
from taylor_pruning.surgery.copying import copy_of
from taylor_pruning.surgery.graph import ChannelGraph
from taylor_pruning.surgery.nested import map_tensors, tensors_in
from taylor_pruning.surgery.plans import plan_of, units_of
from taylor_pruning.surgery.units import Unit, check_gates, cost_terms
from taylor_pruning.surgery.wrappers import unwrapped


class PartsGraph:
    """Like ChannelGraph, for submodules of `model`; names of layers are those in the whole network.

    Args:
        model: the whole network. It is not changed.
        names: of the submodules. run: run(model) calls the network on `samples` samples.
        samples: a part whose first input has not as many rows is left whole: its rows are not the images of a batch.
        exclude, options: see ChannelGraph.

    Attributes:
        parts: {name: ChannelGraph} in the order in which the forward calls them.
        left_whole: {name: reason} of parts that cannot be pruned.
        units, layers, readers, tensors, products, smooth_operations, notes: see ChannelGraph; costs are those of the parts.

    Raises:
        InputError: a name is of no submodule, no part can be traced, or a pattern matches no layer of them.
    """

    def __init__(self, model: nn.Module, names: Iterable[str], run: Callable, samples: int, exclude=(), **options):
        self.model, self.notes = unwrapped(model)
        names = list(names)
        self._check_names(names)
        self.parts, self.left_whole = {}, {}
        calls = recorded_calls(self.model, names, run)
        for name in sorted(names, key=lambda name: list(calls).index(name) if name in calls else len(calls)):
            try:
                example = _example(calls.get(name, []), samples)
                part = ChannelGraph(self.model.get_submodule(name), example, **options)
                found = [layer for layer in part.layers if any(fnmatch(_joined(name, layer), p) for p in exclude)]
                self.parts[name] = ChannelGraph(part.model, example, found, **options) if found else part
            except InputError as error:
                self.left_whole[name] = str(error)
        if not self.parts:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in self.left_whole.items())
            raise InputError(f"no part of the network can be pruned ({reasons})")
        self._merge()
        for pattern in exclude:
            if not any(fnmatch(name, pattern) for name in self.layers):
                raise InputError(f"exclude {pattern} matches no layer; layers are: {', '.join(self.layers)}")

    def _check_names(self, names):
        known = dict(self.model.named_modules())
        for name in names:
            if name not in known:
                tops = ", ".join(child for child, _ in self.model.named_children())
                raise InputError(f"prune_modules: the network has no module {name}; its modules are {tops}")
            if any(other != name and f"{name}.".startswith(f"{other}.") for other in names):
                raise InputError(f"prune_modules: {name} lies in another module of the list; name one of them")

    def _merge(self):
        self.units, self.layers, self.tensors, self.products, self.readers = (), {}, {}, [], ()
        self.offsets, smooth = {}, set()
        for name, part in self.parts.items():
            self.offsets[name] = offset = len(self.units)

            def shifted(units, offset=offset):
                return torch.where(units >= 0, units + offset, units)

            self.units += tuple(
                Unit(unit.index + offset, tuple((_joined(name, layer), index) for layer, index in unit.filters))
                for unit in part.units
            )
            layers = {_joined(name, layer): info for layer, info in part.layers.items()}
            self.layers |= {layer: replace(info, unit_of=shifted(info.unit_of)) for layer, info in layers.items()}
            tensors = {(_joined(name, tensor), dim): units for (tensor, dim), units in part.tensors.items()}
            shared = {id(units): shifted(units) for units in tensors.values()}
            self.tensors |= {key: shared[id(units)] for key, units in tensors.items()}
            self.products += [(number, [shifted(units) for units in dims]) for number, dims in part.products]
            self.readers += tuple(
                replace(reader, layer=_joined(name, reader.layer), units=shifted(reader.units))
                for reader in part.readers
            )
            smooth.update(part.smooth_operations)
        self.smooth_operations = tuple(sorted(smooth))

    @property
    def written(self):
        """As of ChannelGraph, of the parts."""
        return {_joined(name, tensor) for name, part in self.parts.items() for tensor in part.written}

    def cost_terms(self):
        """As of ChannelGraph, of the parts alone."""
        parameters = self.model.named_parameters()
        own = [(name, p) for name, p in parameters if any(name.startswith(f"{part}.") for part in self.parts)]
        return cost_terms(own, self.tensors, self.products)

    def filter_weights(self):
        """As of ChannelGraph, of the parts."""
        parts = self.parts.items()
        return {_joined(name, layer): w for name, part in parts for layer, w in part.filter_weights().items()}

    @contextmanager
    def gated(self, gates, on_activation=None, estimates=None, outputs=None, once=False):
        """As of ChannelGraph: while open, forwards of the whole network multiply the units' channels by their gates."""
        check_gates(gates, len(self.units))
        with ExitStack() as stack:
            for name, part in self.parts.items():
                own, offset = {}, self.offsets[name]
                for reader in part.readers:
                    if estimate := (estimates or {}).get(_joined(name, reader.layer)):
                        own[reader.layer] = copy.copy(estimate)
                        own[reader.layer].reader = reader
                seen = None if on_activation is None else _shifting(on_activation, offset)
                some = gates[..., offset : offset + len(part.units)]
                stack.enter_context(part.gated(some, seen, own, outputs, once))
            yield self

    @contextmanager
    def executed(self, change=None, read=None):
        """As of ChannelGraph; nodes are those of the parts' readers."""
        with ExitStack() as stack:
            for part in self.parts.values():
                stack.enter_context(part.executed(change, read))
            yield self

    def units_of(self, plan):
        """As of ChannelGraph."""
        return units_of(plan, self.units, self.layers)

    def plan_of(self, units):
        """As of ChannelGraph."""
        return plan_of(units, self.units, self.layers)

    def remove(self, plan, verify=True):
        """A copy of the whole network whose parts are cut, each proved on its own (ChannelGraph.remove)."""
        chosen, replaced = self.units_of(plan), {}
        for name, part in self.parts.items():
            offset = self.offsets[name]
            own = [part.units[u - offset] for u in chosen if offset <= u < offset + len(part.units)]
            if own:
                replaced[id(part.model)] = part.remove(own, verify)
        return copy_of(self.model, replaced)


def parts_of(graph: ChannelGraph | PartsGraph) -> list[str]:
    """Names of the modules that a graph has traced; "" for the whole network."""
    return list(graph.parts) if isinstance(graph, PartsGraph) else [""]


@torch.no_grad()
def recorded_calls(model: nn.Module, names: Iterable[str], run: Callable) -> dict[str, list]:
    """{name: [(args, kwargs) of every call]} of submodules while run(model) runs, in the order of their first call."""
    calls, hooks = {}, []
    with in_evaluation(model):
        try:
            for name in names:

                def seen(module, args, kwargs, name=name):
                    calls.setdefault(name, []).append(map_tensors((args, kwargs), torch.Tensor.clone))

                hooks.append(model.get_submodule(name).register_forward_pre_hook(seen, with_kwargs=True))
            run(model)
        finally:
            for hook in hooks:
                hook.remove()
    return calls


def recorded_inputs(model: nn.Module, name: str, run: Callable):
    """What a submodule, or with the name "" the network, is called with once while run(model) runs, as an example_input."""
    (call,) = recorded_calls(model, [name], run)[name]
    return example_of_call(*call)


def example_of_call(args: tuple, kwargs: dict):
    """The arguments of a call in the form of an example_input. Raises InputError for positional and named ones together."""
    if args and kwargs:
        raise InputError("it is called with positional and named arguments together")
    return kwargs or (args[0] if len(args) == 1 else args)


def _example(calls, samples):
    if len(calls) != 1:
        raise InputError(f"it runs {len(calls)} times in a forward" if calls else "the forward does not call it")
    example = example_of_call(*calls[0])
    tensors = tensors_in(example)
    if not tensors or not tensors[0].dim() or len(tensors[0]) != samples:
        raise InputError("it does not read tensors whose rows are the images of a batch")
    return example


def _joined(part, name):
    return f"{part}.{name}" if name else part


def _shifting(on_activation, offset):
    return lambda site, output: on_activation(
        replace(site, units=torch.where(site.units >= 0, site.units + offset, site.units)), output
    )
