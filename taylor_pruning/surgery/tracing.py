"""Runs a network on channel names: which channels of which tensors are one and the same thing.

The network is traced with `torch.fx` and interpreted with every activation replaced by an integer tensor of the same
shape that holds, for each element, the id of the channel it came from. conv and linear layers read ids and issue new
ones; normalisation, pooling and activations pass them on; a sum unites the ids that meet (union-find); cat, chunk,
view, flatten and transpose act on the id tensor as they act on data. A size that the forward reads off a shape is a
`Length` that knows the ids along that axis. What is not understood is protected, never cut.
Id tensors are `expand`ed over batch and space, so that they cost no memory.
"""

import functools
import inspect
import math
import traceback
from collections import OrderedDict, defaultdict
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import fx, nn
from torch.nn.modules.conv import _ConvTransposeNd
from torchvision.ops import FrozenBatchNorm2d

from taylor_pruning.errors import InputError
from taylor_pruning.surgery.copying import copy_of

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, FrozenBatchNorm2d)
INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
TRACE_ERRORS = (
    fx.proxy.TraceError, TypeError, ValueError, RuntimeError, AttributeError, LookupError, AssertionError, NameError
)  # fmt: skip

# Operations by name: a module's class name in lower case, a function's or method's name without trailing underscore.
# f(0) = 0 element by element, or channel by channel, piecewise linear: a closed gate before them is closed behind them.
LINEAR_AT_ZERO = set(
    """relu relu6 leaky_relu leakyrelu rrelu identity dropout dropout1d dropout2d dropout3d feature_dropout
    stochastic_depth clone contiguous detach to type float double half bfloat16 abs neg""".split()
)
ZERO_PRESERVING = LINEAR_AT_ZERO | set(
    """elu selu celu gelu silu mish hardswish tanh tanhshrink softshrink hardshrink softsign alphadropout alpha_dropout
    feature_alpha_dropout drop_block2d drop_block3d square sign""".split()
)
# f(0) != 0, at least for some arguments: a gate is needed behind them.
ZERO_BREAKING = set(
    "sigmoid hardsigmoid softplus logsigmoid exp cos rsqrt reciprocal threshold clamp clip hardtanh".split()
)
SPATIAL = {
    f"{kind}{dimension}d"
    for kind in """max_pool maxpool avg_pool avgpool adaptive_max_pool adaptivemaxpool adaptive_avg_pool adaptiveavgpool
        zeropad reflectionpad replicationpad circularpad""".split()
    for dimension in (1, 2, 3)
} | set("interpolate upsample upsamplingnearest2d upsamplingbilinear2d".split())
RESHAPING = set("view reshape view_as reshape_as".split())
EXPANDING = set("expand expand_as repeat".split())
AS_ANOTHER = set("expand_as view_as reshape_as type_as to".split())  # the second tensor is a model of shape or type
NEW = set("zeros ones full empty rand randn".split())  # tensors of a given size; also new_zeros, zeros_like
NATIVE = set("flatten permute transpose squeeze unsqueeze movedim swapaxes stack pixel_unshuffle".split())
REDUCING = set("mean sum amax amin".split())
SUMS = set("add iadd sub isub maximum minimum".split())
DIVISIONS = set("div truediv itruediv".split())
PRODUCTS = DIVISIONS | set("mul imul multiply".split())
PIECEWISE_LINEAR = (
    set(
        """hardsigmoid hardtanh threshold clamp clip prelu cat concat chunk split getitem getattr size dim pad expand
        expand_as flatten channel_shuffle channelshuffle pixel_shuffle pixelshuffle pixelunshuffle linear conv1d conv2d
        conv3d convtranspose1d convtranspose2d convtranspose3d batchnorm1d batchnorm2d batchnorm3d syncbatchnorm
        frozenbatchnorm2d""".split()
    )
    | LINEAR_AT_ZERO | SPATIAL | RESHAPING | NATIVE | REDUCING | SUMS
)  # fmt: skip


IN_PLACE_OPERATORS = set("iadd isub imul itruediv ifloordiv imod ipow iand ior".split())


class Tracer(fx.Tracer):
    """Symbolic tracer to which every layer whose forward is that of a known kind is one operation.

    Args:
        whole: names of other modules that are one operation.
    """

    proxy_buffer_attributes = True  # a forward that counts batches must not count while it is traced

    def __init__(self, whole=()):
        super().__init__()
        self.whole = whole

    def is_leaf_module(self, module, name):
        if name in self.whole:
            return True
        known = isinstance(module, BATCH_NORMS) and any(type(module).forward is kind.forward for kind in BATCH_NORMS)
        return known or super().is_leaf_module(module, name)


@contextmanager
def undisturbed(model, training, hooked=()):
    """The model in the given mode, with no hooks but those of the modules named in `hooked`; on leaving, every attribute
    of every module is as it was."""
    saved = [(module, dict(vars(module))) for module in model.modules()]
    keep = {id(model.get_submodule(name)) for name in hooked}
    try:
        for module, _ in saved:
            vars(module)["training"] = training
            if id(module) not in keep:
                vars(module).update(_forward_hooks=OrderedDict(), _forward_pre_hooks=OrderedDict())
        yield
    finally:
        for module, attributes in saved:
            vars(module).clear()
            vars(module).update(attributes)


def changed_in_place(node, model):
    """The input that an operation changes in place (`add_`, `+=`, `inplace=True`, `out=`), None if there is none."""
    if node.op == "call_module":
        module = model.get_submodule(node.target)
        return node.args[0] if getattr(module, "inplace", False) is True and node.args else None
    if node.op not in ("call_method", "call_function"):
        return None
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if (name.rstrip("_") != name and not name.startswith("_")) or name in IN_PLACE_OPERATORS:
        return node.args[0]
    if isinstance(node.kwargs.get("out"), fx.Node):
        return node.kwargs["out"]
    if node.kwargs.get("inplace") is True:
        return node.args[0] if node.args else node.kwargs.get("input")
    if node.op == "call_function" and any(a is True for a in node.args):  # relu(x, True)
        names = list(inspect.signature(node.target).parameters) if inspect.isfunction(node.target) else []
        return node.args[0] if dict(zip(names, node.args, strict=False)).get("inplace") is True else None
    return None


def settled(graph, model):
    """The graph with every later reader of a tensor that an operation changes in place reading its result."""
    order = {node: position for position, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        changed = changed_in_place(node, model)
        if isinstance(changed, fx.Node):
            changed.replace_all_uses_with(node, lambda user, node=node: order[user] > order[node])
    return graph


def trace(model, whole=()):
    """Symbolic trace (`fx.Graph`) of `model`, with all arguments of its forward but the first at their defaults.

    The modules named in `whole` are one operation each.

    Raises InputError naming the line of the forward that cannot be traced.
    """
    name = type(model).__name__
    arguments = inspect.signature(model.forward).parameters.values()
    others = [p for p in arguments if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)][1:]
    if missing := [p.name for p in others if p.default is p.empty]:
        raise InputError(f"forward of {name} needs {', '.join(missing)} besides the images; give them defaults")
    defaults = {p.name: p.default for p in others if isinstance(p.default, (bool, int, float, type(None)))}
    try:
        with _widths(model):
            return settled(Tracer(whole).trace(model, defaults), model)
    except TRACE_ERRORS as error:
        here = (str(Path(torch.__file__).parent), __file__)
        frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(here)]
        where = f'{frames[-1].filename}, line {frames[-1].lineno}: "{frames[-1].line}"' if frames else "its forward"
        cause = str(error).strip().split("\n")[0] or type(error).__name__
        raise InputError(
            f"{name} cannot be traced at {where} ({cause}). Move control flow that depends on the data, and new "
            "tensors sized by it, out of forward or into a function marked with torch.fx.wrap"
        ) from error


class Width(int):
    """A number of channels that the forward reads off a layer (`conv.in_channels`), or an integer computed from some.

    Attributes:
        sources: ((layer name, attribute), ...) that it was computed from.
        whole: it is that attribute itself.
    """

    def __new__(cls, value, sources, whole=True):
        width = super().__new__(cls, value)
        width.sources, width.whole = sources, whole
        return width

    def _computed(operation):
        def method(self, other):
            result = getattr(int, operation)(self, other)
            sources = self.sources + getattr(other, "sources", ())
            return Width(result, sources, whole=False) if type(result) is int else result

        return method

    __add__, __sub__, __mul__, __floordiv__ = map(_computed, ("__add__", "__sub__", "__mul__", "__floordiv__"))
    __radd__, __rsub__, __rmul__, __rfloordiv__ = map(_computed, ("__radd__", "__rsub__", "__rmul__", "__rfloordiv__"))


@contextmanager
def _widths(model):
    """While open, every layer's numbers of channels are `Width`s."""
    attributes = "in_channels out_channels in_features out_features num_features num_channels num_parameters".split()
    found = [(n, m, a) for n, m in model.named_modules() for a in attributes if type(vars(m).get(a)) is int]
    try:
        for name, module, attribute in found:
            vars(module)[attribute] = Width(vars(module)[attribute], ((name, attribute),))
        yield
    finally:
        for _, module, attribute in found:
            vars(module)[attribute] = int(vars(module)[attribute])


class ChannelIds:
    """The book of ids: which tensor dimensions they run along, which are united, which may not be cut and why."""

    def __init__(self, model):
        self.count = 0
        self.edges = []  # pairs of equally long id vectors
        self.reasons = []  # (ids, reason)
        self.tensors = {}  # (parameter or buffer name, dim): ids along that dimension
        self.filters = {}  # conv or linear layer: ids of its filters
        self.widths = {}  # layer with one setting a channel (normalisation, PReLU, depthwise conv): ids of its channels
        self.aliases = {}  # name of a parameter or buffer: the first name of the same tensor
        first = {}
        for named in (model.named_parameters, model.named_buffers):
            for name, tensor in named(remove_duplicate=False):
                self.aliases[name] = first.setdefault(id(tensor), name)

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
        """`ids` run along dimension `dim` of the tensor `name`; a second reader unites its ids with the first's."""
        key = (self.aliases[name], dim)
        if key in self.tensors:
            self.unite(self.tensors[key], ids)
        else:
            self.tensors[key] = ids

    def width(self, module, name, attribute):
        """The ids of the channels that an attribute of a layer counts, None if no tensor of its has that length."""
        key = None
        if attribute.startswith(("in_", "out_")):
            groups, transposed = getattr(module, "groups", 1), isinstance(module, _ConvTransposeNd)
            rows = attribute.startswith("in_") == transposed
            if rows or groups == 1:
                key = f"{name}.weight", 0 if rows else 1
            elif groups == module.in_channels == module.out_channels:
                key = f"{name}.weight", 0
        else:
            vectors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
            key = next(((f"{name}.{n}", 0) for n, v in vectors if v.shape == (getattr(module, attribute),)), None)
        if key is None or key[0] not in self.aliases:
            return None
        key = self.aliases[key[0]], key[1]
        if key not in self.tensors:
            self.tensors[key] = self.new(getattr(module, attribute))
        return self.tensors[key]

    def roots(self):
        """[count] for every id the smallest id of its class: every edge hooks the larger label on the smaller one."""
        label = torch.arange(self.count)
        if not self.edges:
            return label
        a, b = (torch.cat(ends) for ends in zip(*self.edges, strict=True))
        while not torch.equal(label[a], label[b]):
            ends = torch.cat([label[a], label[b]])
            low = torch.minimum(label[a], label[b]).repeat(2)
            label = label.scatter_reduce(0, ends, low, "amin")
            while not torch.equal(label, label[label]):
                label = label[label]
        return label


class Length(int):
    """A number that the forward took from a shape: it shrinks when channels go.

    Attributes:
        ids: of the channels that it counts.
        whole: it is their plain number, nothing computed from it.
    """

    def __new__(cls, value, ids, whole):
        length = super().__new__(cls, value)
        length.ids, length.whole = ids, whole
        return length


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
    """One interpretation: nodes in order of execution and how many positions each layer's weight is applied at."""

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


def squash(tensors, keep=()):
    """Equally ranked id tensors reduced to one element along every dimension in which none of them varies by stride."""
    for dim in range(tensors[0].dim()):
        if dim not in keep and all(t.stride(dim) == 0 or t.shape[dim] == 1 for t in tensors):
            tensors = [t.narrow(dim, 0, 1) for t in tensors]
    return tensors


def varies(ids, dim):
    """Whether more than one id runs along dimension `dim`."""
    if ids.shape[dim] < 2 or ids.stride(dim) == 0:
        return False
    (ids,) = squash([ids])
    return bool((ids != ids.narrow(dim, 0, 1)).any())


def varying(ids):
    return [dim for dim in range(ids.dim()) if varies(ids, dim)]


def contains(ids, others):
    return bool(torch.isin(others, squash([ids])[0]).all())


def spread(ids, dim, shape):
    """The vector `ids` along dimension `dim` of an id tensor of the given shape."""
    return ids.view([-1 if d == dim else 1 for d in range(len(shape))]).expand(shape)


def instances(kind, *values):
    """Everything of one kind in nested arguments, in order: id tensors or `Length`s."""
    found = []
    fx.node.map_aggregate(values, lambda v: found.append(v) if isinstance(v, kind) else None)
    return found


def argument(name, position, args, kwargs, default=None):
    return kwargs.get(name, args[position] if len(args) > position else default)


def operation_name(node):
    """Name of a function or method; a user's own function, kept whole by `torch.fx.wrap`, has none that is known."""
    if node.op == "call_method":
        name = node.target
    elif (node.target.__module__ or "torch").split(".")[0] in ("torch", "torchvision", "_operator", "math", "builtins"):
        name = node.target.__name__
    else:
        return f"{node.target.__name__}()"
    return name if name.startswith("_") else name.rstrip("_")


def conv_space(module, space):
    """Size of a conv's output along every dimension of space."""
    if module.padding == "same":
        return tuple(space)
    sizes = []
    for dim, size in enumerate(space):
        extent = module.dilation[dim] * (module.kernel_size[dim] - 1) + 1
        padding = 0 if module.padding == "valid" else 2 * module.padding[dim]
        if isinstance(module, _ConvTransposeNd):
            sizes.append((size - 1) * module.stride[dim] - padding + extent + module.output_padding[dim])
        else:
            sizes.append((size + padding - extent) // module.stride[dim] + 1)
    return tuple(sizes)


class ShapeInterpreter(fx.Interpreter):
    """Runs a traced network on data and keeps the shape of everything."""

    def __init__(self, model, graph):
        super().__init__(model, graph=graph)
        self.extra_traceback = False  # an error is one line
        self.shapes = {}

    def run_node(self, node):
        result = super().run_node(node)
        self.shapes[node] = fx.node.map_aggregate(result, lambda v: tuple(v.shape) if torch.is_tensor(v) else None)
        return result


class ChannelInterpreter(fx.Interpreter):
    """Interprets a traced network on id tensors and fills in a `ChannelIds` book and a `Tracing`."""

    def __init__(self, model, graph, example_input, book, prune_linear=False):
        super().__init__(model, graph=graph)
        self.example, self.book, self.prune_linear = example_input, book, prune_linear
        self.tracing = Tracing()
        self.extra_traceback = False

    @functools.cached_property
    def shapes(self):
        """{node: shape, or a tuple of shapes} of one true forward of a copy; only what is not understood needs it."""
        forward = ShapeInterpreter(copy_of(self.module), self.graph)
        parameter = next((p for p in self.module.parameters() if p.is_floating_point()), self.example)
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            forward.run(self.example.to(parameter))
        return forward.shapes

    def run_node(self, node):
        info = self.tracing.nodes[node] = Node()
        info.constant = node.op == "get_attr" or self.is_constant(node)
        args, kwargs = fx.node.map_aggregate(self.fetch_args_kwargs_from_env(node), self.length_of)
        tensors = instances(torch.Tensor, args, kwargs)
        if node.op == "placeholder":
            value = super().run_node(node)  # ids for the images, its default for any other argument
            result = self.book.fixed(tuple(value.shape), "input of the network") if torch.is_tensor(value) else value
        elif node.op == "get_attr":
            result = self.attribute(node)
            info.source = True  # no gate makes it zero
        elif node.op == "output":
            info.reads = True
            self.protect_all(tensors, "output of the network")
            result = args[0]
        elif node.op == "call_module":
            module = self.module.get_submodule(node.target)
            name = type(module).__name__.lower()
            result = self.run_module(node, info, module, name, args, kwargs, tensors)
            if isinstance(module, BATCH_NORMS) and module.running_mean is None:
                name = f"{name} without running statistics"  # it divides by those of the batch, in evaluation mode too
        else:
            name = operation_name(node)
            result = self.run_function(node, info, name, args, kwargs, tensors)
        known = info.constant or (node.op.startswith("call") and (name in PIECEWISE_LINEAR or name in PRODUCTS))
        if node.op.startswith("call") and tensors and not known:
            info.nonlinear = name
        if not instances(torch.Tensor, result):
            info.source = True  # a size or a flag: no path for zeros
        elif info.source and torch.is_tensor(result):
            info.ids = result
            if node.op == "call_module" and result.shape[:1] != self.example.shape[:1]:
                self.book.protect(result, f"the batch of {node.target} is not that of the images")
        return result

    def is_constant(self, node):
        """Whether all tensors that it computes with are constants. Sizes, types and devices of activations are none."""
        inputs = [i for i in node.all_input_nodes if instances(torch.Tensor, self.env[i])]
        if node.op in ("call_method", "call_function") and operation_name(node) in AS_ANOTHER:
            inputs = inputs[:1]
        return bool(inputs) and all(self.tracing.nodes[i].constant for i in inputs)

    def length_of(self, value):
        """A layer's `Width` as the `Length` of the ids that run there; any other value as it is."""
        if not isinstance(value, Width):
            return value
        layers = [(self.module.get_submodule(name), name, attribute) for name, attribute in value.sources]
        ids = [ids for layer in layers if (ids := self.book.width(*layer)) is not None]
        return Length(int(value), torch.cat(ids), value.whole) if ids else int(value)

    # -- modules -----------------------------------------------------------------------------------------------------

    def run_module(self, node, info, module, name, args, kwargs, tensors):
        x = tensors[0] if tensors else None
        whole = all(key in module._parameters for key in ("weight", "bias") if hasattr(module, key))
        if nn.utils.parametrize.is_parametrized(module) or (isinstance(module, (*CONVS, nn.Linear)) and not whole):
            return self.unknown(node, info, tensors, f"the weight of {node.target} is computed from other tensors")
        if isinstance(module, CONVS):
            return self.conv(node, info, module, x)
        if isinstance(module, nn.Linear):
            return self.linear(node, info, module, x)
        if isinstance(module, BATCH_NORMS + INSTANCE_NORMS) or (
            isinstance(module, nn.GroupNorm) and module.num_groups == module.num_channels
        ):
            return self.per_channel(node, info, module, x, source=True)
        if isinstance(module, nn.PReLU):
            return self.per_channel(node, info, module, x) if module.num_parameters > 1 else x
        if isinstance(module, nn.Flatten):
            return x.flatten(module.start_dim, module.end_dim)
        if isinstance(module, nn.PixelShuffle):
            return self.pixel_shuffle(x, module.upscale_factor)
        if isinstance(module, nn.PixelUnshuffle):
            return nn.functional.pixel_unshuffle(x, module.downscale_factor)
        if isinstance(module, nn.ChannelShuffle):
            return self.channel_shuffle(x, module.groups)
        if isinstance(module, nn.Hardtanh) and module.min_val <= 0 <= module.max_val:
            return x
        return self.simple(node, info, name, args, kwargs, tensors)

    def conv(self, node, info, module, x):
        book, weight, transposed = self.book, f"{node.target}.weight", isinstance(module, _ConvTransposeNd)
        in_dim, out_dim = (0, 1) if transposed else (1, 0)
        inputs, groups = self.channels(node, x, 1, module.in_channels), module.groups
        info.source = True
        plain_call = len(node.args) + len(node.kwargs) == 1  # a transposed conv may be told its output size
        space = conv_space(module, x.shape[2:]) if plain_call else self.shapes[node][2:]
        if min(space) < 1:
            raise RuntimeError(f"{node.target} gets too small a map, {tuple(x.shape[2:])}")
        self.tracing.positions[node.target] += math.prod(x.shape[2:] if transposed else space)
        if groups == module.in_channels > 1:  # depthwise: filter i belongs to input channel i // multiplier
            multiplier = module.out_channels // groups
            outputs = inputs.repeat_interleave(multiplier)
            book.bind(weight, 0, inputs if transposed else outputs)
            if multiplier > 1 and transposed:
                book.protect(inputs, f"{node.target} is a transposed depthwise conv with a channel multiplier")
            book.widths[node.target] = outputs
        else:
            info.reads = True
            if groups > 1 and transposed:
                book.protect(inputs, f"{node.target} is a transposed grouped conv")
            by_group = inputs.view(groups, -1)  # every group must keep as many input channels as the others
            book.unite(by_group[:1].expand_as(by_group), by_group)
            book.bind(weight, in_dim, inputs if transposed else by_group[0])
            outputs = self.issue(node.target, weight, out_dim, module.out_channels, groups)
        if module.bias is not None:
            book.bind(f"{node.target}.bias", 0, outputs)
        return spread(outputs, 1, (x.shape[0], module.out_channels, *space))

    def linear(self, node, info, module, x):
        info.source = info.reads = True
        info.dim = x.dim() - 1
        self.book.bind(f"{node.target}.weight", 1, self.channels(node, x, info.dim, module.in_features))
        outputs = self.issue(node.target, f"{node.target}.weight", 0, module.out_features, 1)
        if module.bias is not None:
            self.book.bind(f"{node.target}.bias", 0, outputs)
        if not self.prune_linear:
            self.book.protect(outputs, "fully connected (see prune_linear)")
        self.tracing.positions[node.target] += math.prod(x.shape[1:-1])
        return spread(outputs, info.dim, (*x.shape[:-1], module.out_features))

    def issue(self, layer, weight, dim, number, groups):
        """The ids of a layer's filters: new ones, or those it was given when it was first called."""
        book = self.book
        if layer not in book.filters:
            known = book.tensors.get((book.aliases[weight], dim))
            ids = book.filters[layer] = book.new(number) if known is None else known
            if dim == 0 or groups == 1:
                book.bind(weight, dim, ids)
            else:
                book.protect(ids, f"{layer} is a transposed grouped conv")
            by_group = ids.view(groups, -1)
            book.unite(by_group[:1].expand_as(by_group), by_group)
        return book.filters[layer]

    def per_channel(self, node, info, module, x, source=False):
        """Normalisation or activation with one setting a channel."""
        info.source = source
        ids = self.channels(node, x, 1, getattr(module, "num_features", None))
        self.book.widths[node.target] = ids
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if tensor.dim() == 1:
                self.book.bind(f"{node.target}.{name}", 0, ids)
        return spread(ids, 1, x.shape)

    # -- functions, methods and modules without parameters -----------------------------------------------------------

    def simple(self, node, info, name, args, kwargs, tensors):
        """Operations on one tensor that are known by name."""
        if len(tensors) == 1:
            (x,) = tensors
            if name in ZERO_PRESERVING:
                return x
            if name in ZERO_BREAKING and len(varying(x)) < 2:  # a gate works along one dimension
                info.source, info.dim = True, (*varying(x), 1)[0]
                return x
            if name in SPATIAL:
                return self.spatial(node, info, x, args, kwargs)
        return self.unknown(node, info, tensors, f"passes through {name} ({node.name})")

    def run_function(self, node, info, name, args, kwargs, tensors):
        lengths = instances(Length, args, kwargs)
        if not tensors:
            return self.number(node, info, name, args, kwargs, lengths)
        x = tensors[0]
        if name == "size" or (name == "getattr" and args[1] == "shape"):
            dim = argument("dim", 1, args, kwargs) if name == "size" else None
            return self.size(x) if dim is None else self.size(x)[dim]
        if name in ("numel", "nelement"):
            return Length(x.numel(), squash([x])[0].unique(), whole=False)
        if name == "getattr" and args[1] == "dtype":
            return next((p.dtype for p in self.module.parameters() if p.is_floating_point()), self.example.dtype)
        if name in ("dim", "getattr", "is_floating_point"):
            return super().run_node(node)
        if name in ("to", "type_as"):
            return x
        if name.endswith("_like") and name.removesuffix("_like") in NEW:
            info.constant, info.source = True, name != "zeros_like"
            return x
        if name == "new_tensor":
            info.constant = info.source = True
            return self.book.fixed(tuple(torch.as_tensor(args[1]).shape), f"meets the new tensor {node.name}")
        if name.startswith("new_") and name.removeprefix("new_") in NEW:
            return self.new_tensor(node, info, name.removeprefix("new_"), args[1:], kwargs)
        if name in RESHAPING | EXPANDING:
            return self.resize(node, info, name, args, kwargs, x)
        parts = isinstance(argument("sizes", 1, args, kwargs), (tuple, list)) and all(n.whole for n in lengths)
        foreign = [n for n in lengths if name not in ("chunk", "split") or not (parts or contains(x, n.ids))]
        self.protect_all([n.ids for n in foreign], f"their number enters {name} ({node.name})")
        if foreign:
            self.protect_all(tensors, f"meets a number of channels in {name} ({node.name})")
        if name in SUMS | PRODUCTS | {"pow"}:
            return self.elementwise(node, info, name, args, tensors)
        if name in ("cat", "concat"):
            return self.cat(args, kwargs, tensors)
        if name == "channel_shuffle":
            return self.channel_shuffle(x, argument("groups", 1, args, kwargs))
        if name == "pixel_shuffle":
            return self.pixel_shuffle(x, argument("upscale_factor", 1, args, kwargs))
        if name in NATIVE:
            return super().run_node(node)
        if name in ("chunk", "split"):
            return self.split(node, name, args, kwargs, x)
        if name == "getitem":
            return self.getitem(node, info, args)
        if name in REDUCING:
            return self.reduce(node, info, args, kwargs, x)
        if name == "pad":
            return self.pad(node, info, args, kwargs, tensors)
        return self.simple(node, info, name, args, kwargs, tensors)

    @staticmethod
    def size(x):
        """The shape of `x`, with a `Length` wherever channels run."""

        def length(dim):
            (small,) = squash([x], keep=(dim,))
            small = small.movedim(dim, 0).reshape(x.shape[dim], -1)
            whole = bool((small == small[:, :1]).all())
            return Length(x.shape[dim], small[:, 0] if whole else small.unique(), whole)

        return tuple(length(dim) if varies(x, dim) else size for dim, size in enumerate(x.shape))

    def number(self, node, info, name, args, kwargs, lengths):
        """An operation on numbers, shapes and flags alone: what is computed from a `Length` is one, too."""
        if name in NEW:
            return self.new_tensor(node, info, name, args, kwargs)
        result = super().run_node(node)
        if torch.is_tensor(result):
            info.constant = True
            self.protect_all([n.ids for n in lengths], f"their number is the size of a new tensor ({node.name})")
            return self.book.fixed(tuple(result.shape), f"meets the new tensor {node.name}")
        if lengths and name != "getitem" and not isinstance(result, tuple):
            ids = torch.cat([n.ids for n in lengths])
            if isinstance(result, int) and not isinstance(result, bool):
                return Length(int(result), ids, whole=False)
            self.book.protect(ids, f"their number enters {name} ({node.name})")
        return result

    def new_tensor(self, node, info, name, args, kwargs):
        """A tensor that the forward makes: its dimensions that are given by a `Length` shrink with those channels."""
        sizes = kwargs.get("size", args[0] if args and (name == "full" or not isinstance(args[0], int)) else args)
        sizes = (sizes,) if isinstance(sizes, int) else tuple(sizes)
        info.constant, info.source = True, name != "zeros"
        lengths = [(dim, size) for dim, size in enumerate(sizes) if isinstance(size, Length)]
        if len(lengths) == 1 and lengths[0][1].whole:
            return spread(lengths[0][1].ids, lengths[0][0], sizes)
        self.protect_all([n.ids for _, n in lengths], f"their number is the size of a new tensor ({node.name})")
        return self.book.fixed(tuple(map(int, sizes)), f"meets the new tensor {node.name}")

    def resize(self, node, info, name, args, kwargs, x):
        """view, reshape, expand: a dimension is given by a `Length`, as the rest (-1), or has a fixed size."""
        if kwargs or len(args) < 2 or not isinstance(args[1], (int, tuple, list, torch.Tensor)):
            tensors = instances(torch.Tensor, args, kwargs)
            return self.unknown(node, info, tensors, f"passes through {name} ({node.name})")
        sizes = args[1] if isinstance(args[1], (tuple, list)) else args[1:]
        if isinstance(args[1], torch.Tensor):
            sizes = self.size(args[1])
        if name == "repeat":
            x = x[(None,) * (len(sizes) - x.dim())]
            for dim, (size, number) in enumerate(zip(x.shape, sizes, strict=True)):
                if size > 1 and isinstance(number, Length):
                    tensors = [x, number.ids]
                    self.protect_all(tensors, f"is repeated by a number of channels in {node.name}")
                if size > 1 and number > 1:
                    x = torch.cat([x] * number, dim)
            sizes = [number if size == 1 else -1 for size, number in zip(x.shape, sizes, strict=True)]
        if name in RESHAPING:
            result = rest = x.reshape(*sizes)
            for dim, size in enumerate(sizes):
                if not isinstance(size, Length) and size != -1:
                    self.equal_parts(result, dim)
                    rest = rest.narrow(dim, 0, 1)
            if len(varying(rest)) > 1:
                self.book.protect(x, f"is split by computed sizes in {node.name}")
        else:
            result = x.expand(*sizes)
        for dim, size in enumerate(sizes):  # what is as long as a Length says must shrink with it
            if not isinstance(size, Length):
                continue
            along = spread(size.ids, dim, result.shape) if size.whole else None
            if along is not None and name not in RESHAPING and x.shape[dim - result.dim() :][:1] in ((), (1,)):
                self.book.protect(result, f"is repeated over channels in {node.name}")
                info.source, result = True, along
            elif along is not None:
                self.unite(result, along)
            elif not contains(x, size.ids):
                self.protect_all([x, size.ids], f"meets another number of channels in {node.name}")
        return result

    def elementwise(self, node, info, name, args, tensors):
        if len(tensors) == 1:
            return self.with_number(info, name, args, tensors[0])
        nodes = instances(fx.Node, node.args, node.kwargs)
        operands = [a for a in nodes if torch.is_tensor(self.env[a])]
        constants = [self.tracing.nodes[operand].constant for operand in operands]
        a, b = self.align(tensors)
        broadcast = [False, False]
        for dim in range(a.dim()):
            for i, (small, large) in enumerate(((a, b), (b, a))):
                broadcast[i] |= small.shape[dim] == 1 < large.shape[dim] and varies(large, dim)
        if all(broadcast) or name == "pow" or (name in DIVISIONS and not constants[1]):
            return self.unknown(node, info, tensors, f"passes through {name} ({node.name})")
        shape = torch.broadcast_shapes(a.shape, b.shape)
        if any(broadcast):
            small, large = (a, b) if broadcast[0] else (b, a)
            self.book.protect(small, f"is broadcast over channels in {name} ({node.name})")
        else:
            self.unite(a, b)
            large = max(a, b, key=torch.Tensor.numel)
        if name in SUMS:
            info.source = any(broadcast) or any(constants)
            return large.expand(shape)
        info.main = self.main_operand(operands, constants, broadcast, tensors)
        info.nonlinear = None if any(constants) else name
        return large.expand(shape)

    @staticmethod
    def with_number(info, name, args, x):
        """x + 1, 1 - x, 2 * x, x / 2, 2 / x, x ** 2, 2 ** x."""
        number, first = next((a for a in args if not torch.is_tensor(a)), None), torch.is_tensor(args[0])
        if name in SUMS:
            info.source = number != 0
        elif name == "pow":
            info.source = not (first and isinstance(number, (int, float)) and number >= 1)
        else:
            info.source = name in DIVISIONS and not first
        if name in DIVISIONS and not first:
            info.nonlinear = name
        return x

    def main_operand(self, operands, constants, broadcast, tensors):
        """The factor whose zero makes the product zero: the full-sized one that a hook can gate."""

        def preference(i):
            functional_source = self.tracing.nodes[operands[i]].source and operands[i].op != "call_module"
            return (not broadcast[i], not constants[i], tensors[i].numel(), not functional_source)

        return operands[max((0, 1), key=preference)]

    def unite(self, a, b):
        a, b = squash(torch.broadcast_tensors(*self.align([a, b])))
        self.book.unite(a.reshape(-1), b.reshape(-1))

    @staticmethod
    def align(tensors):
        rank = max(t.dim() for t in tensors)
        return [t[(None,) * (rank - t.dim())] for t in tensors]

    def cat(self, args, kwargs, tensors):
        dim = argument("dim", 1, args, kwargs, 0) % tensors[0].dim()
        shape = list(tensors[0].shape)
        shape[dim] = sum(t.shape[dim] for t in tensors)
        return torch.cat(squash(tensors, keep=(dim,)), dim).expand(shape)

    def equal_parts(self, x, dim):
        """Unites the channels of equal position in all slices along `dim`, so that the slices stay equally long."""
        if varies(x, dim):
            (x,) = squash([x], keep=(dim,))
            self.unite(x.narrow(dim, 0, 1), x)

    def channel_shuffle(self, x, groups):
        self.equal_parts(x.unflatten(1, (groups, -1)), 1)
        return nn.functional.channel_shuffle(x, groups)

    def pixel_shuffle(self, x, factor):
        self.equal_parts(x.unflatten(-3, (-1, factor * factor)), x.dim() - 2)
        return nn.functional.pixel_shuffle(x, factor)

    def split(self, node, name, args, kwargs, x):
        dim = argument("dim", 2, args, kwargs, 0) % x.dim()
        sizes = argument("chunks" if name == "chunk" else "split_size_or_sections", 1, args, kwargs)
        sizes = argument("split_size", 1, args, kwargs) if sizes is None else sizes
        parts = getattr(x, name)(sizes, dim)
        if varies(x, dim):
            fixed_sizes = name == "split" and not isinstance(sizes, Length)
            if isinstance(sizes, (tuple, list)) and all(isinstance(s, Length) and s.whole for s in sizes):
                for part, size in zip(parts, sizes, strict=True):
                    self.unite(part, spread(size.ids, dim, part.shape))
            elif fixed_sizes or len({p.shape[dim] for p in parts}) > 1:
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
        if not all(p is None or type(p) is int or isinstance(p, slice) for p in parts):
            return self.unknown(node, info, instances(torch.Tensor, args), f"is indexed in {node.name}")
        for dim, part in enumerate(p for p in parts if p is not None):
            if part != slice(None) and varies(x, dim):
                self.book.protect(x, f"is indexed by position in {node.name}")
        return x[index]

    def reduce(self, node, info, args, kwargs, x):
        dims = argument("dim", 1, args, kwargs)
        dims = tuple(range(x.dim())) if dims is None else (dims,) if isinstance(dims, int) else tuple(dims)
        dims = sorted(d % x.dim() for d in dims)
        keepdim = argument("keepdim", 2, args, kwargs, False)
        if not isinstance(keepdim, bool) or any(varies(x, d) for d in dims):
            return self.unknown(node, info, [x], f"is reduced over channels in {node.name}")
        for dim in reversed(dims):
            x = x.narrow(dim, 0, 1) if keepdim else x.select(dim, 0)
        return x

    def pad(self, node, info, args, kwargs, tensors):
        x, sizes = tensors[0], argument("pad", 1, args, kwargs)
        padded = [x.dim() - 1 - i // 2 for i, size in enumerate(sizes) if size]
        if argument("value", 3, args, kwargs) or len(tensors) > 1 or any(varies(x, dim) or dim < 2 for dim in padded):
            return self.unknown(node, info, tensors, f"passes through pad ({node.name})")
        return self.spatial(node, info, x, args, kwargs)

    def spatial(self, node, info, x, args, kwargs):
        """Pooling, resizing, padding of space: the same channels at the size that one channel of zeros gets."""
        probe = torch.zeros(1, 1, *x.shape[2:])
        args, kwargs = fx.node.map_aggregate((args, kwargs), lambda v: probe if torch.is_tensor(v) else v)
        call = self.module.get_submodule(node.target).forward if node.op == "call_module" else node.target
        probe = call(*args, **kwargs)
        if not torch.is_tensor(probe):
            return self.unknown(node, info, [x], f"{node.name} returns indices")
        return spread(self.channels(node, x, 1), 1, (*x.shape[:2], *probe.shape[2:]))

    # -- shared ------------------------------------------------------------------------------------------------------

    def attribute(self, node):
        """A raw parameter or buffer in the forward: one id an element if it has one long dimension, else fixed."""
        book, tensor = self.book, self.fetch_attr(node.target)
        if not torch.is_tensor(tensor):
            return tensor
        reason = f"meets the tensor {node.target}"
        long = [dim for dim in range(tensor.dim()) if tensor.shape[dim] > 1]
        if node.target not in book.aliases:  # neither parameter nor buffer: it is not cut
            return book.fixed(tuple(tensor.shape), reason)
        if len(long) != 1:
            for dim in long:
                book.bind(node.target, dim, book.fixed((tensor.shape[dim],), reason))
            return book.fixed(tuple(tensor.shape), reason)
        ids = book.tensors.setdefault((book.aliases[node.target], long[0]), book.new(tensor.numel()))
        return spread(ids, long[0], tensor.shape)

    def channels(self, node, x, dim, expected=None):
        """[channels] ids along `dim`; ids that meet in one channel are united."""
        if expected not in (None, x.shape[dim]):
            raise InputError(
                f"{node.target} needs {expected} channels but gets {x.shape[dim]} from an example of shape "
                f"{tuple(self.example.shape[1:])}; pass an example_input that the network can process"
            )
        (small,) = squash([x], keep=(dim,))
        table = small.movedim(dim, 0).reshape(x.shape[dim], -1)
        self.book.unite(table[:, :1].expand_as(table), table)
        return table[:, 0].contiguous()

    def protect_all(self, tensors, reason):
        for ids in tensors:
            self.book.protect(ids, reason)

    def unknown(self, node, info, tensors, reason):
        """Nothing that goes in or comes out may be cut."""
        info.reads = info.source = True
        self.protect_all(tensors, reason)
        if node.op == "call_module":
            module = self.module.get_submodule(node.target)
            if isinstance(module, CONVS):
                self.book.filters.setdefault(node.target, self.book.fixed((module.out_channels,), reason))
            for name, parameter in module.named_parameters():
                for dim in range(parameter.dim()):
                    self.book.bind(f"{node.target}.{name}", dim, self.book.fixed((parameter.shape[dim],), reason))

        def fill(shape):
            if shape is None:
                return None
            if all(isinstance(size, int) for size in shape):
                return self.book.fixed(shape, reason)
            return tuple(fill(s) for s in shape)

        return fill(self.shapes[node])
