"""Fine-tuning and training between rounds as a whole."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from toys import RICH, Fixed, ListLoader, Poisoned, states_equal, toy_data, toy_loaders, toy_model

from taylor_pruning.errors import InputError
from taylor_pruning.training.epochs import TrainingDiverged
from taylor_pruning.training.evaluation import evaluate
from taylor_pruning.training.fine_tuning import fine_tune, train_steps
from taylor_pruning.training.recipe import Recipe


@pytest.mark.parametrize("recipe", [Recipe(epochs=3, lr=0.05), RICH, Recipe(epochs=3, lr=0.05, amp="bf16")])
def test_learns_a_toy_problem(recipe):
    train, val = toy_loaders()
    model = toy_model().eval()
    parameters = list(model.parameters())
    history = fine_tune(model, train, val, recipe, teacher=toy_model(seed=1), progress=False)
    assert [epoch["epoch"] for epoch in history.epochs] == list(range(recipe.epochs + 1))
    assert history.epochs[0]["top1"] < 60 < 90 < history.epochs[history.best_epoch]["top1"]
    assert history.epochs[-1]["train_loss"] < history.epochs[1]["train_loss"]
    assert not model.training
    assert all(new is old for new, old in zip(model.parameters(), parameters, strict=True))
    accuracy = evaluate(model, val, progress=False)
    assert accuracy.top1 == history.epochs[history.best_epoch]["top1"]
    assert accuracy.loss == history.epochs[history.best_epoch]["loss"]


def test_every_epoch_is_reported(capsys):
    train, val = toy_loaders()
    history = fine_tune(toy_model(), train, val, Recipe(epochs=1, lr=0.05))
    before, after = history.epochs
    lines = capsys.readouterr().out.splitlines()
    figures = [f"loss {e['loss']:.4f}, top-1 {e['top1']:.2f} %, top-5 {e['top5']:.2f} %" for e in (before, after)]
    assert lines[0] == f"fine-tune 0/1: validation {figures[0]}"
    assert lines[1] == f"fine-tune 1/1: train loss {after['train_loss']:.4f}, validation {figures[1]}"


def test_best_epoch_is_kept_and_epoch_zero_competes():
    train, val = toy_loaders()
    model = toy_model()
    fine_tune(model, train, val, Recipe(epochs=3, lr=0.05), progress=False)
    good = copy.deepcopy(model)
    train.labels = (train.labels + 1) % 3  # every step makes it worse
    history = fine_tune(model, train, val, Recipe(epochs=2, lr=0.05), progress=False)
    assert history.best_epoch == 0
    assert history.epochs[1]["top1"] < history.epochs[0]["top1"]
    assert states_equal(model, good)


@pytest.mark.parametrize("label, best_epoch", [(0, 3), (1, 0)])  # training lowers, or raises, the validation loss
def test_equal_top1_is_decided_by_loss(label, best_epoch):
    model = Fixed(2)
    images = torch.tensor([2.0, 0.0]).reshape(1, 2, 1, 1)
    train, val = ListLoader(images, torch.tensor([label]), 1), ListLoader(images, torch.tensor([0]), 1)
    history = fine_tune(model, train, val, Recipe(epochs=3, lr=0.1), progress=False)
    assert [epoch["top1"] for epoch in history.epochs] == [100.0] * 4
    assert history.best_epoch == min(range(4), key=lambda epoch: history.epochs[epoch]["loss"]) == best_epoch


def test_no_epochs_means_evaluation_only():
    train, val = toy_loaders()
    model = toy_model()
    before = copy.deepcopy(model)
    history = fine_tune(model, train, val, Recipe(epochs=0), progress=False)
    assert len(history.epochs) == 1 and history.best_epoch == 0
    assert history.epochs[0]["top1"] == evaluate(model, val, progress=False).top1
    assert states_equal(model, before)


@pytest.mark.parametrize("turn", [0, 2])
def test_train_steps_is_sgd_at_a_constant_rate(turn):
    train, _ = toy_loaders(images=36, dtype=torch.float64)  # 3 steps per epoch
    model = toy_model(batchnorm=False).double()
    reference = copy.deepcopy(model)
    optimizer = torch.optim.SGD(reference.parameters(), 0.05, momentum=0.9, weight_decay=1e-4, nesterov=True)
    epochs = [1 + 2 * turn, 2 + 2 * turn]  # of its own every turn
    for epoch, steps in zip(epochs, (3, 2), strict=True):
        train.set_epoch(epoch)
        for images, labels in list(train)[:steps]:
            optimizer.zero_grad()
            F.cross_entropy(reference(images), labels, label_smoothing=0.1).backward()
            optimizer.step()
    # averaging and epochs play no part
    recipe = Recipe(epochs=0, lr=0.05, label_smoothing=0.1, ema_decay=0.9, clip_ratio=None)
    train_steps(model, train, recipe, 5, loss_before=1.1, round_index=turn, progress=False)
    for new, old in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(new, old, rtol=1e-10, atol=1e-12)


def test_train_steps_leaves_random_generators_and_modes_alone():
    models = []
    for seed in (3, 4):
        model = toy_model().eval()  # with dropout
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        train_steps(model, toy_loaders()[0], Recipe(lr=0.05), 8, loss_before=1.1, progress=False)
        assert torch.equal(torch.get_rng_state(), state)
        assert not model.training and all(parameter.grad is None for parameter in model.parameters())
        models.append(model)
    assert states_equal(*models) and not states_equal(models[0], toy_model())


def test_trainings_of_different_rounds_have_other_dropout():
    data, models = list(toy_loaders()[0]), []  # the same images in every epoch
    for round_index in (0, 0, 1):
        models.append(toy_model())
        options = {"loss_before": 1.1, "round_index": round_index, "progress": False}
        train_steps(models[-1], data, Recipe(lr=0.05), 2, **options)
    assert states_equal(*models[:2]) and not states_equal(*models[1:])


def test_train_steps_gives_the_weights_back_where_training_diverges():
    model = Poisoned(toy_model(), step=2, factor=math.nan)
    with pytest.raises(TrainingDiverged, match="epoch 1, step 2 of 6"):
        train_steps(model, toy_loaders()[0], Recipe(lr=0.05), 4, loss_before=1.1, progress=False)
    assert states_equal(model.model, toy_model())


def test_out_of_memory_says_what_to_turn(tmp_path):
    class Greedy(Fixed):
        def forward(self, images):
            if self.training and len(images) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
            return super().forward(images)

    loader = ListLoader(torch.randn(4, 2, 1, 1), torch.tensor([0, 1, 0, 1]), 4)
    model = Greedy(2)
    with pytest.raises(InputError, match=r"fine-tune: out of memory.*--batch-size.*--accumulate \(now 1\)"):
        fine_tune(model, loader, loader, Recipe(epochs=1), progress=False)
    with pytest.raises(InputError, match="train: out of memory.*--batch-size"):
        train_steps(model, loader, Recipe(), 1, loss_before=1.1, progress=False)
    assert model.training and not model.bias.any()


class Exhausted(list):
    """Batches that were read before."""

    def __iter__(self):
        return iter(())


def test_bad_input_is_refused():
    train, val = toy_loaders()
    for field, value in {
        "epochs": -1,
        "lr": 0.0,
        "momentum": 1.0,
        "warmup_epochs": 5,
        "amp": "fp8",
        "accumulate": 0,
        "temperature": 0.0,
        "ema_decay": 1.0,
        "clip_ratio": 0.0,
        "lr ": math.nan,
    }.items():
        with pytest.raises(InputError, match=field.strip()):
            Recipe(**{field.strip(): value})
    with pytest.raises(InputError, match="needs a teacher"):
        fine_tune(toy_model(), train, val, RICH, progress=False)
    with pytest.raises(InputError, match="teacher has 4 outputs"):
        fine_tune(toy_model(), train, val, RICH, teacher=toy_model(classes=4), progress=False)
    with pytest.raises(InputError, match="requires a gradient"):
        fine_tune(toy_model().requires_grad_(False), train, val, Recipe(), progress=False)
    with pytest.raises(InputError, match="loader is empty"):
        fine_tune(toy_model(), ListLoader(train.images[:0], train.labels[:0], 4), val, Recipe(), progress=False)
    with pytest.raises(InputError, match="gives no batch in epoch 1; give one that can be read again and again"):
        fine_tune(toy_model(), Exhausted(train), val, Recipe(), progress=False)
    train.images = torch.full_like(train.images, math.nan)
    with pytest.raises(InputError, match=r"epoch 1, batch \d holds NaN"):
        fine_tune(toy_model(), train, val, Recipe(), progress=False)


def test_a_plain_dataloader_will_do():
    images, labels = toy_data()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, labels), 32, shuffle=True)
    model = toy_model()
    history = fine_tune(model, loader, loader, Recipe(epochs=2, lr=0.05), progress=False)
    assert len(history.epochs) == 3


def test_a_known_start_is_not_evaluated_again():
    train, val = toy_loaders()
    model, passes = toy_model(), []
    before = evaluate(model, val, progress=False)
    val.on_batch = lambda epoch, batch: passes.append(batch)
    history = fine_tune(model, train, val, Recipe(epochs=2, lr=0.05), before=before, progress=False)
    assert passes == [0, 1, 2] * 2  # the two epochs
    assert {key: history.epochs[0][key] for key in vars(before)} == vars(before)
    assert history.best_epoch > 0 and history.best == evaluate(model, val, progress=False)


def test_a_teacher_may_share_layers_with_the_network():
    """Their statistics are those of the training, not those that the teacher came with."""
    train, val = toy_loaders()
    model = toy_model()
    teacher = torch.nn.Sequential(*model[:-1], copy.deepcopy(model[-1]))
    fine_tune(model, train, val, Recipe(epochs=2, lr=0.05), teacher=teacher, progress=False)
    assert model[1].num_batches_tracked > 0 and bool(model[1].running_mean.any())
