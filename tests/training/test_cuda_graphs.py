"""Replayed passes against eager ones, and what is not replayed. What needs a GPU is skipped without one."""

import copy
import random

import numpy as np
import pytest
import torch
from torch import nn
from toys import ListLoader, rich_run, states_equal, toy_data, toy_model, without_seconds

from taylor_pruning.errors import InputError
from taylor_pruning.experiment.data import TensorImages
from taylor_pruning.experiment.loaders import make_loader
from taylor_pruning.training import cuda_graphs
from taylor_pruning.training.evaluation import evaluate
from taylor_pruning.training.fine_tuning import fine_tune
from taylor_pruning.training.recipe import Recipe
from taylor_pruning.training.steps import OptimiserSteps

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
CUDA = torch.device("cuda")


class Wrapped(nn.Module):
    """The toy network with something else in its forward."""

    def __init__(self, extra):
        super().__init__()
        self.model, self.extra, self.calls = toy_model(batchnorm=False), extra, 0

    def forward(self, images):
        self.extra(self, images)
        return self.model(images)


def count(module, images):
    module.calls += 1


EXTRAS = {
    "changes attributes": count,
    "draws random numbers": lambda module, images: random.random(),
    "draws": lambda module, images: np.random.rand(),
    "random": lambda module, images: torch.rand(1),
    "waits for the device": lambda module, images: images.sum().item(),
}
HOST_EXTRAS = [name for name in EXTRAS if not name.startswith("waits")]


@pytest.mark.parametrize("name", HOST_EXTRAS)
def test_what_a_pass_changes_on_the_host_is_seen(name):
    model, images = Wrapped(EXTRAS[name]), torch.zeros(2, 3, 6, 6)
    before = cuda_graphs._host_state(model)
    model.model(images)
    assert cuda_graphs._host_state(model) == before
    model(images)
    assert cuda_graphs._host_state(model) != before


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook",
                                      "register_full_backward_hook", "register_full_backward_pre_hook"])  # fmt: skip
def test_hooks_are_seen(register):
    model = toy_model()
    assert not cuda_graphs._has_hooks(model)
    getattr(model[3], register)(lambda *arguments: None)
    assert cuda_graphs._has_hooks(model)


def steps_of(model, teacher=None, **changes):
    recipe = Recipe(**{"lr": 0.05, "amp": None, **changes}).resolved(CUDA, teacher is not None)
    return OptimiserSteps(model.to(CUDA).train(), recipe, teacher, total=40)


def batches(sizes):
    images, labels = (tensor.to(CUDA) for tensor in toy_data(images=sum(sizes)))
    return list(zip(images.split(sizes), labels.split(sizes), strict=True))


@gpu
@pytest.mark.parametrize("changes", [{}, {"amp": "bf16"}, {"amp": "fp16", "clip_ratio": 0.05}, {"ema_decay": 0.5},
                                     {"teacher": toy_model(seed=3)}])  # fmt: skip
def test_replayed_steps_equal_eager_ones(changes):
    model = toy_model()
    model[5] = nn.Identity()  # dropout draws other numbers in a graph
    if "teacher" in changes:
        changes = {"teacher": changes["teacher"].to(CUDA).eval()}
    eager, replayed = steps_of(copy.deepcopy(model), cuda_graphs=False, **changes), steps_of(model, **changes)
    tolerance = {"rtol": 2e-2, "atol": 1e-3} if "amp" in changes else {"rtol": 1e-3, "atol": 1e-5}
    sizes = [16, 15] * 6 + [7]  # two shapes, each replayed thrice, and a ragged last batch
    for number, batch in enumerate(batches(sizes)):
        where = [f"batch {number}"]
        ours, theirs = replayed.step([batch], where), eager.step([batch], where)
        torch.testing.assert_close(ours, theirs, **tolerance)
    assert replayed._single_pass.refusal is None and len(replayed._single_pass._graphs) == 2
    for ours, theirs in zip(replayed.evaluated_model.parameters(), eager.evaluated_model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, **tolerance)
    assert all(parameter.grad is None for parameter in model.parameters())


@gpu
def test_dropout_draws_anew_in_every_replay():
    steps = steps_of(toy_model(), lr=1e-30)
    batch = batches([16])[0]
    losses = [steps.step([batch], ["batch"])[0][0].item() for _ in range(8)]
    assert len(steps._single_pass._graphs) == 1 and len(set(losses)) == 8


@gpu
@pytest.mark.parametrize("reason", EXTRAS)
def test_what_a_replay_would_not_do_again_stays_eager(reason):
    steps = steps_of(Wrapped(EXTRAS[reason]))
    for batch in batches([16] * 6):
        steps.step([batch], ["batch"])
    assert reason in steps._single_pass.refusal and not steps._single_pass._graphs


@gpu
def test_large_passes_stay_eager(monkeypatch):
    monkeypatch.setattr(cuda_graphs, "MEMORY_SHARE", 0.0)
    steps = steps_of(toy_model())
    for batch in batches([16] * 6):
        steps.step([batch], ["batch"])
    assert "memory" in steps._single_pass.refusal and not steps._single_pass._graphs


@gpu
@pytest.mark.parametrize("changes", [{}, {"cuda_graphs": False}, {"amp": "bf16", "accumulate": 2}, {"ema_decay": 0.9},
                                     {"amp": "fp16", "clip_ratio": 0.05}])  # fmt: skip
def test_no_step_waits_for_the_device(changes):
    images, labels = toy_data(images=640)
    data = TensorImages((images.clamp(-3, 3) * 40 + 128).to(torch.uint8), labels, padding=1, flip=True)
    loader = make_loader(data, 32, shuffle=True, device=CUDA)
    steps = steps_of(toy_model(), **changes)
    for _ in range(2):  # eager passes, recording
        for batch in loader:
            steps.step([batch], ["batch"])
    iterator = iter(loader)
    pending = [next(iterator)]  # copies the order of the epoch
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in iterator:
            pending.append(batch)
            if len(pending) == steps.recipe.accumulate:
                steps.step(pending, ["batch"] * len(pending))
                pending = []
    finally:
        torch.cuda.set_sync_debug_mode("default")


@gpu
def test_a_bad_label_is_named_and_the_process_lives():
    images, labels = (tensor.to(CUDA) for tensor in toy_data(images=96))
    labels[40] = 3
    model = toy_model().to(CUDA)
    start = copy.deepcopy(model)
    loader = ListLoader(images, labels, 16)
    with pytest.raises(InputError, match="batch 2 holds label 3"):
        evaluate(model, loader, progress=False)
    loader.set_epoch = lambda epoch: None
    with pytest.raises(InputError, match="epoch 1, batch 2 holds label 3"):
        fine_tune(model, loader, ListLoader(images[:32], labels[:32], 16), Recipe(epochs=1), progress=False)
    assert states_equal(model, start)


@gpu
def test_training_on_a_gpu_learns_and_resumes(tmp_path):
    images, labels = (tensor.to(CUDA) for tensor in toy_data())
    train, val = ListLoader(images, labels, 16), ListLoader(images[:50], labels[:50], 20)
    recipe = Recipe(epochs=4, lr=0.05)
    model = toy_model().to(CUDA)
    history = fine_tune(model, train, val, recipe, checkpoint=tmp_path / "c.pt", progress=False)
    assert history.epochs[0]["top1"] < 60 < 90 < history.best.top1
    again = fine_tune(toy_model(seed=7).to(CUDA), train, val, recipe, checkpoint=tmp_path / "c.pt", resume=True,
                      progress=False)  # fmt: skip
    assert without_seconds(again) == without_seconds(history)
    assert rich_run()[1].best_epoch  # the CPU still works beside it
