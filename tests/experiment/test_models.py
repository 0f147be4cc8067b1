"""Networks built at every form, with torchvision's weights."""

import urllib.error

import pytest
import torch
from torch import nn
from torchvision import models

from taylor_pruning.errors import InputError
from taylor_pruning.experiment.models import _probe, build_model, model_names, pretrained_weights
from taylor_pruning.experiment.pruned_file import load_pruned, save_pruned

FAMILIES = [
    *("alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "efficientnet_v2_s", "googlenet", "inception_v3"),
    *("maxvit_t", "mnasnet0_5", "mobilenet_v2", "mobilenet_v3_small", "regnet_x_400mf", "regnet_y_400mf", "resnet18"),
    *("resnext50_32x4d", "shufflenet_v2_x0_5", "squeezenet1_0", "swin_t", "swin_v2_t", "vgg11", "vgg11_bn"),
    *("vit_b_16", "wide_resnet50_2"),
]


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_gives_logits_at_224(name):
    assert isinstance(_probe(name, 7, 224), nn.Module)  # the forward and its shape, on the meta device


@pytest.mark.parametrize("name", ["resnet18", "vgg11", "densenet121", "mobilenet_v2", "squeezenet1_1", "googlenet"])
def test_small_form_runs_at_32_pixels(name):
    built = build_model(name, 10, image_size=32)
    with torch.no_grad():
        logits = built.model(torch.rand(2, 3, 32, 32))
    assert logits.shape == (2, 10) and logits.isfinite().all()
    assert (built.weights, built.new_head) == ("none", False)
    assert not built.model.training


def test_small_form_keeps_the_resolution_of_the_stem():
    resnet = build_model("resnet18", 10, image_size=32).model
    assert resnet.conv1.kernel_size == (3, 3) and resnet.conv1.stride == (1, 1)
    assert isinstance(resnet.maxpool, nn.Identity)
    vgg = build_model("vgg16", 10, image_size=32).model
    assert isinstance(vgg.classifier, nn.Linear) and vgg.classifier.in_features == 512
    assert build_model("mobilenet_v2", 10, image_size=32).model.features[0][0].stride == (1, 1)
    assert build_model("mobilenet_v2", 10, image_size=64, weights="none").model.features[0][0].stride == (2, 2)


@pytest.mark.parametrize("size", [32, 64])
def test_the_network_of_the_embedded_data(size, tmp_path):
    built = build_model("vgg7_bn", 10, image_size=size)
    assert (built.weights, sum(p.numel() for p in built.model.parameters())) == ("none", 538_506)
    save_pruned(tmp_path / "model.pt", built.model, name="vgg7_bn", num_classes=10, image_size=size)
    images = torch.rand(2, 3, size, size)
    assert torch.equal(load_pruned(tmp_path / "model.pt")(images), built.model(images))
    with pytest.raises(InputError, match="no pretrained weights of vgg7_bn"):
        build_model("vgg7_bn", 10, image_size=size, weights="default")


@pytest.mark.parametrize("name", ["alexnet", "inception_v3"])
def test_a_size_that_cannot_run_is_named(name):
    with pytest.raises(InputError, match=r"cannot run on images of 32x32.*--image-size 224"):
        build_model(name, 10, image_size=32)


def test_unknown_names_get_close_matches():
    with pytest.raises(InputError, match="resnet18"):
        build_model("resnet-18", 10, image_size=32)
    with pytest.raises(InputError, match="vgg16"):
        pretrained_weights("no such network at all")
    assert "fcn_resnet50" not in model_names() and "raft_large" not in model_names()


def test_auxiliary_classifiers_are_left_out():
    model = build_model("inception_v3", 4, image_size=96, weights="none").model.train()
    assert model.AuxLogits is None and not model.transform_input
    assert model(torch.rand(2, 3, 96, 96)).shape == (2, 4)


def test_pretrained_weights_follow_the_image_size():
    default = models.ResNet18_Weights.DEFAULT
    assert pretrained_weights("resnet18") is default
    assert pretrained_weights("resnet18", "auto", 224) is default
    assert pretrained_weights("resnet18", "auto", 32) is None
    assert pretrained_weights("resnet18", "none", 224) is None
    with pytest.raises(InputError, match="--weights none"):
        pretrained_weights("resnet18", "default", 32)


def cached(monkeypatch, tmp_path, weights, state):
    """Lay `state` where torch hub keeps the downloaded file of `weights`."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    torch.save(state, folder / weights.url.split("/")[-1])


@pytest.mark.parametrize(("imagenet_labels", "classes", "new_head"), [(True, 1000, False), (False, 4, True)])
def test_torchvision_weights_keep_or_replace_the_head(monkeypatch, tmp_path, imagenet_labels, classes, new_head):
    dense = models.mobilenet_v3_small()
    cached(monkeypatch, tmp_path, models.MobileNet_V3_Small_Weights.DEFAULT, dense.state_dict())
    built = build_model("mobilenet_v3_small", 4, image_size=224, imagenet_labels=imagenet_labels)
    assert (built.num_classes, built.new_head) == (classes, new_head)
    assert built.weights == "MobileNet_V3_Small_Weights.IMAGENET1K_V1"
    assert built.model.classifier[-1].out_features == classes
    assert torch.equal(built.model.classifier[-1].weight, dense.classifier[-1].weight) != new_head
    assert torch.equal(built.model.features[3].block[0][0].weight, dense.features[3].block[0][0].weight)


def test_googlenet_weights_rescale_the_input_and_lose_their_auxiliaries(monkeypatch, tmp_path):
    dense = models.googlenet(init_weights=False, aux_logits=True)
    cached(monkeypatch, tmp_path, models.GoogLeNet_Weights.DEFAULT, dense.state_dict())
    model = build_model("googlenet", 5, image_size=64).model
    assert model.transform_input and model.aux1 is None and model.fc.out_features == 5
    smaller = tmp_path / "googlenet.pt"
    save_pruned(smaller, model, name="googlenet", num_classes=5, image_size=64)
    assert load_pruned(smaller).transform_input


def test_a_failed_download_says_what_to_do(monkeypatch, tmp_path):
    def no_network(*args, **kwargs):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.urlopen", no_network)
    with pytest.raises(InputError, match="could not download .*no route to host.*--weights none"):
        build_model("resnet18", 10, image_size=224)
