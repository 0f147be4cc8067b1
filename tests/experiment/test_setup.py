"""How a dense network is trained where there are no weights for it."""

import dataclasses

import pytest
import torch

from taylor_pruning.errors import InputError
from taylor_pruning.experiment.arguments import parse
from taylor_pruning.experiment.command import DataSettings, ExperimentTask
from taylor_pruning.experiment.models import build_model, head_name
from taylor_pruning.experiment.setup import (
    _only_head_trains,
    check_compiler,
    dense_training,
    load_data,
    prepare,
    warn_of_no_training,
)

CASES = {
    "from scratch with BatchNorm": ("vgg7_bn", False, [], (12, 0.1, 64)),
    "from scratch without": ("squeezenet1_1", False, [], (12, 0.02, 16)),
    "a new head": ("vgg7_bn", True, [], (3, 0.02, 64)),
    "as asked": ("vgg7_bn", False, ["--train-epochs", "1", "--train-lr", "0.3", "--batch-size", "8"], (1, 0.3, 8)),
    "fine-tuning has its own": ("vgg7_bn", False, ["--lr", "0.5", "--fine-tune-epochs", "9"], (12, 0.1, 64)),
}


@pytest.mark.parametrize("case", CASES)
def test_schedule(case):
    name, new_head, words, expected = CASES[case]
    built = dataclasses.replace(build_model(name, 10, image_size=32), new_head=new_head)
    recipe, batch_size = dense_training(parse(ExperimentTask, "", words), built, 3000)
    assert (recipe.epochs, recipe.lr, batch_size) == expected
    assert recipe.warmup_epochs == min(1, recipe.epochs / 4) and recipe.weight_decay == 5e-4


def test_a_dense_network_is_trained_without_a_teacher():
    built = dataclasses.replace(build_model("vgg7_bn", 10, image_size=32), new_head=False)
    recipe, _ = dense_training(parse(ExperimentTask, "", ["--distillation-weight", "0.9"]), built, 3000)
    assert recipe.distillation_weight == 0


def test_options_of_a_training_that_is_not_needed_are_named(capsys):
    built = dataclasses.replace(build_model("vgg7_bn", 10, image_size=32), weights="mine.pth")
    warn_of_no_training(DataSettings(train_epochs=30), built)
    assert capsys.readouterr().err.startswith("--train-epochs has no effect: vgg7_bn has its weights from mine.pth")
    warn_of_no_training(DataSettings(train_epochs=0), built)
    assert not capsys.readouterr().err


@pytest.mark.parametrize(("device", "variable"), [("cpu", "CXX"), ("cuda", "CC")])
def test_a_missing_compiler_is_named_before_anything_is_trained(device, variable, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv(variable, raising=False)
    command = parse(ExperimentTask, "", ["--compile"])
    with pytest.raises(InputError, match=f"--compile needs a compiler, .* in {variable}, or leave --compile out"):
        prepare(command, tmp_path, torch.device(device))
    (tmp_path / "mine").touch(mode=0o755)
    monkeypatch.setenv(variable, f"{tmp_path / 'mine'} -O2")
    check_compiler(torch.device(device))


@pytest.mark.parametrize(
    ("images", "batch", "lr"), [(3000, 16, 0.02), (16_000, 40, 0.02 * 2.5**0.5), (50_000, 64, 0.04)]
)
def test_without_batchnorm_the_batch_follows_the_option_where_there_are_steps_enough(images, batch, lr):
    built = dataclasses.replace(build_model("squeezenet1_1", 10, image_size=32), new_head=False)
    recipe, found = dense_training(parse(ExperimentTask, "", []), built, images)
    assert found == batch and recipe.lr == pytest.approx(lr)


def test_the_embedded_images_have_one_size():
    with pytest.raises(
        InputError, match="the embedded images have 32 pixels; leave --image-size out or pass --data-path"
    ):
        load_data(DataSettings(image_size=64))


def test_where_a_new_head_is_trained_all_other_layers_rest():
    built = build_model("vgg7_bn", 10, image_size=32)
    next(built.model.parameters()).requires_grad_(False)
    before = [parameter.requires_grad for parameter in built.model.parameters()]
    with _only_head_trains(built):
        training = [name for name, parameter in built.model.named_parameters() if parameter.requires_grad]
    assert training == [f"{head_name(built.model)}.weight", f"{head_name(built.model)}.bias"]
    assert [parameter.requires_grad for parameter in built.model.parameters()] == before
