"""The graph that a recording builds, and the node of every tensor in it."""

import operator
import weakref

import torch
from torch import fx
from torch.nn.utils.rnn import PackedSequence

from taylor_pruning.surgery.nested import tensors_in
from taylor_pruning.surgery.numbers import is_tracked, plain, product_of
from taylor_pruning.surgery.recorded_calls import pick


class Untraceable(RuntimeError):
    """The forward does something that a graph cannot repeat on other data. `remedy`: what to do about it."""

    def __init__(
        self,
        what,
        remedy="Move decisions that depend on the values of activations into a module of their own, which then stays as it is",
    ):
        super().__init__(what)
        self.remedy = remedy


UNSEEN = (
    "Compute it by functions of torch, as x.detach() in the place of torch.Tensor(x) or nn.Parameter(x), or in a module of its "
    "own, which then stays as it is"
)


def _storage(tensor):
    """What tells whether two tensors have the same values in memory; a sparse tensor shares none.

    Raises Untraceable inside of a transform such as `torch.func.vmap`, where a tensor stands for others.
    """
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        raise Untraceable(
            "torch.func transforms the calls", "Move the transform into a module of its own, which then stays as it is"
        )
    return tensor.untyped_storage()._cdata if tensor.layout == torch.strided else id(tensor)


def _shapes(value):
    """The shapes of tensors in nested tuples and lists, in plain tuples; numbers stay, and None is in the place of all else."""
    if isinstance(value, torch.Tensor):
        return tuple(map(int, value.shape))
    if isinstance(value, (tuple, list)):
        return tuple(map(_shapes, value))
    return value if isinstance(value, (int, float)) else None


class TensorNodes:
    """The graph of one recording, with the node of every tensor that it has seen.

    Args:
        names: {id of a parameter or buffer: its name}.
        on_values: the forward runs on values; else on stand-ins without any.

    Attributes:
        graph: fx.Graph of what has been recorded.
        batch: size of the batch.
        nodes: {id of a tensor: (node, tensor)}, which keeps the tensor alive.
        stand_ins: {id of a real tensor: (its stand-in, tensor)}.
        settings: {id of a buffer of one number: its version before the forward}.
        constants: {name: tensor} that are neither inputs nor parameters nor buffers. storages: {name: id of its storage}.
        holders: {id of a tensor that a module computes when its mode is set: (name of the module, attribute, tensor)}.
            held: {name of a constant: (name of the module, attribute)}.
        lengths: {id of a parameter or buffer: (its length, node)} of those of which the forward has taken len().
        path: names of the modules that run now, the innermost last.
        written: ids of the storages to which calls have written.
        varied: ids of those to which they have written what depends on the input, parameters or buffers.
        given: ids of the parameters, buffers and constants, which calls such as `to` may return as they are.
        multiples: of the batch, for which plain numbers were taken.
    """

    def __init__(self, names, on_values):
        self.graph, self.names, self.on_values, self.batch = fx.Graph(), names, on_values, None
        self.nodes, self.stand_ins, self.constants, self.storages, self.path = {}, {}, {}, {}, [""]
        self.settings, self.holders, self.held, self.lengths = {}, {}, {}, {}
        self.written, self.varied, self.given = set(), set(), set()
        self.multiples = []

    def stand_in(self, tensor):
        """A tensor of the same shape and strides without values; the tensor itself where the forward runs on values."""
        if self.on_values or tensor.device.type == "meta":
            return tensor
        if id(tensor) not in self.stand_ins:
            made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
            made.requires_grad_(tensor.requires_grad)
            self.stand_ins[id(tensor)] = made, tensor
            if id(tensor) in self.names:
                self.names[id(made)] = self.names[id(tensor)]
        return self.stand_ins[id(tensor)][0]

    def released(self):
        """Weak references to the tensors that were made for the recording, which this no longer keeps alive."""
        made = [
            tensor for node, tensor in self.nodes.values() if node.op != "get_attr" and id(tensor) not in self.given
        ]
        made += [tensor for tensor, _ in self.stand_ins.values()]
        self.nodes, self.stand_ins = {}, {}
        return [weakref.ref(tensor) for tensor in made]

    def add_input(self, tensor):
        node = self.graph.placeholder(f"input_{len(self.nodes)}")
        self.bind(tensor, node)

    def read_batch_from(self, tensor):
        """Records the size of the batch as the first dimension of this input."""
        shape = self.graph.call_function(getattr, (self.node_of(tensor), "shape"))
        self.batch_node = self.graph.call_function(pick, (shape, 0))

    def bind(self, tensor, node):
        """Makes the node that of the tensor."""
        self.nodes[id(tensor)] = node, tensor
        node.meta.setdefault("shape", tuple(map(int, tensor.shape)))
        node.meta["real"] = tensor.is_floating_point()

    def rebind(self, tensor, node):
        """What is read of a new tensor from now on is what the node has written to it."""
        if isinstance(tensor, torch.Tensor) and self.is_computed(tensor):
            self.bind(tensor, node)

    def node_of(self, tensor):
        """The tensor's node; one that reads it where it is a parameter, a buffer or a constant.

        Raises Untraceable if it was computed, but by no recorded call.
        """
        known = self.nodes.get(id(tensor))
        if known is not None:
            return known[0]
        name = self.names.get(id(tensor))
        if name is None and (
            tensor.device.type == "meta" or tensor.grad_fn is not None or self._is_of_computed(tensor)
        ):
            raise Untraceable("a tensor comes from code that torch functions do not see", UNSEEN)
        if name is None:
            name = f"constant {len(self.constants)}"
            self.constants[name] = tensor.detach().clone()  # as it is before the forward writes to it
            self.storages[name] = _storage(tensor)
            if id(tensor) in self.holders:
                self.held[name] = self.holders[id(tensor)][:2]
        self.given.add(id(tensor))
        node = self.graph.create_node("get_attr", name)
        node.meta["module"] = self.path[-1]
        self.bind(tensor, node)
        return node

    def is_computed(self, tensor):
        """Whether it is the result of a recorded call."""
        known = self.nodes.get(id(tensor))
        return known is not None and known[0].op != "get_attr"

    def _is_of_computed(self, tensor):
        """Whether its values in memory are those of the result of a recorded call."""
        found = (
            known for node, known in self.nodes.values() if node.op != "get_attr" and not node.meta.get("constant")
        )
        own = _storage(tensor)
        return any(_storage(known) == own for known in found)

    def is_constant(self, tensor):
        """Whether its values are known and do not depend on the input, parameters or buffers."""
        if self.varied and _storage(tensor) in self.varied:
            return False
        if self.on_values:
            known = self.nodes.get(id(tensor))
            return known is not None and bool(known[0].meta.get("constant"))
        return tensor.device.type != "meta" and id(tensor) not in self.names

    def is_setting(self, tensor):
        """Whether it is a buffer of one number that the forward has not changed, which no cut changes either."""
        if id(tensor) not in self.settings:
            return False
        made, _ = self.stand_ins.get(id(tensor), (None, None))
        return tensor._version == self.settings[id(tensor)] and (made is None or made._version == 0)

    def note_written(self, tensors, varied=True):
        """A call writes to these tensors, which may be views of others; `varied`: what is no constant."""
        if varied:
            self.varied.update(map(_storage, tensors))
        both = (*tensors, *map(self.stand_in, tensors))
        self.written.update(map(_storage, both))

    def is_written(self, tensor):
        """Whether a call has written to the tensor or to a part of it."""
        return _storage(self.stand_in(tensor)) in self.written

    def written_constants(self):
        """Names of the constants to which a call has written, or to a part of them."""
        return [name for name, storage in self.storages.items() if storage in self.written]

    def unpack(self, result, node):
        """Gives every tensor of a result of several, nested or not, a node of its own."""
        with torch._C.DisableTorchFunction():  # the shapes of what has no node yet are no steps
            node.meta["shapes"] = _shapes(result)
        for i, item in enumerate(result):
            if not tensors_in(item):
                continue
            part = self.graph.call_function(pick, (node, i))
            part.meta.update(module=self.path[-1], constant=node.meta["constant"])
            if isinstance(item, torch.Tensor):
                self.bind(item, part)
            else:
                self.unpack(item, part)

    def packed(self, sequence):
        """The node of a PackedSequence, which can be made of tensors alone."""
        parts = (None if tensor is None else self.node_of(tensor) for tensor in sequence)
        return self.graph.call_function(PackedSequence, tuple(parts))

    def as_nodes(self, value, sized=False, bounded=False, length=None):
        """Arguments of a call with nodes in the place of tensors and sizes.

        Args:
            sized: the arguments are sizes; a multiple of the batch, which `len(x)` gives as a plain number, is taken for one.
            bounded: they are positions or numbers of channels.
            length: (plain number, node) of the tensor that is called, where the forward has taken it.
        """

        def convert(item):
            if isinstance(item, torch.Tensor):
                return self.node_of(item)
            if is_tracked(item):
                return item if item.node is None else item.node
            item = plain(item)
            if length and type(item) is int and item == length[0]:
                return length[1]
            if (sized or bounded) and type(item) is int and (product := product_of(item)) is not None:
                return product
            if sized and type(item) is int and self.batch and item and item % self.batch == 0:
                self.multiples.append(item // self.batch)
                if item == self.batch:
                    return self.batch_node
                return self.graph.call_function(operator.mul, (self.batch_node, item // self.batch))
            return item

        return fx.node.map_aggregate(value, convert)

    def of_samples(self, args):
        """The arguments of an indexing; what it says of the samples of a batch in plain numbers is said by nodes.

        A list or range of all samples is a `torch.arange`, and bounds of a slice that are multiples of the batch are such.
        """
        x, index, *rest = args
        parts = index if isinstance(index, tuple) else (index,)
        first, size = parts[0] if parts else None, x.shape[0] if x.dim() else 0
        if not self.batch or not size or size % self.batch:
            return args
        if isinstance(first, slice):
            bounds = (self.as_nodes(bound, sized=True) for bound in (first.start, first.stop))
            return x, (slice(*bounds, first.step), *parts[1:]), *rest
        if not isinstance(first, (list, range)) or list(first) != list(range(size)):
            return args
        shape = self.graph.call_function(getattr, (self.node_of(x), "shape"))
        rows = self.graph.call_function(torch.arange, (self.graph.call_function(pick, (shape, 0)),))
        rows.meta.update(shape=(size,), real=False, module=self.path[-1], constant=True)
        return x, (rows, *parts[1:]), *rest

    def output_node(self, item):
        """The node of a tensor, a size or a shape that the forward returns; None for what is the same for every input."""
        if isinstance(item, torch.Size):
            sizes = [self.output_node(size) or int(size) for size in item]
            constant = all(isinstance(size, int) for size in sizes)
            return None if constant else self.graph.call_function(torch.Size, (sizes,))
        # On values a batch is so small that numbers like it may be constants.
        found = self.as_nodes(item, sized=not self.on_values)
        return found if isinstance(found, fx.Node) else None
