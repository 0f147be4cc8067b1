"""The mode that sees every call of torch while a forward runs, and records it."""

import operator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.overrides import TorchFunctionMode

from taylor_pruning.surgery.nested import map_tensors, tensors_in
from taylor_pruning.surgery.numbers import is_tracked, number

FREE = set(  # questions about a tensor whose answer is no part of the graph
    """dim ndim ndimension dtype layout requires_grad is_leaf is_floating_point is_complex is_contiguous is_cuda is_cpu
    is_meta is_mps is_quantized is_sparse is_nested is_inference get_device element_size grad_fn _version stride
    is_same_size names _backward_hooks requires_grad_ retains_grad grad output_nr _base storage_offset data_ptr
    is_autocast_enabled is_signed __hash__ __repr__ __format__ is_tensor is_storage result_type promote_types can_cast
    _is_view is_pinned __dir__ __reduce_ex__ is_grad_enabled get_autocast_dtype __deepcopy__""".split()
)
SIZES = set("shape size numel nelement __len__".split())
VALUES = set(  # a number or a decision taken from the values of a tensor
    "__bool__ item tolist __int__ __float__ __index__ numpy is_nonzero equal allclose __contains__ __complex__".split()
)
SIZED = set(
    "view reshape expand repeat tile unflatten broadcast_to zeros ones full empty rand randn new_zeros new_ones new_full "
    "new_empty".split()
)
SHAPE_KEPT = set(  # the result is like the first argument; running them on meta tensors takes long
    """batch_norm instance_norm group_norm layer_norm rms_norm relu relu6 silu gelu hardswish hardsigmoid mish elu selu
    leaky_relu sigmoid tanh softplus dropout softmax log_softmax clamp prelu exp neg abs sqrt square""".split()
)
WRAPPERS = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")
TRACE_ERRORS = (TypeError, ValueError, RuntimeError, AttributeError, LookupError, AssertionError, NotImplementedError)


class Untraceable(RuntimeError):
    """The forward does something that a graph cannot repeat on other data."""


def operation_name(node):
    """The name of an operation, the same for a function, a method, an operator and what works in place."""
    if node.op == "call_module":
        return "call_module"
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    return bare(name)


def bare(name):
    name = name.strip("_") if name.startswith("__") else name if name.startswith("_") else name.rstrip("_")
    return name[1:] if name in ("iadd", "isub", "imul", "itruediv", "ipow") else name


class Recorder(TorchFunctionMode):
    """Runs calls of torch on stand-ins for tensors and records them."""

    def __init__(self, names, rules, device, on_values):
        super().__init__()
        self.graph, self.rules, self.device, self.on_values = fx.Graph(), rules, device, on_values
        self.batch = None
        self.hooks = 0  # forward hooks that run now
        self.looked = False  # one of them has looked at values
        self.names = names  # id of a parameter or buffer: its name
        self.nodes = {}  # id of a tensor: (node, tensor), which keeps the tensor alive
        self.stand_ins = {}  # id of a real tensor: (its stand-in, tensor)
        self.constants, self.path, self.opaque = {}, [""], ()
        self.failed = None  # name of the innermost module in which an error arose

    # -- tensors -----------------------------------------------------------------------------------------------------

    def stand_in(self, tensor):
        if self.on_values or tensor.device.type == "meta":
            return tensor
        if id(tensor) not in self.stand_ins:
            made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
            made.requires_grad_(tensor.requires_grad)
            self.stand_ins[id(tensor)] = made, tensor
            if id(tensor) in self.names:
                self.names[id(made)] = self.names[id(tensor)]
        return self.stand_ins[id(tensor)][0]

    def place(self, tensor):
        node = self.graph.placeholder(f"input_{len(self.nodes)}")
        self.bind(tensor, node)

    def measure(self, tensor):
        """The first input, whose first dimension is the batch."""
        shape = self.graph.call_function(getattr, (self.node_of(tensor), "shape"))
        self.batch_node = self.graph.call_function(pick, (shape, 0))

    def bind(self, tensor, node):
        self.nodes[id(tensor)] = node, tensor
        node.meta.setdefault("shape", tuple(map(int, tensor.shape)))
        node.meta["real"] = tensor.is_floating_point()

    def node_of(self, tensor):
        known = self.nodes.get(id(tensor))
        if known is not None:
            return known[0]
        name = self.names.get(id(tensor))
        if name is None and (tensor.device.type == "meta" or tensor.grad_fn is not None):
            raise Untraceable("a tensor comes from code that torch functions do not see")
        if name is None:
            name = f"constant {len(self.constants)}"
            self.constants[name] = tensor.detach()
        node = self.graph.create_node("get_attr", name)
        node.meta["module"] = self.path[-1]
        self.bind(tensor, node)
        return node

    def is_constant(self, tensor):
        """Its values are known and do not depend on the input, parameters or buffers."""
        if self.on_values:
            known = self.nodes.get(id(tensor))
            return known is not None and bool(known[0].meta.get("constant"))
        return tensor.device.type != "meta" and id(tensor) not in self.names

    def is_batch(self, tensor, dim):
        return tensor.ndim > 0 and dim in (0, -tensor.ndim) and tensor.shape[0] == self.batch

    # -- calls -------------------------------------------------------------------------------------------------------

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(func, "__name__", str(func))
        owner = getattr(func, "__self__", None)
        if name == "__get__":
            name = getattr(owner, "__name__", name)
        elif name in ("__set__", "__delete__"):
            if getattr(owner, "__name__", "") == "data":
                raise Untraceable("the data of a tensor are replaced")
            return func(*args, **kwargs)
        if name == "device":
            return self.device
        if name in FREE:
            return func(*args, **kwargs)
        if name == "_set_grad_enabled":
            self.graph.call_function(set_grad, tuple(args))
            return func(*args, **kwargs)
        tensors = tensors_in((args, kwargs))
        if name == "unbind" and self.is_batch(tensors[0], (args[1:] or tuple(kwargs.values()) or (0,))[0]):
            raise Untraceable("the forward runs over the samples of a batch one by one")
        if name in VALUES and not all(self.is_constant(t) for t in tensors):
            if self.hooks and self.on_values:
                self.looked = True
                return func(*args, **kwargs)
            raise Untraceable(f"a decision or a number depends on the values of a tensor ({name})")
        if self._is_python(func) and bare(name) not in self.rules:
            with _inside(), self:
                return func(*args, **kwargs)
        if name.startswith("_assert"):
            return func(*args, **kwargs)
        if name in SIZES:
            return self.size(func, name, args, kwargs)
        return self.record(func, name, args, kwargs, tensors)

    @staticmethod
    def _is_python(func):
        return getattr(func, "__module__", None) in ("torch.nn.functional", "torch.functional") and hasattr(
            func, "__code__"
        )

    def size(self, func, name, args, kwargs):
        """A shape is a node, and each of its sizes a Number with a node, made when it is first used."""
        value, node = func(*args, **kwargs), None

        def sized(index, size):
            nonlocal node
            node = node or self.graph.call_function(getattr, (self.node_of(args[0]), "shape"))
            return number(int(size), self.graph.call_function(pick, (node, index)))

        if name in ("shape", "size") and isinstance(value, torch.Size):
            if any(map(is_tracked, value)):
                return value
            return torch.Size([sized(i, s) for i, s in enumerate(value)])
        if name in ("size", "__len__"):
            dim = (args[1:] or tuple(kwargs.values()) or (0,))[0] if name == "size" else 0
            return sized(int(dim) % args[0].ndim, value)
        return number(int(value), self.graph.call_method("numel", (self.node_of(args[0]),)))

    def record(self, func, name, args, kwargs, tensors):
        on_constants = bool(tensors) and all(self.is_constant(t) for t in tensors)
        if "device" in kwargs and kwargs["device"] is None:
            kwargs = {k: v for k, v in kwargs.items() if k != "device"}
        arguments, options = self.as_nodes((args, kwargs), bare(name) in SIZED)
        if on_constants or self.on_values:
            result = func(*args, **kwargs)
        else:
            result = self.run(func, bare(name), *map_tensors((args, kwargs), self.stand_in), tensors)
        made = tensors_in(result)
        if not made and not isinstance(result, (type(None), torch.Tensor)):
            return result
        target = _function(func, name)
        if isinstance(target, str):
            node = self.graph.call_method(target, arguments, options)
        else:
            node = self.graph.call_function(target, arguments, options)
        node.meta["module"] = self.path[-1]
        node.meta["constant"] = on_constants or not tensors
        if isinstance(result, torch.Tensor):
            self.bind(result, node)
        elif made:
            self.unpack(result, node)
        return result

    def unpack(self, result, node):
        node.meta["shapes"] = map_tensors(result, lambda t: tuple(map(int, t.shape)))
        for i, item in enumerate(result):
            if not tensors_in(item):
                continue
            part = self.graph.call_function(pick, (node, i))
            part.meta.update(module=self.path[-1], constant=node.meta["constant"])
            if isinstance(item, torch.Tensor):
                self.bind(item, part)
            else:
                self.unpack(item, part)

    def run(self, func, name, args, kwargs, tensors):
        """The call on stand-ins; where the shape is plain, without running it."""
        x = args[0] if args else None
        if isinstance(x, torch.Tensor) and x.device.type == "meta":
            if name in SHAPE_KEPT and not any(type(a) is bool and a for a in args[1:]) and not kwargs.get("inplace"):
                fits = name != "batch_norm" or all(t.shape == x.shape[1:2] for t in tensors[1:])
                if fits and not getattr(func, "__name__", "").endswith("_") and not kwargs.get("dtype"):
                    return torch.empty_like(x)
            if name == "linear" and x.ndim and x.shape[-1] == args[1].shape[-1] and args[1].ndim == 2:
                return x.new_empty((*x.shape[:-1], args[1].shape[0]))
            plain = name in ("add", "mul", "sub") and not kwargs and not func.__name__.endswith("_")
            if plain and x.is_floating_point() and all(t.shape == x.shape and t.dtype == x.dtype for t in tensors):
                return torch.empty_like(x)
        if not any(t.device.type == "meta" for t in tensors_in((args, kwargs))):
            return func(*args, **kwargs)
        if kwargs.get("device") is not None:
            kwargs = kwargs | {"device": "meta"}
        if name == "to":
            args = tuple("meta" if isinstance(a, (torch.device, str)) else a for a in args)
        if name in ("cuda", "cpu"):
            return x
        return func(*args, **kwargs)

    def as_nodes(self, value, sized=False):
        """Arguments of a call with nodes in the place of tensors and sizes.

        Args:
            sized: the arguments are sizes; a multiple of the batch, which `len(x)` gives as a plain number, is taken for one.
        """

        def convert(item):
            if isinstance(item, torch.Tensor):
                return self.node_of(item)
            if is_tracked(item) and item.node is not None:
                return item.node
            if sized and type(item) is int and self.batch and item and item % self.batch == 0:
                if item == self.batch:
                    return self.batch_node
                return self.graph.call_function(operator.mul, (self.batch_node, item // self.batch))
            return item

        return fx.node.map_aggregate(value, convert)

    # -- modules -----------------------------------------------------------------------------------------------------

    @contextmanager
    def modules(self, model):
        """While open, the recorder knows which module runs, and runs the `opaque` ones as one operation each."""
        names = {id(module): name for name, module in model.named_modules()}
        call = nn.Module.__call__

        def traced_call(module, *args, **kwargs):
            name = names.get(id(module), self.path[-1])
            if name in self.opaque or isinstance(module, torch.jit.ScriptModule):
                return self.whole(self.graph.call_module, name, module.forward, args, kwargs)
            self.path.append(name)
            try:
                return call(module, *args, **kwargs)
            except TRACE_ERRORS:
                self.failed = self.failed or name
                raise
            finally:
                self.path.pop()

        def wrapped_call(function):
            return lambda *args, **kwargs: self.whole(self.graph.call_function, function, function, args, kwargs)

        marked = fx._symbolic_trace._wrapped_fns_to_patch if self.on_values else {}
        saved = [(scope, name, scope[name]) for (_, name), scope in marked.items() if name in scope]
        try:
            nn.Module.__call__ = traced_call
            for scope, name, function in saved:
                scope[name] = wrapped_call(function)
            yield
        finally:
            nn.Module.__call__ = call
            for scope, name, function in saved:
                scope[name] = function

    def whole(self, record, target, function, args, kwargs):
        """A module, or a function marked by `torch.fx.wrap`, as one operation of which nothing is known."""
        name = target if isinstance(target, str) else target.__name__
        if not self.on_values:
            raise Untraceable(f"{name} runs as a whole")
        node = record(target, *self.as_nodes((args, kwargs)))
        node.meta.update(module=self.path[-1], constant=False)
        with torch._C.DisableTorchFunction():
            result = function(*args, **kwargs)
        if isinstance(result, torch.Tensor):
            self.bind(result, node)
        elif isinstance(result, (tuple, list)):
            self.unpack(result, node)
        else:
            raise Untraceable(f"{name} returns {type(result).__name__}")
        return result


def watched(hook, recorder):
    """A forward hook that may look at values (a record of statistics) unless it changes anything with them."""

    def called(*args, **kwargs):
        recorder.hooks += 1
        try:
            result = hook(*args, **kwargs)
        finally:
            recorder.hooks -= 1
        if recorder.looked and result is not None:
            raise Untraceable("a forward hook computes with the values of activations")
        recorder.looked = False
        return result

    return called


def pick(value, index):
    return value[index]


def set_grad(enabled):
    """A `torch.no_grad` of the forward, repeated when the graph runs."""
    torch._C._set_grad_enabled(enabled)


def _function(func, name):
    """What fx calls: a function, or the name of a method."""
    if name == "__getitem__":
        return pick
    kind = type(func).__name__
    if kind == "method-wrapper":
        return Property(name)
    if kind in ("method_descriptor", "wrapper_descriptor") or getattr(func, "__module__", None) == "torch._tensor":
        return name
    return func


class Property:
    """`x.T` and its kind as a function."""

    def __init__(self, name):
        self.__name__ = name

    def __call__(self, tensor):
        return getattr(tensor, self.__name__)


@contextmanager
def _inside():
    """While open, functions of torch.nn.functional run their bodies, of which the recorder sees the operations."""
    modules = [F, torch.functional]
    saved = [(module, name, getattr(module, name)) for module in modules for name in WRAPPERS if hasattr(module, name)]
    try:
        for module, name, _ in saved:
            setattr(module, name, lambda *_: False)
        yield
    finally:
        for module, name, function in saved:
            setattr(module, name, function)
