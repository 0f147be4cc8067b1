"""Calls that torch functions do not see, made seen while a forward is recorded: modules, compiled functions, constructors."""

import sys
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import fx, nn
from torch.autograd.variable import VariableMeta

from taylor_pruning.surgery.captured import captured_call
from taylor_pruning.surgery.recorder import TRACE_ERRORS
from taylor_pruning.surgery.tensor_nodes import Untraceable
from taylor_pruning.surgery.threads import here

FLAG_ONLY = {  # these hand `training` to one operation, which is recorded in either mode
    str(Path(nn.__file__).parent / "modules" / name) for name in ("batchnorm.py", "dropout.py")
}
CALL_SCRIPTED = torch.jit.ScriptFunction.__call__  # while a forward is recorded another function is in its place


@contextmanager
def calls_seen(recorder, model, original):
    """While open, the recorder knows which module runs, and runs the `opaque` ones as one operation each.

    Raises InputError if a module of the original runs, of which `model` is a copy.
    """
    modes = {id(module): vars(module).pop("training", None) for module in model.modules()}
    replaced = {
        (nn.Module, "__call__"): _traced_call(recorder, model, original),
        (nn.Module, "__getattr__"): _watched_attribute(recorder, modes),
        (torch.jit.ScriptFunction, "__call__"): _scripted_call(recorder),
        **_makers(),
    }
    marked = fx._symbolic_trace._wrapped_fns_to_patch if recorder.on_values else {}
    saved = [(scope, name, scope[name]) for (_, name), scope in marked.items() if name in scope]
    own = [(kind, name, vars(kind).get(name)) for kind, name in replaced]
    try:
        for (kind, name), function in replaced.items():
            setattr(kind, name, function)
        for scope, name, function in saved:
            scope[name] = here(_whole_function(recorder, function), function)
        with recorder.autocasts.watched():
            yield
    finally:
        for kind, name, function in own:
            delattr(kind, name) if function is None else setattr(kind, name, function)
        for scope, name, function in saved:
            scope[name] = function
        recorder.mode_read = recorder.mode_read or any(hasattr(module, "training") for module in model.modules())


def _watched_attribute(recorder, modes):
    attribute = nn.Module.__getattr__

    def watched_attribute(module, name):  # is asked for what is no plain attribute, as `training` is not now
        if name != "training" or id(module) not in modes:
            return attribute(module, name)
        recorder.mode_read = recorder.mode_read or sys._getframe(1).f_code.co_filename not in FLAG_ONLY
        return modes[id(module)]

    return watched_attribute


def _traced_call(recorder, model, original):
    names = {id(module): name for name, module in model.named_modules()}
    originals = {id(module): name for name, module in original.named_modules() if id(module) not in names}
    call = nn.Module.__call__

    def traced_call(module, *args, **kwargs):
        if id(module) in originals:
            raise captured_call(originals[id(module)])
        name = names.get(id(module), recorder.path[-1])
        if name in recorder.opaque or isinstance(module, torch.jit.ScriptModule):
            return recorder.whole(recorder.graph.call_module, name, module.forward, args, kwargs)
        recorder.path.append(name)
        try:
            return call(module, *args, **kwargs)
        except TRACE_ERRORS:
            recorder.failed = recorder.failed or name
            raise
        finally:
            recorder.path.pop()

    return here(traced_call, call)


def _scripted_call(recorder):
    """The call of a function of torch.jit, whose operations are seen in part, and on later calls not at all."""

    def scripted_call(function, *args, **kwargs):
        called = _compiled_from(function)
        if called is None or function in recorder.opaque:
            return _whole_function(recorder, Scripted(function))(*args, **kwargs)
        try:
            return called(*args, **kwargs)
        except TRACE_ERRORS:
            recorder.failed = recorder.failed or function
            raise

    return here(scripted_call, CALL_SCRIPTED)


def _whole_function(recorder, function):
    return lambda *args, **kwargs: recorder.whole(recorder.graph.call_function, function, function, args, kwargs)


def _compiled_from(function):
    """The Python function of which one of torch.jit was compiled; None of a traced one, which did what it did in its trace."""
    compiled = getattr(function, "__qualname__", None) == "torch.jit.ScriptFunction"
    return getattr(function, "_torchdynamo_inline", None) if compiled else None


class Scripted:
    """A function of torch.jit; alike in all recordings."""

    def __init__(self, function):
        self.function, self.__name__ = function, function.name

    def __call__(self, *args, **kwargs):
        return CALL_SCRIPTED(self.function, *args, **kwargs)

    def __repr__(self):
        return f"{self.__name__} at {id(self.function)}"


def _makers():
    """{(class, name): what takes its place} of what gives tensors without a call of a torch function."""
    return {
        (VariableMeta, "__call__"): here(_variable, VariableMeta.__call__),
        (torch.Tensor, "__new__"): staticmethod(here(_sized_tensor, torch.Tensor.__new__)),
        (torch.Tensor, "as_subclass"): here(_same_tensor, torch.Tensor.as_subclass),
    }


def _variable(kind, data, requires_grad=False, **more):
    """What `torch.autograd.Variable` makes of a tensor, by a call that is seen: most networks of before torch 0.4 call it."""
    return data.detach().requires_grad_(requires_grad)


def _sized_tensor(kind, *given, **more):
    """A tensor that `torch.Tensor` makes by its sizes, by a call that is seen; old networks fill it with draws."""
    sizes = given[0] if len(given) == 1 and isinstance(given[0], torch.Size) else given
    if kind is torch.Tensor and sizes and not more and all(isinstance(size, int) for size in sizes):
        return torch.empty(*sizes)
    return torch._C.TensorBase.__new__(kind, *given, **more)


def _same_tensor(tensor, kind):
    """`tensor.as_subclass(kind)`, which torch functions do not see, in a graph: it has the data and not the class."""
    return tensor


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
