"""Networks of timm by name: built, pruned by the runner, built again from their file; and what is said without timm."""

import json
import sys

import pytest
import torch
from image_files import write_folder
from torchvision.transforms import InterpolationMode

import run_single_experiment
from taylor_pruning.errors import InputError
from taylor_pruning.experiment.models import build_model, pretrained_weights
from taylor_pruning.experiment.pruned_file import load_pruned


@pytest.mark.parametrize("name", ["timm/resnet18", "resnet18"])
def test_timm_is_optional(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    if name.startswith("timm/"):
        with pytest.raises(InputError, match="pip install timm"):
            build_model(name, 3, image_size=64, weights="none")
    else:
        assert build_model(name, 3, image_size=64, weights="none").name == name


def test_names_and_weights_are_checked():
    pytest.importorskip("timm")
    with pytest.raises(InputError, match="did you mean timm/resnet18"):
        pretrained_weights("timm/resnet81")
    with pytest.raises(InputError, match="resnet18.a1_in1k"):
        pretrained_weights("timm/resnet18.nobody")
    weights = pretrained_weights("timm/resnet18.a1_in1k", "auto", 224)
    assert str(weights) == "timm/resnet18.a1_in1k" and "resnet18" in weights.url
    shown = weights.transforms()
    assert (shown.crop_size, shown.interpolation) == ([224], InterpolationMode.BICUBIC) and shown.resize_size[0] > 224
    assert pretrained_weights("timm/resnet18", "auto", 32) is pretrained_weights("timm/resnet18", "none", 224) is None
    with pytest.raises(InputError, match="224"):
        pretrained_weights("timm/resnet18", "default", 32)
    with pytest.raises(InputError, match="no pretrained weights"):
        pretrained_weights("timm/beit3_giant_patch14_224", "default", 224)


def test_a_fixed_size_follows_the_images():
    pytest.importorskip("timm")
    vit = build_model("timm/test_vit", 3, image_size=64, weights="none").model
    assert vit(torch.zeros(1, 3, 64, 64)).shape == (1, 3)


def test_a_size_for_which_a_network_cannot_be_built_is_named_once():
    pytest.importorskip("timm")
    reason = r"timm/xcit_nano_12_p16_224 cannot be built for 65 pixels \([^()]*divide[^()]*\); pass --image-size 224"
    with pytest.raises(InputError, match=f"^{reason}$"):
        build_model("timm/xcit_nano_12_p16_224", 3, image_size=65, weights="none")


def test_the_runner_prunes_a_network_of_timm(tmp_path):
    pytest.importorskip("timm")
    write_folder(tmp_path / "images")
    arguments = ["--model", "timm/test_resnet", "--data-path", tmp_path / "images", "--image-size", 64, "--weights", "none",
                 "--train-epochs", 0, "--fine-tune-epochs", 0, "--rounds", 1, "--batch-size", 6, "--workers", 0,
                 "--device", "cpu", "--quiet", "--output-dir", tmp_path / "run"]  # fmt: skip
    assert run_single_experiment.main(list(map(str, arguments))) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    model = load_pruned(tmp_path / "run" / "pruned_model.pt")
    assert results["model"]["name"] == "timm/test_resnet" and type(model).__module__.startswith("timm.")
    assert sum(p.numel() for p in model.parameters()) == results["stages"][-1]["parameters"]
    assert results["stages"][-1]["parameters"] < results["stages"][0]["parameters"]
