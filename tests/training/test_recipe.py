"""The recipe's ranges, what it decides for a device, and the learning rate."""

import math

import pytest
import torch
from toys import toy_loaders, toy_model

from taylor_pruning.errors import InputError
from taylor_pruning.training.fine_tuning import fine_tune
from taylor_pruning.training.recipe import Recipe, lr_factor


def test_learning_rate_warms_up_and_ends_at_zero():
    assert [lr_factor(step, 3, 11) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert lr_factor(7, 3, 11) == pytest.approx(0.5)
    assert lr_factor(11, 3, 11) == pytest.approx(0.0)
    train, val = toy_loaders()  # 6 steps per epoch
    history = fine_tune(toy_model(), train, val, Recipe(epochs=2, lr=0.1, warmup_epochs=1.0), progress=False)
    assert history.epochs[1]["lr"] == pytest.approx(0.1 * 6 / 7)
    assert history.epochs[2]["lr"] == pytest.approx(0.1)


def test_what_is_automatic_is_off_on_a_cpu_and_what_is_given_stays():
    cpu = torch.device("cpu")
    recipe = Recipe().resolved(cpu)
    assert (recipe.amp, recipe.channels_last) == (None, False)
    assert (recipe.distillation_weight, Recipe().resolved(cpu, teacher=True).distillation_weight) == (0.0, 0.5)
    recipe = Recipe(amp="bf16", channels_last=True, distillation_weight=0.2)
    assert recipe.resolved(cpu) == recipe


@pytest.mark.parametrize(
    "field, value",
    {"epochs": -1, "lr": math.nan, "momentum": 1.0, "weight_decay": -1.0, "warmup_epochs": 5, "amp": "fp8",
     "accumulate": 0, "temperature": 0.0, "ema_decay": 1.0, "clip_ratio": 0.0}.items(),
)  # fmt: skip
def test_values_out_of_range_are_refused_by_name(field, value):
    with pytest.raises(InputError, match=f"{field} must be"):
        Recipe(**{field: value})
