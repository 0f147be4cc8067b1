"""--head present: the logits of the classes that the data have, the labels that count them, and the saved network."""

import json
from dataclasses import replace

import pytest
import torch
from image_files import write_folder

import run_single_experiment
from EnhancedPruning import load_pruned
from taylor_pruning.errors import InputError
from taylor_pruning.experiment.data import TensorImages
from taylor_pruning.experiment.folders import load_image_folder
from taylor_pruning.experiment.head import present_classes, reduced_head, relabelled
from taylor_pruning.experiment.loaders import make_loader
from taylor_pruning.experiment.models import build_model
from taylor_pruning.training.fine_tuning import evaluate

SYNSETS = ("n01440764", "n02979186", "n03888257")  # tench, cassette player, parachute: labels 0, 482 and 701
LABELS = [0, 482, 701]


@pytest.fixture(scope="module")
def synsets(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("images"), SYNSETS, per_class=4)


@pytest.mark.parametrize("name", ["squeezenet1_1", "resnet18"])  # a conv and a linear layer classify
def test_the_logits_are_those_of_the_present_classes(name, synsets):
    torch.manual_seed(0)
    data = load_image_folder(synsets)
    built = build_model(name, data.num_classes, image_size=32, weights="none", imagenet_labels=True)
    assert data.num_classes == built.num_classes == 1000
    few, reduced = present_classes(data, built)
    assert few.classes == list(SYNSETS) and few.num_classes == reduced.num_classes == 3 and not few.imagenet_labels
    assert sorted({int(label) for label in data.val.targets}) == LABELS  # what was given stays as it was
    for part in ("train", "val", "evaluation_train"):
        labels = [int(label) for label in getattr(data, part).targets]
        assert [LABELS[int(label)] for label in getattr(few, part).targets] == labels
    ((images, labels),) = make_loader(few.val, 12)
    assert labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    with torch.no_grad():
        logits = built.model(images)
        torch.testing.assert_close(reduced.model(images), logits[:, LABELS])
    assert logits.shape[1] == 1000
    whole = replace(few, imagenet_labels=True)
    assert present_classes(whole, reduced) == (whole, reduced)  # every class is there


def test_folders_that_are_not_imagenets_classes_are_refused(tmp_path):
    data = load_image_folder(write_folder(tmp_path, ("a", "b")))
    built = build_model("squeezenet1_1", 2, image_size=32, weights="none")
    with pytest.raises(InputError, match="synset ids"):
        present_classes(data, built)


def test_files_and_tensors_are_relabelled_alike(synsets):
    data = load_image_folder(synsets, image_size=96)  # decoded when they are needed
    few = relabelled(data.val, {label: place for place, label in enumerate(LABELS)})
    assert not isinstance(few, TensorImages) and few.classes == list(SYNSETS)
    assert [few[i][1] for i in range(12)] == few.targets == [0] * 4 + [1] * 4 + [2] * 4
    assert data.val[11][1] == 701


def test_a_layer_without_a_bias_is_reduced():
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 6, bias=False))
    assert torch.equal(reduced_head(model, [5, 1])[1].weight, model[1].weight[[5, 1]])


def test_a_specialised_network_is_pruned_saved_and_loaded(synsets, tmp_path):
    torch.manual_seed(0)
    weights = tmp_path / "imagenet.pth"
    torch.save(build_model("squeezenet1_1", 1000, image_size=32, weights="none").model.state_dict(), weights)
    arguments = ["--data-path", str(synsets), "--weights", str(weights), "--model", "squeezenet1_1", "--head", "present",
                 "--calibration-samples", "9", "--rounds", "1", "--fine-tune-epochs", "0", "--workers", "0", "--quiet",
                 "--device", "cpu", "--output-dir", str(tmp_path / "run")]  # fmt: skip
    assert run_single_experiment.main(arguments) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["data"]["classes"] == list(SYNSETS) and results["model"]["num_classes"] == 3
    assert not results["model"]["new_head"]
    model = load_pruned(tmp_path / "run" / "pruned_model.pt")
    data = load_image_folder(synsets)
    val = relabelled(data.val, {label: place for place, label in enumerate(LABELS)})
    found = evaluate(model, make_loader(val, 12), progress=False)
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 3)
    assert found.top1 == pytest.approx(results["stages"][-1]["top1"])
