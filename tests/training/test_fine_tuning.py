"""FineTuning and DistributedRun against hand formulas, brute force and unbroken runs."""

import copy
import math
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from taylor_pruning.errors import InputError
from taylor_pruning.training.fine_tuning import (
    Interrupted,
    Recipe,
    TrainingDiverged,
    evaluate,
    fine_tune,
    reestimate_batchnorm,
    train_steps,
)
from taylor_pruning.training.recipe import lr_factor
from taylor_pruning.training.steps import distillation_loss

ROOT = Path(__file__).parents[2]
RICH = Recipe(
    epochs=4, lr=0.05, warmup_epochs=0.5, label_smoothing=0.1, distillation_weight=0.5, ema_decay=0.8, clip_norm=5.0
)


class ListLoader:
    """Batches of a tensor pair, shuffled by (seed, epoch) once set_epoch was called; `on_batch(epoch, i)` may interfere."""

    def __init__(self, images, labels, batch_size, on_batch=None):
        self.images, self.labels, self.batch_size, self.on_batch = images, labels, batch_size, on_batch
        self.epoch = None

    def __len__(self):
        return math.ceil(len(self.labels) / self.batch_size)

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        order = torch.arange(len(self.labels))
        if self.epoch is not None:
            order = torch.randperm(len(order), generator=torch.Generator().manual_seed(1000 + self.epoch))
        for i in range(len(self)):
            rows = order[i * self.batch_size : (i + 1) * self.batch_size]
            if self.on_batch:
                self.on_batch(self.epoch, i)
            yield self.images[rows], self.labels[rows]


def toy_data(images=96, classes=3, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(images) % classes
    means = torch.randn(classes, 3, 6, 6, generator=generator)
    return (means[labels] + 0.7 * torch.randn(images, 3, 6, 6, generator=generator)).to(dtype), labels


def toy_model(classes=3, batchnorm=True, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8) if batchnorm else nn.Identity(),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.2) if batchnorm else nn.Identity(),
        nn.Linear(32, classes),
    )


def toy_loaders(batch_size=16, on_batch=None, **options):
    images, labels = toy_data(**options)
    return ListLoader(images, labels, batch_size, on_batch), ListLoader(images[:50], labels[:50], 20)


def states_equal(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def without_seconds(history):
    return [{key: value for key, value in epoch.items() if key != "seconds"} for epoch in history.epochs]


class Fixed(nn.Module):
    """Logits straight from the image's first pixels; `bias` makes it a model with a parameter."""

    def __init__(self, classes):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(classes))

    def forward(self, images):
        return images.flatten(1)[:, : len(self.bias)] + self.bias


# ---------------------------------------------------------------------------------------------------------- evaluate


@pytest.mark.parametrize("classes", [3, 7])
def test_evaluate_equals_brute_force(classes):
    logits = torch.randn(23, classes, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(23) % classes
    model = Fixed(classes).train()
    accuracy = evaluate(model, ListLoader(logits[:, :, None, None], labels, 5), progress=False)
    ranks = [sorted(row.tolist(), reverse=True).index(row[label]) for row, label in zip(logits, labels, strict=True)]
    assert accuracy.images == 23
    assert accuracy.top1 == pytest.approx(100 * sum(r < 1 for r in ranks) / 23)
    assert accuracy.top5 == pytest.approx(100 * sum(r < min(5, classes) for r in ranks) / 23)
    assert accuracy.loss == pytest.approx(F.cross_entropy(logits.double(), labels).item())
    assert model.training


def test_evaluate_uses_eval_mode_and_restores_every_mode():
    model = toy_model().train()
    model[1].eval()
    _, val = toy_loaders()
    before = copy.deepcopy(model.state_dict())
    assert evaluate(model, val, progress=False) == evaluate(model, val, progress=False)  # no dropout
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert [module.training for module in model] == [True, False, True, True, True, True, True]


def test_evaluate_names_what_is_wrong():
    model = toy_model()
    images, labels = toy_data()
    with pytest.raises(InputError, match="no images"):
        evaluate(model, ListLoader(images[:0], labels[:0], 4), progress=False)
    wrong = labels.clone()
    wrong[20] = 3
    with pytest.raises(InputError, match=r"batch 1 holds label 3.*3 outputs"):
        evaluate(model, ListLoader(images, wrong, 16), progress=False)
    wrong[20] = -1
    with pytest.raises(InputError, match="label -1"):
        evaluate(model, ListLoader(images, wrong, 16), progress=False)
    images[40, 0, 0, 0] = math.nan
    with pytest.raises(InputError, match="batch 2 holds NaN"):
        evaluate(model, ListLoader(images, labels, 16), progress=False)
    with pytest.raises(InputError, match=r"logits \[16, classes\]"):
        evaluate(model[:1], toy_loaders()[0], progress=False)
    with torch.no_grad():
        model[6].weight[0, 0] = math.inf
    with pytest.raises(InputError, match="6.weight"):
        evaluate(model, toy_loaders()[1], progress=False)


# --------------------------------------------------------------------------------------------------------- fine_tune


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


def test_learning_rate_warms_up_and_ends_at_zero():
    assert [lr_factor(step, 3, 11) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert lr_factor(7, 3, 11) == pytest.approx(0.5)
    assert lr_factor(11, 3, 11) == pytest.approx(0.0)
    train, val = toy_loaders()  # 6 steps per epoch
    history = fine_tune(toy_model(), train, val, Recipe(epochs=2, lr=0.1, warmup_epochs=1.0), progress=False)
    assert history.epochs[1]["lr"] == pytest.approx(0.1 * 6 / 7)
    assert history.epochs[2]["lr"] == pytest.approx(0.1)


def test_distillation_loss_equals_the_formula():
    generator = torch.Generator().manual_seed(2)
    student, teacher = torch.randn(2, 6, 4, generator=generator, dtype=torch.float64)
    p, q = (teacher / 3).softmax(1), (student / 3).softmax(1)
    expected = 9 * (p * (p / q).log()).sum(1).mean()
    torch.testing.assert_close(distillation_loss(student, teacher, 3.0), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("clip_norm", [None, 0.05])
def test_one_step_follows_the_documented_loss(clip_norm):
    images, labels = toy_data(images=12, dtype=torch.float64)
    model, teacher = toy_model(batchnorm=False).double(), toy_model(batchnorm=False, seed=1).double()
    reference = copy.deepcopy(model)
    w, temperature = 0.3, 2.0
    recipe = Recipe(
        epochs=1,
        lr=0.1,
        weight_decay=0.01,
        label_smoothing=0.2,
        distillation_weight=w,
        temperature=temperature,
        clip_norm=clip_norm,
    )
    logits = reference(images)
    p, q = (teacher(images) / temperature).softmax(1), (logits / temperature).softmax(1)
    smooth = 0.8 * F.one_hot(labels, 3).double() + 0.2 / 3
    loss = (1 - w) * -(smooth * logits.log_softmax(1)).sum(1).mean()
    loss = loss + w * temperature**2 * (p * (p / q).log()).sum(1).mean()
    history = fine_tune(
        model, ListLoader(images, labels, 12), ListLoader(images, labels, 12), recipe, teacher=teacher, progress=False
    )
    assert history.epochs[1]["train_loss"] == pytest.approx(loss.item(), rel=1e-12)
    loss.backward()
    assert history.best_epoch == 1
    norm = sum(p.grad.square().sum() for p in reference.parameters()).sqrt().item()
    shrink = clip_norm / (norm + 1e-6) if clip_norm else 1.0
    assert shrink <= 1
    for new, old in zip(model.parameters(), reference.parameters(), strict=True):
        step = 0.1 * 1.9 * (shrink * old.grad + 0.01 * old)  # first Nesterov step: (1 + momentum) x gradient
        torch.testing.assert_close(new, old - step, rtol=1e-10, atol=1e-12)


def test_teacher_teaches_in_eval_mode_and_is_untouched():
    teacher = toy_model(seed=1).train()
    before = copy.deepcopy(teacher)
    fine_tune(toy_model(), *toy_loaders(), Recipe(epochs=1, distillation_weight=0.5), teacher=teacher, progress=False)
    assert states_equal(teacher, before)  # in train mode its BatchNorm statistics would move
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(module.training for module in teacher.modules())


def test_ema_starts_at_the_given_weights():
    images, labels = toy_data(images=12, dtype=torch.float64)
    loaders = ListLoader(images, labels, 12), ListLoader(images, labels, 12)
    start = toy_model(batchnorm=False).double()
    plain, averaged = copy.deepcopy(start), copy.deepcopy(start)
    fine_tune(plain, *loaders, Recipe(epochs=1, lr=0.1), progress=False)
    history = fine_tune(averaged, *loaders, Recipe(epochs=1, lr=0.1, ema_decay=0.75), progress=False)
    assert history.best_epoch == 1
    for p0, p1, average in zip(start.parameters(), plain.parameters(), averaged.parameters(), strict=True):
        torch.testing.assert_close(average, 0.75 * p0 + 0.25 * p1, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [4, 5])  # 5: uneven last micro-batch
def test_accumulation_equals_the_big_batch(size):
    train, val = toy_loaders(batch_size=12, images=36, dtype=torch.float64)
    small = ListLoader(train.images, train.labels, size)
    recipe = Recipe(epochs=1, lr=0.1, clip_norm=0.5)
    if size == 5:  # 12 = 5 + 5 + 2
        train.images, train.labels, small.images, small.labels = (
            train.images[:12], train.labels[:12], train.images[:12], train.labels[:12]
        )
    big, accumulated = (toy_model(batchnorm=False).double() for _ in range(2))
    fine_tune(big, train, val, recipe, progress=False)
    history = fine_tune(
        accumulated, small, val, Recipe(**{**vars(recipe), "accumulate": 3}), progress=False
    )
    assert history.best_epoch == 1
    for a, b in zip(big.parameters(), accumulated.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_channels_last_trains_the_same_and_leaves_no_trace():
    plain, strided = toy_model(), toy_model()
    for model, channels_last in ((plain, False), (strided, True)):
        torch.manual_seed(0)
        recipe = Recipe(epochs=2, lr=0.05, channels_last=channels_last)
        fine_tune(model, *toy_loaders(), recipe, progress=False)
    assert strided[0].weight.is_contiguous()
    for a, b in zip(plain.parameters(), strided.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


# ----------------------------------------------------------------------------------------- training between rounds


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
    recipe = Recipe(epochs=0, lr=0.05, label_smoothing=0.1, ema_decay=0.9)  # averaging and epochs play no part
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


def test_train_steps_gives_the_weights_back_where_training_diverges():
    model = Poisoned(toy_model(), step=2, factor=math.nan)
    with pytest.raises(TrainingDiverged, match="epoch 1, step 2 of 6"):
        train_steps(model, toy_loaders()[0], Recipe(lr=0.05), 4, loss_before=1.1, progress=False)
    assert states_equal(model.model, toy_model())


# ------------------------------------------------------------------------------------- breaking off and going on


def raise_at(epoch, batch, error):
    def on_batch(at_epoch, at_batch):
        if (at_epoch, at_batch) == (epoch, batch):
            raise error

    return on_batch


def rich_run(checkpoint=None, resume=False, on_batch=None, recipe=RICH, model=None):
    """The run that the tests below break off: dropout, BatchNorm, EMA, distillation, smoothing, clipping."""
    torch.manual_seed(5)
    model = model or toy_model()
    train, val = toy_loaders(on_batch=on_batch)
    history = fine_tune(
        model, train, val, recipe, teacher=toy_model(seed=1), checkpoint=checkpoint, resume=resume, progress=False
    )
    return model, history


@pytest.mark.parametrize("epoch", [1, 3])
def test_resume_after_an_exception_has_the_same_bits(tmp_path, epoch):
    unbroken, expected = rich_run()
    with pytest.raises(OSError):
        rich_run(tmp_path / "c.pt", on_batch=raise_at(epoch, 2, OSError("disk")))
    torch.manual_seed(99)  # the checkpoint, not the new process, decides the random numbers
    model, history = rich_run(tmp_path / "c.pt", resume=True, model=toy_model(seed=7))
    assert states_equal(model, unbroken)
    assert without_seconds(history) == without_seconds(expected)
    assert history.best_epoch == expected.best_epoch


def test_resume_of_a_finished_run_trains_nothing(tmp_path):
    model, expected = rich_run(tmp_path / "c.pt")
    again, history = rich_run(tmp_path / "c.pt", resume=True, model=toy_model(seed=7), on_batch=raise_at(1, 0, OSError))
    assert states_equal(model, again) and history == expected


def test_resume_without_a_file_starts_anew(tmp_path):
    unbroken, _ = rich_run()
    model, _ = rich_run(tmp_path / "c.pt", resume=True)
    assert states_equal(model, unbroken)


def test_resume_after_sigkill_has_the_same_bits(tmp_path):
    script = tmp_path / "killed.py"
    script.write_text(
        "import os, signal, sys\nfrom pathlib import Path\n"
        f"sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests' / 'training')!r}]\n"
        "from test_fine_tuning import rich_run\n"
        "def kill(epoch, batch):\n"
        "    if (epoch, batch) == (3, 2):\n        os.kill(os.getpid(), signal.SIGKILL)\n"
        "rich_run(Path(sys.argv[1]), on_batch=kill)\n"
    )
    killed = subprocess.run([sys.executable, script, tmp_path / "c.pt"], capture_output=True, text=True, timeout=120)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert len(torch.load(tmp_path / "c.pt", weights_only=True)["history"]) == 3
    unbroken, expected = rich_run()
    model, history = rich_run(tmp_path / "c.pt", resume=True)
    assert states_equal(model, unbroken)
    assert without_seconds(history) == without_seconds(expected)


def test_another_recipe_or_network_is_refused(tmp_path):
    rich_run(tmp_path / "c.pt")
    with pytest.raises(InputError, match=r"lr \(0.05 there, 0.01 here\), temperature \(4.0 there, 2.0 here\)"):
        rich_run(tmp_path / "c.pt", resume=True, recipe=Recipe(**{**vars(RICH), "lr": 0.01, "temperature": 2.0}))
    model = toy_model(batchnorm=False)
    before = copy.deepcopy(model)
    with pytest.raises(InputError, match="shapes of the network"):
        rich_run(tmp_path / "c.pt", resume=True, model=model)
    assert states_equal(model, before)
    (tmp_path / "c.pt").write_bytes(b"something else")
    with pytest.raises(InputError, match="not a fine-tuning checkpoint"):
        rich_run(tmp_path / "c.pt", resume=True)


def test_interrupt_names_a_usable_checkpoint(tmp_path):
    unbroken, _ = rich_run()
    with pytest.raises(Interrupted, match=r"c\.pt holds epoch 2 of 4.*resume") as interrupted:
        rich_run(tmp_path / "c.pt", on_batch=raise_at(3, 1, KeyboardInterrupt))
    assert isinstance(interrupted.value, KeyboardInterrupt)
    model, _ = rich_run(interrupted.value.checkpoint, resume=True)
    assert states_equal(model, unbroken)
    with pytest.raises(Interrupted, match="no checkpoint") as interrupted:
        rich_run(on_batch=raise_at(3, 1, KeyboardInterrupt))
    assert interrupted.value.checkpoint is None


def test_interrupt_while_writing_leaves_the_previous_checkpoint(tmp_path, monkeypatch):
    unbroken, _ = rich_run()
    save, calls = torch.save, []

    def interrupted_save(state, file):
        calls.append(file)
        if len(calls) == 4:  # epochs 0, 1, 2 are written, 3 breaks off half-way
            file.write(b"half a file")
            raise KeyboardInterrupt
        save(state, file)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", interrupted_save)
        with pytest.raises(Interrupted, match="holds epoch 2 of 4"):
            rich_run(tmp_path / "c.pt")
    assert [path.name for path in tmp_path.iterdir()] == ["c.pt"]
    model, _ = rich_run(tmp_path / "c.pt", resume=True)
    assert states_equal(model, unbroken)


# -------------------------------------------------------------------------------------------------------- divergence


class Poisoned(nn.Module):
    """The wrapped model, with logits multiplied by `factor` from training step `step` on."""

    def __init__(self, model, step, factor):
        super().__init__()
        self.model, self.step, self.factor, self.steps = model, step, factor, 0

    def forward(self, images):
        self.steps += self.training
        return self.model(images) * (self.factor if self.training and self.steps >= self.step else 1.0)


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


def test_out_of_memory_says_what_to_turn(tmp_path):
    class Greedy(Fixed):
        def forward(self, images):
            if self.training and len(images) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
            return super().forward(images)

    loader = ListLoader(torch.randn(4, 2, 1, 1), torch.tensor([0, 1, 0, 1]), 4)
    with pytest.raises(InputError, match=r"out of memory.*--batch-size.*--accumulate \(now 1\)"):
        fine_tune(Greedy(2), loader, loader, Recipe(epochs=1), progress=False)


def test_bad_input_is_refused():
    train, val = toy_loaders()
    for field, value in {"epochs": -1, "lr": 0.0, "momentum": 1.0, "warmup_epochs": 5, "amp": "fp8", "accumulate": 0,
                         "temperature": 0.0, "ema_decay": 1.0, "clip_norm": 0.0, "lr ": math.nan}.items():
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
    train.images = torch.full_like(train.images, math.nan)
    with pytest.raises(InputError, match=r"epoch 1, batch \d holds NaN"):
        fine_tune(toy_model(), train, val, Recipe(), progress=False)


# --------------------------------------------------------------------------------------------------------- BatchNorm


def test_reestimated_statistics_are_the_data_s():
    generator = torch.Generator().manual_seed(3)
    batches = [(torch.randn(n, 3, 4, 4, generator=generator, dtype=torch.float64) + 2, None) for n in (8, 8, 2)]
    model = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm2d(3, momentum=0.3), nn.Dropout2d(0.9)).double().train()
    model[2].eval()
    model[1].running_mean.fill_(math.nan)
    reestimate_batchnorm(model, batches)
    images = torch.cat([images for images, _ in batches])
    torch.testing.assert_close(model[1].running_mean, images.mean((0, 2, 3)), rtol=1e-12, atol=0)
    variance = sum(len(batch) * batch.var((0, 2, 3), correction=1) for batch, _ in batches) / len(images)
    torch.testing.assert_close(model[1].running_var, variance, rtol=1e-12, atol=0)
    assert model[1].momentum == 0.3
    assert [module.training for module in model] == [True, True, False]
    with pytest.raises(InputError, match="no batches"):
        reestimate_batchnorm(model, [])


# ------------------------------------------------------------------------------------------------- several processes


def distributed_worker(folder):
    """Body of one gloo process: one shard of the data in evaluate and in one training step."""
    from taylor_pruning.training.distributed import end_distributed, init_distributed, is_main, rank, world_size

    init_distributed(torch.device("cpu"))
    assert world_size() == 2 and is_main() == (rank() == 0)
    images, labels = toy_data(images=24, dtype=torch.float64)
    model = toy_model(batchnorm=False, seed=rank()).double()  # rank 1 starts elsewhere and must be brought in line
    odd = slice(rank(), 23, 2)  # 12 and 11 images
    accuracy = evaluate(toy_model(batchnorm=False).double(), ListLoader(images[odd], labels[odd], 5), progress=False)
    shard = slice(rank(), None, 2)
    train = ListLoader(images[shard], labels[shard], 6)
    train.set_epoch = lambda epoch: None
    val = ListLoader(images[shard], labels[shard], 6)
    recipe = Recipe(epochs=1, lr=0.1, accumulate=2)
    history = fine_tune(model, train, val, recipe, checkpoint=Path(folder, "c.pt"), progress=False)
    resumed = toy_model(batchnorm=False, seed=9).double()
    again = fine_tune(resumed, train, val, recipe, checkpoint=Path(folder, "c.pt"), resume=True, progress=False)
    assert without_seconds(again) == without_seconds(history) and states_equal(model, resumed)
    torch.save(
        {"accuracy": vars(accuracy), "history": history.epochs, "state": model.state_dict()}, f"{folder}/{rank()}.pt"
    )
    end_distributed()


def test_two_processes_equal_one(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = (
        f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests' / 'training')!r}]\n"
        f"from test_fine_tuning import distributed_worker; distributed_worker({str(tmp_path)!r})"
    )
    base = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env={**base, "RANK": str(r), "LOCAL_RANK": str(r), "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for r in range(2)
    ]
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(errors)
    first, second = (torch.load(tmp_path / f"{r}.pt", weights_only=True) for r in range(2))

    images, labels = toy_data(images=24, dtype=torch.float64)
    model = toy_model(batchnorm=False).double()
    whole = evaluate(model, ListLoader(images[:23], labels[:23], 23), progress=False)
    assert first["accuracy"] == second["accuracy"] == pytest.approx(vars(whole), rel=1e-12)
    loader = ListLoader(images, labels, 24)
    history = fine_tune(model, loader, loader, Recipe(epochs=1, lr=0.1), progress=False)
    assert history.best_epoch == 1
    assert first["history"][1]["train_loss"] == pytest.approx(history.epochs[1]["train_loss"], rel=1e-12)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(first["state"][name], tensor, rtol=1e-10, atol=1e-12)
        assert torch.equal(first["state"][name], second["state"][name])


def test_a_plain_dataloader_will_do():
    images, labels = toy_data()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, labels), 32, shuffle=True)
    model = toy_model()
    history = fine_tune(model, loader, loader, Recipe(epochs=2, lr=0.05), progress=False)
    assert len(history.epochs) == 3
