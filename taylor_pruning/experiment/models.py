"""Networks: building torchvision classifiers for any image size, saving, loading and exporting pruned ones.

    built = build_model("vgg16", 10, image_size=32)
    save_pruned("pruned_model.pt", smaller, name=built.name, num_classes=10, image_size=32)
    smaller = load_pruned("pruned_model.pt")
    export_model(smaller, images[:2], "pruned_model.onnx", "onnx")
"""

import copy
import difflib
import http.client
import io
import json
import pickle
import re
import struct
from collections import Counter
from collections.abc import Callable, Collection
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torchvision import models
from torchvision.models import WeightsEnum
from torchvision.models.vgg import cfgs, make_layers

from taylor_pruning.errors import InputError, atomic_file, atomic_path

SMALL_IMAGE = 64  # below this many pixels the strided ImageNet stems leave nothing to look at
IMAGENET_CLASSES = 1000
# Where training scripts keep the weights in a checkpoint. Where there are several, the first counts: averages come last.
STATE_KEYS = ("state_dict", "model_state_dict", "model", "net", "network", "ema_state_dict", "model_ema", "ema")
VGG7 = "vgg7_bn"  # not one of torchvision's: small enough to be trained on the embedded images in a minute
VGG_LAYERS = {
    VGG7: [32, "M", 64, "M", 128, 128, "M", 128, 128, "M"],
    **{name: cfgs[key] for name, key in (("vgg11", "A"), ("vgg13", "B"), ("vgg16", "D"), ("vgg19", "E"))},
}
FORMAT, FORMAT_VERSION = "pruned-network", 1

# What torch.load(weights_only=True) raises on pickled code, damaged archives and files of another kind.
UNREADABLE = (
    *(pickle.UnpicklingError, struct.error, RuntimeError, AssertionError, EOFError),
    *(LookupError, ValueError, AttributeError, TypeError),
)


@dataclass(frozen=True)
class BuiltModel:
    """A network that maps images [B, 3, image_size, image_size] to logits [B, num_classes], in eval mode.

    `weights` says where its weights come from ("none", "VGG16_Weights.IMAGENET1K_V1" or a file), `new_head` whether the
    classifier was drawn anew although the rest was loaded, `transforms` is the evaluation preset that belongs to
    torchvision's weights (None for other weights).
    """

    model: nn.Module
    name: str
    num_classes: int
    image_size: int
    weights: str
    new_head: bool
    transforms: Callable | None


def model_names() -> list[str]:
    """Names of torchvision's classification networks and of the toolkit's own."""
    return [*models.list_models(module=models), VGG7]


def pretrained_weights(name: str, weights: str | Path = "auto", image_size: int | None = None) -> WeightsEnum | None:
    """The torchvision weights that `build_model` would load, without downloading them; None for "none" and files.

    `image_size` None stands for the size that the weights were trained at. Raises InputError for an unknown name, and
    for "default" below 64 pixels, where the networks have another stem.
    """
    _check_name(name)
    if name == VGG7:
        if weights == "default":
            raise InputError(f"there are no pretrained weights of {name}; pass --weights none or a file")
        return None
    small = image_size is not None and image_size < SMALL_IMAGE
    if weights == "default" and small:
        raise InputError(
            f"the pretrained weights of {name} are for {SMALL_IMAGE} pixels or more, not {image_size}; "
            "pass --image-size 224 or --weights none"
        )
    if weights == "default" or (weights == "auto" and not small):
        return models.get_model_weights(name).DEFAULT
    return None


def build_model(
    name: str, num_classes: int, *, image_size: int, weights: str | Path = "auto", imagenet_labels: bool = False
) -> BuiltModel:
    """Build a classification network for `num_classes` labels and square images of `image_size` pixels.

    name: one of torchvision's, or "vgg7_bn": six convolutions of 32 to 128 filters and one linear layer.

    weights: "auto" (torchvision's default weights from 64 pixels on, none below), "default", "none", or a file that
    holds a state_dict, plain or under one of STATE_KEYS; a prefix that all names share ("module.", "_orig_mod.",
    Lightning's "model.") is taken off. Weights for another number of classes keep everything but the classifier, which is drawn anew; with `imagenet_labels` the labels
    are ImageNet's own 1000, and a classifier of 1000 classes is kept.

    Below 64 pixels the small form is built: ResNets (and ResNeXt, wide ResNet) and DenseNets begin with a 3x3
    convolution of stride 1 and no max-pooling (He et al. 2016, section 4.2; Huang et al. 2017), VGG ends in one linear
    layer, and any other stem of stride 2 gets stride 1. The auxiliary classifiers of GoogLeNet and Inception are left
    out. GoogLeNet and Inception with weights at 64 pixels or more rescale ImageNet-normalised inputs as torchvision's
    do (`transform_input`).

    Raises InputError for an unknown name, a size that the network cannot run at, a failed download, and for weights
    that cannot be read, do not fit or are not finite.
    """
    pretrained = pretrained_weights(name, weights, image_size)
    probe = _probe(name, num_classes, image_size)
    if pretrained is not None:
        state, description = _download(pretrained), str(pretrained)
    elif weights in ("auto", "none"):
        state, description = None, "none"
    else:
        state, description = _read_state(Path(weights), probe.state_dict().keys()), str(weights)

    if state is not None:
        state = _adapt_names(name, state)
        head = state.get(f"{head_name(probe)}.weight")
        if imagenet_labels and head is not None and len(head) == IMAGENET_CLASSES:
            num_classes = IMAGENET_CLASSES
    rescale = state is not None and image_size >= SMALL_IMAGE
    model = _network(name, num_classes, image_size, transform_input=rescale)
    new_head = state is not None and _copy_weights(model, state, description)
    transforms = None if pretrained is None else pretrained.transforms()
    return BuiltModel(model.eval(), name, num_classes, image_size, description, new_head, transforms)


def _check_name(name: str):
    names = model_names()
    if name not in names:
        close = difflib.get_close_matches(name, names, n=3) or ["vgg16", "resnet18", "mobilenet_v2"]
        raise InputError(f"unknown model {name!r}; did you mean {', '.join(close)}?")


def _network(name: str, num_classes: int, image_size: int, *, transform_input: bool = False) -> nn.Module:
    small = image_size < SMALL_IMAGE
    if name == VGG7 or (small and name.startswith("vgg")):
        return _small_vgg(name, num_classes)
    options = {}
    if name in ("googlenet", "inception_v3"):
        options = {"aux_logits": False, "init_weights": True, "transform_input": transform_input}
    elif name.startswith("vit_"):
        options = {"image_size": image_size}
    elif name.startswith("maxvit_"):
        options = {"input_size": (image_size, image_size)}
    model = models.get_model(name, weights=None, num_classes=num_classes, **options)
    if small:
        _shrink_stem(model)
    return model


def _small_vgg(name: str, num_classes: int) -> nn.Module:
    layers = VGG_LAYERS.get(name) or VGG_LAYERS[name.removesuffix("_bn")]
    features = make_layers(layers, batch_norm=name.endswith("_bn"))
    with _parameters_on_meta():  # the 120 million weights of the classifier that is about to go are never allocated
        model = models.VGG(features)
    model.avgpool = nn.AdaptiveAvgPool2d(1)
    model.classifier = nn.Linear(layers[-2], num_classes)
    return model


def _shrink_stem(model: nn.Module):
    if isinstance(model, models.ResNet):
        model.conv1, model.maxpool = _small_conv(model.conv1), nn.Identity()
    elif isinstance(model, models.DenseNet):
        model.features.conv0, model.features.pool0 = _small_conv(model.features.conv0), nn.Identity()
    else:
        stem = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
        if stem.stride == (2, 2):  # stride 4 and more are patches, which the layers behind count on
            stem.stride = (1, 1)


def _small_conv(stem: nn.Conv2d) -> nn.Conv2d:
    conv = nn.Conv2d(3, stem.out_channels, kernel_size=3, padding=1, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return conv


@contextmanager
def _parameters_on_meta():
    """Within the block new parameters have a shape and no memory; everything else is computed as usual."""

    def to_meta(module, name, parameter):
        return nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)

    handle = register_module_parameter_registration_hook(to_meta)
    try:
        yield
    finally:
        handle.remove()


def _probe(name: str, num_classes: int, image_size: int) -> nn.Module:
    """The network on the meta device after one forward there: what cannot run fails before anything is downloaded."""
    try:
        with _parameters_on_meta(), torch.no_grad():
            network = _network(name, num_classes, image_size).eval().to("meta")
            logits = network(torch.zeros(1, 3, image_size, image_size, device="meta"))
    except (RuntimeError, ValueError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"{name} cannot run on images of {image_size}x{image_size} pixels ({reason}); pass --image-size 224"
        ) from error
    if logits.shape != (1, num_classes):
        raise InputError(f"{name} gives {tuple(logits.shape)} instead of logits [1, {num_classes}]; use another model")
    return network


def head_name(model: nn.Module) -> str:
    """Name of the classifying layer: the last Linear, or where there is none (SqueezeNet) the last convolution."""
    named = list(model.named_modules())
    linears = [name for name, module in named if isinstance(module, nn.Linear)]
    return linears[-1] if linears else [name for name, module in named if isinstance(module, nn.Conv2d)][-1]


def _download(weights: WeightsEnum) -> dict[str, Tensor]:
    try:
        return weights.get_state_dict(progress=True, check_hash=True, weights_only=True)
    except (OSError, http.client.HTTPException, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise InputError(
            f"could not download {weights.url} ({error}); pass --weights FILE or --weights none"
        ) from error


def read_tensors(
    path: Path,
    device: str | torch.device = "cpu",
    remedy: str = "save it again with torch.save(model.state_dict(), path)",
):
    """Content of a file of tensors and plain values. Pickled code is refused, never run.

    Raises InputError, ending in `remedy`, if it cannot be read.
    """
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except OSError as error:
        raise InputError(f"cannot open {path}: {error.strerror}; check the path") from error
    except UNREADABLE as error:
        raise InputError(
            f"{path} cannot be read as tensors: it is damaged, of another kind, or holds pickled code, which is "
            f"refused; {remedy}"
        ) from error


def _read_state(path: Path, expected: Collection[str]) -> dict[str, Tensor]:
    """The state_dict in a file, its names those that the network expects as far as a common prefix goes."""
    content = read_tensors(path)
    if isinstance(content, dict) and content.get("format") == FORMAT:
        raise InputError(f"{path} is a pruned network, not weights for a whole one; load it with load_pruned")
    while key := next((k for k in STATE_KEYS if isinstance(content, dict) and isinstance(content.get(k), dict)), None):
        content = content[key]
    if not isinstance(content, dict) or not content or not all(isinstance(value, Tensor) for value in content.values()):
        raise InputError(f"{path} holds no state_dict; save it with torch.save(model.state_dict(), path)")
    state = {key.replace("_orig_mod.", ""): value for key, value in content.items()}  # of torch.compile, at any depth
    return _without_prefix(state, expected, path)


def _without_prefix(state: dict[str, Tensor], expected: Collection[str], path: Path) -> dict[str, Tensor]:
    """The tensors under the prefix that makes most names those of `expected`, by these names.

    Other tensors in the file (a loss's buffers, metrics) are left out where there is such a prefix. Raises InputError if
    two prefixes serve equally well, as those of a teacher and a student do.
    """
    found = Counter()
    for key in state:
        starts = [0, *(i + 1 for i, letter in enumerate(key) if letter == ".")]
        found.update(key[:start] for start in starts if key[start:] in expected)
    (prefix, count), (other, second) = (*found.most_common(2), ("", 0), ("", 0))[:2]
    if not prefix:
        return state
    if count == second:
        raise InputError(f"{path} holds two networks, {prefix}* and {other}*; save one of them alone")
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def _adapt_names(name: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Leave out auxiliary classifiers, and undo the old layer names in torchvision's DenseNet files."""
    if name in ("googlenet", "inception_v3"):
        state = {key: value for key, value in state.items() if not key.startswith(("aux1.", "aux2.", "AuxLogits."))}
    if name.startswith("densenet"):
        state = {re.sub(r"(\.denselayer\d+\.(?:norm|relu|conv))\.([12]\.)", r"\1\2", k): v for k, v in state.items()}
    return state


def _copy_weights(model: nn.Module, state: dict[str, Tensor], source: str) -> bool:
    """Copy `state` into `model`, except a head with another number of classes. True if the head stayed new."""
    expected = model.state_dict()
    head = head_name(model)
    new, old = expected[f"{head}.weight"], state.get(f"{head}.weight")
    new_head = old is not None and old.shape[1:] == new.shape[1:] and len(old) != len(new)
    if new_head:
        for names in (expected, state):
            names.pop(f"{head}.weight")
            names.pop(f"{head}.bias", None)

    missing = [key for key in expected if key not in state and not key.endswith("num_batches_tracked")]
    wrong = {
        "missing": missing,
        "unexpected": [key for key in state if key not in expected],
        "of another shape": [key for key in expected if key in state and state[key].shape != expected[key].shape],
    }
    if any(wrong.values()):
        raise InputError(f"{source} is for another network: {_first_names(wrong)}; check --model and --image-size")
    for key, value in state.items():
        if value.is_floating_point() and not value.isfinite().all():
            raise InputError(f"{source} has NaN or infinite values in {key}; train it again or use other weights")
        expected[key].copy_(value)
    return new_head


def _first_names(groups: dict[str, list[str]]) -> str:
    return "; ".join(
        f"{len(keys)} {kind} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
        for kind, keys in groups.items()
        if keys
    )


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

    The file is a plain dict that `torch.load(path, weights_only=True)` reads: its "state_dict" holds the small tensors,
    "attributes" every integer attribute of every module, "extra" the caller's JSON values. `name`, `num_classes` and
    `image_size` are those of `build_model`; without `name`, `load_pruned` needs a factory.

    Raises InputError if `name` comes without the two sizes or is not the network's, or if `extra` is not JSON.
    """
    if name is not None and (num_classes is None or image_size is None):
        raise InputError("a model name needs num_classes and image_size beside it; pass all three or none")
    try:
        extra = json.loads(json.dumps(extra or {}))  # leaves plain values alone, as weights_only asks for
    except TypeError as error:
        raise InputError(f"extra must hold JSON values only: {error}") from error
    copies = {}  # one copy of a tensor, however many names it has; a view would drag its whole storage into the file
    tensors = {
        key: copies.setdefault(id(tensor), tensor.detach().cpu().clone())
        for key, (module, attribute) in _slots(model).items()
        if (tensor := getattr(module, attribute)) is not None
    }
    persistent = model.state_dict().keys()
    content = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "name": name,
        "num_classes": num_classes,
        "image_size": image_size,
        "attributes": {key: _attributes(module) for key, module in model.named_modules(remove_duplicate=False)},
        "state_dict": {key: tensor for key, tensor in tensors.items() if key in persistent},
        "buffers": {key: tensor for key, tensor in tensors.items() if key not in persistent},
        "extra": extra,
    }
    if name is not None:
        _check_same_network(_skeleton(content, None, path), content, f"the model to save is not {name}")
    with atomic_file(path) as file:
        torch.save(content, file)


def load_pruned(
    path: str | Path, factory: Callable[[], nn.Module] | None = None, device: str | torch.device = "cpu"
) -> nn.Module:
    """Rebuild a network from `save_pruned`: same logits, dtypes and shared parameters, in eval mode, on `device`.

    `factory` builds the network before pruning; it is needed where the file names no torchvision model. The weights
    before pruning take no memory, unless the factory reads the values of its parameters.

    Raises InputError for a file of another kind or a newer version, a missing factory, or another network's factory.
    """
    content = read_tensors(Path(path), device)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise InputError(f"{path} is not a pruned network; give a file that save_pruned wrote")
    if content.get("format_version", 0) > FORMAT_VERSION:
        raise InputError(
            f"{path} has format version {content['format_version']}, newer than {FORMAT_VERSION}; update this toolkit"
        )
    if absent := {"name", "num_classes", "image_size", "attributes", "state_dict", "buffers"} - content.keys():
        raise InputError(f"{path} is damaged: it lacks {', '.join(sorted(absent))}; save the network again")
    model = _skeleton(content, factory, path)
    _check_same_network(model, content, f"{path} is not a pruned form of the network that was built for it")
    _restore(model, content)
    return model.eval()


def _skeleton(content: dict, factory: Callable[[], nn.Module] | None, path: str | Path) -> nn.Module:
    """The network before pruning, its parameters on the meta device."""
    if factory is None:
        if content["name"] is None:
            raise InputError(f"{path} names no torchvision model; pass load_pruned a factory that builds the network")
        _check_name(content["name"])
        with _parameters_on_meta():
            return _network(content["name"], content["num_classes"], content["image_size"])
    try:
        with _parameters_on_meta():
            return factory()
    except RuntimeError:  # it reads its parameters or moves them: only real ones will do
        return factory()


def _slots(model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """Every place for a parameter or buffer: {dotted name: (module, attribute)}, absent ones (bias=None) included."""
    return {
        f"{prefix}.{key}" if prefix else key: (module, key)
        for prefix, module in model.named_modules(remove_duplicate=False)
        for key in (*module._parameters, *module._buffers)
    }


def _attributes(module: nn.Module) -> dict[str, int | tuple | list]:
    """The integers (and booleans, and sequences of integers) among a module's own public attributes."""

    def plain(value):
        return type(value) in (int, bool) or (type(value) in (tuple, list) and all(type(i) is int for i in value))

    return {k: v for k, v in vars(module).items() if plain(v) and not k.startswith("_") and k != "training"}


def _check_same_network(model: nn.Module, content: dict, complaint: str):
    slots, tensors = _slots(model), content["state_dict"] | content["buffers"]
    modules = dict(model.named_modules(remove_duplicate=False))
    needed = [key for key, (module, attribute) in slots.items() if getattr(module, attribute) is not None]
    attributes = {
        f"{key}.{attribute}": key in modules and attribute in vars(modules[key])
        for key, values in content["attributes"].items()
        for attribute in values
    }
    wrong = {
        "missing in the file": [key for key in needed if key not in tensors]
        + [key for key in modules if key not in content["attributes"]],
        "missing in the network": [key for key in tensors if key not in slots]
        + [key for key, present in attributes.items() if not present],
    }
    if any(wrong.values()):
        raise InputError(f"{complaint}: {_first_names(wrong)}; give the name or factory that it was built with")


def _restore(model: nn.Module, content: dict):
    modules = dict(model.named_modules(remove_duplicate=False))
    for key, values in content["attributes"].items():
        for attribute, value in values.items():
            setattr(modules[key], attribute, value)
    slots, shared = _slots(model), {}
    for key, tensor in (content["state_dict"] | content["buffers"]).items():
        module, attribute = slots[key]
        if attribute in module._buffers:
            setattr(module, attribute, tensor)
            continue
        old = getattr(module, attribute)
        trainable = tensor.is_floating_point() and (old is None or old.requires_grad)
        identity = (tensor.data_ptr(), tensor.shape) if tensor.numel() else key  # torch.save keeps shared storages
        parameter = shared.setdefault(identity, nn.Parameter(tensor, requires_grad=trainable))
        setattr(module, attribute, parameter)


def export_model(model: nn.Module, example_input: Tensor, path: str | Path, format: str):
    """Export `model` in eval mode with a dynamic batch dimension, as "pt2" (torch.export) or "onnx" (one file).

    example_input: [B, C, H, W] on the model's device; C, H and W become fixed. The model is left as it was.
    Raises InputError for another format, or for "onnx" where the packages onnx and onnxscript are missing; what the
    exporters cannot express raises their own errors.
    """
    if format not in ("pt2", "onnx"):
        raise InputError(f"unknown export format {format!r}; use pt2 or onnx")
    model = copy.deepcopy(model).eval()
    if len(example_input) == 1:  # torch.export takes a dimension of 1 for a constant
        example_input = torch.cat([example_input, example_input])
    if format == "pt2":
        program = torch.export.export(model, (example_input,), dynamic_shapes=({0: torch.export.Dim("batch")},))
        buffer = io.BytesIO()  # on a full disk, torch.export's own writer ends the process
        torch.export.save(program, buffer)
        with atomic_file(path) as file:
            file.write(buffer.getbuffer())
        return
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise InputError(f"ONNX export needs more packages ({error}); pip install onnx onnxscript") from error
    with atomic_path(path) as temporary:
        torch.onnx.export(
            model,
            (example_input,),
            temporary,
            dynamo=True,
            external_data=False,
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            verbose=False,
        )
