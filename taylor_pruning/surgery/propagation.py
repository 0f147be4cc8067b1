"""Runs the recorded graph on channel ids instead of data."""

import math
import operator
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import fx

from taylor_pruning.surgery.ids import Value, spread
from taylor_pruning.surgery.numbers import is_tracked, number, numbers_of, plain
from taylor_pruning.surgery.operations import RULES, Call, Info
from taylor_pruning.surgery.operations.elementwise import CURVED, align
from taylor_pruning.surgery.operations.views import sizes_of
from taylor_pruning.surgery.recorded_calls import operation_name

FACTORIES = set(
    "zeros ones full empty rand randn arange linspace eye new_zeros new_ones new_full new_empty new_tensor tensor randint "
    "scalar_tensor as_tensor new randperm tril_indices".split()
)

RULE_ERRORS = (TypeError, ValueError, RuntimeError, LookupError, AttributeError)

# What is made by its sizes alone; the values of other new tensors are numbers or positions.
OF_TENSORS = set("tensor as_tensor asarray".split())  # of a tensor they give the same values

FILLED = set("zeros ones full empty rand randn randint normal new_zeros new_ones new_full new_empty new".split())

LIKE = set("to type_as expand_as view_as reshape_as broadcast_to".split())


@dataclass
class Propagation:
    """What the ids say of a graph.

    Attributes:
        infos: {node: Info} in order of execution.
        env: {node: Value, tuple of values, Number or shape}.
    """

    infos: dict = field(default_factory=dict)
    env: dict = field(default_factory=dict)

    def exposed(self):
        """The nodes from which some path leads to a reader without passing another source: gates must be there."""
        exposed = set()
        for node in reversed(self.infos):
            if any(self._is_exposed(user, node, exposed) for user in node.users):
                exposed.add(node)
        return exposed

    def _is_exposed(self, user, node, exposed):
        """Whether zeros of `node` have to reach a reader by way of its `user`."""
        return self.infos[user].reads or self._keeps_zeros(user, node) and user in exposed

    def _keeps_zeros(self, user, node):
        """Whether zeros in `node` make zeros in the result of `user`, which reads it."""
        info = self.infos[user]
        return not info.source and (info.mains is None or node in info.mains)

    def move_gates(self, nodes):
        """Has the exposed results that `nodes` make zero gated in their place; False if there is none."""
        exposed, front, moved = self.exposed(), list(nodes), []
        while front:
            node = front.pop()
            for user in node.users:
                if user in exposed and self._keeps_zeros(user, node):
                    (moved if isinstance(self.env[user], Value) else front).append(user)
        for user in moved:
            self._gate(user)
        return bool(moved)

    def gate_behind_curves(self):
        """Has results of smooth functions gated in the place of what they alone read; yields those nodes.

        The function is then no part of what happens along the gate: its result goes to zero on a straight line.
        """
        exposed = self.exposed()
        for node, info in self.infos.items():
            if node in exposed and info.nonlinear in CURVED and not info.source and self._has_all(node, exposed):
                self._gate(node)
                yield node

    def _has_all(self, node, exposed):
        """Whether nothing else is exposed to what makes `node` zero, back to the sources."""
        front = [node]
        while front:
            reader = front.pop()
            for operand in reader.all_input_nodes:
                if self.infos[operand].constant or not self._keeps_zeros(reader, operand):
                    continue
                if any(user is not reader and self._is_exposed(user, operand, exposed) for user in operand.users):
                    return False
                if not self.infos[operand].source:
                    front.append(operand)
        return True

    def _gate(self, node):
        self.infos[node].source, self.infos[node].value = True, self.env[node]

    def leave_ungated(self, node):
        """Takes back that the result is gated, where what is before it can be."""
        self.infos[node].source, self.infos[node].value = False, None


def propagate(trace, ids, parameters, ways, idle=False):
    """Run the graph of `trace`, or that of its idle layers, on ids.

    Args:
        ids: the ChannelIds to fill.
        parameters: {name: parameter or buffer}.
        ways: how it is cut where several ways keep the network exact.
    """
    result = Propagation()
    with numbers_of(trace.graph):
        for node in (trace.idle if idle else trace.graph).nodes:
            info = result.infos[node] = Info()
            if node.op == "placeholder":
                result.env[node] = Value(node.meta["shape"], (), "input of the network")
            elif node.op == "get_attr":
                info.constant = True
                result.env[node] = _constant(trace, ids, parameters, node)
            elif node.op == "output":
                info.reads = True
                fx.node.map_aggregate(tuple(result.env[n] for n in node.all_input_nodes), partial(_keep_output, ids))
            else:
                result.env[node] = _call(node, info, result, ids, ways)
                value = result.env[node]
                if info.source and isinstance(value, Value):
                    info.value = value
                elif not isinstance(value, Value):
                    info.source = info.source or not _has_values(value)
    return result


def _keep_output(ids, item):
    """What the network returns must stay as it is: the channels of a tensor, and those that a size counts."""
    if isinstance(item, Value):
        for layer in item.layers:
            ids.protect(layer, "output of the network")
    ids.keep_number(item, "their number is an output of the network")
    return item


def _constant(trace, ids, parameters, node):
    if node.target in parameters:
        stored = parameters[node.target]
        if stored.dim() == 1 and stored.dtype in (torch.int64, torch.int32) and not stored.is_meta:
            ids.places[node.target] = stored.long().cpu()
        return ids.parameter(node.target, tuple(stored.shape), f"meets the tensor {node.target}")
    tensor = trace.constants[node.target]
    return Value(tuple(tensor.shape), (), "meets a tensor that is neither parameter nor buffer", tensor)


def _has_values(value):
    found = []
    fx.node.map_aggregate(value, lambda v: found.append(v) if isinstance(v, Value) else v)
    return bool(found)


def _call(node, info, result, ids, ways):
    env = result.env
    operands = []

    def fetch(source):
        value = env[source]
        if isinstance(value, Value):
            operands.append((source, value))
        return value

    given, out = dict(node.kwargs), node.kwargs.get("out")
    if isinstance(out, fx.Node):  # it is written to
        del given["out"]
    args, kwargs = fx.node.map_arg((node.args, given), fetch)
    name = operation_name(node)
    if name in OF_TENSORS and args and isinstance(args[0], Value):
        name = "clone"
    inputs = [source for source in node.all_input_nodes if source in result.infos and _is_tensor(env[source])]
    if name in LIKE:  # of the others only the shape or the type matters
        inputs = inputs[:1]
    info.constant = bool(inputs) and all(result.infos[i].constant for i in inputs) and name not in FACTORIES
    node.meta["weight"] = info.constant
    if name == "set_grad":
        return None
    if name in ("getattr", "shape") and isinstance(args[0], Value):
        return tuple(sizes_of(ids, args[0]))
    if name == "numel":
        return number(math.prod(args[0].shape), ids=_all_ids(args[0]), factor=None)
    call = Call(node, name, args, kwargs, ids, info, result.infos, ways, operands)
    if not operands:
        return _without_tensors(call)
    if name in FACTORIES:
        return _factory(call)
    if not call.is_piecewise_linear():
        info.nonlinear = name
    rule = RULES.get(name)
    if rule is None:
        return call.unknown()
    try:
        made = rule(call)
        return _written(call, made, env[out]) if isinstance(out, fx.Node) else made
    except RULE_ERRORS:  # what the rule has united so far can only protect more
        return call.unknown(f"passes through {call.where}, called in a form that is not known")


def _written(call, made, out):
    """The result of an operation that is written to the tensor `out`, whose channels are those of the result."""
    axes, reason = align(call.ids, [made, out], call.shape, call.where)
    return call.ids.value(call.shape, [axis.layer for axis in axes], reason or made.reason)


def _is_tensor(value):
    return isinstance(value, Value) or (isinstance(value, tuple) and _has_values(value))


def _all_ids(value):
    found = [layer.unique() for layer in value.layers]
    return torch.cat(found) if found else None


def _without_tensors(call):
    """Arithmetic on sizes, an item of a tuple, or a new tensor."""
    if "shape" not in call.node.meta:
        if call.name == "pick" or call.node.op == "call_function" and "shapes" not in call.node.meta:
            value = call.node.target(*call.args, **call.kwargs)
            _keep_what_is_asked(call, value)
            return value
        return call.fill(f"passes through {call.where}")
    if call.name == "pick":
        return call.args[0][call.args[1]]
    return _factory(call)


def _keep_what_is_asked(call, value):
    """After a cut what the forward asks of a number of channels, perhaps in an `assert`, has the same answer."""
    if call.node.target is operator.mod and value == 0:
        call.ids.divides(*call.args, f"their number is to be divided by {plain(call.args[1])} in the forward")
    elif call.node.target is operator.eq and value:
        size, width = call.args
        if is_tracked(size) and size.ids is not None and size.whole:
            call.ids.bind(width, size.ids, "their number is compared with another one in the forward")


def _factory(call):
    """A new tensor: where its size is a number of channels, it has those channels; they are never closed."""
    call.info.source = call.name not in ("zeros", "new_zeros")
    call.info.mains = ()
    call.info.constant = call.info.source
    if call.name not in FILLED:
        call.keep_numbers()
        return call.result(reason=f"meets the new tensor {call.where}")
    shape, layers = call.shape, []
    start = 1 if call.operands and call.node.op == "call_method" else 0
    given = call.args[start:] or (call.kwargs.get("size", ()),)
    listed = [sizes for sizes in given if isinstance(sizes, (tuple, list))]  # beside what is to be filled in or drawn
    sizes = listed[0] if listed else given
    if call.name in ("full", "new_full"):
        value = call.get("fill_value", start + 1)
        call.ids.keep_number(value, f"their number enters {call.where}")
    for d, size in enumerate(sizes[: len(shape)]):
        if is_tracked(size) and (size.ids is not None or size.widths):
            multiple = size.factor and size.factor.denominator == 1 and not size.rounded
            if size.ids is not None and multiple and len(size.ids) * size.factor == shape[d]:
                layers.append(spread(size.ids.repeat(int(size.factor)), d, shape))
            elif shape[d] > 1 and (size.terms or size.ids is None):
                # channels that fill up to another number, are written later, or are as many as an attribute says
                along = call.ids.new(shape[d])
                call.ids.bind(size, along, f"their number is the size of a new tensor in {call.where}")
                layers.append(spread(along, d, shape))
            else:
                call.ids.keep_number(size, f"their number is the size of a new tensor in {call.where}")
    return call.ids.value(shape, layers, f"meets the new tensor {call.where}")
