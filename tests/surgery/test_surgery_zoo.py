"""Surgery on torchvision's classification networks: zeroed gates are removed channels.

By default a network of every kind of block runs, with few blocks and on small images. The whole list:

    pytest tests/surgery/test_surgery_zoo.py -m zoo
"""

import pytest
import torch
from test_surgery import check_law, randomise
from torchvision import models
from torchvision.models.convnext import CNBlockConfig
from torchvision.models.efficientnet import MBConvConfig
from torchvision.models.regnet import BlockParams
from torchvision.models.resnet import BasicBlock, Bottleneck

from taylor_pruning.surgery.graph import ChannelGraph

# A network of every kind with few blocks, and with torchvision's own stem, blocks and head.
REPRESENTATIVES = {
    "squeezenet1_1": lambda: models.squeezenet1_1(num_classes=10),
    "resnet18": lambda: models.ResNet(BasicBlock, [1, 2, 1, 1], num_classes=10),
    "resnext50_32x4d": lambda: models.ResNet(Bottleneck, [1, 2, 1, 1], num_classes=10, groups=32, width_per_group=4),
    "densenet121": lambda: models.DenseNet(8, (2, 3, 3, 2), num_init_features=16, num_classes=10),
    "googlenet": lambda: models.GoogLeNet(num_classes=10, aux_logits=False, init_weights=False),
    "mobilenet_v2": lambda: models.MobileNetV2(
        10, inverted_residual_setting=[[1, 16, 1, 1], [6, 24, 2, 2], [6, 32, 2, 2]]
    ),
    "mobilenet_v3_small": lambda: models.mobilenet_v3_small(num_classes=10),
    "mnasnet0_5": lambda: models.mnasnet0_5(num_classes=10),
    "shufflenet_v2_x0_5": lambda: models.ShuffleNetV2([2, 2, 2], [24, 48, 96, 192, 256], 10),
    "efficientnet_b0": lambda: models.EfficientNet(
        [MBConvConfig(1, 3, 1, 32, 16, 1, 1, 1), MBConvConfig(6, 5, 2, 16, 24, 2, 1, 1)], dropout=0.2, num_classes=10
    ),
    "regnet_y_400mf": lambda: models.RegNet(
        BlockParams([1, 2, 1, 1], [16, 32, 48, 64], [8] * 4, [1.0] * 4, [2] * 4, se_ratio=0.25), num_classes=10
    ),
    "convnext_tiny": lambda: models.ConvNeXt(
        [CNBlockConfig(24, 48, 1), CNBlockConfig(48, 96, 2), CNBlockConfig(96, None, 1)], num_classes=10
    ),
}
ALL = {  # name: image size
    "alexnet": 64, "vgg11": 32, "vgg11_bn": 32, "vgg13": 32, "vgg13_bn": 32, "vgg16": 32, "vgg16_bn": 32, "vgg19": 32,
    "vgg19_bn": 32, "googlenet": 96, "inception_v3": 96, "squeezenet1_0": 64, "squeezenet1_1": 64, "resnet18": 64,
    "resnet34": 64, "resnet50": 64, "resnet101": 64, "resnet152": 64, "wide_resnet50_2": 64, "wide_resnet101_2": 64,
    "resnext50_32x4d": 64, "resnext101_32x8d": 64, "resnext101_64x4d": 64, "densenet121": 64, "densenet161": 64,
    "densenet169": 64, "densenet201": 64, "mobilenet_v2": 64, "mobilenet_v3_small": 64, "mobilenet_v3_large": 64,
    "mnasnet0_5": 64, "mnasnet0_75": 64, "mnasnet1_0": 64, "mnasnet1_3": 64, "shufflenet_v2_x0_5": 64,
    "shufflenet_v2_x1_0": 64, "shufflenet_v2_x1_5": 64, "shufflenet_v2_x2_0": 64, "efficientnet_b0": 64,
    "efficientnet_b1": 64, "efficientnet_b2": 64, "efficientnet_v2_s": 64, "regnet_x_400mf": 64, "regnet_x_800mf": 64,
    "regnet_x_1_6gf": 64, "regnet_x_3_2gf": 64, "regnet_x_8gf": 64, "regnet_y_400mf": 64, "regnet_y_800mf": 64,
    "regnet_y_1_6gf": 64, "regnet_y_3_2gf": 64, "regnet_y_8gf": 64, "convnext_tiny": 32,
}  # fmt: skip


def build(name, **options):
    """A network of torchvision with 10 classes, in float64 where it is small."""
    if name in ("googlenet", "inception_v3"):
        options.setdefault("init_weights", False)
    model = randomise(models.get_model(name, num_classes=10, **options).eval())
    return model if name.startswith(("vgg", "alexnet", "wide", "resnext101")) else model.double()


def zoo_images(model, size):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 3, size, size, generator=generator).to(next(model.parameters()).dtype)


def check(name, model, size):
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
    torch.manual_seed(0)
    graph = check(name, randomise(REPRESENTATIVES[name]().eval().double()), ALL[name])
    assert len(graph.units) > 100


def test_auxiliary_heads_take_nothing_away():
    torch.manual_seed(0)
    graph = ChannelGraph(build("googlenet", aux_logits=True), torch.zeros(1, 3, 299, 299, dtype=torch.double))
    assert "used in training only" in {info.reason for info in graph.layers.values()}
    without = build("googlenet", aux_logits=False)
    assert ChannelGraph(without, zoo_images(without, ALL["googlenet"]), verify=False).units == graph.units


@pytest.mark.zoo
@pytest.mark.parametrize("name", ALL)
def test_full_list(name, request):
    if "zoo" not in request.config.getoption("-m"):
        pytest.skip("runs with -m zoo")
    torch.manual_seed(0)
    check(name, build(name), ALL[name])
