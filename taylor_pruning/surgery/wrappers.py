"""Takes wrappers off a network, and refuses networks whose layers cannot be cut."""

import copy

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.rnn import PackedSequence
from torch.optim.swa_utils import AveragedModel

from taylor_pruning.errors import InputError
from taylor_pruning.surgery.nested import tensors_in

WRAPPERS = (
    nn.DataParallel,
    nn.parallel.DistributedDataParallel,
    AveragedModel,
)  # their attribute `module` is the network
PLACEHOLDERS = (
    "FloatFunctional",
    "QuantStub",
    "DeQuantStub",
)  # do nothing before a network is prepared for quantisation
QUANTISATION = ("torch.ao.quantization", "torch.ao.nn.quantized", "torch.ao.nn.intrinsic", "torch.ao.nn.qat")


def unwrapped(model: nn.Module) -> tuple[nn.Module, tuple[str, ...]]:
    """The network without wrappers such as DataParallel or torch.compile, and one line on each kind that was taken off.

    Modules with wrapped parts are rebuilt around the same parameters and buffers; `model` itself is not changed.

    Raises:
        InputError: not an nn.Module, or scripted, traced, exported, prepared for quantisation or uninitialised.
    """
    _refuse_other_types(model)
    found: dict[str, None] = {}
    network = _rebuilt(model, {}, found)
    check_values(network)
    for where, module in _places(network):
        _refuse_module(module, where)
    notes = tuple(f"{kind} was taken off: the pruned network is the plain module" for kind in found)
    return network, notes


def without_wrappers(model: nn.Module) -> nn.Module:
    """The network as `unwrapped` gives it, also one that cannot be pruned, as after preparing a pruned one for quantisation."""
    return _rebuilt(model, {}, {})


def check_values(network: nn.Module) -> None:
    """Raises InputError if the network is of torch.jit, or if its parameters have no values of their own yet."""
    for where, module in _places(network):
        if isinstance(module, torch.jit.ScriptModule):
            raise InputError(f"{where} is scripted or traced by torch.jit; give the nn.Module that it was made from")
        parameters = [p for p in module._parameters.values() if p is not None]
        if any(map(nn.parameter.is_lazy, parameters)):
            raise InputError(f"{where} ({type(module).__name__}) has no shape yet; run the network once on images")
        if any(p.is_meta for p in parameters):
            raise InputError(f"the weights of {where} are on the meta device, without values; load them")
        if any(type(p).__module__.startswith("torch.distributed") for p in parameters):
            raise InputError(f"the weights of {where} are spread over processes; give a network that has them whole")


def _places(network):
    return [(f"module {name}" if name else "the network", module) for name, module in network.named_modules()]


def check_example(example) -> None:
    """Raises InputError if an example input holds no tensors, or some without a batch."""
    if not tensors_in(example):
        raise InputError(
            f"example_input is of type {type(example).__name__}; give a tensor of images, a tuple of several inputs, or a "
            "dict of named ones"
        )
    given = example.values() if isinstance(example, dict) else example if type(example) is tuple else [example]
    if any(isinstance(item, PackedSequence) for item in given):
        raise InputError(
            "example_input holds a PackedSequence, whose samples cannot be told apart; let the forward take the padded tensor "
            "and its lengths, and pack them"
        )
    if isinstance(example, Tensor) and (example.dim() < 2 or not len(example)):
        raise InputError(f"example_input is {[*example.shape]}; give images [N, C, H, W] with their batch dimension")


def _refuse_other_types(model):
    if isinstance(model, nn.Module):
        return
    if isinstance(model, type):
        raise InputError(f"the network is the class {model.__name__}; give an instance of it")
    kind = type(model).__name__
    raise InputError(
        "the network is an exported program; give the nn.Module that was exported"
        if kind == "ExportedProgram"
        else f"the network is of type {kind}; give an nn.Module"
    )


def _rebuilt(module, done, found):
    """The module without wrappers on it or in it: itself, if there are none."""
    if module in done:
        return done[module]
    inner = module
    while isinstance(inner, WRAPPERS) or "_orig_mod" in inner._modules:  # the latter is what torch.compile returns
        wrapped = "module" if isinstance(inner, WRAPPERS) else "_orig_mod"
        found[type(inner).__name__ if wrapped == "module" else "torch.compile"] = None
        inner = inner._modules[wrapped]
    compiled = getattr(inner, "_compiled_call_impl", None) is not None
    if compiled:
        found["torch.compile"] = None
    children = {n: None if child is None else _rebuilt(child, done, found) for n, child in inner._modules.items()}
    if compiled or any(child is not inner._modules[name] for name, child in children.items()):
        plain = copy.copy(inner)  # shares parameters and buffers
        vars(plain)["_modules"] = children
        vars(plain)["_compiled_call_impl"] = None
        inner = plain
    done[module] = inner
    return inner


def _refuse_module(module, where):
    kind = type(module)
    if kind.__module__.startswith(QUANTISATION) and kind.__name__ not in PLACEHOLDERS:
        raise InputError(
            f"{where} ({kind.__name__}) is prepared for quantisation; prune the float network first, and prepare the "
            "pruned one"
        )
    if isinstance(module, fx.GraphModule) and any(
        isinstance(n.target, torch._ops.OpOverload) for n in module.graph.nodes
    ):
        raise InputError(f"{where} comes from torch.export; give the nn.Module that was exported")
    tensors = (*module._parameters.values(), *module._buffers.values())
    if any(t.is_inference() for t in tensors if t is not None):
        raise InputError(f"the tensors of {where} were made in torch.inference_mode(); make the network outside of it")
