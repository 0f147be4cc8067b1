"""Networks whose forwards count, average and keep things come back as they were."""

import pytest
import torch
from conftest import Residual, randomise

from EnhancedPruning import EnhancedPruning, PruningSettings
from taylor_pruning.kept_state import attributes_of
from taylor_pruning.modes import frozen, in_evaluation
from taylor_pruning.repair.compensation import compensate
from taylor_pruning.training.evaluation import evaluate


class Remembering(Residual):
    """Nothing that it keeps changes what it answers."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.tensor(0))
        self.register_buffer("mean", torch.ones(4))
        self.number, self.seen, self.sizes, self.last = 0, {"last": None}, [], None
        self.register_buffer("resized", torch.zeros(2), persistent=False)
        self.total = torch.zeros(1)

    def forward(self, x):
        self.calls += 1
        self.total.add_(1)
        self.mean = 0.9 * self.mean
        self.number += 1
        self.seen["last"], self.seen[len(x)], self.last = x, x, x
        self.sizes.append(len(x))
        self.resized.resize_(len(x)).fill_(1)
        self.register_buffer("made", x[:1].clone(), persistent=False)
        return super().forward(x)


@pytest.fixture
def network():
    torch.manual_seed(0)
    return randomise(Remembering())


def held(model):
    values = {name: tensor.clone() for name, tensor in [*model.named_buffers(), ("total", model.total)]}
    return values, attributes_of(model), [module.training for module in model.modules()]


def check_same(before, after):
    assert before[0].keys() == after[0].keys()
    assert all(torch.equal(value, after[0][name]) for name, value in before[0].items())
    assert list(before[1]) == list(after[1]) and before[2] == after[2]
    assert all(value is after[1][name] or value == after[1][name] for name, value in before[1].items())


@pytest.mark.parametrize("context", [in_evaluation, frozen])
def test_what_forwards_leave_behind_is_taken_back(context, network, images):
    network(images)
    network.train()
    before = held(network)
    with context(network):
        assert not network.training
        network(images[:3])
    check_same(before, held(network))


def test_buffers_come_back_from_other_sizes_and_from_writes_to_their_data():
    class Rewriting(torch.nn.Module):
        def __init__(self):
            super().__init__()
            for name, size in (("grid", 0), ("mean", 3), ("calls", 1)):
                self.register_buffer(name, torch.zeros(size))

        def forward(self, x):
            self.grid.resize_(x.shape).fill_(1)
            self.mean.data = x.mean((0, 2, 3))
            self.calls.data.add_(1)
            return x

    network = Rewriting()
    with in_evaluation(network):
        network(torch.ones(2, 3, 4, 4))
    assert [buffer.tolist() for buffer in network.buffers()] == [[], [0, 0, 0], [0]]


def test_the_network_comes_back_from_measuring_and_compensation(network, images, labels, batches):
    before = held(network)
    evaluate(network, batches, progress=False)
    compensate(network, randomise(Remembering()), batches, progress=False)
    check_same(before, held(network))


def test_the_network_comes_back_from_the_pipeline(network, images, batches):
    before = held(network)
    pruning = EnhancedPruning(
        network, batches, batches, calibration=batches, settings=PruningSettings(rounds=1), progress=False
    )
    pruning.run_full_pruning(30, 2, fine_tune_epochs=1)
    check_same(before, held(network))


class MadeLater(Residual):
    """Its last layer is made by the first forward, which knows how many features there are."""

    def __init__(self):
        super().__init__()
        self.classes, self.head = self.head.out_features, None

    def forward(self, x):
        features = self.conv2(self.conv1(self.stem(x)).relu()).mean((2, 3))
        if self.head is None:
            self.head = torch.nn.Linear(features.shape[1], self.classes, dtype=x.dtype)
        return self.head(features)


def test_layers_that_the_first_forward_makes_stay(images, batches):
    model = randomise(MadeLater())
    evaluate(model, batches, progress=False)
    weight = model.head.weight
    evaluate(model, batches, progress=False)
    assert model.head.weight is weight
    settings = PruningSettings(rounds=1)
    assert EnhancedPruning(randomise(MadeLater()), batches, batches, settings=settings, progress=False).prune(30).plan
