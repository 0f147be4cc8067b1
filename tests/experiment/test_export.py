"""Exported networks give the same logits."""

import sys

import pytest
import torch
from pruned_networks import pruned_network
from torch import nn
from torch.nn.utils import weight_norm

import run_single_experiment
from taylor_pruning.errors import InputError
from taylor_pruning.experiment.export import export_model


def test_pt2_gives_the_same_logits_at_any_batch(tmp_path):
    model, _ = pruned_network("resnet18")
    model.train()
    export_model(model, torch.randn(1, 3, 32, 32), tmp_path / "pruned.pt2", "pt2")
    assert model.training
    exported = torch.export.load(tmp_path / "pruned.pt2").module()
    with torch.no_grad():
        for batch in (1, 5):
            images = torch.randn(batch, 3, 32, 32)
            torch.testing.assert_close(exported(images), model.eval()(images))
    assert [path.name for path in tmp_path.iterdir()] == ["pruned.pt2"]


@pytest.mark.filterwarnings("ignore")
def test_a_weight_that_the_last_forward_computed_is_no_obstacle(tmp_path):
    model, images = nn.Sequential(weight_norm(nn.Conv2d(3, 4, 3)), nn.Flatten()), torch.randn(2, 3, 4, 4)
    expected = model(images)
    export_model(model, images, tmp_path / "model.pt2", "pt2")
    torch.testing.assert_close(torch.export.load(tmp_path / "model.pt2").module()(images), expected)


def test_onnx_gives_the_same_logits_at_any_batch(tmp_path):
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package)
    runtime = pytest.importorskip("onnxruntime")
    model, _ = pruned_network("vgg11_bn")
    export_model(model, torch.randn(2, 3, 32, 32), tmp_path / "pruned.onnx", "onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["pruned.onnx"]  # the weights are inside
    session = runtime.InferenceSession(tmp_path / "pruned.onnx", providers=["CPUExecutionProvider"])
    with torch.no_grad():
        for batch in (1, 5):
            images = torch.randn(batch, 3, 32, 32)
            logits = torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])
            torch.testing.assert_close(logits, model(images), atol=1e-4, rtol=1e-4)


def test_export_errors_say_what_to_do(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="pt2 or onnx"):
        export_model(nn.Flatten(), torch.zeros(2, 3, 4, 4), tmp_path / "model", "tflite")
    monkeypatch.setitem(sys.modules, "onnxscript", None)  # the import fails
    with pytest.raises(InputError, match="pip install onnx onnxscript"):
        export_model(nn.Flatten(), torch.zeros(2, 3, 4, 4), tmp_path / "model.onnx", "onnx")
    assert list(tmp_path.iterdir()) == []


def test_packages_that_an_export_lacks_are_missed_before_the_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    monkeypatch.setattr(run_single_experiment, "prepare", lambda *_: pytest.fail("began"))
    assert run_single_experiment.main(["--export", "pt2", "onnx", "--output-dir", str(tmp_path / "run")]) == 2
    assert "pip install onnx onnxscript" in capsys.readouterr().err and not (tmp_path / "run").exists()
