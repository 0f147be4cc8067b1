"""The names of recorded operations, and the functions that a recorded graph calls."""

import inspect

import torch
from torch.nn import functional as F

AS_ANOTHER = ("to", "type_as")
_NORM = "input weight bias running_mean running_var {} momentum eps cudnn_enabled"
OTHER_ORDERS = {  # functions whose namesake in torch.nn.functional takes its arguments in another order than theirs
    torch.batch_norm: (F.batch_norm, _NORM.format("training").split()),
    torch.instance_norm: (F.instance_norm, _NORM.format("use_input_stats").split()),
    torch.embedding: (F.embedding, ["weight", "input"]),  # what else it takes matters to gradients of the weight alone
}


def operation_name(node):
    """The name of an operation, the same for a function, a method, an operator and what works in place."""
    if node.op == "call_module":
        return "call_module"
    return bare(_name(node))


def _name(node):
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))


def sources_of(node):
    """The nodes whose values enter a node's; of the second tensor of some operations only the type and the device does."""
    return node.all_input_nodes[:1] if operation_name(node) in AS_ANOTHER else node.all_input_nodes


def bare(name):
    """A name without the underscores and the prefix of what works in place."""
    name = name.strip("_") if name.startswith("__") else name if name.startswith("_") else name.rstrip("_")
    return name[1:] if name in ("iadd", "isub", "imul", "itruediv", "ipow") else name


def in_order(func, name, args, kwargs):
    """A function and its arguments as the rules expect them.

    What a conv or linear layer reads, its weight and its bias are given by position. In the place of a function of
    OTHER_ORDERS comes its namesake, which computes the same.
    """
    if func in OTHER_ORDERS:
        func, names = OTHER_ORDERS[func]
        given = dict(zip(names, args, strict=False)) | kwargs
        given["input"] = given.pop("indices", given.get("input"))
        first = list(inspect.signature(func).parameters)[:2]
        more = {name: given[name] for name in names if name not in (*first, "cudnn_enabled")}
        return func, tuple(given[name] for name in first), more
    if name.startswith("conv") or name == "linear":
        for key in ("input", "weight", "bias")[len(args) :]:
            if key not in kwargs:
                break
            args, kwargs = (*args, kwargs[key]), {k: v for k, v in kwargs.items() if k != key}
    return func, args, kwargs


IN_PLACE = {f"__i{name}__" for name in "add sub mul truediv floordiv mod pow matmul and or xor lshift rshift".split()}
IN_PLACE |= {"__setitem__", "setitem"}


def is_in_place(name, kwargs):
    """Whether a call of that name changes a tensor that it is given."""
    ends = name.endswith("_") and not name.startswith("_")
    return ends or name in IN_PLACE or bool(kwargs.get("inplace")) or kwargs.get("out") is not None


def is_python(function):
    """Whether it is one of torch's functions that are written in Python, of other operations."""
    return getattr(function, "__module__", None) in ("torch.nn.functional", "torch.functional") and hasattr(
        function, "__code__"
    )


def writes(node):
    """Whether the node changes a tensor that it is given."""
    return node.op in ("call_function", "call_method") and is_in_place(_name(node), node.kwargs)


def pick(value, index):
    """Indexing as a function."""
    return value[index]


def setitem(tensor, index, value):
    """An assignment as a function: what was read from `tensor` before is read from its result."""
    tensor[index] = value
    return tensor


def set_grad(enabled):
    """A `torch.no_grad` of the forward, repeated when the graph runs."""
    torch._C._set_grad_enabled(enabled)


def called_function(func, name):
    """What fx calls: a function, or the name of a method."""
    if name in ("__getitem__", "__setitem__"):
        return pick if name == "__getitem__" else setitem
    kind = type(func).__name__
    if kind == "method-wrapper":
        return Property(name)
    if kind in ("method_descriptor", "wrapper_descriptor") or getattr(func, "__module__", None) == "torch._tensor":
        return name
    return func


class Property:
    """`x.T` and its kind as a function; alike in all recordings."""

    def __init__(self, name):
        self.__name__ = name

    def __repr__(self):
        return self.__name__

    def __call__(self, tensor):
        return getattr(tensor, self.__name__)
