"""One optimiser step against its formula, and that it never reads from the device."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from toys import RICH, ListLoader, states_equal, toy_data, toy_loaders, toy_model

from taylor_pruning.tasks.classification import kl_divergence
from taylor_pruning.training.fine_tuning import fine_tune
from taylor_pruning.training.recipe import Recipe
from taylor_pruning.training.steps import OptimiserSteps


def test_kl_divergence_equal_the_formula():
    generator = torch.Generator().manual_seed(2)
    student, teacher = torch.randn(2, 6, 4, generator=generator, dtype=torch.float64)
    p, q = (teacher / 3).softmax(1), (student / 3).softmax(1)
    expected = 9 * (p * (p / q).log()).sum(1)
    torch.testing.assert_close(kl_divergence(student, teacher, 3.0), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("clip_ratio", [None, 0.01])
def test_one_step_follows_the_documented_loss(clip_ratio):
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
        clip_ratio=clip_ratio,
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
    for (name, new), old in zip(model.named_parameters(), reference.parameters(), strict=True):
        shares = torch.ones(len(old), dtype=torch.float64)
        if clip_ratio:  # each filter with its bias
            layer = reference.get_submodule(name.rpartition(".")[0])
            weights, gradients = (
                torch.cat([t.flatten(1), bias[:, None]], 1).norm(dim=1)
                for t, bias in ((layer.weight, layer.bias), (layer.weight.grad, layer.bias.grad))
            )
            shares = (clip_ratio * weights / gradients).clamp(max=1)
            assert (shares < 1).any()
        clipped = old.grad * shares.reshape(-1, *[1] * (old.ndim - 1))
        step = 0.1 * 1.9 * (clipped + 0.01 * old)  # first Nesterov step: (1 + momentum) x gradient
        torch.testing.assert_close(new, old - step, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("channels_last", [False, True])
def test_teacher_teaches_in_eval_mode_and_is_untouched(channels_last):
    teacher = toy_model(seed=1).train()
    before, layouts = copy.deepcopy(teacher), []
    teacher[0].register_forward_pre_hook(lambda module, _: layouts.append(module.weight.is_contiguous()))
    recipe = Recipe(epochs=1, distillation_weight=0.5, channels_last=channels_last)
    fine_tune(toy_model(), *toy_loaders(), recipe, teacher=teacher, progress=False)
    assert set(layouts) == {not channels_last} and all(p.is_contiguous() for p in teacher.parameters())
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
    recipe = Recipe(epochs=1, lr=0.1, clip_ratio=0.05)
    if size == 5:  # 12 = 5 + 5 + 2
        train.images, train.labels, small.images, small.labels = (
            train.images[:12],
            train.labels[:12],
            train.images[:12],
            train.labels[:12],
        )
    big, accumulated = (toy_model(batchnorm=False).double() for _ in range(2))
    fine_tune(big, train, val, recipe, progress=False)
    history = fine_tune(accumulated, small, val, Recipe(**{**vars(recipe), "accumulate": 3}), progress=False)
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


class NoHostReads(TorchDispatchMode):
    """Refuses what makes the host wait for a GPU: the value of a tensor as a Python number, or as a shape."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default), function
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "changes", [{}, vars(RICH), {"amp": "fp16", "clip_ratio": 0.05}, {"amp": "bf16", "accumulate": 2}]
)
def test_a_step_reads_nothing_from_the_device(changes):
    images, labels = toy_data(images=12)
    recipe = Recipe(**{**changes, "channels_last": True}).resolved(images.device)
    steps = OptimiserSteps(toy_model().train(), recipe, toy_model(seed=1).eval(), total=10, warmup=2)
    batches = [(images[:6], labels[:6]), (images[6:], labels[6:])][: recipe.accumulate]
    with NoHostReads():
        for _ in range(3):
            facts = steps.step(batches, ["a", "b"][: recipe.accumulate])
        with pytest.raises(AssertionError, match="_local_scalar_dense"):  # the guard guards
            float(facts[0][0].mul(1))
    assert steps.number == 3 and all(values[0].isfinite() for values in facts)


class LateBranch(nn.Module):
    """Leaves its convolution out of the first forward, as layer drop may."""

    def __init__(self):
        super().__init__()
        self.conv, self.head, self.forwards = nn.Conv2d(3, 3, 3, padding=1), nn.Linear(3, 3), 0

    def forward(self, x):
        self.forwards += 1
        x = x if self.forwards == 1 else x + self.conv(x)
        return self.head(x.mean((2, 3)))


def test_a_parameter_may_get_its_first_gradient_in_a_later_step():
    images, labels = toy_data(images=8)
    model = LateBranch()
    reference = copy.deepcopy(model)
    steps = OptimiserSteps(model, Recipe(lr=0.1, clip_ratio=None).resolved(images.device), None, total=None)
    optimizer = torch.optim.SGD(reference.parameters(), 0.1, momentum=0.9, weight_decay=1e-4, nesterov=True)
    for _ in range(3):
        steps.step([(images, labels)], ["batch"])
        optimizer.zero_grad()
        F.cross_entropy(reference(images), labels).backward()
        optimizer.step()
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_an_fp16_overflow_in_the_first_step_leaves_no_trace():
    images, labels = toy_data(images=8)
    model = toy_model(batchnorm=False)
    start = copy.deepcopy(model)
    steps = OptimiserSteps(model, Recipe(amp="fp16", lr=0.1, clip_ratio=None).resolved(images.device), None, total=None)
    sound = steps.scaler.state_dict()
    steps.scaler.load_state_dict({**sound, "scale": 2.0**120})  # every gradient overflows
    steps.step([(images, labels)], ["batch 0"])
    assert states_equal(model, start) and steps.scaler.get_scale() == 2.0**119
    steps.scaler.load_state_dict(sound)
    steps.step([(images, labels)], ["batch 1"])
    optimizer = torch.optim.SGD(start.parameters(), 0.1, momentum=0.9, weight_decay=1e-4, nesterov=True)
    with torch.autocast("cpu", torch.float16):
        loss = F.cross_entropy(start(images), labels)
    loss.backward()
    optimizer.step()
    for ours, theirs in zip(model.parameters(), start.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
