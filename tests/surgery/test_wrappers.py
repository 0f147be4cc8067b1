import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm
from torch.optim.swa_utils import AveragedModel

from EnhancedPruning import EnhancedPruning, PruningSettings
from taylor_pruning.errors import InputError
from taylor_pruning.surgery.graph import ChannelGraph
from taylor_pruning.surgery.wrappers import unwrapped

IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(6, 8, 3), nn.ReLU())
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.body(self.stem(x)).mean((2, 3)))


def network():
    torch.manual_seed(0)
    return Network().eval()


def compiled_in_place(model):
    model.compile()
    return model


def with_part(change):
    def wrap(model):
        model.body = change(model.body)
        return model

    return wrap


WRAPPED = {
    "plain": (lambda model: model, ()),
    "DataParallel": (nn.DataParallel, ("DataParallel",)),
    "AveragedModel": (AveragedModel, ("AveragedModel",)),
    "torch.compile": (torch.compile, ("torch.compile",)),
    "compiled in place": (compiled_in_place, ("torch.compile",)),
    "several": (lambda model: AveragedModel(nn.DataParallel(model)), ("AveragedModel", "DataParallel")),
    "a part compiled": (with_part(torch.compile), ("torch.compile",)),
    "a part compiled in place": (with_part(compiled_in_place), ("torch.compile",)),
    "a part in DataParallel": (with_part(nn.DataParallel), ("DataParallel",)),
    "fx.GraphModule": (torch.fx.symbolic_trace, ()),
}


@pytest.mark.parametrize("kind", WRAPPED)
def test_wrappers_are_taken_off_and_named(kind):
    wrap, names = WRAPPED[kind]
    given = wrap(network())
    modules, tensors = list(given.modules()), {id(p) for p in given.parameters()}
    graph = ChannelGraph(given, IMAGES)
    assert graph.notes == tuple(f"{name} was taken off: the pruned network is the plain module" for name in names)
    assert {id(p) for p in graph.model.parameters()} == tensors
    assert list(graph.model.state_dict()) == list(network().state_dict()) or kind == "AveragedModel"
    assert all(a is b for a, b in zip(given.modules(), modules, strict=True))  # the caller's network is as it was
    gates = torch.ones(len(graph.units))
    gates[:3] = 0
    smaller = graph.remove(graph.units[:3])
    with torch.no_grad(), graph.gated(gates):
        torch.testing.assert_close(smaller(IMAGES), graph.model(IMAGES))
    assert not any(hasattr(m, "_orig_mod") or isinstance(m, nn.DataParallel) for m in smaller.modules())


def test_a_shared_part_stays_shared():
    model = network()
    model.again = model.body
    model.body = model.again = torch.compile(model.body)
    assert unwrapped(model)[0].body is unwrapped(model)[0].body
    plain, _ = unwrapped(model)
    assert plain.body is plain.again


def test_the_result_says_what_was_taken_off():
    data = [(IMAGES, torch.arange(4))]
    pruning = EnhancedPruning(
        nn.DataParallel(network()), data, data, settings=PruningSettings(rounds=1), progress=False
    )
    result = pruning.prune(30, 2)
    assert type(result.model) is Network
    assert result.as_dict()["notes"] == ["DataParallel was taken off: the pruned network is the plain module"]


def prepared(model):
    model.qconfig = torch.ao.quantization.get_default_qconfig("x86")
    return torch.ao.quantization.prepare(model)


def trainable_prepared(model):
    model.train().qconfig = torch.ao.quantization.get_default_qat_qconfig("x86")
    return torch.ao.quantization.prepare_qat(model)


def keeping(container):
    def change(model):
        model.body.seen = container(model.body(model.stem(IMAGES)))
        return model

    return change


def with_weight(change):
    def wrap(model):
        model.body[0] = change(model.body[0])
        return model

    return wrap


def lazy(model):
    model.head = nn.LazyLinear(4)
    return model


def recomputed_spectral(layer):
    layer = spectral_norm(layer)
    layer.train()(torch.zeros(1, 6, 4, 4))
    return layer.eval()


class Distributed(nn.Parameter):
    __module__ = "torch.distributed.tensor"


def spread(model):
    model.head.weight = Distributed(model.head.weight.data)
    return model


REFUSED = {
    "a class": (lambda model: Network, "is the class Network; give an instance"),
    "a function": (lambda model: model.forward, "of type method; give an nn.Module"),
    "a state_dict": (lambda model: model.state_dict(), "of type OrderedDict"),
    "traced": (lambda model: torch.jit.trace(model, IMAGES), "traced by torch.jit; give the nn.Module"),
    "a part traced": (
        with_part(lambda part: torch.jit.trace(part, torch.zeros(1, 6, 6, 6))),
        "module body is scripted or",
    ),
    "exported": (lambda model: torch.export.export(model, (IMAGES,)), "exported program; give the nn.Module"),
    "exported, as a module": (lambda model: torch.export.export(model, (IMAGES,)).module(), "comes from torch.export"),
    "prepared": (prepared, "is prepared for quantisation; prune the float network first"),
    "prepared for training": (trainable_prepared, "is prepared for quantisation"),
    "lazy": (lazy, "module head .LazyLinear. has no shape yet; run the network once"),
    "spread over processes": (
        spread,
        "weights of module head are spread over processes; give a network that has them whole",
    ),
    "on meta": (lambda model: model.to("meta"), "on the meta device, without values"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", REFUSED)
def test_networks_that_cannot_be_cut_are_refused_with_what_to_give_instead(kind):
    change, message = REFUSED[kind]
    with pytest.raises(InputError, match=message):
        ChannelGraph(change(network()), IMAGES)


COMPUTED = {  # how a weight is computed: filters of the layer itself and of the one before it that may go
    "weight_norm": (weight_norm, 8, 6),
    "spectral_norm": (recomputed_spectral, 0, 0),
    "prune": (lambda layer: prune.l1_unstructured(layer, "weight", 0.5), 8, 6),
    "parametrised weight_norm": (parametrizations.weight_norm, 8, 6),
    "weight_norm as a whole": (partial(parametrizations.weight_norm, dim=None), 8, 6),
    "weight_norm counted from behind": (partial(parametrizations.weight_norm, dim=-4), 8, 6),
    "parametrised spectral_norm": (parametrizations.spectral_norm, 0, 0),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", COMPUTED)
def test_layers_whose_weight_is_computed(kind):
    change, own, before = COMPUTED[kind]
    model = with_weight(change)(network())
    model(IMAGES)  # leaves behind a weight with a history
    graph = ChannelGraph(model, IMAGES)
    assert int(graph.layers["body.0"].removable.sum()) == own and int(graph.layers["stem.0"].removable.sum()) == before
    for name, number, filters in (("body.0", own, 8), ("stem.0", before, 6)):
        assert (graph.layers[name].reason is None) == (number == filters)
    if own:
        smaller = graph.remove({"body.0": [0, 3], **({"stem.0": [1]} if before else {})})
        assert smaller(IMAGES).shape == (4, 4)
        assert (smaller.body[0].out_channels, smaller.body[0].in_channels) == (6, 5 if before else 6)


def test_a_weight_scaled_by_a_tensor_that_is_no_parameter_stays():
    class Scaled(nn.Conv2d):
        scale = torch.ones(8, 1, 1, 1)

        def forward(self, x):
            return F.conv2d(x, torch._weight_norm(self.weight, self.scale, 0))

    graph = ChannelGraph(nn.Sequential(nn.Conv2d(3, 6, 3), Scaled(6, 8, 3), nn.Conv2d(8, 2, 1)), IMAGES)
    assert {graph.layers[name].reason for name in "01"} == {"passes through _weight_norm (1)"}


class Store:
    """Keeps what a layer gives, as its forward hook."""

    def keep(self, module, given, output):
        self.kept = output


def storing(activation):
    store = Store()
    store.keep(None, None, activation)
    return store


CONTAINERS = [lambda x: x, lambda x: [x], lambda x: {"x": x}, torch.Tensor.detach, storing, lambda x: storing(x).keep]


@pytest.mark.parametrize("container", CONTAINERS)
def test_a_network_that_keeps_an_activation_is_cut(container):
    graph = ChannelGraph(keeping(container)(network()), IMAGES)
    assert graph.remove(graph.units[:2])(IMAGES).shape == (4, 4)


@pytest.mark.parametrize("example", [None, IMAGES.numpy(), [], {}])
def test_an_example_without_tensors_is_refused(example):
    with pytest.raises(InputError, match="example_input is of type .*; give a tensor of images"):
        ChannelGraph(network(), example)


@pytest.mark.parametrize("example", [(IMAGES, IMAGES), [IMAGES]])
def test_an_example_that_does_not_fit_the_forward_is_refused(example):
    with pytest.raises(InputError, match="cannot be run on an example.*a tuple of several inputs"):
        ChannelGraph(network(), example)


def test_an_example_without_images_is_refused():
    for example in (IMAGES[:0], IMAGES[0, 0, 0]):
        with pytest.raises(InputError, match="with their batch dimension"):
            ChannelGraph(network(), example)


def test_the_caller_s_network_is_not_changed():
    model = with_part(torch.compile)(network())
    before = copy.copy(vars(model)["_modules"])
    unwrapped(model)
    assert vars(model)["_modules"] == before


class Quantisable(Network):
    """A float network with the placeholders that a later preparation for quantisation needs."""

    def __init__(self):
        super().__init__()
        self.quant, self.dequant = torch.ao.quantization.QuantStub(), torch.ao.quantization.DeQuantStub()
        self.add = torch.ao.nn.quantized.FloatFunctional()

    def forward(self, x):
        y = self.body(self.stem(self.quant(x)))
        return self.dequant(self.head(self.add.add(y, y.relu()).mean((2, 3))))


def test_placeholders_of_quantisation_are_no_obstacle():
    graph = ChannelGraph(Quantisable().eval(), IMAGES)
    assert graph.units and graph.remove(graph.units[:1])(IMAGES).isfinite().all()
