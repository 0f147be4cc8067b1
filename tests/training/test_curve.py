"""Accuracy against steps: where it is measured, of what, and that measuring changes nothing."""

import copy

import pytest
import torch
from toys import states_equal, toy_loaders, toy_model

from taylor_pruning.training.curve import StepCurve
from taylor_pruning.training.epochs import TrainingDiverged
from taylor_pruning.training.evaluation import evaluate
from taylor_pruning.training.fine_tuning import fine_tune
from taylor_pruning.training.recipe import Recipe


def test_it_is_measured_at_one_and_three_of_every_decade_and_at_both_ends():
    curve = StepCurve([], 4321)
    assert [step for step in range(4400) if curve.due(step)] == [0, 10, 30, 100, 300, 1000, 3000, 4321]


@pytest.mark.parametrize("recipe", [Recipe(epochs=3, lr=0.05), Recipe(epochs=3, lr=0.05, ema_decay=0.8)])
def test_measuring_changes_nothing_and_ends_with_the_last_weights(recipe):
    results = []
    for monitored in (False, True):
        train, val = toy_loaders()  # six steps an epoch
        model = toy_model()
        monitor = list(val)[:1] if monitored else None
        history = fine_tune(model, train, val, recipe, monitor=monitor, progress=False)
        results.append((copy.deepcopy(model.state_dict()), history))
    (plain, _), (measured, history) = results
    assert all(torch.equal(tensor, measured[name]) for name, tensor in plain.items())
    assert [point["step"] for point in history.steps] == [0, 10, 18]
    assert history.steps[0]["loss"] == pytest.approx(evaluate(toy_model(), monitor, progress=False).loss)
    if history.best_epoch == 3:
        assert history.steps[-1]["loss"] == pytest.approx(evaluate(model, monitor, progress=False).loss)


def test_a_resumed_training_has_the_points_of_an_unbroken_one(tmp_path):
    recipe, curves = Recipe(epochs=4, lr=0.05), {}

    def run(name, on_batch=None, resume=False):
        train, val = toy_loaders(on_batch=on_batch)
        model = toy_model()
        history = fine_tune(model, train, val, recipe, monitor=list(val), checkpoint=tmp_path / name, resume=resume,
                            progress=False)  # fmt: skip
        return model, history.steps

    def interrupt(epoch, index):
        if (epoch, index) == (3, 2):
            raise KeyboardInterrupt

    curves["whole"] = run("whole")
    with pytest.raises(KeyboardInterrupt):
        run("broken", interrupt)
    curves["broken"] = run("broken", resume=True)
    assert curves["whole"][1] == curves["broken"][1] and len(curves["whole"][1]) == 3
    assert states_equal(curves["whole"][0], curves["broken"][0])


def test_weights_that_diverged_are_not_measured():
    train, val = toy_loaders()
    with pytest.raises(TrainingDiverged):
        fine_tune(toy_model(), train, val, Recipe(epochs=3, lr=1e30), monitor=list(val), progress=False)


def test_the_recipe_turns_it_off():
    train, val = toy_loaders()
    recipe = Recipe(epochs=1, accuracy_at_steps=False)
    assert fine_tune(toy_model(), train, val, recipe, monitor=list(val), progress=False).steps == []
