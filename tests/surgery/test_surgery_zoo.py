"""Surgery on torchvision's classification networks: zeroed gates are removed channels.

By default one network of every kind of block runs, on small images. The full list of networks:

    pytest tests/surgery/test_surgery_zoo.py -m zoo
"""

import pytest
import torch
from test_surgery import check_law, randomise
from torchvision import models

from taylor_pruning.surgery.graph import ChannelGraph

# name: image size
REPRESENTATIVES = {
    "alexnet": 64,
    "squeezenet1_1": 64,
    "resnet18": 64,
    "resnext50_32x4d": 64,
    "densenet121": 64,
    "googlenet": 96,
    "inception_v3": 75,
    "mobilenet_v2": 64,
    "mobilenet_v3_small": 64,
    "mnasnet0_5": 64,
    "shufflenet_v2_x0_5": 64,
    "efficientnet_b0": 64,
    "regnet_y_400mf": 64,
    "convnext_tiny": 32,
}
REST = {
    "vgg11": 32, "vgg11_bn": 32, "vgg13": 32, "vgg13_bn": 32, "vgg16": 32, "vgg16_bn": 32, "vgg19": 32, "vgg19_bn": 32,
    "inception_v3": 96,
    "squeezenet1_0": 64, "resnet34": 64, "resnet50": 64, "resnet101": 64, "resnet152": 64, "wide_resnet50_2": 64,
    "wide_resnet101_2": 64, "resnext101_32x8d": 64, "resnext101_64x4d": 64, "densenet161": 64, "densenet169": 64,
    "densenet201": 64, "mobilenet_v3_large": 64, "mnasnet0_75": 64, "mnasnet1_0": 64, "mnasnet1_3": 64,
    "shufflenet_v2_x1_0": 64, "shufflenet_v2_x1_5": 64, "shufflenet_v2_x2_0": 64, "efficientnet_b1": 64,
    "efficientnet_b2": 64, "efficientnet_v2_s": 64, "regnet_x_400mf": 64, "regnet_x_800mf": 64, "regnet_x_1_6gf": 64,
    "regnet_x_3_2gf": 64, "regnet_x_8gf": 64, "regnet_y_800mf": 64, "regnet_y_1_6gf": 64, "regnet_y_3_2gf": 64,
    "regnet_y_8gf": 64,
}  # fmt: skip


def build(name, **options):
    """A network of torchvision with 10 classes, in float64 where it is small."""
    torch.manual_seed(0)
    if name in ("googlenet", "inception_v3"):
        options.setdefault("init_weights", False)
    model = randomise(models.get_model(name, num_classes=10, **options).eval())
    return model if name.startswith(("vgg", "alexnet", "wide", "resnext101")) else model.double()


def zoo_images(model, size):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 3, size, size, generator=generator).to(next(model.parameters()).dtype)


def check(name, size, **options):
    model = build(name, **options)
    linear = name.startswith(("mobilenet_v3", "convnext", "alexnet"))
    x, example = zoo_images(model, size), None
    if getattr(model, "AuxLogits", None):  # a head that needs a large image, in training alone
        example = x.new_zeros(1, 3, 299, 299)
    fractions = (0.3, 0.6) if example is None else (0.3,)
    return check_law(
        model,
        x,
        seeds=(0,),
        fractions=fractions,
        prune_linear=linear,
        train=not name.startswith("vgg") and example is None,
        example=example,
    )


@pytest.mark.parametrize("name", REPRESENTATIVES)
def test_one_of_every_kind(name):
    without_heads = {"aux_logits": False} if name == "inception_v3" else {}  # they need 299 pixels: -m zoo
    graph = check(name, REPRESENTATIVES[name], **without_heads)
    assert len(graph.units) > (0 if name == "convnext_tiny" else 1000)


def test_auxiliary_heads_take_nothing_away():
    name, size = "googlenet", REPRESENTATIVES["googlenet"]
    graph = ChannelGraph(build(name, aux_logits=True), torch.zeros(1, 3, 299, 299, dtype=torch.double))
    assert "used in training only" in {info.reason for info in graph.layers.values()}
    without = build(name, aux_logits=False)
    assert ChannelGraph(without, zoo_images(without, size), verify=False).units == graph.units


@pytest.mark.zoo
@pytest.mark.parametrize("name", REST)
def test_full_list(name, request):
    if "zoo" not in request.config.getoption("-m"):
        pytest.skip("runs with -m zoo")
    check(name, REST[name])
