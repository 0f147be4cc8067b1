"""Forwards that draw random numbers, as layers that are left out at random do."""

import math
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_surgery import Net, Plain, images, random_units, randomise
from torch import nn

from taylor_pruning.errors import InputError
from taylor_pruning.surgery.draws import EqualDraws, equal_draws, fixed_draws
from taylor_pruning.surgery.graph import ChannelGraph


class Dropping(Plain):
    """Leaves its layers out, in training, where `draw` says so."""

    draw = staticmethod(random.random)

    def forward(self, x):
        return x if self.training and self.draw() < 0.5 else x + super().forward(x)


class DroppingByNumPy(Dropping):
    draw = staticmethod(np.random.rand)


class DroppingByTorch(Dropping):
    draw = staticmethod(lambda: torch.rand(1))


class DroppingByItsScale(Plain):
    """Layers that count or do not, by a number that torch draws."""

    def forward(self, x):
        y = super().forward(x)
        return x + y * float(torch.bernoulli(torch.full((1,), 0.8))) if self.training else x + y


@pytest.mark.parametrize("kind", [Dropping, DroppingByNumPy, DroppingByTorch, DroppingByItsScale])
def test_layers_left_out_at_random_are_cut(kind):
    model = randomise(Net([kind]).double().eval())
    for seed in range(8):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        graph = ChannelGraph(model, images(1))
        graph.remove(random_units(graph, 0.5, seed))
        assert all(info.reason is None for info in graph.layers.values())


def test_a_number_that_torch_draws_is_the_same_in_the_graph():
    model = randomise(Net([DroppingByItsScale]).double())
    graph = ChannelGraph(model, images(1))
    model.train()
    with torch.no_grad(), equal_draws(torch.device("cpu")):
        wanted = model(images())
        with graph.gated(torch.ones(len(graph.units))):
            torch.testing.assert_close(model(images()), wanted)


def test_the_generators_go_on_where_they_were():
    random.seed(3)
    np.random.seed(3)
    wanted = random.random(), np.random.rand()
    random.seed(3)
    np.random.seed(3)
    with fixed_draws():
        first = random.random(), np.random.rand()
    assert (random.random(), np.random.rand()) == wanted
    with fixed_draws():
        assert (random.random(), np.random.rand()) == first != wanted


def test_comparisons_that_contradict_each_other_name_the_layers(monkeypatch):
    torch.manual_seed(0)
    graph = ChannelGraph(randomise(Net([Dropping]).double().eval()), images(1), verify=False)
    answers = iter(["removing them gives other outputs than closing their gates", None])
    monkeypatch.setattr("taylor_pruning.surgery.graph.CutProof.failure", lambda *_: next(answers))
    with pytest.raises(InputError, match=r"filters of blocks.0.a.0 cannot be removed: .* differs from run to run"):
        graph.remove([unit for unit in graph.units if unit.filters[0][0] == "blocks.0.a.0"][:2])


def test_random_draws_become_one_number():
    with torch.no_grad(), EqualDraws(torch.device("cpu")):
        x = torch.arange(4.0)
        assert torch.equal(F.dropout(x, 0.4, True), x) and torch.equal(
            F.dropout2d(x.view(1, 4, 1, 1), 0.3).flatten(), x
        )
        assert torch.equal(torch.native_dropout(x, 0.5, True)[0], x)  # as F.dropout calls it on a GPU
        assert x.new_empty(2).bernoulli_(0.8).tolist() == pytest.approx([0.8, 0.8])
        assert torch.rand(2).tolist() == pytest.approx([0.6] * 2) and torch.randn_like(x).tolist() == pytest.approx(
            [0.6] * 4
        )
        assert torch.empty(1).uniform_(-1, 4).item() == 2 and torch.empty(1).normal_(2, 5).item() == 5
        assert torch.empty(1).exponential_(4).item() == 0.25
        for slopes, mean in (((), (1 / 8 + 1 / 3) / 2), ((0.1, 0.3), 0.2)):
            y = -torch.ones(1)
            assert F.rrelu(y, *slopes, training=True).item() == pytest.approx(-mean)
            assert F.rrelu(y, *slopes, training=True, inplace=True) is y and y.item() == pytest.approx(-mean)


class Frames(nn.Module):
    """Frames folded into the batch, and what only training does to them."""

    def __init__(self, drop):
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 6, 3)
        self.fc, self.drop = nn.Linear(6, 4), drop

    def forward(self, x):
        n, frames = x.shape[:2]
        x = self.norm(self.a(x.flatten(0, 1)))
        x = self.drop(x) if self.training else x
        return self.fc(F.relu(self.b(F.relu(x))).mean((2, 3)).view(n, frames, -1).mean(1))


DROPS = {
    "dropout": lambda x: F.dropout(x, 0.5, True),
    "drop path": lambda x: x * (torch.rand(len(x), 1, 1, 1) < 0.9),
}


@pytest.mark.parametrize("name", DROPS)
def test_what_training_draws_for_folded_samples_protects_nothing_and_leaves_no_trace(name):
    torch.manual_seed(0)
    model = Frames(DROPS[name]).eval()
    before, state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    graph = ChannelGraph(model, torch.zeros(2, 4, 3, 8, 8))
    assert len(graph.units) == 14 and all(info.reason is None for info in graph.layers.values())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


class Encoding(nn.Module):
    """The deviation of its noise depends on the number of channels, so that no filter of `a` can be cut exactly."""

    def __init__(self, noise):
        super().__init__()
        self.a, self.mean, self.deviation = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 1), nn.Conv2d(8, 6, 1)
        self.b, self.noise = nn.Conv2d(6, 3, 1), noise

    def forward(self, x):
        x = F.relu(self.a(x))
        deviation = torch.exp(self.deviation(x / math.sqrt(x.shape[1])))
        return self.b(self.mean(x) + deviation * self.noise(deviation))


NOISES = {
    "randn_like": torch.randn_like,
    "between -1 and 1": lambda x: 2 * torch.rand_like(x) - 1,
    "in place": lambda x: torch.empty_like(x).normal_(),
    "rsample": lambda x: torch.distributions.Normal(torch.zeros_like(x), 1.0, validate_args=False).rsample(),
}


@pytest.mark.parametrize("name", NOISES)
def test_noise_of_mean_zero_hides_no_branch(name):
    torch.manual_seed(0)
    graph = ChannelGraph(Encoding(NOISES[name]).eval(), torch.zeros(1, 3, 8, 8))
    assert "other outputs than closing" in graph.layers["a"].reason


class Augmented(Frames):
    """Changes hidden states in training."""

    def forward(self, x):
        x = self.a(x)
        x = self.drop(x) if self.training else x
        return self.fc(F.relu(self.b(F.relu(x))).mean((2, 3)))


def mixed(x):
    share = float(np.random.beta(0.3, 0.3))
    return share * x + (1 - share) * x[torch.randperm(len(x))]


def mixed_styles(x):
    mean, deviation, order = x.mean((2, 3), True), x.std((2, 3), keepdim=True) + 1e-3, torch.randperm(len(x))
    share = torch.distributions.Beta(0.1, 0.1).sample((len(x), 1, 1, 1))
    return (x - mean) / deviation * (deviation * share + deviation[order] * (1 - share)) + mean[order]


AUGMENTED = {
    "mixup": mixed,
    "styles": mixed_styles,
    "behind other noise": lambda x: mixed(x + torch.randn_like(x)),
    "normal": lambda x: x + torch.normal(0.0, 0.1, x.shape),
    "around means": lambda x: torch.normal(x, 0.1),
    "poisson": lambda x: x + torch.poisson(F.relu(x)) + 0.1 * torch.poisson(torch.ones(len(x), 1, 1, 1)),
    "other": lambda x: x + torch.empty_like(x).cauchy_() + torch.empty_like(x).log_normal_(),
}


@pytest.mark.parametrize("name", AUGMENTED)
def test_what_training_draws_protects_nothing(name):
    torch.manual_seed(0)
    graph = ChannelGraph(Augmented(AUGMENTED[name]).eval(), torch.zeros(2, 3, 8, 8))
    assert True in graph.executions and all(info.reason is None for info in graph.layers.values())
