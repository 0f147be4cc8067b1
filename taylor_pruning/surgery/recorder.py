"""The mode that sees every call of torch while a forward runs, and records it."""

from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import PackedSequence
from torch.overrides import TorchFunctionMode

from taylor_pruning.surgery.autocasts import Autocasts
from taylor_pruning.surgery.draws import EqualDraws
from taylor_pruning.surgery.lines import caller
from taylor_pruning.surgery.nested import map_tensors, tensors_in
from taylor_pruning.surgery.numbers import number
from taylor_pruning.surgery.recorded_calls import (
    bare,
    called_function,
    in_order,
    is_in_place,
    is_python,
    pick,
    set_grad,
)
from taylor_pruning.surgery.sample_loops import takes_samples_apart
from taylor_pruning.surgery.tensor_nodes import TensorNodes, Untraceable

FREE = set(  # questions about a tensor whose answer is no part of the graph
    """dim ndim ndimension dtype layout requires_grad is_leaf is_floating_point is_complex is_contiguous is_cuda is_cpu
    is_meta is_mps is_quantized is_sparse is_nested is_inference get_device element_size grad_fn _version stride
    is_same_size names _backward_hooks requires_grad_ retains_grad grad output_nr _base storage_offset data_ptr
    is_autocast_enabled is_signed __hash__ __repr__ __format__ is_tensor is_storage result_type promote_types can_cast
    _is_view is_pinned __dir__ __reduce_ex__ is_grad_enabled get_autocast_dtype __deepcopy__""".split()
)
OF_SIZES = {"stride", "is_same_size", "storage_offset"}  # of those, answers that may be others for other sizes
SIZES = set("shape size numel nelement __len__".split())
VALUES = set(  # a number or a decision taken from the values of a tensor
    "__bool__ item tolist __int__ __float__ __index__ numpy is_nonzero equal allclose __contains__ __complex__".split()
)
SIZED = set(
    "view reshape expand repeat tile unflatten broadcast_to zeros ones full empty rand randn randperm new_zeros new_ones "
    "new_full new_empty".split()
)
BOUNDED = set("__getitem__ __setitem__ narrow split split_with_sizes tensor_split".split())  # by positions or numbers
SHAPE_KEPT = set(  # the result is like the first argument; running them on meta tensors takes long
    """batch_norm instance_norm group_norm layer_norm rms_norm relu relu6 silu gelu hardswish hardsigmoid mish elu selu
    leaky_relu sigmoid tanh softplus dropout softmax log_softmax clamp prelu exp neg abs sqrt square""".split()
)
OF_NUMPY = {"axis": "dim", "keepdims": "keepdim"}  # names of arguments that torch takes too
STATISTICAL = (F.batch_norm, F.instance_norm)  # in training they write to the statistics that they are given
WRAPPERS = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")
NO_DATA = "Compute with a new tensor, as F.conv2d(x, conv.weight * mask) does, in the place of writing to `.data`"
OF_THEIR_OWN = "Move the call into a module of its own, which then stays as it is"
ALL_AT_ONCE = "Compute with all samples at once, or move the loop into a module of its own, which then stays as it is"
TRACE_ERRORS = (TypeError, ValueError, RuntimeError, AttributeError, LookupError, AssertionError, NotImplementedError)


class Recorder(TorchFunctionMode):
    """Runs calls of torch on stand-ins for tensors and records them."""

    def __init__(self, names, rules, device, on_values):
        super().__init__()
        self.nodes = TensorNodes(names, on_values)
        self.graph, self.path = self.nodes.graph, self.nodes.path
        self.rules, self.device, self.on_values = rules, device, on_values
        self.autocasts = Autocasts()
        self.hooks = 0  # forward hooks that run now
        self.looked = False  # one of them has looked at values
        self.opaque = ()  # names of modules, and functions of torch.jit, that run as one operation each
        self.apart = False  # whether one of them runs now, of which nothing more is recorded
        self.failed = None  # the innermost of them in which an error arose
        self.gradients = True  # whether gradients are on in the graph
        self.mode_read = False  # whether the forward asks for the mode in which its modules are
        self.sizes_read = False  # whether it asks for a size, or for the parts of a tensor, of which there may be more

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(func, "__name__", str(func))
        if isinstance(func, torch._ops.HigherOrderOperator):  # its functions compute with what they have captured
            raise Untraceable(f"functions are handed to torch, which calls them ({name})", OF_THEIR_OWN)
        owner = getattr(func, "__self__", None)
        if name == "__get__":
            name = getattr(owner, "__name__", name)
        elif name in ("__set__", "__delete__"):
            if getattr(owner, "__name__", "") == "data":
                raise Untraceable("the data of a tensor are replaced", NO_DATA)
            return func(*args, **kwargs)
        if name == "device":
            return self.device
        self.sizes_read |= name in OF_SIZES
        if name in FREE:
            return func(*args, **kwargs)
        if name == "_set_grad_enabled":
            if torch.is_grad_enabled() == self.gradients:  # else in an autograd.Function, where they are off
                self.graph.call_function(set_grad, tuple(args))
                self.gradients = args[0]
            return func(*args, **kwargs)
        tensors = tensors_in((args, kwargs))
        if name in VALUES and tensors and all(map(self.nodes.is_setting, tensors)):
            return func(*args, **kwargs)
        if name in VALUES and not all(self.nodes.is_constant(t) for t in tensors):
            if self.hooks and self.on_values:
                self.looked = True
                return func(*args, **kwargs)
            raise Untraceable(f"a decision or a number depends on the values of a tensor ({name})")
        if is_python(func) and bare(name) not in self.rules:
            with _inside(), self:
                return func(*args, **kwargs)
        if name.startswith("_assert"):
            return func(*args, **kwargs)
        if name in SIZES:
            return self.size(func, name, args, kwargs)
        return self.record(func, name, args, kwargs, tensors)

    def size(self, func, name, args, kwargs):
        """A shape is a node, and each of its sizes a Number with a node, made when it is first used."""
        value, node = func(*args, **kwargs), None
        self.sizes_read = True

        def sized(index, size):
            nonlocal node
            node = node or self.graph.call_function(getattr, (self.nodes.node_of(args[0]), "shape"))
            return number(int(size), self.graph.call_function(pick, (node, index)))

        if name in ("shape", "size") and isinstance(value, torch.Size):
            return torch.Size([sized(i, s) for i, s in enumerate(value)])
        if name in ("size", "__len__"):
            dim = (args[1:] or tuple(kwargs.values()) or (0,))[0] if name == "size" else 0
            size = sized(int(dim) % args[0].ndim, value)
            if name == "__len__" and id(args[0]) in self.nodes.names:  # else that of a batch
                self.nodes.lengths[id(args[0])] = value, size.node
            return size
        return number(int(value), self.graph.call_method("numel", (self.nodes.node_of(args[0]),)))

    def record(self, func, name, args, kwargs, tensors):
        """Runs a call and adds it to the graph; returns its result."""
        on_constants = bool(tensors) and all(self.nodes.is_constant(t) for t in tensors)
        if bare(name) in self.rules:  # an operation that nothing is known of may call its own arguments so
            kwargs = {OF_NUMPY.get(key, key): value for key, value in kwargs.items()}
        func, args, kwargs = in_order(func, bare(name), args, kwargs)
        length = self.nodes.lengths.get(id(args[0])) if args and bare(name) in SIZED else None
        given = self.nodes.of_samples(args) if name in ("__getitem__", "__setitem__") else args
        arguments, options = self.nodes.as_nodes((given, kwargs), bare(name) in SIZED, name in BOUNDED, length)
        if on_constants or self.on_values:
            result = self.computed(func, args, kwargs)
        else:
            result = self.run(func, bare(name), *map_tensors((args, kwargs), self.nodes.stand_in), tensors)
        result = args[0] if name == "__setitem__" else result
        made = tensors_in(result)
        if not made and not isinstance(result, (type(None), torch.Tensor)):
            return result
        target = called_function(func, name)
        if isinstance(target, str):
            node = self.graph.call_method(target, arguments, options)
        else:
            node = self.graph.call_function(target, arguments, options)
        if not on_constants and takes_samples_apart(name, args, kwargs, result, self.nodes.batch):
            raise Untraceable("the forward runs over the samples of a batch one by one", ALL_AT_ONCE)
        if is_in_place(name, kwargs):
            self.nodes.note_written(tensors_in((args[:1], kwargs.get("out"))), varied=not on_constants)
        elif func in STATISTICAL and True in (*args[5:6], kwargs.get("training"), kwargs.get("use_input_stats")):
            self.nodes.note_written(tensors_in((args[1:3], kwargs.get("running_mean"), kwargs.get("running_var"))))
        constant = on_constants or not tensors
        node.meta.update(module=self.path[-1], constant=constant, autocast=self.autocasts.now(), line=caller())
        if isinstance(result, torch.Tensor):
            self.nodes.bind(result, node)
            if is_in_place(name, kwargs):
                self.nodes.rebind(kwargs.get("out", args[0] if args else None), node)
        elif made:
            self.sizes_read = True
            self.nodes.unpack(result, node)
        return result

    def run(self, func, name, args, kwargs, tensors):
        """The call on stand-ins; where the shape is plain, without running it."""
        x = args[0] if args else None
        if isinstance(x, torch.Tensor) and x.device.type == "meta":
            if name in SHAPE_KEPT and not any(type(a) is bool and a for a in args[1:]) and not kwargs.get("inplace"):
                fits = name != "batch_norm" or all(t.shape == x.shape[1:2] for t in tensors[1:])
                if fits and not getattr(func, "__name__", "").endswith("_") and not kwargs.get("dtype"):
                    return torch.empty_like(x)
            weight = args[1] if len(args) > 1 else kwargs.get("weight")
            if name == "linear" and x.ndim and x.shape[-1] == weight.shape[-1] and weight.ndim == 2:
                return x.new_empty((*x.shape[:-1], weight.shape[0]))
            plain = name in ("add", "mul", "sub") and not kwargs and not func.__name__.endswith("_")
            if plain and x.is_floating_point() and all(t.shape == x.shape and t.dtype == x.dtype for t in tensors):
                return torch.empty_like(x)
        if not any(t.device.type == "meta" for t in tensors_in((args, kwargs))):
            return self.computed(func, args, kwargs)
        if kwargs.get("device") is not None:
            kwargs = kwargs | {"device": "meta"}
        if name == "to":
            args = tuple("meta" if isinstance(a, (torch.device, str)) else a for a in args)
        if name in ("cuda", "cpu"):
            return x
        return func(*args, **kwargs)

    def computed(self, func, args, kwargs):
        """The call on values. What it draws is as in the runs that are compared: a forward may decide by it."""
        with EqualDraws(self.device):
            return func(*args, **kwargs)

    def whole(self, record, target, function, args, kwargs):
        """A module, a scripted function or one marked by `torch.fx.wrap`, as one operation of which nothing is known."""
        if self.apart:
            return function(*args, **kwargs)
        name = target if isinstance(target, str) else target.__name__
        if not self.on_values:
            raise Untraceable(f"{name} runs as a whole")
        packed = map_tensors((args, kwargs), self.nodes.packed, PackedSequence)
        node = record(target, *self.nodes.as_nodes(packed))
        node.meta.update(module=self.path[-1], constant=False, autocast=self.autocasts.now(), line=caller())
        self.apart = True
        try:
            with torch._C.DisableTorchFunction(), torch.compiler.set_stance("default"):
                result = function(*args, **kwargs)
        finally:
            self.apart = False
        if isinstance(result, torch.Tensor):
            self.nodes.bind(result, node)
        elif isinstance(result, (tuple, list)):
            self.sizes_read = True
            self.nodes.unpack(result, node)
        else:
            raise Untraceable(f"{name} returns {type(result).__name__}")
        return result


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
