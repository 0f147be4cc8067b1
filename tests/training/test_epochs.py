"""Divergence: found, named with its step, and without loss of good weights."""

import copy
import functools
import math

import pytest
import torch
from toys import Fixed, ListLoader, Poisoned, rich_run, states_equal, toy_loaders, toy_model, without_seconds

from taylor_pruning.errors import InputError
from taylor_pruning.training import epochs
from taylor_pruning.training.checks import BatchLog
from taylor_pruning.training.epochs import TrainingDiverged
from taylor_pruning.training.fine_tuning import fine_tune
from taylor_pruning.training.recipe import Recipe, lr_factor


@pytest.mark.parametrize("factor", [math.nan, math.inf, 1e5])
def test_divergence_stops_with_its_place_and_the_best_weights(tmp_path, factor):
    train, val = toy_loaders()  # 6 steps per epoch
    recipe = Recipe(epochs=3, lr=0.05, warmup_epochs=1)
    model = Poisoned(toy_model(), step=6 + 3, factor=factor)
    with pytest.raises(TrainingDiverged, match=r"epoch 2, step 3 of 6.*learning rate 0.0\d+.*c\.pt \(epoch 1\)") as e:
        fine_tune(model, train, val, recipe, checkpoint=tmp_path / "c.pt", progress=False)
    assert (e.value.epoch, e.value.step, e.value.checkpoint) == (2, 3, tmp_path / "c.pt")
    assert e.value.lr == pytest.approx(0.05 * lr_factor(8, 6, 18))
    best = torch.load(tmp_path / "c.pt", weights_only=True)["best"]
    assert all(torch.equal(best[name], tensor) for name, tensor in model.state_dict().items())
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())


def test_nan_gradient_in_the_last_step_is_found():
    class NanGradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * math.nan

    class Model(Fixed):
        def forward(self, images):
            return NanGradient.apply(super().forward(images)) if self.training else super().forward(images)

    images = torch.randn(4, 2, 1, 1)
    loader = ListLoader(images, torch.tensor([0, 1, 0, 1]), 4)
    model = Model(2)
    with pytest.raises(TrainingDiverged, match="bias of the model"):
        fine_tune(model, loader, loader, Recipe(epochs=1), progress=False)
    assert model.bias.isfinite().all()


@pytest.fixture(params=[1, 4, 100])
def read_every(request, monkeypatch):
    """As on a GPU, where the host reads every few batches; 100: at the end of an epoch alone."""
    monkeypatch.setattr(epochs, "BatchLog", functools.partial(BatchLog, every=request.param))
    return request.param


def test_a_late_read_changes_nothing(read_every):
    _, history = rich_run()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(epochs, "BatchLog", BatchLog)
        _, expected = rich_run()
    assert without_seconds(history) == without_seconds(expected)


@pytest.mark.parametrize("step", [1, 3, 6])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_late_read_names_the_step_and_keeps_the_good_weights(tmp_path, read_every, step, accumulate):
    train, val = toy_loaders(batch_size=16 // accumulate)  # 6 steps per epoch
    recipe = Recipe(epochs=3, lr=0.05, warmup_epochs=1, accumulate=accumulate)
    model = Poisoned(toy_model(), step=(6 + step - 1) * accumulate + 1, factor=math.nan)
    with pytest.raises(TrainingDiverged, match=rf"epoch 2, step {step} of 6") as e:
        fine_tune(model, train, val, recipe, checkpoint=tmp_path / "c.pt", progress=False)
    assert e.value.lr == pytest.approx(0.05 * lr_factor(6 + step - 1, 6, 18))
    best = torch.load(tmp_path / "c.pt", weights_only=True)["best"]
    assert all(torch.equal(best[name], tensor) for name, tensor in model.state_dict().items())


def test_a_late_read_names_the_bad_batch(read_every):
    train, val = toy_loaders(batch_size=16)
    train.labels, model = train.labels.clone(), toy_model()
    start = copy.deepcopy(model)
    train.set_epoch(1)
    bad = next(index for index, (images, _) in enumerate(train) if (images == train.images[11]).flatten(1).all(1).any())
    train.labels[11] = 3
    with pytest.raises(InputError, match=rf"training: epoch 1, batch {bad} holds label 3, but the model has 3 outputs"):
        fine_tune(model, train, val, Recipe(epochs=1, lr=0.05), progress=False)
    assert states_equal(model, start)


def test_the_training_loss_is_the_mean_over_the_images():
    torch.manual_seed(0)
    model, x, y = torch.nn.Linear(4, 3), torch.randn(11, 4), torch.arange(11) % 3
    wanted = torch.nn.functional.cross_entropy(model(x), y).item()
    loader = [(x[:8], y[:8]), (x[8:], y[8:])]
    history = fine_tune(model, loader, loader, Recipe(epochs=1, lr=1e-9), progress=False)
    assert history.epochs[1]["train_loss"] == pytest.approx(wanted, rel=1e-5)


def test_batches_that_are_left_over_are_a_step_of_the_schedule():
    model = torch.nn.Linear(4, 3)
    recipe = Recipe(epochs=2, accumulate=2)
    training = epochs.Training(model, recipe, None, batches=3)
    assert training.steps_per_epoch == 2 and training.steps.total == 4
