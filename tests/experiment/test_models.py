"""Networks built at every form, weights from files, pruned networks through a file and back, exports."""

import os
import pickle
import subprocess
import sys
import urllib.error

import pytest
import torch
from torch import nn
from torchvision import models

from taylor_pruning.errors import InputError
from taylor_pruning.experiment.models import (
    _probe,
    build_model,
    export_model,
    load_pruned,
    model_names,
    pretrained_weights,
    save_pruned,
)

KEEP = torch.tensor([0, 2, 3])
FAMILIES = [
    *("alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "efficientnet_v2_s", "googlenet", "inception_v3"),
    *("maxvit_t", "mnasnet0_5", "mobilenet_v2", "mobilenet_v3_small", "regnet_x_400mf", "regnet_y_400mf", "resnet18"),
    *("resnext50_32x4d", "shufflenet_v2_x0_5", "squeezenet1_0", "swin_t", "swin_v2_t", "vgg11", "vgg11_bn"),
    *("vit_b_16", "wide_resnet50_2"),
]


class Trap:
    """Pickles to a call: whoever unpickles it writes the file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return exec, (f"open({str(self.path)!r}, 'w').close()",)


class EveryKind(nn.Module):
    """One of each layer kind that pruning cuts, a raw parameter, a tied weight and a non-persistent buffer."""

    def __init__(self, classes=3):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, bias=False)
        self.bn = nn.BatchNorm2d(4)
        self.prelu = nn.PReLU(4)
        self.depthwise = nn.Conv2d(4, 4, 3, groups=4)
        self.group_norm = nn.GroupNorm(4, 4)
        self.scale = nn.Parameter(torch.randn(4, 1, 1))
        self.register_buffer("mask", torch.rand(4, 1, 1), persistent=False)
        self.up = nn.ConvTranspose2d(4, 4, 2)
        self.instance_norm = nn.InstanceNorm2d(4, affine=True, track_running_stats=True)
        self.layer_norm = nn.LayerNorm(4)
        self.line = nn.Conv1d(4, 5, 1)
        self.tied = nn.Conv1d(4, 5, 1)
        self.tied.weight = self.line.weight
        self.volume = nn.Conv3d(5, 5, 1)
        self.fc = nn.Linear(5, classes)

    def forward(self, x):
        x = self.group_norm(self.depthwise(self.prelu(self.bn(self.conv(x))))) * self.scale * self.mask
        x = self.instance_norm(self.up(x)).mean(3)
        x = self.layer_norm(x.transpose(1, 2)).transpose(1, 2)
        x = self.volume((self.line(x) + self.tied(x))[..., None, None]).flatten(2)
        return self.fc(x.mean(2))


def cut(module, keep=KEEP, inputs=None):
    """Slice a layer's output channels (every tensor along dim 0) and, for convolutions, its input channels."""
    for tensors in (module._parameters, module._buffers):
        for key, tensor in tensors.items():
            if tensor is not None and tensor.dim():
                tensors[key] = nn.Parameter(tensor[keep]) if isinstance(tensor, nn.Parameter) else tensor[keep]
    if inputs is not None:
        module.weight = nn.Parameter(module.weight[:, inputs])
        module.in_channels = len(inputs)
    name = "out_channels" if hasattr(module, "out_channels") else "num_features"
    setattr(module, name, len(keep))


def pruned_every_kind():
    torch.manual_seed(0)
    model = EveryKind()
    model(torch.randn(8, 3, 8, 8))  # statistics that are not the initial ones
    cut(model.conv)
    cut(model.bn)
    model.prelu.weight, model.prelu.num_parameters = nn.Parameter(model.prelu.weight[KEEP]), 3
    cut(model.depthwise)
    model.depthwise.in_channels = model.depthwise.groups = 3
    for key in ("weight", "bias"):
        setattr(model.group_norm, key, nn.Parameter(getattr(model.group_norm, key)[KEEP]))
        setattr(model.layer_norm, key, nn.Parameter(getattr(model.layer_norm, key)[KEEP]))
    model.group_norm.num_channels = model.group_norm.num_groups = 3
    model.layer_norm.normalized_shape = (3,)
    model.scale, model.mask = nn.Parameter(model.scale[KEEP]), model.mask[KEEP]
    model.up.weight, model.up.bias = nn.Parameter(model.up.weight[KEEP][:, KEEP]), nn.Parameter(model.up.bias[KEEP])
    model.up.in_channels = model.up.out_channels = 3
    cut(model.instance_norm)
    model.line.weight = model.tied.weight = nn.Parameter(model.line.weight[:, KEEP])
    model.line.in_channels = model.tied.in_channels = 3
    model.conv.bias = nn.Parameter(torch.randn(3))  # compensation may give a layer a bias that it never had
    return model.eval()


def pruned_network(name):
    """A torchvision network at 32 pixels with a few filters of one or two layers sliced off, and its file's names."""
    torch.manual_seed(0)
    built = build_model(name, 5, image_size=32)
    model = built.model
    if name == "vgg11_bn":
        cut(model.features[0], torch.arange(50))
        cut(model.features[1], torch.arange(50))
        cut(model.features[4], torch.arange(0, 128, 2), inputs=torch.arange(50))
        cut(model.features[5], torch.arange(0, 128, 2))
        cut(model.features[8], torch.arange(256), inputs=torch.arange(0, 128, 2))
    elif name == "resnet18":
        block = model.layer2[0]
        cut(block.conv1, torch.arange(30, 100))
        cut(block.bn1, torch.arange(30, 100))
        cut(block.conv2, torch.arange(128), inputs=torch.arange(30, 100))
    else:  # the expansion of one inverted residual: pointwise, depthwise, projection
        expand, depthwise, project = (model.features[2].conv[i] for i in (0, 1, 2))
        for layer in (expand[0], expand[1], depthwise[0], depthwise[1]):
            cut(layer, torch.arange(60))
        depthwise[0].in_channels = depthwise[0].groups = 60
        cut(project, torch.arange(24), inputs=torch.arange(60))
    return model, {"name": name, "num_classes": 5, "image_size": 32}


# Building


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_gives_logits_at_224(name):
    assert isinstance(_probe(name, 7, 224), nn.Module)  # the forward and its shape, on the meta device


@pytest.mark.parametrize("name", ["resnet18", "vgg11", "densenet121", "mobilenet_v2", "squeezenet1_1", "googlenet"])
def test_small_form_runs_at_32_pixels(name):
    built = build_model(name, 10, image_size=32)
    with torch.no_grad():
        logits = built.model(torch.rand(2, 3, 32, 32))
    assert logits.shape == (2, 10) and logits.isfinite().all()
    assert (built.weights, built.new_head, built.transforms) == ("none", False, None)
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


# Weights


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
    assert built.weights == "MobileNet_V3_Small_Weights.IMAGENET1K_V1" and built.transforms.crop_size == [224]
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


PREFIXES = ["module.", "_orig_mod.", "model.", "module._orig_mod.", "_orig_mod.module.", "model._orig_mod.", "net.backbone."]
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


# Pruned networks


def test_every_layer_kind_survives_the_file(tmp_path):
    model, images = pruned_every_kind(), torch.randn(2, 3, 8, 8)
    model.scale.requires_grad_(False)
    save_pruned(tmp_path / "pruned.pt", model, extra={"plan": {"conv": [1]}})
    loaded = load_pruned(tmp_path / "pruned.pt", factory=EveryKind)
    assert torch.equal(loaded(images), model(images))
    assert loaded.line.weight is loaded.tied.weight
    assert torch.equal(loaded.mask, model.mask) and "mask" not in loaded.state_dict()
    assert (loaded.conv.out_channels, loaded.depthwise.groups, loaded.layer_norm.normalized_shape) == (3, 3, (3,))
    assert loaded.fc.weight.requires_grad  # the flags are the factory's
    loaded(torch.randn(4, 3, 8, 8)).sum().backward()
    assert torch.load(tmp_path / "pruned.pt", weights_only=True)["extra"] == {"plan": {"conv": [1]}}


def test_a_new_process_gives_the_same_logits(tmp_path):
    images, expected = torch.randn(2, 3, 32, 32), {}
    for name in ("vgg11_bn", "resnet18", "mobilenet_v2"):
        model, names = pruned_network(name)
        save_pruned(tmp_path / name, model, **names)
        with torch.no_grad():
            expected[name] = model(images)
    torch.save(images, tmp_path / "images.pt")
    code = (
        "import sys, torch\nfrom taylor_pruning.experiment.models import load_pruned\n"
        "images = torch.load('images.pt')\n"
        "with torch.no_grad():\n"
        "    torch.save({name: load_pruned(name)(images) for name in sys.argv[1:]}, 'logits.pt')\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code, *expected], cwd=tmp_path, env=environment, check=True)
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), expected)


def test_the_dense_network_is_not_allocated(tmp_path):
    devices = []

    def factory():
        model = EveryKind()
        devices.extend({parameter.device.type for parameter in model.parameters()})
        return model

    save_pruned(tmp_path / "pruned.pt", pruned_every_kind())
    load_pruned(tmp_path / "pruned.pt", factory)
    assert devices == ["meta"]
    assert not EveryKind().fc.weight.is_meta  # the hook is gone


def test_a_factory_that_reads_its_weights(tmp_path):
    def factory():
        model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 2))
        assert model[0].weight.norm().item() > 0  # has no answer on the meta device
        return model

    model, vectors = factory(), torch.randn(2, 6)
    save_pruned(tmp_path / "pruned.pt", model)
    assert torch.equal(load_pruned(tmp_path / "pruned.pt", factory)(vectors), model(vectors))


def test_dtype_is_kept_and_views_do_not_drag_their_storage(tmp_path):
    model = nn.Sequential(nn.Linear(512, 512, bias=False)).to(torch.float64)
    model[0].weight, model[0].out_features = nn.Parameter(model[0].weight.detach()[:2]), 2
    save_pruned(tmp_path / "pruned.pt", model)
    assert (tmp_path / "pruned.pt").stat().st_size < 20_000
    loaded = load_pruned(tmp_path / "pruned.pt", lambda: nn.Sequential(nn.Linear(512, 512, bias=False)))
    assert loaded[0].weight.dtype == torch.float64


def test_wrong_files_and_factories_are_named(tmp_path):
    path = tmp_path / "pruned.pt"
    model = pruned_every_kind()
    save_pruned(path, model)
    with pytest.raises(InputError, match="factory"):
        load_pruned(path)
    with pytest.raises(InputError, match="missing in the file"):
        load_pruned(path, lambda: nn.Sequential(EveryKind()))
    with pytest.raises(InputError, match="missing in the network"):
        load_pruned(path, lambda: build_model("vgg11", 3, image_size=32).model)
    with pytest.raises(InputError, match="pruned network, not weights"):
        build_model("vgg11", 3, image_size=32, weights=path)
    content = torch.load(path, weights_only=True)
    torch.save(content | {"format_version": 2}, path)
    with pytest.raises(InputError, match="newer"):
        load_pruned(path, EveryKind)
    del content["attributes"]
    torch.save(content, path)
    with pytest.raises(InputError, match="damaged: it lacks attributes"):
        load_pruned(path, EveryKind)
    torch.save(model.state_dict(), path)
    with pytest.raises(InputError, match="not a pruned network"):
        load_pruned(path, EveryKind)


def test_what_could_not_be_loaded_is_not_saved(tmp_path):
    path = tmp_path / "pruned.pt"
    with pytest.raises(InputError, match="not resnet18"):
        save_pruned(path, pruned_every_kind(), name="resnet18", num_classes=3, image_size=32)
    with pytest.raises(InputError, match="image_size"):
        save_pruned(path, pruned_every_kind(), name="resnet18", num_classes=3)
    with pytest.raises(InputError, match="JSON"):
        save_pruned(path, pruned_every_kind(), extra={"scores": torch.zeros(3)})
    assert list(tmp_path.iterdir()) == []


# Exports


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
