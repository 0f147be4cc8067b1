"""Builds classification networks for any image size and number of classes, with weights from torchvision, timm or a file.

built = build_model("vgg16", 10, image_size=32)
built.model(images)                                                         # logits [B, 10]
"""

import difflib
import http.client
import pickle
import re
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torchvision import models
from torchvision.models import WeightsEnum
from torchvision.models.vgg import cfgs, make_layers

from taylor_pruning.errors import InputError
from taylor_pruning.experiment.data import SMALL_IMAGE
from taylor_pruning.experiment.timm_models import PREFIX, TimmWeights, check_timm_name, timm_network
from taylor_pruning.experiment.weights import copy_weights, read_state
from taylor_pruning.files import user_path
from taylor_pruning.memory import raise_out_of_memory

IMAGENET_CLASSES = 1000
VGG7 = "vgg7_bn"  # not one of torchvision's: small enough to be trained on the embedded images in a minute
VGG_LAYERS = {
    VGG7: [32, "M", 64, "M", 128, 128, "M", 128, 128, "M"],
    **{name: cfgs[key] for name, key in (("vgg11", "A"), ("vgg13", "B"), ("vgg16", "D"), ("vgg19", "E"))},
}


@dataclass(frozen=True)
class BuiltModel:
    """A network that maps images [B, 3, image_size, image_size] to logits [B, num_classes], in eval mode.

    `weights` says where its weights come from ("none", "VGG16_Weights.IMAGENET1K_V1" or a file), `new_head` whether the
    classifier was initialised at random although the rest was loaded.
    """

    model: nn.Module
    name: str
    num_classes: int
    image_size: int
    weights: str
    new_head: bool


def weights_file(weights: str | Path) -> Path | None:
    """The file at --weights; None for the words that say which weights to take."""
    return None if weights in ("auto", "default", "none") else user_path(weights)


def model_names() -> list[str]:
    """Names of torchvision's classification networks and of the toolkit's own."""
    return [*models.list_models(module=models), VGG7]


def pretrained_weights(
    name: str, weights: str | Path = "auto", image_size: int | None = None
) -> WeightsEnum | TimmWeights | None:
    """The torchvision or timm weights that `build_model` would load, without downloading; None for "none" and files.

    `image_size` None stands for the size that the weights were trained at. Raises InputError for an unknown name, and
    for "default" below 64 pixels, where the networks have another stem.
    """
    check_name(name)
    available = None
    if name != VGG7:
        available = TimmWeights.of(name) if name.startswith(PREFIX) else models.get_model_weights(name).DEFAULT
    if available is None:
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
        return available
    return None


def build_model(
    name: str, num_classes: int, *, image_size: int, weights: str | Path = "auto", imagenet_labels: bool = False
) -> BuiltModel:
    """Build a classification network for `num_classes` labels and square images of `image_size` pixels.

    name: one of torchvision's, one of timm's as "timm/resnet18", or "vgg7_bn": six convolutions of 32 to 128 filters
    and one linear layer.

    weights: "auto" (torchvision's default weights from 64 pixels on, none below), "default", "none", or a file that
    holds a state_dict, plain or under one of weights.STATE_KEYS; a prefix that all names share ("module.", "_orig_mod.",
    Lightning's "model.") is taken off. Weights for another number of classes keep everything but the classifier, which
    is initialised at random; with `imagenet_labels` the labels are ImageNet's own 1000, and a classifier of 1000
    classes is kept.

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
        state, description = read_state(weights_file(weights), probe.state_dict().keys()), str(weights)

    if state is not None:
        state = _adapt_names(name, state)
        head = state.get(f"{head_name(probe)}.weight")
        if imagenet_labels and head is not None and len(head) == IMAGENET_CLASSES:
            num_classes = IMAGENET_CLASSES
    rescale = state is not None and image_size >= SMALL_IMAGE
    model = network(name, num_classes, image_size, transform_input=rescale)
    new_head = state is not None and copy_weights(model, state, description, head_name(model))
    return BuiltModel(model.eval(), name, num_classes, image_size, description, new_head)


def check_name(name: str):
    """Raises InputError if there is no network of that name, or timm is missing."""
    if name.startswith(PREFIX):
        return check_timm_name(name)
    names = model_names()
    if name not in names:
        close = difflib.get_close_matches(name, names, n=3) or ["vgg16", "resnet18", "mobilenet_v2"]
        raise InputError(f"unknown model {name!r}; did you mean {', '.join(close)}?")


def network(name: str, num_classes: int, image_size: int, *, transform_input: bool = False) -> nn.Module:
    if name.startswith(PREFIX):
        return timm_network(name, num_classes, image_size)
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
    with parameters_on_meta():  # the 120 million weights of the classifier that will be replaced are never allocated
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
        if stem.stride == (2, 2):  # stride 4 and more are patches, which the following layers rely on
            stem.stride = (1, 1)


def _small_conv(stem: nn.Conv2d) -> nn.Conv2d:
    conv = nn.Conv2d(3, stem.out_channels, kernel_size=3, padding=1, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return conv


@contextmanager
def parameters_on_meta():
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
        with parameters_on_meta(), torch.no_grad():
            probe = network(name, num_classes, image_size).eval().to("meta")
            logits = probe(torch.zeros(1, 3, image_size, image_size, device="meta"))
    except InputError:  # which says all
        raise
    except (RuntimeError, ValueError, AssertionError) as error:
        raise_out_of_memory(error)
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"{name} cannot run on images of {image_size}x{image_size} pixels ({reason}); pass --image-size 224"
        ) from error
    if logits.shape != (1, num_classes):
        raise InputError(f"{name} gives {tuple(logits.shape)} instead of logits [1, {num_classes}]; use another model")
    return probe


def head_name(model: nn.Module) -> str:
    """Name of the classifying layer: the last Linear, or where there is none (SqueezeNet) the last convolution."""
    named = list(model.named_modules())
    linears = [name for name, module in named if isinstance(module, nn.Linear)]
    return linears[-1] if linears else [name for name, module in named if isinstance(module, nn.Conv2d)][-1]


def _download(weights: WeightsEnum | TimmWeights) -> dict[str, Tensor]:
    try:
        return weights.get_state_dict(progress=True, check_hash=True, weights_only=True)
    except (OSError, http.client.HTTPException, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"could not download {weights.url} ({reason}); pass --weights FILE or --weights none"
        ) from error


def _adapt_names(name: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Leave out auxiliary classifiers, and undo the old layer names in torchvision's DenseNet files."""
    if name in ("googlenet", "inception_v3"):
        state = {key: value for key, value in state.items() if not key.startswith(("aux1.", "aux2.", "AuxLogits."))}
    if name.startswith("densenet"):
        state = {re.sub(r"(\.denselayer\d+\.(?:norm|relu|conv))\.([12]\.)", r"\1\2", k): v for k, v in state.items()}
    return state
