"""Forwards that look at buffers of one number, and functions whose operations are not seen."""

import re
import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from test_surgery import Net, Plain, check_law, images, randomise
from torch import nn
from torch.autograd import Variable

from taylor_pruning.errors import InputError
from taylor_pruning.surgery.graph import ChannelGraph


class Deciding(Net):
    """A forward that `decide` changes by a flag and a number in buffers."""

    def __init__(self, decide, flag=True):
        super().__init__([Plain])
        self.decide = decide
        self.register_buffer("flag", torch.tensor(flag))
        self.register_buffer("number", torch.tensor([2.0]))

    def forward(self, x):
        return super().forward(self.decide(self, x))


def count(network, x):
    network.number.add_(1)
    return x if network.number.item() > 2.5 else -x


def count_anew(network, x):
    network.number += 1
    return x if network.number.item() > 2.5 else -x


def deciding(decide, **options):
    torch.manual_seed(0)
    return randomise(Deciding(decide, **options).double().eval())


VARIABLES = {
    "activation": lambda network, x: x - Variable(x.mean((2, 3), keepdim=True)),
    "buffer": lambda network, x: x - Variable(network.number),
    "new tensor": lambda network, x: (
        x + Variable(torch.ones(x.size(0), 1, *x.shape[2:]), requires_grad=False).type_as(x)
    ),
    "size": lambda network, x: x * Variable(torch.Tensor(x.size(0), 1, 1, 1).bernoulli_(0.5)).type_as(x),
    "shape": lambda network, x: x + torch.Tensor(x.size()).fill_(0.5).type_as(x),
    "list": lambda network, x: x - Variable(torch.Tensor([0.5, 0.25, 0.125]).view(3, 1, 1)).type_as(x),
}


@pytest.mark.parametrize("name", VARIABLES)
def test_variables_of_old_networks_are_tensors(name):
    graph = check_law(deciding(VARIABLES[name]), images(), seeds=(0,))
    assert all(info.reason is None for info in graph.layers.values())
    assert "__call__" not in vars(type(Variable)) and "__new__" not in vars(torch.Tensor)


class Named(torch.Tensor):
    """A tensor of another class, as libraries of images have."""


@pytest.mark.parametrize("where", ["input", "output"])
def test_tensors_cast_to_a_subclass_keep_their_channels(where):
    model = deciding(lambda network, x: x.as_subclass(Named)) if where == "input" else deciding(lambda network, x: x)
    if where == "output":
        model.register_forward_hook(lambda module, given, output: output.as_subclass(Named))
    graph = check_law(model, images(), seeds=(0,))
    assert all(info.reason is None for info in graph.layers.values())
    assert type(graph.remove(graph.units[:2])(images())) is type(model(images())) is Named
    assert "as_subclass" not in vars(torch.Tensor)


@pytest.mark.parametrize("made", [nn.Parameter, torch.DoubleTensor])
def test_tensors_that_unseen_code_makes_of_activations_are_refused(made):
    model = deciding(lambda network, x: x - made(x.mean((2, 3), keepdim=True)))
    with pytest.raises(
        InputError, match=r"comes from code that torch functions do not see.*x.detach\(\) in the place of"
    ):
        ChannelGraph(model, images(), verify=False)


@pytest.mark.parametrize("flag", [True, False])
def test_a_flag_in_a_buffer_decides(flag):
    graph = check_law(deciding(lambda network, x: 2 * x if network.flag else x * x, flag=flag), images(), train=False)
    assert all(info.reason is None for info in graph.layers.values())


def test_a_number_in_a_buffer_is_taken_as_it_is():
    graph = check_law(deciding(lambda network, x: x * network.number.item() + int(network.flag)), images())
    assert all(info.reason is None for info in graph.layers.values())


@pytest.mark.parametrize("decide", [count, count_anew])
def test_a_buffer_that_the_forward_changes_decides_nothing(decide):
    model = deciding(decide)
    before = model.number.clone()
    with pytest.raises(InputError, match=r"depends on the values of a tensor \(item\)"):
        ChannelGraph(model, images(1))
    assert torch.equal(model.number, before)


@torch.jit.script
def scripted_swish(x):
    return x.mul(x.sigmoid())


with warnings.catch_warnings(action="ignore"):
    traced_swish = torch.jit.trace(lambda x: x.mul(x.sigmoid()), torch.ones(1))


class Scripted(Plain):
    """Calls a function of torch.jit."""

    def __init__(self, c, called=scripted_swish):
        super().__init__(c)
        self.called = called

    def forward(self, x):
        return self.b(self.called(self.a(x)))


def test_a_scripted_function_is_what_was_compiled():
    torch.manual_seed(0)
    graph = check_law(randomise(Net([Scripted]).double().eval()), images(), seeds=(0,))
    assert all(info.removable.all() for info in graph.layers.values())


def test_a_function_of_a_trace_protects_what_passes_through_it_in_every_call():
    torch.manual_seed(0)
    model = randomise(Net([Scripted]).double().eval())
    model.blocks[0].called = traced_swish
    for _ in range(3):  # the first calls of such a function run otherwise than later ones
        graph = check_law(model, images(), seeds=(0,))
        assert graph.layers["blocks.0.a.0"].reason == "passes through _lambda (blocks.0)"
        assert graph.layers["stem.0"].reason is None and graph.layers["blocks.0.b.0"].reason is None
    with graph.gated(torch.ones(len(graph.units))):  # it is the same function where the forward is recorded again
        found = model(images()[..., :8])
    assert torch.allclose(found, model(images()[..., :8]))


@torch.library.custom_op("taylor_pruning_tests::turned", mutates_args=())
def turned(x: torch.Tensor, axis: int, keepdims: bool) -> torch.Tensor:
    return x.flip(axis)


@turned.register_fake
def _(x, axis, keepdims):
    return torch.empty_like(x)


class Turned(Plain):
    def forward(self, x):
        return self.b(turned(self.a(x), axis=2, keepdims=True))


def test_an_operation_of_others_gets_its_arguments_by_their_names():
    graph = ChannelGraph(Net([Turned]).double().eval(), images())
    assert graph.layers["blocks.0.a.0"].reason.startswith("passes through turned")


class Undecided(nn.Module):
    """Decides by the values of activations, and calls a scripted function while it does."""

    def forward(self, x):
        return scripted_swish(2 * x) if x.sum() > 0 else x


def test_a_scripted_function_in_a_module_that_runs_as_a_whole():
    torch.manual_seed(0)
    model = randomise(Net([Plain]).double().eval())
    model.blocks.append(Undecided())
    graph = ChannelGraph(model, images(1))
    assert "whose forward no graph can repeat" in graph.layers["blocks.0.b.0"].reason
    assert graph.layers["stem.0"].reason is None


@torch.jit.script
def scripted_decision(x):
    return 2 * x if bool(x.sum() > 0) else x


def test_a_scripted_function_that_decides_by_values_runs_as_a_whole():
    torch.manual_seed(0)
    model = randomise(Net([Scripted]).double().eval())
    model.blocks[0].called = scripted_decision
    graph = check_law(model, images(), seeds=(0,))
    assert graph.layers["blocks.0.a.0"].reason == "passes through scripted_decision (blocks.0)"
    assert graph.layers["blocks.0.b.0"].reason is None


class SeveralUndecided(Undecided):
    def forward(self, x):
        return super().forward(x), (x.mean((2, 3)), None)


class ReadsSeveral(Plain):
    def forward(self, x):
        first, (second, _) = self.undecided(self.a(x))
        return self.b(first * second[..., None, None])


def test_a_module_that_runs_as_a_whole_may_give_several_tensors():
    torch.manual_seed(0)
    model = randomise(Net([ReadsSeveral]).double().eval())
    model.blocks[0].undecided = SeveralUndecided()
    graph = check_law(model, images(), seeds=(0,), train=False)
    assert "blocks.0.undecided, whose forward no graph can repeat" in graph.layers["blocks.0.a.0"].reason
    assert graph.layers["blocks.0.b.0"].reason is None


# -- loops over samples, and what refusals advise ----------------------------------------------------------------------


def by_split(x):
    return torch.cat([sample * sample.mean() for sample in x.split(1, 0)])


def by_chunks(x):
    return torch.cat([sample * sample.mean() for sample in x.chunk(x.shape[0])])


def by_number(x):
    return torch.stack([x[i] * x[i].mean() for i in range(x.shape[0])])


def by_slice(x):
    return torch.cat([x[i : i + 1] * x[i : i + 1].mean() for i in range(len(x))])


def in_fours(x):
    return torch.cat([some - some.amax((0, 2, 3), keepdim=True) for some in x.split(4)])


class Loop(nn.Module):
    def __init__(self, loop):
        super().__init__()
        self.loop = loop

    def forward(self, x):
        return self.loop(x)


@pytest.mark.parametrize("loop", [by_split, by_chunks, by_number, by_slice, in_fours])
@pytest.mark.parametrize("verify", [True, False])
def test_a_loop_over_samples_is_refused_or_one_operation(loop, verify):
    with pytest.raises(InputError, match="one by one.*loop into a module of its own"):
        ChannelGraph(deciding(lambda network, x: loop(x)), images(1), verify=verify)
    model = randomise(Net([Plain]).double().eval())
    model.blocks.append(Loop(loop))
    graph = ChannelGraph(model, images(1), verify=verify)
    assert "whose forward no graph can repeat" in graph.layers["blocks.0.b.0"].reason
    with torch.no_grad(), graph.gated(torch.ones(len(graph.units), dtype=torch.double)):
        together = model(images(50))
    torch.testing.assert_close(together, model(images(50)))


class Frozen(dict):
    def __setitem__(self, key, value):
        raise TypeError("immutable")


class Given(nn.Module):
    """A conv and a head, whose inputs and outputs `run` uses."""

    def __init__(self, run):
        super().__init__()
        self.a, self.fc, self.run = nn.Conv2d(3, 8, 3), nn.Linear(8, 4), run

    def forward(self, *inputs):
        return self.run(self, *inputs)

    def logits(self, x):
        return self.fc(self.a(x).relu().mean((2, 3)))


def masked(network, x):
    network.a.weight.data *= 0.5
    return network.logits(x)


ADVICE = {  # name: (forward, example, what is said)
    "tensors in an object": (
        lambda s, x, y: s.logits(x.data) + y,
        (SimpleNamespace(data=images()), images().mean((2, 3))[:, :1]),
        "give the tensors in SimpleNamespace, which are not seen, in a tuple",
    ),
    "a number beside one image": (
        lambda s, x, t: s.logits(x) * t,
        (images(1), torch.ones(1)),
        "an example of two samples",
    ),
    "classes alone": (lambda s, x: s.logits(x).argmax(1), images(1), "let it return what they are chosen by"),
    "a dictionary that cannot be filled": (lambda s, x: Frozen(y=s.logits(x)), images(1), "return tensors in tuples"),
    "data": (masked, images(1), "Compute with a new tensor"),
}


@pytest.mark.parametrize("name", ADVICE)
def test_a_refusal_says_what_to_do(name):
    run, example, advice = ADVICE[name]
    with pytest.raises(InputError, match=re.escape(advice)):
        ChannelGraph(Given(run).double().eval(), example)


def test_distributions_do_not_look_at_values_in_a_trace(monkeypatch):
    def run(network, x):
        return torch.distributions.Normal(network.logits(x), 1.0).mean

    monkeypatch.setattr(torch.distributions.Distribution, "_validate_args", True)  # torch.compile turns it off
    assert len(check_law(Given(run).double().eval(), images(), seeds=(0,)).units) == 8
    with pytest.raises(ValueError, match="Expected parameter loc"):
        torch.distributions.Normal(torch.tensor(torch.nan), 1.0)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_gradients_are_on_again_behind_a_reentrant_checkpoint():
    def run(network, x):
        return network.fc(torch.utils.checkpoint.checkpoint(network.a, x, use_reentrant=True).mean((2, 3)))

    graph = ChannelGraph(Given(run).double().eval(), images())
    with graph.gated(torch.ones(len(graph.units), dtype=torch.double)):
        assert graph.model(images()).requires_grad


class Ensemble(nn.Module):
    """Several heads at once, as torch.func runs an ensemble."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4, 8))

    def forward(self, x):
        return torch.func.vmap(lambda weight: F.linear(x, weight))(self.weight).mean(0)


class Pooled(nn.Sequential):
    def forward(self, x):
        return Ensemble.forward(self[1], self[0](x).mean((2, 3)))


def test_a_transform_of_calls_runs_as_a_whole_in_a_module_and_is_named_elsewhere():
    conv, head, x = nn.Conv2d(3, 8, 1), Ensemble(), torch.zeros(1, 3, 4, 4)
    graph = ChannelGraph(nn.Sequential(conv, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head), x)
    assert graph.layers["0"].reason == "passes through 3, whose forward no graph can repeat"
    with pytest.raises(InputError, match=r"torch.func transforms the calls\). Move the transform into a module"):
        ChannelGraph(Pooled(conv, head), x)


@torch.compile(backend="eager")
def compiled(x):
    return 2 * F.relu(x)


def test_functions_that_are_compiled_are_recorded_as_what_they_do():
    graph = check_law(deciding(lambda network, x: compiled(x)), images(), seeds=(0,))
    assert all(info.reason is None for info in graph.layers.values())


class Choosing(nn.Module):
    def forward(self, x):
        return torch.cond(x.mean() > 0, lambda y: 2 * y, lambda y: y / 2, (x,))


def test_branches_by_values_run_as_a_whole_in_a_module_and_are_named_elsewhere():
    conv = nn.Conv2d(3, 8, 1)
    graph = ChannelGraph(nn.Sequential(conv, Choosing(), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 2, 1)), images(1).float())
    assert [graph.layers[name].reason for name in "02"] == ["passes through 1, whose forward no graph can repeat", None]
    with pytest.raises(InputError, match=r"which calls them \(cond\)\). Move the call into a module of its own"):
        ChannelGraph(deciding(Choosing.forward), images(1))
