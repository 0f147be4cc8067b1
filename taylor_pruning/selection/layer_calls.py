"""The calls of conv and linear layers in a network, each of which can be timed at other widths."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, fx

from taylor_pruning.selection.costs import units_along
from taylor_pruning.surgery.graph import ChannelGraph
from taylor_pruning.surgery.recorded_calls import operation_name
from taylor_pruning.timing import least_milliseconds

SHARES = (1 / 8, 1 / 4, 1 / 2, 3 / 4, 1)  # of a layer's width at which it is timed


@dataclass(frozen=True)
class LayerCall:
    """A call of a conv or linear layer in the graph.

    Attributes:
        node: of the graph. weight: its parameter's name. in_dim, out_dim: of the weight.
        widths: dense (input, output) channels of the weight's two dimensions; the input is that of a group.
        can_shrink: which of both have channels that may go.
        depthwise: filters of each input channel of a depthwise conv, or 0. batch: size of the graph's batch.
    """

    node: fx.Node
    weight: str
    in_dim: int
    out_dim: int
    widths: tuple[int, int]
    can_shrink: tuple[bool, bool]
    groups: int
    depthwise: int
    batch: int

    def grid(self, round_to: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """(inputs, outputs): widths at which it is timed."""
        steps = (round_to, max(round_to, self.depthwise or self.groups))
        found = zip(self.widths, self.can_shrink, steps, strict=True)
        return tuple(_points(width, step) if shrinks else (width,) for width, shrinks, step in found)

    def key(self, batch_size: int) -> str:
        """All that the time of the call depends on, except the widths."""
        node, weight = self.node, self.node.all_input_nodes[1].meta["shape"]
        fixed = [operation_name(node), *literals(node), "x".join(map(str, self._space())), f"batch {batch_size}"]
        kernel = "x".join(map(str, weight[2:]))
        return f"{' '.join(fixed)} kernel {kernel or 1} groups {'depthwise' if self.depthwise else self.groups}"

    def _space(self):
        shape = self.node.all_input_nodes[0].meta["shape"]
        return shape[1:-1] if operation_name(self.node) == "linear" else shape[2:]

    @property
    def elements(self) -> int:
        """Of the output for one image and one output channel."""
        shape = self.node.meta["shape"]
        return math.prod(shape) // self.batch // shape[-1 if operation_name(self.node) == "linear" else 1]

    def milliseconds(self, inputs: int, outputs: int, batch_size: int, like: Tensor) -> float:
        """Time of a call at these widths on the device and in the type of `like`."""
        node, groups = self.node, outputs // self.depthwise if self.depthwise else self.groups
        source, weight = (n.meta["shape"] for n in node.all_input_nodes[:2])
        first, channels = max(1, source[0] * batch_size // self.batch), inputs * groups
        linear = operation_name(node) == "linear"
        x = like.new_empty(first, *source[1:-1], channels) if linear else like.new_empty(first, channels, *source[2:])
        shape = (outputs, inputs) if self.in_dim else (inputs, outputs)
        tensors = {
            node.all_input_nodes[0]: x.normal_(),
            node.all_input_nodes[1]: like.new_empty(*shape, *weight[2:]).normal_(),
        }
        for bias in node.all_input_nodes[2:]:
            tensors[bias] = like.new_zeros(outputs)
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), tensors.__getitem__)
        if "groups" in kwargs:
            kwargs = {**kwargs, "groups": groups}
        elif len(args) > 6:
            args = (*args[:6], groups, *args[7:])
        return least_milliseconds(lambda: node.target(*args, **kwargs), like.device)


def _points(width: int, step: int) -> tuple[int, ...]:
    """Widths of the grid, multiples of `step`: odd ones where any width may arise, because multiples of 8 are faster."""
    found = {width}
    for share in SHARES[:-1]:
        point = max(step, round(share * width / step) * step)
        found.add(point if step > 1 or point % 2 else max(1, point - 1))
    return tuple(sorted(found))


def literals(node: fx.Node) -> list[str]:
    """Stride, padding and so on as they stand in the call, without its groups."""
    positional = [f"{i}={a}" for i, a in enumerate(node.args) if i != 6 and not isinstance(a, fx.Node)]
    named = [f"{k}={a}" for k, a in node.kwargs.items() if k != "groups" and not isinstance(a, fx.Node)]
    return [text.replace(" ", "") for text in (*positional, *named)]


def layer_calls(graph: ChannelGraph) -> Iterator[LayerCall]:
    """The calls of conv and linear layers whose weight is a parameter, in order of execution."""
    parameters = dict(graph.model.named_parameters())
    trace = graph.executions[False].trace
    for node in trace.graph.nodes:
        name = operation_name(node)
        if node.op != "call_function" or not (name == "linear" or name.startswith("conv")):
            continue
        source, weight = (*node.all_input_nodes, None)[:2]
        if weight is None or weight.op != "get_attr" or weight.target not in parameters:
            continue
        in_dim, out_dim = (0, 1) if "transpose" in name else (1, 0)
        units = [units_along(graph, weight.target, dim) for dim in (in_dim, out_dim)]
        shape, channels = weight.meta["shape"], source.meta["shape"][1]
        groups = channels // shape[1] if in_dim and name != "linear" else 1
        if not in_dim and node.meta["shape"][1] != shape[1]:
            continue  # transposed and grouped
        depthwise = shape[out_dim] // groups if groups > 1 and shape[in_dim] == 1 else 0
        shrinks = tuple(bool((of_dim >= 0).any()) for of_dim in units)
        widths = (shape[in_dim], shape[out_dim])
        yield LayerCall(node, weight.target, in_dim, out_dim, widths, shrinks, groups, depthwise, trace.batch)
