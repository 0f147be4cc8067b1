"""Runs a recorded graph on data, with other values in the place of what its calls read and give."""

from collections import defaultdict
from functools import partial

import torch
from torch import fx
from torch.func import functional_call

from taylor_pruning.errors import InputError
from taylor_pruning.surgery.autocasts import under
from taylor_pruning.surgery.lines import note_line
from taylor_pruning.surgery.nested import Slot, map_tensors
from taylor_pruning.surgery.other_sizes import at_size
from taylor_pruning.surgery.recorded_calls import set_grad, sources_of
from taylor_pruning.surgery.recorder import TRACE_ERRORS
from taylor_pruning.surgery.tracing import Trace


def input_dependent(nodes):
    """The nodes of a graph whose values depend on what the network reads."""
    found = set()
    for node in nodes:
        if node.op == "placeholder" or not found.isdisjoint(sources_of(node)):
            found.add(node)
    return found


class Execution:
    """Runs the graph with the parameters that the model holds now.

    Args:
        model: the module whose forward was recorded. trace: what was recorded.
    """

    def __init__(self, model, trace: Trace):
        self.model, self.trace = model, trace
        self.last = _last_uses(trace.graph)

    def tensors(self):
        named = {**dict(self.model.named_buffers(remove_duplicate=False))}
        named.update(self.model.named_parameters(remove_duplicate=False))
        return named

    def tensors_of_a_run(self):
        """The same, with copies of those to which the forward writes: the model's own stay as they are."""
        named = self.tensors()
        return named | {name: named[name].clone() for name in self.trace.written}

    def flat(self, args, kwargs):
        """The tensors of a call of the network, in the order of the graph's inputs.

        Raises InputError if the call has another structure than the example.
        """
        wanted, given = [], []
        structure = map_tensors((args, kwargs), lambda t: given.append(t) or Slot(len(given) - 1))
        map_tensors(self.trace.inputs, lambda slot: wanted.append(slot), Slot)
        if len(given) != len(wanted) or structure != self.trace.inputs:
            raise InputError(
                f"{type(self.model).__name__} is called with other arguments than its example_input; "
                "give inputs of the same structure"
            )
        return given

    def at_size(self, inputs, own=None):
        """`surgery.other_sizes.at_size` for the inputs that `flat` gives."""
        return at_size(self.trace, self.model, inputs, vars(self.model) if own is None else own)

    def run(self, args, kwargs=None, change=None, read=None, calls=None, own=None):
        """The output of the network. Raises InputError if its graph does not hold for inputs of that size.

        Args:
            change: {node: function}, called with the node's result; its result takes the place.
            read: {node: function} called with the list of the node's positional arguments; the result takes their place.
            calls: {node: function} called with the node's (args, kwargs) in the place of what it calls.
            own: see surgery.other_sizes.at_size; default: the model is as it is without its graph.
        """
        inputs = self.flat(tuple(args), dict(kwargs or {}))
        at, inputs = self.at_size(inputs, own), iter(inputs)
        change, read, calls, env, named = change or {}, read or {}, calls or {}, {}, self.tensors_of_a_run()
        outer = torch.is_grad_enabled()
        try:
            for node in self.trace.graph.nodes:
                if node.op == "placeholder":
                    value = next(inputs)
                elif node.op == "get_attr":
                    value = self._stored(node.target, named, at)
                elif node.op == "output":
                    (sources,), _ = at.arguments.get(node, (node.args, {}))
                    return _filled(at.output, [env[source] for source in sources])
                else:
                    instead = calls.get(node) or self.with_copies(node, named)
                    value = evaluate(self.model, node, env.__getitem__, read.get(node), outer, instead, at)
                if node in change:
                    value = change[node](value)
                env[node] = value
                for dead in self.last[node]:
                    del env[dead]
        finally:
            torch._C._set_grad_enabled(outer)

    @torch.no_grad()
    def without_inputs(self, nodes):
        """{node: its value} of those of the nodes that the network computes from parameters, buffers and constants alone."""
        varying = input_dependent(self.trace.graph.nodes)
        found = [node for node in nodes if node not in varying]
        needed = set(found)
        for node in reversed(self.trace.graph.nodes):
            if node in needed:
                needed.update(node.all_input_nodes)
        env, named = {}, self.tensors_of_a_run()
        for node in self.trace.graph.nodes:
            if node in needed:
                if node.op == "get_attr":
                    env[node] = self._stored(node.target, named)
                else:
                    instead = self.with_copies(node, named)
                    env[node] = evaluate(self.model, node, env.__getitem__, instead=instead)
        return {node: env[node] for node in found}

    def with_copies(self, node, named):
        """A function that calls the node's module on the `named` tensors that it writes to; None if it is no such node."""
        if node.op != "call_module":
            return None
        prefix = f"{node.target}."
        own = {name.removeprefix(prefix): named[name] for name in self.trace.written if name.startswith(prefix)}
        return partial(functional_call, self.model.get_submodule(node.target), own) if own else None

    def _stored(self, name, named, at=None):
        value = named.get(name)
        return self.constant(name, named, at) if value is None else value

    def constant(self, name, named, at=None):
        """A tensor that is neither parameter nor buffer, on the device of the `named` ones: that of the trace, or what the
        model holds now in its place if it computes it anew whenever its mode is set."""
        constants = at.constants if at is not None and name in at.constants else self.trace.constants
        tensor = constants[name]
        if name in self.trace.held:
            module, attribute = self.trace.held[name]
            now = vars(self.model.get_submodule(module)).get(attribute)
            tensor = now if isinstance(now, torch.Tensor) and now.shape == tensor.shape else tensor
        device = next((t.device for t in named.values()), tensor.device)
        if tensor.device != device and tensor.device.type == "cpu" and tensor.dim():
            tensor = constants[name] = tensor.to(device)
        return tensor.clone() if name in self.trace.rewritten else tensor


def _filled(output, found):
    return map_tensors(output, lambda slot: found[slot.index], Slot)


def evaluate(model, node, value_of, read=None, grad=False, instead=None, at=None):
    """The result of one call of the graph; `value_of` gives the value of every node that it reads. See `Execution.run`.

    `grad`: whether gradients are wanted where the forward itself does not switch them off.

    `at`: surgery.other_sizes.AtSize, None for inputs of the example's size.
    """
    arguments = None if at is None else at.arguments.get(node)
    args, kwargs = fx.node.map_arg((node.args, node.kwargs) if arguments is None else arguments, value_of)
    if read is not None:
        args = read(args)
    try:
        if regions := node.meta.get("autocast"):
            with under(regions):
                return _called(model, node, args, kwargs, grad, instead)
        return _called(model, node, args, kwargs, grad, instead)
    except TRACE_ERRORS as error:
        note_line(error, node)
        raise


def _called(model, node, args, kwargs, grad, instead):
    if instead is not None:
        return instead(args, kwargs)
    if node.op == "call_method":
        return getattr(args[0], node.target)(*args[1:], **kwargs)
    if node.op == "call_module":
        return model.get_submodule(node.target)(*args, **kwargs)
    if node.target is set_grad:
        return set_grad(args[0] and grad)
    return node.target(*args, **kwargs)


def _last_uses(graph):
    """{node: nodes whose values nothing needs after it}."""
    last = {}
    for node in graph.nodes:
        last[node] = node
        for source in node.all_input_nodes:
            last[source] = node
    dead = defaultdict(list)
    for node, user in last.items():
        if user.op != "output":
            dead[user].append(node)
    return dead
