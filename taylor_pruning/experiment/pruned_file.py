"""The file of a pruned network: its small tensors and sizes, from which the network is built again.

save_pruned("pruned_model.pt", smaller, name=built.name, num_classes=10, image_size=32)
smaller = load_pruned("pruned_model.pt")
"""

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from torch import nn

from taylor_pruning.errors import InputError, instance_of
from taylor_pruning.experiment.models import check_name, network, parameters_on_meta
from taylor_pruning.experiment.weights import PRUNED_FORMAT, first_names, read_tensors
from taylor_pruning.files import atomic_file, input_file, output_file
from taylor_pruning.held import held_tensors, own_values
from taylor_pruning.options import check_argument
from taylor_pruning.surgery.copying import copy_of, structure_of
from taylor_pruning.surgery.trial_inputs import FORWARD_ERRORS
from taylor_pruning.surgery.wrappers import check_values, without_wrappers

FORMAT_VERSION = 1
FIELDS = {"name": (str, type(None)), "num_classes": (int, type(None)), "image_size": (int, type(None)),
          "attributes": dict, "state_dict": dict, "buffers": dict}  # fmt: skip


def save_pruned(
    path: str | Path,
    model: nn.Module,
    *,
    name: str | None = None,
    num_classes: int | None = None,
    image_size: int | None = None,
    extra: dict | None = None,
):
    """Save a network whose parameters, buffers and size attributes (out_channels, num_features, ...) were cut.

    Wrappers such as DataParallel or torch.compile are taken off.

    The file is a plain dict that `torch.load(path, weights_only=True)` reads: its "state_dict" holds the small tensors,
    "attributes" every integer attribute of every module, "extra" the caller's JSON values. `name`, `num_classes` and
    `image_size` are those of `build_model`; without `name`, `load_pruned` needs a factory.

    Raises InputError if `name` comes without the two sizes or is not the network's, if `extra` is not JSON, or if the
    network has no values yet.
    """
    instance_of("model", model, nn.Module)
    model = without_wrappers(model)
    check_values(model)
    path = output_file(path, "the file")
    if name is not None and (num_classes is None or image_size is None):
        raise InputError("a model name needs num_classes and image_size beside it; pass all three or none")
    if name is not None:
        check_argument("name", name, str)
        check_argument("num_classes", num_classes, int, low=1)
        check_argument("image_size", image_size, int, low=1)
    try:
        extra = json.loads(json.dumps(extra or {}))  # leaves plain values alone, as weights_only asks for
    except (TypeError, ValueError) as error:
        raise InputError(f"extra must hold JSON values only: {error}") from error
    copies = {}  # one copy of a tensor, however many names it has; a view would drag its whole storage into the file
    tensors = {
        key: copies.setdefault(id(tensor), tensor.detach().cpu().clone())
        for key, (module, attribute) in _slots(model).items()
        if (tensor := getattr(module, attribute)) is not None
    }
    persistent = model.state_dict().keys()
    content = {
        "format": PRUNED_FORMAT,
        "format_version": FORMAT_VERSION,
        "name": name,
        "num_classes": num_classes,
        "image_size": image_size,
        "attributes": {key: _attributes(module) for key, module in model.named_modules(remove_duplicate=False)},
        "kinds": _kinds(model),
        "state_dict": {key: tensor for key, tensor in tensors.items() if key in persistent},
        "buffers": {key: tensor for key, tensor in tensors.items() if key not in persistent},
        "extra": extra,
    }
    if name is not None:
        _check_same_network(_skeleton(content, None, path), content, f"the model to save is not {name}")
    with atomic_file(path) as file:
        torch.save(content, file)


def load_pruned(
    path: str | Path,
    factory: Callable[[], nn.Module] | None = None,
    device: str | torch.device = "cpu",
    *,
    remedy: str = "save the network again",
) -> nn.Module:
    """Rebuild a network from `save_pruned`: same logits, dtypes and shared parameters, in eval mode, on `device`.

    `factory` builds the network before pruning; it is needed where the file names no network of torchvision or timm. Wrappers
    such as DataParallel are taken off it, as they were before pruning. The weights before pruning take no memory, unless the
    factory reads the values of its parameters, or the network holds tensors that are neither parameters nor buffers of its
    modules.

    Raises InputError for a file that is damaged (the message ends in `remedy`), of another kind or of a newer version, a
    missing factory, another network's factory, or a network that holds parts of its parameters or buffers as further tensors.
    """
    return load_pruned_and_extra(path, factory, device, remedy=remedy)[0]


def load_pruned_and_extra(
    path: str | Path,
    factory: Callable[[], nn.Module] | None = None,
    device: str | torch.device = "cpu",
    *,
    remedy: str = "save the network again",
) -> tuple[nn.Module, dict]:
    """The network as `load_pruned` gives it, and the `extra` values that were saved with it."""
    path = input_file(path, "the file")
    content = read_tensors(path, _known_device(device), remedy)
    if not isinstance(content, dict) or content.get("format") != PRUNED_FORMAT:
        raise InputError(f"{path} is not a pruned network; give a file that save_pruned wrote")
    version = content.get("format_version", 0)
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise InputError(f"{path} has format version {version}, newer than {FORMAT_VERSION}; update this toolkit")
    if absent := sorted(key for key, kind in FIELDS.items() if not isinstance(content.get(key, ...), kind)):
        raise InputError(f"{path} is damaged: it lacks {', '.join(absent)}; save the network again")
    model = _restored(_skeleton(content, factory, path), content, path)
    if factory is not None and _lacks_values(model):  # tensors that no state_dict has, as of a network in a list
        model = _restored(_built(factory, content), content, path)
    if _lacks_values(model):
        raise InputError(f"{path} cannot be loaded: the network that was built for it holds tensors on the meta device")
    return model.eval(), content.get("extra", {})


def _known_device(device: str | torch.device) -> torch.device:
    """The device. Raises InputError if there is none of that name here."""
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, TypeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"there is no device {device!r} here ({reason}); give another one, as 'cpu'") from error


def _restored(model: nn.Module, content: dict, path: str | Path) -> nn.Module:
    _check_same_network(model, content, f"{path} is not a pruned form of the network that was built for it")
    if _changes_settings(model, content):  # the factory may give the same ones to other networks
        model = structure_of(model)
    built = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}  # keeps their ids taken
    return _with_second_names(model, built, _restore(model, content), path)


def _with_second_names(model: nn.Module, built: dict, restored: dict, path: str | Path) -> nn.Module:
    """The network with the restored tensors also where it holds the built ones outside of its modules' slots, as in lists.

    What is all of such a tensor without being it, as the `.data` that spectral norm keeps, becomes that of the restored one.

    Args:
        built: {id: parameter or buffer of the network as it was built}. restored: {id: what has its place}.

    Raises InputError where it holds a part of such a tensor: no file says what is left of that.
    """
    own = {id(tensor) for tensor in restored.values()}
    held = {id(tensor): tensor for tensor, _ in held_tensors(model) if id(tensor) not in own}
    wholes = {_memory_of(tensor): key for key, tensor in built.items() if tensor.layout is torch.strided}
    storages, aliases = {storage for storage, *_ in wholes}, {}
    for key, tensor in held.items():
        if key in built or tensor.layout is not torch.strided or tensor.untyped_storage()._cdata not in storages:
            continue
        if (whole := wholes.get(_memory_of(tensor))) is not None:
            aliases[key] = restored.get(whole, built[whole]).detach()
        else:
            raise InputError(
                f"{path} cannot be loaded: the network holds a part of a parameter or buffer, of shape "
                f"{tuple(tensor.shape)}, outside of its parameters and buffers; make its forward take that part"
            )
    if aliases or held.keys() & built.keys():
        return copy_of(model, restored | aliases | {id(tensor): tensor for tensor in restored.values()})
    return model


def _memory_of(tensor: torch.Tensor) -> tuple:
    """Its storage, and which elements of that are its own in which order."""
    return tensor.untyped_storage()._cdata, tensor.storage_offset(), tuple(tensor.shape), tensor.stride()


def _lacks_values(model: nn.Module) -> bool:
    """Whether the network holds a tensor on the meta device, anywhere."""
    return any(tensor.is_meta for tensor, _ in held_tensors(model))


def _skeleton(content: dict, factory: Callable[[], nn.Module] | None, path: str | Path) -> nn.Module:
    """The network before pruning, its parameters on the meta device."""
    if factory is None:
        if content["name"] is None:
            raise InputError(
                f"{path} names no network of torchvision or timm; pass load_pruned a factory that builds the network"
            )
        check_name(content["name"])
        with parameters_on_meta():
            return network(content["name"], content["num_classes"], content["image_size"])
    if isinstance(factory, nn.Module) or not callable(factory):
        raise InputError("factory must be a function without arguments that builds the network, as lambda: Net(10)")
    with suppress(*FORWARD_ERRORS), parameters_on_meta():
        return _built(factory, content)
    # it reads its parameters, moves them or gives them their shapes: only real ones will do
    return _built(factory, content)


def _built(factory: Callable[[], nn.Module], content: dict) -> nn.Module:
    """What the factory builds, without the wrappers that were taken off before pruning; older files were saved with them."""
    instance_of("what factory() builds", model := factory(), nn.Module)
    plain, wrapped = without_wrappers(model), _module_names(model)
    return model if wrapped == content["attributes"].keys() != _module_names(plain) else plain


def _module_names(model: nn.Module) -> set[str]:
    return {name for name, _ in model.named_modules(remove_duplicate=False)}


def _slots(model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """Every place for a parameter or buffer: {dotted name: (module, attribute)}, absent ones (bias=None) included."""
    return {
        f"{prefix}.{key}" if prefix else key: (module, key)
        for prefix, module in model.named_modules(remove_duplicate=False)
        for key in (*module._parameters, *module._buffers)
    }


def _attributes(module: nn.Module) -> dict[str, int | tuple | list]:
    """The integers (and booleans, and sequences of integers) among what a module keeps."""

    def plain(value):
        return type(value) in (int, bool) or (type(value) in (tuple, list) and all(type(i) is int for i in value))

    return {name: held[key] for name, (held, key) in own_values(module).items() if plain(held[key])}


def _kinds(model: nn.Module) -> dict[str, str]:
    """{name: class} of the modules of torch.nn; others may have been renamed since."""
    modules = model.named_modules(remove_duplicate=False)
    return {name: type(module).__name__ for name, module in modules if type(module).__module__.startswith("torch.nn.")}


def _check_same_network(model: nn.Module, content: dict, complaint: str):
    slots, tensors = _slots(model), content["state_dict"] | content["buffers"]
    modules = dict(model.named_modules(remove_duplicate=False))
    needed = [key for key, (module, attribute) in slots.items() if getattr(module, attribute) is not None]
    kinds = _kinds(model)
    others = {key: kind for key, kind in content.get("kinds", {}).items() if kinds.get(key, kind) != kind}
    wrong = {
        "missing in the file": [key for key in needed if key not in tensors]
        + [key for key in modules if key not in content["attributes"]],
        "missing in the network": [key for key in tensors if key not in slots]
        + [key for key in content["attributes"] if key not in modules],
        "of another class in the network": [f"{key} (in the file {kind})" for key, kind in others.items()],
    }
    if any(wrong.values()):
        raise InputError(f"{complaint}: {first_names(wrong)}; give the name or factory that it was built with")


def _is_of_a_cut(name: str, fresh, saved) -> bool:
    """Whether a value in the file takes the place of what a new network has; of private ones only what a cut can have made.

    What a run leaves under private names goes with tensors that no file has, as the size for which a grid was made; a cut
    makes numbers smaller.
    """
    if not any(part.startswith("_") for part in name.split(".")):
        return True
    before, after = (value if type(value) in (list, tuple) else [value] for value in (fresh, saved))
    alike = type(fresh) is type(saved) and len(before) == len(after)
    return alike and all(type(b) is int and 0 < a <= b for b, a in zip(before, after, strict=True))


def _changes_settings(model: nn.Module, content: dict) -> bool:
    """Whether dictionaries or settings of the network say other numbers than the file."""
    return any(
        "." in name and own.get(name) != value
        for key, module in model.named_modules(remove_duplicate=False)
        for own in [_attributes(module)]
        for name, value in content["attributes"][key].items()
    )


def _restore(model: nn.Module, content: dict) -> dict[int, torch.Tensor]:
    """Gives the network the file's values; returns {id of a tensor that it had: what has its place}."""
    modules = dict(model.named_modules(remove_duplicate=False))
    for key, values in content["attributes"].items():
        places = own_values(modules[key])
        for attribute, value in values.items():
            if attribute in places:
                held, name = places[attribute]
                if _is_of_a_cut(attribute, held[name], value):
                    held[name] = value
    slots, shared, restored = _slots(model), {}, {}
    for key, tensor in (content["state_dict"] | content["buffers"]).items():
        module, attribute = slots[key]
        old = getattr(module, attribute)
        if attribute in module._buffers:
            setattr(module, attribute, tensor)
            restored[id(old)] = tensor
            continue
        trainable = tensor.is_floating_point() and (old is None or old.requires_grad)
        identity = (tensor.data_ptr(), tensor.shape) if tensor.numel() else key  # torch.save keeps shared storages
        parameter = shared.setdefault(identity, nn.Parameter(tensor, requires_grad=trainable))
        setattr(module, attribute, parameter)
        restored[id(old)] = parameter
    restored.pop(id(None), None)
    return restored
