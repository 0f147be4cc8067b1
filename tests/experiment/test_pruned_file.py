"""Pruned networks through a file and back."""

import pytest
import torch
from killed_runs import PROCESSES
from pruned_networks import EveryKind, pruned_every_kind, pruned_network
from torch import nn
from torch.ao import quantization
from torch.optim.swa_utils import AveragedModel

from taylor_pruning.errors import InputError
from taylor_pruning.experiment.models import build_model
from taylor_pruning.experiment.pruned_file import load_pruned, save_pruned
from taylor_pruning.surgery.graph import ChannelGraph


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


def write_logits(folder, names):
    images = torch.load(folder / "images.pt")
    with torch.no_grad():
        torch.save({name: load_pruned(folder / name)(images) for name in names}, folder / "logits.pt")


def test_a_new_process_gives_the_same_logits(tmp_path):
    images, expected = torch.randn(2, 3, 32, 32), {}
    for name in ("vgg11_bn", "resnet18", "mobilenet_v2"):
        model, names = pruned_network(name)
        save_pruned(tmp_path / name, model, **names)
        with torch.no_grad():
            expected[name] = model(images)
    torch.save(images, tmp_path / "images.pt")
    process = PROCESSES.Process(target=write_logits, args=(tmp_path, list(expected)))
    process.start()
    process.join(120)
    assert process.exitcode == 0
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


def reading(model):
    assert model[0].weight.norm().item() > 0  # has no answer on the meta device
    return model


def through_numpy(model):
    model[0].weight.data = torch.from_numpy(2 * model[0].weight.detach().numpy())
    return model


def lazy(model):
    model = nn.Sequential(nn.LazyLinear(4), nn.LazyBatchNorm1d(), model[1])
    model(torch.zeros(2, 6))
    return model


@pytest.mark.parametrize("change", [reading, through_numpy, lazy])
def test_factories_that_need_the_values_of_their_weights(change, tmp_path):
    def factory():
        return change(nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 2)))

    model, vectors = factory().eval(), torch.randn(2, 6)
    save_pruned(tmp_path / "pruned.pt", model)
    assert torch.equal(load_pruned(tmp_path / "pruned.pt", factory)(vectors), model(vectors))


class Beside(nn.Module):
    """Holds a frozen network and a tensor outside of what a state_dict has."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(6, 4)
        frozen = nn.Linear(6, 4)
        with torch.no_grad():
            frozen.weight.copy_(torch.arange(24.0).view(4, 6))
        self.frozen, self.scale = [frozen.requires_grad_(False)], {"of the frozen one": frozen.weight.detach().square()}

    def forward(self, x):
        return self.a(x) + x @ (self.frozen[0].weight + self.scale["of the frozen one"]).T


def test_what_no_state_dict_has_comes_from_the_factory(tmp_path):
    model, vectors = Beside().eval(), torch.randn(2, 6)
    save_pruned(tmp_path / "pruned.pt", model)
    assert torch.equal(load_pruned(tmp_path / "pruned.pt", Beside)(vectors), model(vectors))


class SecondNames(nn.Module):
    """A parameter and a buffer that modules hold under names of which no state_dict knows."""

    def __init__(self, part=slice(None)):
        super().__init__()
        self.conv, self.next = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 3)
        self.register_buffer("scale", torch.rand(6))
        self.register_buffer("shift", torch.rand(4))
        self.weights, self.again = {"of the next": [self.next.weight]}, self.scale
        self.shifted = self.shift if part == slice(None) else self.shift[part]

    def forward(self, x):
        y = self.conv(x).relu() * self.again.view(-1, 1, 1)
        y = nn.functional.conv2d(y, self.weights["of the next"][0])
        return y.mean((2, 3)) + self.shifted.sum()


def test_second_names_of_parameters_and_buffers_name_those_of_the_file(tmp_path):
    model, images = SecondNames().eval(), torch.randn(2, 3, 8, 8)
    smaller = ChannelGraph(model, images).remove({"conv": [1, 4]})
    save_pruned(tmp_path / "pruned.pt", smaller)
    loaded = load_pruned(tmp_path / "pruned.pt", SecondNames)
    assert torch.equal(loaded(images), smaller(images))
    assert loaded.weights["of the next"][0] is loaded.next.weight and loaded.again is loaded.scale


def test_data_of_a_parameter_that_a_norm_keeps_are_those_of_the_file(tmp_path):
    def build():
        normed = nn.utils.spectral_norm(nn.Conv2d(6, 6, 3))
        return nn.Sequential(
            nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 1), nn.ReLU(), normed, nn.Flatten(), nn.Linear(96, 4)
        )

    model, images = build().eval(), torch.randn(2, 3, 8, 8)
    smaller = ChannelGraph(model, images).remove({"0": [1, 4]})
    save_pruned(tmp_path / "pruned.pt", smaller)
    loaded = load_pruned(tmp_path / "pruned.pt", build)
    assert torch.equal(loaded[4].weight, loaded[4].weight_orig)  # until the norm divides it before the first call
    assert torch.equal(loaded(images), smaller(images))


def test_a_held_part_of_a_buffer_is_refused(tmp_path):
    save_pruned(tmp_path / "pruned.pt", SecondNames(slice(2)))
    with pytest.raises(InputError, match=r"holds a part of a parameter or buffer, of shape \(2,\)"):
        load_pruned(tmp_path / "pruned.pt", lambda: SecondNames(slice(2)))


def test_a_network_without_values_is_refused(tmp_path):
    def factory():
        model = Beside()
        model.scale = torch.ones(4, device="meta")
        return model

    save_pruned(tmp_path / "pruned.pt", Beside())
    with pytest.raises(InputError, match="holds tensors on the meta device"):
        load_pruned(tmp_path / "pruned.pt", factory)


class Twice(nn.Module):
    """A network with a part that is compiled."""

    def __init__(self):
        super().__init__()
        self.part = torch.compile(EveryKind(), backend="eager")

    def forward(self, x):
        return 2 * self.part(x)


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile, lambda network: network])
def test_a_factory_may_build_the_wrappers_that_were_taken_off(wrap, tmp_path):
    model, images = Twice(), torch.randn(2, 3, 8, 8)
    model.part = pruned_every_kind()
    save_pruned(tmp_path / "pruned.pt", model)
    loaded = load_pruned(tmp_path / "pruned.pt", factory=lambda: wrap(Twice()))
    assert type(loaded) is Twice and torch.equal(loaded(images), model(images))


def test_wrappers_that_were_saved_are_loaded(tmp_path):
    model, images = nn.DataParallel(pruned_every_kind()), torch.randn(2, 3, 8, 8)
    save_pruned(tmp_path / "pruned.pt", model)
    loaded = load_pruned(tmp_path / "pruned.pt", factory=lambda: nn.DataParallel(EveryKind()))
    assert torch.equal(loaded(images), model(images))


def test_the_error_of_a_factory_is_its_own(tmp_path):
    save_pruned(tmp_path / "pruned.pt", pruned_every_kind())
    with pytest.raises(KeyError, match="width"):
        load_pruned(tmp_path / "pruned.pt", lambda: {}["width"])


def test_dtype_is_kept_and_views_do_not_drag_their_storage(tmp_path):
    model = nn.Sequential(nn.Linear(512, 512, bias=False)).to(torch.float64)
    model[0].weight, model[0].out_features = nn.Parameter(model[0].weight.detach()[:2]), 2
    save_pruned(tmp_path / "pruned.pt", model)
    assert (tmp_path / "pruned.pt").stat().st_size < 20_000
    loaded = load_pruned(tmp_path / "pruned.pt", lambda: nn.Sequential(nn.Linear(512, 512, bias=False)))
    assert loaded[0].weight.dtype == torch.float64


class LeavesItsSize(nn.Sequential):
    """Its forward keeps the size of the last image, in itself and in a part."""

    def forward(self, x):
        self.height = self[1].width = x.shape[-1]
        return super().forward(x)


def test_what_a_forward_left_need_not_be_in_the_network_that_is_built(tmp_path):
    def build(end=nn.ReLU):
        return LeavesItsSize(nn.Conv2d(3, 4, 1), end())

    model, path = build(), tmp_path / "pruned.pt"
    model(x := torch.randn(2, 3, 8, 8))
    save_pruned(path, model)
    torch.testing.assert_close(load_pruned(path, build)(x), model(x))
    with pytest.raises(InputError, match="1 of another class in the network .1 .in the file ReLU"):
        load_pruned(path, lambda: build(nn.GELU))


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
    for factory, message in (
        (model, "factory must be a function"),
        (3, "factory must be a function"),
        (lambda: EveryKind, "what factory.. builds is of type type"),
    ):
        with pytest.raises(InputError, match=message):
            load_pruned(path, factory)
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


def test_wrong_paths_devices_and_fields_are_named(tmp_path):
    path = tmp_path / "pruned.pt"
    save_pruned(path, pruned_every_kind())
    for given, message in (
        ((None, EveryKind), "the file is of type NoneType; give the path"),
        ((path, EveryKind, "gpu"), "there is no device 'gpu' here .*give another one, as 'cpu'"),
        ((path, EveryKind, "cuda:99"), "there is no device 'cuda:99' here"),
    ):
        with pytest.raises(InputError, match=message):
            load_pruned(*given)
    content = torch.load(path, weights_only=True)
    for name, value in (("attributes", None), ("state_dict", []), ("name", 3), ("image_size", "32")):
        torch.save(content | {name: value}, path)
        with pytest.raises(InputError, match=f"is damaged: it lacks {name}"):
            load_pruned(path, EveryKind)
    torch.save(content | {"format_version": None}, path)
    load_pruned(path, EveryKind)


@pytest.mark.parametrize("wrapper", [nn.DataParallel, AveragedModel])
def test_wrappers_are_left_out_of_the_file(tmp_path, wrapper):
    model = nn.Sequential(nn.Linear(4, 2)).eval()
    save_pruned(tmp_path / "pruned.pt", wrapper(model))
    for factory in (lambda: nn.Sequential(nn.Linear(4, 2)), lambda: wrapper(nn.Sequential(nn.Linear(4, 2)))):
        assert torch.equal(load_pruned(tmp_path / "pruned.pt", factory)[0].weight, model[0].weight)


def check_states(loaded, model):
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("wrap", [nn.DataParallel, AveragedModel, torch.compile])
def test_files_that_were_saved_with_wrappers_are_loaded(tmp_path, wrap, monkeypatch):
    def build():
        return wrap(nn.Sequential(nn.Linear(4, 2)))

    model = build()
    with monkeypatch.context() as earlier:
        earlier.setattr("taylor_pruning.experiment.pruned_file.without_wrappers", lambda model: model)
        save_pruned(tmp_path / "pruned.pt", model)
    loaded = load_pruned(tmp_path / "pruned.pt", build)
    check_states(loaded, model)


@pytest.mark.filterwarnings("ignore")  # from torch, on the age of its quantisation
def test_a_pruned_network_may_be_prepared_for_quantisation(tmp_path):
    def build():
        model = nn.Sequential(nn.Conv2d(3, 4, 3)).train()
        model.qconfig = quantization.get_default_qat_qconfig()
        return quantization.prepare_qat(model)

    save_pruned(tmp_path / "pruned.pt", model := build())
    loaded = load_pruned(tmp_path / "pruned.pt", build)
    check_states(loaded, model)


def test_what_could_not_be_loaded_is_not_saved(tmp_path):
    path = tmp_path / "pruned.pt"
    with pytest.raises(InputError, match="not resnet18"):
        save_pruned(path, pruned_every_kind(), name="resnet18", num_classes=3, image_size=32)
    with pytest.raises(InputError, match="image_size"):
        save_pruned(path, pruned_every_kind(), name="resnet18", num_classes=3)
    with pytest.raises(InputError, match="JSON"):
        save_pruned(path, pruned_every_kind(), extra={"scores": torch.zeros(3)})
    circle = {}
    circle["again"] = circle
    with pytest.raises(InputError, match="JSON values only: Circular"):
        save_pruned(path, pruned_every_kind(), extra=circle)
    with pytest.raises(InputError, match="num_classes must be a whole number, not '3'"):
        save_pruned(path, pruned_every_kind(), name="resnet18", num_classes="3", image_size=32)
    with pytest.raises(InputError, match="on the meta device, without values"):
        save_pruned(path, nn.Linear(2, 2, device="meta"))
    with pytest.raises(InputError, match="model is of type dict; give an instance of Module"):
        save_pruned(path, {})
    with pytest.raises(InputError, match="is a folder; give the path of a file"):
        save_pruned(tmp_path, pruned_every_kind())
    with pytest.raises(InputError, match="there is no folder .*none; make it first"):
        save_pruned(tmp_path / "none" / "pruned.pt", pruned_every_kind())
    assert list(tmp_path.iterdir()) == []
