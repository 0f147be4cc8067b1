"""Weights from files as people have them."""

import pickle
import sys

import pytest
import torch
from torch import nn

from taylor_pruning.errors import InputError
from taylor_pruning.experiment.models import build_model
from taylor_pruning.experiment.pruned_file import load_pruned
from taylor_pruning.experiment.weights import copy_weights


class Trap:
    """Pickles to a call: whoever unpickles it writes the file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return exec, (f"open({str(self.path)!r}, 'w').close()",)


@pytest.mark.parametrize("wrapped", ["plain", "state_dict", "model"])
def test_weights_from_a_file(tmp_path, wrapped):
    dense = build_model("resnet18", 6, image_size=32).model
    state = {f"module.{key}": value for key, value in dense.state_dict().items() if "num_batches" not in key}
    torch.save(state if wrapped == "plain" else {wrapped: state, "epoch": 3}, tmp_path / "weights.pt")
    built = build_model("resnet18", 6, image_size=32, weights=tmp_path / "weights.pt")
    assert torch.equal(built.model.fc.weight, dense.fc.weight) and not built.new_head
    built = build_model("resnet18", 9, image_size=32, weights=str(tmp_path / "weights.pt"))
    assert built.new_head and built.model.fc.out_features == 9
    assert torch.equal(built.model.conv1.weight, dense.conv1.weight)


PREFIXES = [
    "module.",
    "_orig_mod.",
    "model.",
    "module._orig_mod.",
    "_orig_mod.module.",
    "model._orig_mod.",
    "net.backbone.",
]

KEYS = ["state_dict", "model_state_dict", "model", "net", "ema_state_dict", "model_ema", "ema"]


@pytest.fixture(scope="module")
def squeezenet():
    return build_model("squeezenet1_1", 5, image_size=32).model.state_dict()


def load_squeezenet(content, path):
    torch.save(content, path)
    return build_model("squeezenet1_1", 5, image_size=32, weights=path).model.state_dict()


def assert_same(state, expected):
    assert all(torch.equal(state[key], value) for key, value in expected.items())


@pytest.mark.parametrize("prefix", PREFIXES)
def test_prefixes_that_wrappers_leave_are_taken_off(squeezenet, tmp_path, prefix):
    state = {prefix + key: value for key, value in squeezenet.items()}
    assert_same(load_squeezenet(state, tmp_path / "weights.pt"), squeezenet)


@pytest.mark.parametrize("key", KEYS)
def test_weights_are_found_in_the_checkpoints_of_training_scripts(squeezenet, tmp_path, key):
    checkpoint = {"epoch": 3, "optimizer": {"state": {}}, key: squeezenet, "best": torch.tensor(55.0)}
    assert_same(load_squeezenet(checkpoint, tmp_path / "weights.pt"), squeezenet)


@pytest.mark.parametrize("content", [{"params": 0}, {"module": 0, "optimizer": {"state": {}}}, {"ema": {"shadow": 0}}])
def test_the_only_state_of_a_file_is_found_under_any_name(squeezenet, tmp_path, content):
    filled = {
        key: {"shadow": squeezenet} if value == {"shadow": 0} else value or squeezenet for key, value in content.items()
    }
    assert_same(load_squeezenet(filled, tmp_path / "weights.pt"), squeezenet)
    with pytest.raises(InputError, match="holds no state_dict"):
        load_squeezenet({"generator": squeezenet, "discriminator": squeezenet}, tmp_path / "weights.pt")


def test_the_trained_weights_come_before_their_averages(squeezenet, tmp_path):
    averages = {key: value + 1 for key, value in squeezenet.items()}
    assert_same(load_squeezenet({"model_ema": averages, "model": squeezenet}, tmp_path / "weights.pt"), squeezenet)


def test_what_lightning_and_averaged_models_keep_besides_is_left_out(squeezenet, tmp_path):
    state = {f"model.{key}": value for key, value in squeezenet.items()}
    state |= {"loss.weight": torch.ones(5), "accuracy.total": torch.zeros(())}
    assert_same(load_squeezenet({"state_dict": state}, tmp_path / "weights.pt"), squeezenet)
    state = {f"module.{key}": value for key, value in squeezenet.items()} | {"n_averaged": torch.tensor(4)}
    assert_same(load_squeezenet(state, tmp_path / "weights.pt"), squeezenet)


def test_names_of_a_part_that_was_compiled(squeezenet, tmp_path):
    state = {key.replace("features.", "features._orig_mod."): value for key, value in squeezenet.items()}
    assert_same(load_squeezenet(state, tmp_path / "weights.pt"), squeezenet)


def test_two_networks_in_one_file_are_refused(squeezenet, tmp_path):
    state = {prefix + key: value for key, value in squeezenet.items() for prefix in ("student.", "teacher.")}
    with pytest.raises(InputError, match=r"holds two networks, student\.\* and teacher\.\*; save one"):
        load_squeezenet(state, tmp_path / "weights.pt")


@pytest.mark.parametrize("content", [{"epoch": 3}, {"model": {}}, {"model": "resnet18"}, [1], {"ema": {"module": {}}}])
def test_files_without_weights_are_refused(tmp_path, content):
    with pytest.raises(InputError, match="holds no state_dict"):
        load_squeezenet(content, tmp_path / "weights.pt")


def test_a_dictionary_that_holds_itself_is_no_state(tmp_path):
    content = {}
    content["model"] = content
    with pytest.raises(InputError, match="holds no state_dict"):
        load_squeezenet(content, tmp_path / "weights.pt")


UNUSABLE = {
    "whole numbers": (lambda w: w.to(torch.int8), r"1 of another type \(features.0.weight\)"),
    "complex numbers": (lambda w: w.to(torch.complex64), "1 of another type"),
    "quantised": (
        lambda w: torch.quantize_per_tensor(w, 0.01, 0, torch.qint8),
        "features.0.weight quantised, sparse or",
    ),
    "float8": (lambda w: w.to(torch.float8_e4m3fn), "features.0.weight quantised, sparse or"),
    "sparse": (lambda w: w.to_sparse(), "features.0.weight quantised, sparse or without values"),
    "without values": (lambda w: w.to("meta"), "features.0.weight quantised, sparse or without values"),
}


@pytest.mark.filterwarnings("ignore")  # of torch, about such tensors
@pytest.mark.parametrize("kind", UNUSABLE)
def test_tensors_that_are_no_plain_weights_are_refused(squeezenet, tmp_path, kind):
    change, message = UNUSABLE[kind]
    state = squeezenet
    with pytest.raises(InputError, match=message):
        load_squeezenet(state | {"features.0.weight": change(state["features.0.weight"])}, tmp_path / "weights.pt")


def test_masks_and_counters_of_other_types_are_copied():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2))
    model.register_buffer("mask", torch.zeros(3))
    mask, counter = torch.tensor([True, False, True]), torch.tensor(3, dtype=torch.int32)
    copy_weights(model, model.state_dict() | {"mask": mask, "0.num_batches_tracked": counter}, "the file", "1")
    assert model.mask.tolist() == [1, 0, 1] and model[0].num_batches_tracked == 3


def test_a_file_of_safetensors_is_read_and_a_damaged_one_is_named(squeezenet, tmp_path, monkeypatch):
    files, path = pytest.importorskip("safetensors.torch"), tmp_path / "weights.safetensors"
    files.save_file(squeezenet, path)
    assert_same(build_model("squeezenet1_1", 5, image_size=32, weights=path).model.state_dict(), squeezenet)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match="cannot be read as tensors: it is damaged"):
        build_model("squeezenet1_1", 5, image_size=32, weights=path)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(InputError, match="without safetensors; pip install safetensors"):
        build_model("squeezenet1_1", 5, image_size=32, weights=path)


def test_names_are_text_and_variances_are_not_negative(squeezenet, tmp_path):
    with pytest.raises(InputError, match="holds no state_dict"):
        load_squeezenet(dict(enumerate(squeezenet.values())), tmp_path / "weights.pt")
    state = build_model("vgg7_bn", 3, image_size=32).model.state_dict()
    state["features.1.running_var"][0] = -1
    torch.save(state, tmp_path / "weights.pt")
    with pytest.raises(InputError, match="negative variances in features.1.running_var"):
        build_model("vgg7_bn", 3, image_size=32, weights=tmp_path / "weights.pt")


def test_old_names_of_densenet_files(tmp_path):
    dense = build_model("densenet121", 5, image_size=32).model
    old = {k.replace("norm1.", "norm.1.").replace("conv2.", "conv.2."): v for k, v in dense.state_dict().items()}
    assert old.keys() != dense.state_dict().keys()
    torch.save(old, tmp_path / "old.pt")
    model = build_model("densenet121", 5, image_size=32, weights=tmp_path / "old.pt").model
    layer = "features.denseblock1.denselayer2"
    assert torch.equal(model.get_parameter(f"{layer}.conv2.weight"), old[f"{layer}.conv.2.weight"])


def test_weights_that_do_not_fit_are_named(tmp_path):
    torch.save(build_model("resnet18", 6, image_size=64, weights="none").model.state_dict(), tmp_path / "large.pt")
    with pytest.raises(InputError, match=r"1 of another shape \(conv1.weight\)"):
        build_model("resnet18", 6, image_size=32, weights=tmp_path / "large.pt")
    with pytest.raises(InputError, match=r"missing \(features.0.weight.*unexpected \(conv1.weight"):
        build_model("vgg11", 6, image_size=32, weights=tmp_path / "large.pt")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(tmp_path, value):
    state = build_model("squeezenet1_1", 6, image_size=32).model.state_dict()
    state["features.3.squeeze.bias"][1] = value
    torch.save(state, tmp_path / "weights.pt")
    with pytest.raises(InputError, match="NaN or infinite values in features.3.squeeze.bias"):
        build_model("squeezenet1_1", 6, image_size=32, weights=tmp_path / "weights.pt")


def test_pickled_code_is_refused_and_not_run(tmp_path):
    mark, path = tmp_path / "mark", tmp_path / "trap.pt"
    with open(path, "wb") as file:
        pickle.dump(Trap(mark), file, protocol=2)
    pickle.loads(path.read_bytes())
    assert mark.exists()  # the trap works
    mark.unlink()
    torch.save({"state_dict": Trap(mark)}, tmp_path / "archive.pt")
    for file in (path, tmp_path / "archive.pt"):
        with pytest.raises(InputError, match="pickled code"):
            build_model("resnet18", 10, image_size=32, weights=file)
        with pytest.raises(InputError, match="pickled code"):
            load_pruned(file)
    assert not mark.exists()


@pytest.mark.parametrize("content", [b"", b"hello, world", b"\x80\x02}.", b"\x80\x02G\x00", b"PK\x03\x04 broken"])
def test_files_of_another_kind_are_refused(tmp_path, content):
    path = tmp_path / "weights.pt"
    path.write_bytes(content)
    for load in (load_pruned, lambda path: build_model("resnet18", 10, image_size=32, weights=path)):
        with pytest.raises(InputError, match="weights.pt"):
            load(path)
        with pytest.raises(InputError, match="cannot open"):
            load(tmp_path / "absent.pt")
