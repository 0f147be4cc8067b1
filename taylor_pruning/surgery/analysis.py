"""Derives from channel ids the layers of a network and the places that need gates."""

from functools import partial

import torch
from torch import fx

from taylor_pruning.memory import raise_out_of_memory
from taylor_pruning.surgery.copying import copy_of
from taylor_pruning.surgery.draws import equal_draws
from taylor_pruning.surgery.execution import Execution
from taylor_pruning.surgery.ids import ChannelIds, flat, varying
from taylor_pruning.surgery.layers import Layers
from taylor_pruning.surgery.nested import map_tensors, tensors_in
from taylor_pruning.surgery.propagation import propagate
from taylor_pruning.surgery.recorded_calls import writes
from taylor_pruning.surgery.recording import inputs_of, typical_tensor
from taylor_pruning.surgery.trial_inputs import FORWARD_ERRORS


class Analysis:
    """One propagation of ids through the graphs of a network.

    Args:
        model: the network. traces: {training mode: Trace}; that of training only where it differs.
        examples: what the network is run on, the cheapest first (surgery.trial_inputs.trial_examples).
        ways: how it is cut where several ways keep the network exact.

    Attributes:
        ids: ChannelIds. layers: Layers. ways: as given.
        places: {training mode: [(node, ids along the channels, their dimension, batch dimension, blocks)]} where gates are
            needed; see surgery.units.GateSite for blocks.
        activations: the same of what the activation functions read, where gates stand behind them.
        blocks: {training mode: {node: blocks}} of the nodes of places and readers that have several rows a sample.
        nonlinear: names of operations that are not piecewise linear.
    """

    def __init__(self, model, traces, examples, ways):
        self.model, self.traces, self.examples, self.ways = model, traces, examples, ways
        self.ids, self.places, self.activations, self.blocks = ChannelIds(), {}, {}, {}
        self._rows = {mode: {} for mode in traces}  # {node: blocks, None where rows do not follow each other by sample}
        for mode, trace in traces.items():
            found, layers = self._propagated(trace)
            if mode:
                self.layers.add_training(layers)
            else:
                self.layers = layers
                self.nonlinear = {info.nonlinear for info in found.infos.values() if info.nonlinear}
            self.places[mode] = list(self._places(mode, found, layers))
        for mode, trace in traces.items():
            if trace.idle is not None:
                self.layers.add_idle(self._propagated(trace, idle=True)[1], mode)
        self.layers.follow_widths(model)

    def _propagated(self, trace, idle=False):
        """The propagation through a trace, or through what runs there without effect on the outputs, and its Layers."""
        self.ids.issued, self.ids.depthwise, self.ids.products = [], [], []
        parameters = {**dict(self.model.named_buffers()), **dict(self.model.named_parameters())}
        found = propagate(trace, self.ids, parameters, self.ways, idle=idle)
        return found, Layers(self.ids, found.env, parameters, trace.batch)

    @property
    def chose(self):
        """Whether some view could follow its channels along more than one dimension."""
        return self.ids.choices > 0

    def _places(self, mode, found, layers):
        def stuck(node):
            return any(self._no_gate(mode, node, layer, in_order) for layer in found.infos[node].value.layers)

        needed, in_order = self._needed(mode, found, layers)
        while found.move_gates(filter(stuck, needed)):
            needed, in_order = self._needed(mode, found, layers)
        self.activations[mode] = [
            self._place(mode, *at, in_order) for at in self._channels(found, needed) if not stuck(at[0])
        ]
        moved = set(found.gate_behind_curves())
        needed, in_order = self._needed(mode, found, layers)
        while left := [node for node in moved.intersection(needed) if stuck(node)]:
            for node in left:
                found.leave_ungated(node)
            needed, in_order = self._needed(mode, found, layers)
        self.blocks[mode] = in_order
        for node, layer in self._channels(found, needed):
            if what := self._no_gate(mode, node, layer, in_order):
                self.ids.protect(layer, f"the channels of {node.name} ({node.meta.get('module')}) {what}")
            else:
                yield self._place(mode, node, layer, in_order)

    @staticmethod
    def _channels(found, nodes):
        """(node, layer) of all layers of ids that the results of the nodes have."""
        return [(node, layer) for node in nodes for layer in found.infos[node].value.layers]

    def _place(self, mode, node, layer, in_order):
        (dim,) = varying(layer)
        return node, flat(layer), dim, self._batch_dim(mode, node, in_order), in_order.get(node, 1)

    def _needed(self, mode, found, layers):
        """The nodes that need gates, and {node: blocks} of those and of what readers read that have several rows a sample."""
        exposed, batch = found.exposed(), self.traces[mode].batch
        needed = [n for n, i in found.infos.items() if i.value is not None and n in exposed and not i.constant]
        read = [node.all_input_nodes[0] for nodes, _, _ in layers.readers.values() for node in nodes]
        merged = {n for n in needed + read if batch not in n.meta["shape"] and n.meta["shape"][:1]}
        merged = {node for node in merged if node.meta["shape"][0] % batch == 0}
        rows = self._rows[mode]
        if new := merged - rows.keys():
            rows.update({**dict.fromkeys(new), **self._by_sample(mode, new)})
        return needed, {node: rows[node] for node in merged if rows[node]}

    def _batch_dim(self, mode, node, in_order):
        """The dimension of a node's result along which the samples follow each other; None if there is none."""
        batch = self.traces[mode].batch
        dims = [d for d, size in enumerate(node.meta["shape"]) if size == batch] or ([0] if node in in_order else [])
        return dims[0] if dims else None

    def _no_gate(self, mode, node, layer, in_order):
        """Why no gate can multiply the channels of `layer` at the node, None if one can."""
        batch_dim = self._batch_dim(mode, node, in_order)
        if not node.meta.get("real"):
            return "are no real numbers"
        if batch_dim is None:
            return "are not ordered by sample"
        return "have no axis of their own" if batch_dim in varying(layer) else None

    def _by_sample(self, mode, nodes):
        """{node: blocks} of the nodes along whose first dimension the samples follow each other, in one block or several."""
        for example in self.examples:
            try:
                return self._ordered(mode, nodes, example)
            except FORWARD_ERRORS as error:  # the graph does not run on that size; if on none, the proof says so
                raise_out_of_memory(error)
        return {}

    @torch.no_grad()
    def _ordered(self, mode, nodes, example):
        """Four samples run, of which the first and the third are alike, through a copy with buffers of its own."""
        model = copy_of(self.model, {id(p): p for p in self.model.parameters()})
        like = typical_tensor(model, tensors_in(example)[0])
        generator, found = torch.Generator().manual_seed(0), {}

        def drawn(tensor):
            shape = (4, *tensor.shape[1:]) if tensor.dim() else tensor.shape
            if not tensor.is_floating_point():
                return tensor[:1].expand(shape)
            values = torch.randn(shape, generator=generator)
            values[2:3] = values[:1]
            return values.to(like)

        def watch(node, out):
            rows = len(out) // 4
            for blocks in (n for n in range(1, rows + 1) if rows % n == 0):
                first, second, third, fourth = out.unflatten(0, (blocks, 4, -1)).transpose(0, 1).flatten(1, 2)
                alike, other = torch.isclose(first, third, rtol=1e-3), torch.isclose(second, fourth, rtol=1e-6)
                if alike.all() and not other.flatten(1).all(1).any():
                    found[node] = blocks
                    break
            return out

        change = {node: partial(watch, node) for node in nodes if node.meta["real"]}
        args, kwargs = map_tensors(inputs_of(example), drawn)
        with equal_draws(like.device):
            Execution(model, self.traces[mode]).run(args, kwargs, change=change)
        return found


def steps(trace):
    """What a forward does to reach its output, and in its idle layers, without names of nodes; on constants of which shapes."""
    idle = [] if trace.idle is None else trace.idle.nodes
    number = {node: i for i, node in enumerate([*live_nodes(trace.graph), *idle])}

    def step(node):
        shape = node.meta["shape"] if node.op == "get_attr" else None
        return node.op, str(node.target), [number[i] for i in node.all_input_nodes], node.meta.get("autocast"), shape

    return [step(node) for node in number]


def live_nodes(graph):
    """The nodes that the output depends on, in order; one that writes to a parameter or buffer counts with what reads that."""
    live = set()
    for node in reversed(graph.nodes):
        if node.op == "output" or node in live or _written_by(node) in live:
            live.update(node.all_input_nodes)
            live.add(node)
    return [node for node in graph.nodes if node in live]


def _written_by(node):
    """The node of the parameter or buffer to which a node writes, perhaps through views; None if there is none."""
    source = node if writes(node) else None
    while isinstance(source, fx.Node) and source.op != "get_attr":
        source = source.args[0] if source.args else None
    return source
