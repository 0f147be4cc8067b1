"""Runs a network on channel names: which channels of which tensors are one and the same thing.

The network is traced with `torch.fx` and interpreted with every activation replaced by an integer tensor of the same
shape that holds, for each element, the id of the channel it came from. conv and linear layers read ids and issue new
ones; normalisation, pooling and activations pass them on; a sum unites the ids that meet (union-find); cat, chunk,
view, flatten and transpose act on the id tensor as they act on data. What is not understood is protected, never cut.
Id tensors are `expand`ed over batch and space, so that they cost no memory.
"""

import math
import traceback
from collections import defaultdict
from dataclasses import dataclass, field

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.passes.shape_prop import ShapeProp
from torch.nn.modules.conv import _ConvTransposeNd

from ExperimentErrors import InputError

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
TRACE_ERRORS = (fx.proxy.TraceError, TypeError, ValueError, RuntimeError, AttributeError, LookupError)

# Operations by name: a module's class name in lower case, a function's or method's name without trailing underscore.
# f(0) = 0 element by element, or channel by channel: a closed gate before them is a closed gate behind them.
ZERO_PRESERVING = set(
    ["relu", "relu6", "leaky_relu", "leakyrelu", "elu", "selu", "celu", "gelu", "silu", "mish", "hardswish", "tanh", "tanhshrink", "softshrink", "hardshrink", "softsign", "hardtanh", "identity", "dropout", "dropout1d", "dropout2d", "dropout3d", "alphadropout", "alpha_dropout", "feature_dropout", "feature_alpha_dropout", "stochastic_depth", "drop_block2d", "drop_block3d", "clone", "contiguous", "detach", "float", "double", "half", "bfloat16", "to", "type", "abs", "neg", "sqrt", "square", "sign"]
)
# f(0) != 0: a gate is needed behind them.
ZERO_BREAKING = set(["sigmoid", "hardsigmoid", "softplus", "logsigmoid", "exp", "cos", "rsqrt", "reciprocal", "threshold", "clamp", "clip"])
POOLING = {
    f"{prefix}{kind}{separator}pool{dimension}d"
    for prefix in ("", "adaptive_", "adaptive")
    for kind in ("max", "avg")
    for separator in ("_", "")
    for dimension in (1, 2, 3)
} | set(["interpolate", "upsample", "upsamplingnearest2d", "upsamplingbilinear2d", "lp_pool2d", "lppool2d"])
RESHAPING = set(["view", "reshape", "unflatten"])
NATIVE = set(["flatten", "permute", "transpose", "squeeze", "unsqueeze", "movedim", "swapaxes", "channel_shuffle", "pixel_shuffle"])
REDUCING = set(["mean", "sum", "amax", "amin"])
SUMS = set(["add", "iadd", "sub", "isub", "maximum", "minimum"])
PRODUCTS = set(["mul", "imul", "multiply", "div", "truediv", "itruediv"])
PIECEWISE_LINEAR = (
    set(
        ["relu", "relu6", "leaky_relu", "leakyrelu", "prelu", "hardtanh", "identity", "dropout", "dropout1d", "dropout2d", "dropout3d", "stochastic_depth", "clone", "contiguous", "detach", "to", "float", "double", "half", "bfloat16", "type", "neg", "abs", "hardsigmoid", "clamp", "clip", "threshold", "add", "iadd", "sub", "isub", "maximum", "minimum", "cat", "concat", "stack", "chunk", "split", "getitem", "getattr", "size", "dim", "mean", "sum", "amax", "amin", "pad", "zeropad2d", "linear", "conv1d", "conv2d", "conv3d", "convtranspose1d", "convtranspose2d", "convtranspose3d", "batchnorm1d", "batchnorm2d", "batchnorm3d", "syncbatchnorm", "floordiv", "_assert", "eq", "ne", "pixelshuffle", "pixelunshuffle", "channelshuffle"]
    )
    | POOLING
    | RESHAPING
    | NATIVE
)


def trace(model, training):
    """Symbolic trace of `model` in the given mode; every module's mode is left as it was.

    Raises InputError naming the line of the forward that cannot be traced.
    """
    modes = {module: module.training for module in model.modules()}
    model.train(training)
    try:
        return fx.GraphModule(model, fx.Tracer().trace(model))
    except TRACE_ERRORS as error:
        frames = [f for f in traceback.extract_tb(error.__traceback__) if "/torch/" not in f.filename.replace("\\", "/")]
        where = f'{frames[-1].filename}, line {frames[-1].lineno}: "{frames[-1].line}"' if frames else "its forward"
        raise InputError(
            f"{type(model).__name__} cannot be traced at {where} ({str(error).splitlines()[0]}). Move control flow that "
            "depends on the data out of forward, or wrap that part in a function marked with torch.fx.wrap"
        ) from error
    finally:
        for module, mode in modes.items():
            module.training = mode


def output_shapes(graph_module, example_input):
    """{node: shape, or a tuple of shapes} without computing anything; parameters and statistics stay untouched."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with torch.no_grad(), mode:
        ShapeProp(graph_module, mode).propagate(mode.from_tensor(example_input))

    def shape(meta):
        if hasattr(meta, "shape"):
            return tuple(meta.shape)
        return tuple(shape(m) for m in meta) if isinstance(meta, (tuple, list)) else None

    return {node: shape(node.meta.get("tensor_meta")) for node in graph_module.graph.nodes}


class ChannelIds:
    """The book of ids: which tensor dimensions they run along, which are united, which may not be cut and why."""

    def __init__(self, model):
        self.count = 0
        self.edges = []  # pairs of equally long id vectors
        self.reasons = []  # (ids, reason)
        self.tensors = {}  # (parameter or buffer name, dim): ids along that dimension
        self.filters = {}  # conv or linear layer: ids of its filters
        self.aliases = {}  # name of a tied parameter: the first name of the same tensor
        first = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            self.aliases[name] = first.setdefault(id(parameter), name)

    def new(self, number):
        self.count += number
        return torch.arange(self.count - number, self.count)

    def unite(self, a, b):
        different = a != b
        if different.any():
            self.edges.append((a[different], b[different]))

    def protect(self, ids, reason):
        self.reasons.append((squash([ids])[0].unique(), reason))

    def fixed(self, shape, reason):
        """An id tensor of one id that may never be cut."""
        ids = self.new(1)
        self.protect(ids, reason)
        return ids.expand(shape) if shape else ids[0]

    def bind(self, name, dim, ids):
        """The ids `ids` run along dimension `dim` of the tensor `name`; a second reader unites its ids with the first's."""
        key = (self.aliases.get(name, name), dim)
        if key in self.tensors:
            self.unite(self.tensors[key], ids)
        else:
            self.tensors[key] = ids

    def roots(self):
        """[count] for every id the smallest id of its class (union-find)."""
        parent = list(range(self.count))

        def find(i):
            while parent[i] != i:
                parent[i] = parent[parent[i]]
                i = parent[i]
            return i

        for a, b in self.edges:
            for i, j in zip(a.tolist(), b.tolist(), strict=True):
                i, j = find(i), find(j)
                if i != j:
                    parent[max(i, j)] = min(i, j)
        return torch.tensor([find(i) for i in range(self.count)], dtype=torch.long)


@dataclass
class Node:
    """What the interpretation found out about one node of the graph."""

    source: bool = False  # zero behind it does not follow from zero before it
    reads: bool = False  # mixes channels: a conv, a linear layer, the output, anything unknown
    ids: torch.Tensor | None = None  # output ids, kept for sources
    dim: int = 1  # channel dimension of a source's output
    main: fx.Node | None = None  # of a product: the operand whose zero is relied on
    constant: bool = False  # depends on parameters and buffers alone
    nonlinear: str | None = None  # name of an operation that is not piecewise linear


@dataclass
class Tracing:
    """One interpretation: nodes in order of execution and how many output positions each layer computes."""

    nodes: dict = field(default_factory=dict)
    positions: dict = field(default_factory=lambda: defaultdict(int))

    def exposed(self):
        """The nodes from which some path leads to a reader without passing another source: gates must be there."""
        exposed = set()
        for node in reversed(self.nodes):
            for user in node.users:
                info = self.nodes[user]
                if info.reads or (not info.source and info.main in (None, node) and user in exposed):
                    exposed.add(node)
        return exposed


def varies(ids, dim):
    """Whether more than one id runs along dimension `dim`."""
    if ids.shape[dim] < 2 or ids.stride(dim) == 0:
        return False
    return bool((ids != ids.narrow(dim, 0, 1)).any())


def squash(tensors, keep=()):
    """Equally ranked id tensors reduced to one element along every dimension in which none of them varies by stride."""
    rank = tensors[0].dim()
    for dim in range(rank):
        if dim not in keep and all(t.stride(dim) == 0 or t.shape[dim] == 1 for t in tensors):
            tensors = [t.narrow(dim, 0, 1) for t in tensors]
    return tensors


class ChannelInterpreter(fx.Interpreter):
    """Interprets a traced network on id tensors and fills in a `ChannelIds` book and a `Tracing`."""

    def __init__(self, graph_module, shapes, book, prune_linear=False):
        super().__init__(graph_module)
        self.shapes, self.book, self.prune_linear = shapes, book, prune_linear
        self.tracing = Tracing()

    def run_node(self, node):
        info = self.tracing.nodes[node] = Node()
        if node.op == "placeholder":
            return self.book.fixed(self.shapes[node], "input of the network")
        inputs = node.all_input_nodes
        info.constant = node.op == "get_attr" or (bool(inputs) and all(self.tracing.nodes[i].constant for i in inputs))
        if node.op == "get_attr":
            return self.parameter(node)
        args, kwargs = self.fetch_args_kwargs_from_env(node)
        if node.op == "output":
            info.reads = True
            self.protect_all(args, "output of the network")
            return args[0]
        tensors = ids_in(args, kwargs)
        if node.op == "call_module":
            module = self.module.get_submodule(node.target)
            name = type(module).__name__.lower()
            result = self.run_module(node, info, module, name, tensors)
        else:
            name = node.target if node.op == "call_method" else node.target.__name__
            name = name if name.startswith("_") else name.rstrip("_")
            result = self.run_function(node, info, name, args, kwargs, tensors)
        if name not in PIECEWISE_LINEAR and not info.constant:
            info.nonlinear = name
        if not ids_in(result):
            info.source = True  # a size or a flag: no path for zeros
        elif info.source:
            info.ids = result
        return result

    # -- modules -----------------------------------------------------------------------------------------------------

    def run_module(self, node, info, module, name, tensors):
        x = tensors[0] if tensors else None
        if nn.utils.parametrize.is_parametrized(module):
            return self.unknown(node, info, tensors, f"{node.target} is parametrized")
        if isinstance(module, CONVS):
            return self.conv(node, info, module, x)
        if isinstance(module, nn.Linear):
            return self.linear(node, info, module, x)
        if isinstance(module, BATCH_NORMS + INSTANCE_NORMS) or (
            isinstance(module, nn.GroupNorm) and module.affine and module.num_groups == module.num_channels
        ):
            return self.per_channel(node, info, x, source=True)
        if isinstance(module, nn.PReLU):
            return self.per_channel(node, info, x) if module.num_parameters > 1 else x
        if isinstance(module, nn.Flatten):
            return x.flatten(module.start_dim, module.end_dim)
        if isinstance(module, nn.PixelShuffle):
            return nn.functional.pixel_shuffle(x, module.upscale_factor)
        if isinstance(module, nn.PixelUnshuffle):
            return nn.functional.pixel_unshuffle(x, module.downscale_factor)
        if isinstance(module, nn.ChannelShuffle):
            return self.channel_shuffle(x, module.groups)
        if isinstance(module, nn.ZeroPad2d):
            return self.spatial(node, x)
        if isinstance(module, nn.Hardtanh) and not isinstance(module, nn.ReLU6):
            info.source = not module.min_val <= 0 <= module.max_val
            return x
        if getattr(module, "return_indices", False):
            return self.unknown(node, info, tensors, f"{node.target} returns indices")
        return self.simple(node, info, name, tensors)

    def conv(self, node, info, module, x):
        book, weight = self.book, f"{node.target}.weight"
        in_dim, out_dim = (0, 1) if isinstance(module, _ConvTransposeNd) else (1, 0)
        inputs, groups = self.channels(x, 1), module.groups
        info.source, shape = True, self.shapes[node]
        self.tracing.positions[node.target] += math.prod(shape[2:])
        if groups == module.in_channels > 1:  # depthwise: filter i belongs to input channel i // multiplier
            per_group = module.out_channels // groups
            book.bind(weight, 0, inputs if in_dim == 0 else inputs.repeat_interleave(per_group))
            outputs = inputs.repeat_interleave(per_group)
            if per_group > 1 and in_dim == 0:
                book.protect(inputs, f"{node.target} is a transposed depthwise conv with a channel multiplier")
        else:
            info.reads = True
            if (groups > 1) and in_dim == 0:
                book.protect(inputs, f"{node.target} is a transposed grouped conv")
            per_group = inputs.view(groups, -1)
            for other in per_group[1:]:  # every group must keep as many input channels as the others
                book.unite(per_group[0], other)
            book.bind(weight, in_dim, per_group[0] if in_dim == 1 else inputs)
            outputs = self.issue(node.target, weight, out_dim, module.out_channels, groups)
        if module.bias is not None:
            book.bind(f"{node.target}.bias", 0, outputs)
        return self.spread(outputs, 1, shape)

    def linear(self, node, info, module, x):
        info.source = info.reads = True
        info.dim = len(self.shapes[node]) - 1
        self.book.bind(f"{node.target}.weight", 1, self.channels(x, x.dim() - 1))
        outputs = self.issue(node.target, f"{node.target}.weight", 0, module.out_features, 1)
        if module.bias is not None:
            self.book.bind(f"{node.target}.bias", 0, outputs)
        if not self.prune_linear:
            self.book.protect(outputs, "fully connected (see prune_linear)")
        self.tracing.positions[node.target] += math.prod(self.shapes[node][1:-1])
        return self.spread(outputs, info.dim, self.shapes[node])

    def issue(self, layer, weight, dim, number, groups):
        """The ids of a layer's filters: new ones, or those it was given when it was first called."""
        book = self.book
        if layer not in book.filters:
            known = book.tensors.get((book.aliases.get(weight, weight), dim))
            ids = book.filters[layer] = book.new(number) if known is None else known
            if dim == 0 or groups == 1:
                book.bind(weight, dim, ids)
            else:
                book.protect(ids, f"{layer} is a transposed grouped conv")
            by_group = ids.view(groups, -1)
            for other in by_group[1:]:
                book.unite(by_group[0], other)
        return book.filters[layer]

    def per_channel(self, node, info, x, source=False):
        """Normalisation or activation with one parameter a channel."""
        info.source = source
        ids = self.channels(x, 1)
        module = self.module.get_submodule(node.target)
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if tensor is not None and tensor.dim() == 1:
                self.book.bind(f"{node.target}.{name}", 0, ids)
        return self.spread(ids, 1, tuple(x.shape))

    # -- functions, methods and modules without parameters -----------------------------------------------------------

    def simple(self, node, info, name, tensors):
        """Operations on one tensor that are known by name."""
        if len(tensors) == 1:
            if name in ZERO_PRESERVING:
                return tensors[0]
            if name in ZERO_BREAKING:
                info.source = True
                return tensors[0]
            if name in POOLING:
                return self.spatial(node, tensors[0])
        return self.unknown(node, info, tensors, f"passes through {name} ({node.name})")

    def run_function(self, node, info, name, args, kwargs, tensors):
        if not tensors or name in ("size", "dim", "getattr", "_assert", "eq", "ne"):
            return super().run_node(node)
        x = tensors[0]
        if name in SUMS | PRODUCTS | {"pow"}:
            return self.elementwise(node, info, name, args, tensors)
        if name in ("cat", "concat"):
            return self.cat(args, kwargs, tensors)
        if name in RESHAPING:
            return self.reshape(node, info, name, args, kwargs, x)
        if name == "channel_shuffle":
            return self.channel_shuffle(x, args[1])
        if name in NATIVE | {"expand", "expand_as", "stack", "pixel_unshuffle"}:
            return super().run_node(node)
        if name in ("chunk", "split"):
            return self.split(node, args, kwargs, x)
        if name == "getitem":
            return self.getitem(node, info, args)
        if name in REDUCING:
            return self.reduce(node, info, args, kwargs, x)
        if name == "pad":
            return self.pad(node, info, args, kwargs, tensors)
        if name == "prelu":
            return self.unknown(node, info, tensors, f"passes through a functional {name} ({node.name})")
        return self.simple(node, info, name, tensors)

    def elementwise(self, node, info, name, args, tensors):
        operands = [a for a in node.args if isinstance(a, fx.Node) and torch.is_tensor(self.env[a])]
        if len(tensors) == 1:
            zero_stays = name in PRODUCTS or (name == "pow" and args[1] > 0) or (name in SUMS and 0 in args[1:])
            info.source = not zero_stays or (name in ("div", "truediv") and not torch.is_tensor(args[0]))
            return tensors[0]
        a, b = self.align(tensors)
        broadcast = []
        for dim in range(a.dim()):
            for small, large in ((a, b), (b, a)):
                if small.shape[dim] == 1 < large.shape[dim] and varies(large, dim):
                    self.book.protect(small, f"is broadcast over channels in {name} ({node.name})")
                    broadcast.append(small)
        if not broadcast:
            self.unite(a, b)
        constants = [self.tracing.nodes[operand].constant for operand in operands]
        if name in SUMS:
            info.source = bool(broadcast) or any(constants)
        else:
            info.main = self.main_operand(name, operands, constants, tensors)
        shape = torch.broadcast_shapes(a.shape, b.shape)
        return max((t for t in (a, b) if not any(t is s for s in broadcast)), key=torch.Tensor.numel).expand(shape)

    def main_operand(self, name, operands, constants, tensors):
        """The factor whose zero makes the product zero: the full-sized one that a hook can gate."""
        if "div" in name:
            return operands[0]

        def preference(i):
            functional_source = self.tracing.nodes[operands[i]].source and operands[i].op != "call_module"
            return (not constants[i], tensors[i].numel(), not functional_source)

        return operands[max(range(len(operands)), key=preference)]

    def unite(self, a, b):
        a, b = torch.broadcast_tensors(*self.align([a, b]))
        a, b = squash([a, b])
        self.book.unite(a.reshape(-1), b.reshape(-1))

    @staticmethod
    def align(tensors):
        rank = max(t.dim() for t in tensors)
        return [t[(None,) * (rank - t.dim())] for t in tensors]

    def cat(self, args, kwargs, tensors):
        dim = kwargs.get("dim", args[1] if len(args) > 1 else 0) % tensors[0].dim()
        shape = list(tensors[0].shape)
        shape[dim] = sum(t.shape[dim] for t in tensors)
        return torch.cat(squash(tensors, keep=(dim,)), dim).expand(shape)

    def reshape(self, node, info, name, args, kwargs, x):
        if kwargs or name == "unflatten":
            return self.unknown(node, info, [x], f"passes through {name} ({node.name})")
        result = x.reshape(*args[1:])
        sizes = node.args[1] if isinstance(node.args[1], (tuple, list)) else node.args[1:]
        for dim, size in enumerate(sizes):
            if isinstance(size, int) and size > 1:  # a number in the code: as many parts must be left after cutting
                self.equal_parts(result, dim)
        return result

    def equal_parts(self, x, dim):
        """Unites the channels of equal position in all slices along `dim`, so that the slices stay equally long."""
        if varies(x, dim):
            (x,) = squash([x], keep=(dim,))
            self.unite(x.narrow(dim, 0, 1), x)

    def channel_shuffle(self, x, groups):
        self.equal_parts(x.reshape(x.shape[0], groups, -1, *x.shape[2:]), 1)
        return nn.functional.channel_shuffle(x, groups)

    def split(self, node, args, kwargs, x):
        dim = kwargs.get("dim", args[2] if len(args) > 2 else 0) % x.dim()
        parts = getattr(x, "chunk" if "chunk" in str(node.target) else "split")(args[1], dim)
        if varies(x, dim):
            fixed_sizes = "split" in str(node.target) and not isinstance(node.args[1], fx.Node)
            if fixed_sizes or len({p.shape[dim] for p in parts}) > 1:
                self.book.protect(x, f"is split into parts of fixed size ({node.name})")
            else:
                for part in parts[1:]:
                    self.unite(parts[0], part)
        return parts

    def getitem(self, node, info, args):
        x, index = args
        if not torch.is_tensor(x):
            return x[index]
        parts = index if isinstance(index, tuple) else (index,)
        plain = all(p is None or isinstance(p, (int, slice)) for p in parts)
        dims = [p for p in parts if p is not None]
        if not plain:
            return self.unknown(node, info, [x], f"is indexed in {node.name}")
        for dim, part in enumerate(dims):
            if part != slice(None) and varies(x, dim):
                self.book.protect(x, f"is indexed by position in {node.name}")
        return x[index]

    def reduce(self, node, info, args, kwargs, x):
        dims = kwargs.get("dim", args[1] if len(args) > 1 else None)
        dims = tuple(range(x.dim())) if dims is None else (dims,) if isinstance(dims, int) else tuple(dims)
        dims = sorted(d % x.dim() for d in dims)
        keepdim = kwargs.get("keepdim", args[2] if len(args) > 2 else False)
        if not isinstance(keepdim, bool) or any(varies(x, d) for d in dims):
            return self.unknown(node, info, [x], f"is reduced over channels in {node.name}")
        for dim in reversed(dims):
            x = x.narrow(dim, 0, 1) if keepdim else x.select(dim, 0)
        return x

    def pad(self, node, info, args, kwargs, tensors):
        x = tensors[0]
        sizes = kwargs.get("pad", args[1] if len(args) > 1 else ())
        value = kwargs.get("value", args[3] if len(args) > 3 else None) or 0
        padded = [x.dim() - 1 - i // 2 for i, size in enumerate(sizes) if size]
        if value != 0 or len(tensors) > 1 or any(varies(x, dim) or dim < 2 for dim in padded):
            return self.unknown(node, info, tensors, f"channels are padded with zeros in {node.name}")
        return self.spatial(node, x)

    # -- shared ------------------------------------------------------------------------------------------------------

    def parameter(self, node):
        """A raw parameter or buffer in the forward: one id an element if it has one long dimension, else fixed."""
        tensor = self.fetch_attr(node.target)
        if not torch.is_tensor(tensor):
            return tensor
        long = [dim for dim in range(tensor.dim()) if tensor.shape[dim] > 1]
        if len(long) != 1:
            return self.book.fixed(tuple(tensor.shape), f"meets the tensor {node.target}")
        key = (self.book.aliases.get(node.target, node.target), long[0])
        if key not in self.book.tensors:
            self.book.tensors[key] = self.book.new(tensor.numel())
        return self.spread(self.book.tensors[key], long[0], tuple(tensor.shape))

    def spatial(self, node, x):
        """Pooling, resizing, padding of space: the same channels at another size."""
        return self.spread(self.channels(x, 1), 1, self.shapes[node])

    def channels(self, x, dim):
        """[channels] ids along `dim`; ids that meet in one channel are united."""
        (small,) = squash([x], keep=(dim,))
        table = small.movedim(dim, 0).reshape(x.shape[dim], -1)
        if table.shape[1] > 1:
            self.book.unite(table[:, :1].expand_as(table).reshape(-1), table.reshape(-1))
        return table[:, 0].contiguous()

    @staticmethod
    def spread(ids, dim, shape):
        return ids.view([-1 if d == dim else 1 for d in range(len(shape))]).expand(shape)

    def protect_all(self, value, reason):
        for ids in ids_in(value):
            self.book.protect(ids, reason)

    def unknown(self, node, info, tensors, reason):
        """Nothing that goes in or comes out may be cut."""
        info.reads = info.source = True
        self.protect_all(tensors, reason)
        if node.op == "call_module":
            for name, _ in self.module.get_submodule(node.target).named_parameters():
                for key in [k for k in self.book.tensors if k[0] == f"{node.target}.{name}"]:
                    self.book.protect(self.book.tensors[key], reason)

        def fill(shape):
            if shape is None:
                return None
            if shape and isinstance(shape[0], tuple):
                return tuple(fill(s) for s in shape)
            return self.book.fixed(shape, reason)

        return fill(self.shapes[node])


def ids_in(*values):
    """The id tensors in nested arguments, in order."""
    found = []
    fx.node.map_aggregate(values, lambda v: found.append(v) if torch.is_tensor(v) else None)
    return found

