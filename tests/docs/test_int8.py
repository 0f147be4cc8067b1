"""int8 of a pruned network by the tools that the recipe names: as accurate, and a quarter of the file."""

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn

from EnhancedFilterPruner import EnhancedFilterPruner
from EnhancedPruning import save_pruned
from taylor_pruning.experiment.models import build_model

RECIPE = Path(__file__).parents[2] / "docs" / "examples" / "int8.py"


@pytest.fixture(scope="module")
def recipe():
    spec = importlib.util.spec_from_file_location("int8_recipe", RECIPE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def pruned():
    """(a pruned classifier of coloured noise, images, labels)."""
    torch.manual_seed(0)
    layers = []
    for inputs, outputs in ((3, 32), (32, 96), (96, 96)):
        layers += [
            nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.MaxPool2d(2),
        ]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(96, 4))
    labels = torch.arange(256) % 4
    colours = 2 * torch.randn(4, 3, 1, 1)
    images = colours[labels] + 0.8 * torch.randn(256, 3, 8, 8)
    pruner = EnhancedFilterPruner(model.eval(), images[:1], 1, progress=False).rank([(images[:64], labels[:64])])
    smaller = pruner.graph.remove(pruner.get_pruning_plan(20)).train()
    optimizer = torch.optim.SGD(smaller.parameters(), 0.05, momentum=0.9)
    for _ in range(40):
        nn.functional.cross_entropy(smaller(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    return smaller.eval(), images, labels


def accuracy(logits, labels):
    return 100 * (torch.as_tensor(logits).argmax(1) == labels).double().mean().item()


def test_the_onnx_file_is_as_accurate_and_a_quarter_as_large(recipe, pruned, tmp_path):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    model, images, labels = pruned
    recipe.quantise_onnx(model, images[:96], tmp_path / "int8.onnx")
    recipe.export_model(model, images[:2], tmp_path / "float.onnx", "onnx")
    session = onnxruntime.InferenceSession(tmp_path / "int8.onnx", providers=["CPUExecutionProvider"])
    with torch.no_grad():
        before = accuracy(model(images), labels)
    after = accuracy(session.run(None, {"images": images.numpy()})[0], labels)
    assert before > 90 and abs(after - before) <= 1
    sizes = [(tmp_path / name).stat().st_size for name in ("int8.onnx", "float.onnx")]
    assert sizes[0] < 0.32 * sizes[1]


def test_pytorchs_own_tools_give_an_int8_network_that_is_as_accurate_and_a_quarter_as_large(recipe, pruned, tmp_path):
    pytest.importorskip("torchao")
    model, images, labels = pruned
    smaller = recipe.quantise_torch(model, images[:96])
    recipe.save_torch(smaller, images, tmp_path / "int8.pt2")
    loaded = torch.export.load(tmp_path / "int8.pt2").module()
    with torch.no_grad():
        outputs = loaded(images)
        assert abs(accuracy(outputs, labels) - accuracy(model(images), labels)) <= 1
        torch.testing.assert_close(outputs, smaller(images))
    bytes_of = [sum(t.nbytes for t in network.state_dict().values()) for network in (smaller, model)]
    assert bytes_of[0] < 0.3 * bytes_of[1]


@pytest.mark.parametrize("content", [torch.zeros(4, 3, 8, 8, dtype=torch.uint8), [torch.zeros(3, 8, 8)], None])
def test_what_cannot_be_calibrated_on_is_named(recipe, content, tmp_path, capsys):
    save_pruned(tmp_path / "pruned.pt", build_model("vgg7_bn", 3, image_size=32).model, name="vgg7_bn", num_classes=3,
                image_size=32)  # fmt: skip
    if content is not None:
        torch.save(content, tmp_path / "images.pt")
    for output in ("small.onnx", "small.txt"):
        with pytest.raises(SystemExit, match="2"):
            recipe.main(
                [*map(str, (tmp_path / "pruned.pt", "--calibration", tmp_path / "images.pt", "--output", output))]
            )
        found = "neither .onnx nor .pt2" if output == "small.txt" else "images.pt"
        assert found in capsys.readouterr().err
