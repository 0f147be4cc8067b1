import math

import pytest
import torch

from EnhancedFilterPruner import EnhancedFilterPruner
from taylor_pruning.scoring import taylor
from taylor_pruning.scoring.layer_costs import removal_costs
from taylor_pruning.scoring.shrinkage import shrunk
from taylor_pruning.scoring.taylor import loss_change
from taylor_pruning.surgery.units import by_layers

VALUES = torch.tensor([1.0, 2.0, 3.0, 6.0, 8.0], dtype=torch.float64)
EXPECTED = torch.tensor([10.0, 20.0, 20.0, 10.0, 40.0], dtype=torch.float64)


def test_values_without_noise_stay_and_pure_noise_becomes_what_is_expected():
    nothing = torch.zeros(5, dtype=torch.float64)
    assert torch.equal(shrunk(VALUES, nothing, EXPECTED, [[0, 1, 2, 3]]), VALUES)
    loud = shrunk(VALUES, nothing + 10, EXPECTED, [[0, 1, 2, 3]])
    assert torch.allclose(loud, torch.tensor([2.0, 4.0, 4.0, 2.0, 8.0], dtype=torch.float64))


def test_the_factor_is_that_of_james_and_stein():
    errors = torch.tensor([0.0, 1.0, 1.0, 2.0, 2.0], dtype=torch.float64)
    target = EXPECTED / 5
    factor = 1 - 2 * 2.0 / (VALUES - target).square().sum()  # n - 3 = 2, mean squared error 2
    assert torch.allclose(shrunk(VALUES, errors, EXPECTED, [range(5)]), target + factor * (VALUES - target))


def test_of_values_that_are_noise_the_whole_distance_is_taken_off_on_the_mean():
    """Without the bound at 0: of 6 values, E[1 / chi^2 of 5 degrees of freedom] = 1/3, so that the factor has the mean 0."""
    generator = torch.Generator().manual_seed(0)
    values = 1000 + torch.randn(5000, 6, dtype=torch.float64, generator=generator)
    scale = 0.1  # errors that are told too small keep the factor above 0, and it is linear in their squares
    groups = [range(start, start + 6) for start in range(0, values.numel(), 6)]
    flat = values.flatten()
    found = shrunk(flat, torch.full_like(flat, scale), torch.ones_like(flat), groups).view_as(values)
    factors = (found[:, 0] - values.mean(1)) / (values[:, 0] - values.mean(1))
    assert ((1 - factors.mean()) / scale**2).item() == pytest.approx(1, abs=0.05)


def test_a_unit_of_which_nothing_is_expected_keeps_its_value():
    errors, expected = torch.full((6,), 9.0, dtype=torch.float64), torch.cat([EXPECTED, EXPECTED[:1] * 0])
    found = shrunk(torch.cat([VALUES, VALUES[:1]]), errors, expected, [range(6)])
    assert torch.equal(found[:5], shrunk(VALUES, errors[:5], EXPECTED, [range(5)])) and found[5] == VALUES[0]


@pytest.mark.parametrize("values, error", [([1.0, 2.0, 9.0], 3.0), ([2.0] * 6, 3.0), ([1.0, 2.0, 3.0, 9.0], math.nan)])
def test_few_values_or_those_expected_and_unknown_errors_change_nothing(values, error):
    values = torch.tensor(values, dtype=torch.float64)
    same = torch.ones_like(values)
    assert torch.equal(shrunk(values, torch.full_like(values, error), same, [range(len(values))]), values)


def test_what_a_choice_of_the_smallest_says_it_costs_is_what_it_costs():
    """Squares of heavy-tailed effects that most samples do not show: the smallest of the raw means are far too small."""
    generator = torch.Generator().manual_seed(0)
    true = torch.empty(400, dtype=torch.float64).exponential_(generator=generator) * 0.3 + 1
    shown = torch.rand(60, 400, dtype=torch.float64, generator=generator) < 0.02
    samples = true * shown / 0.02
    values, errors = samples.mean(0), samples.std(0) / math.sqrt(60)
    better = shrunk(values, errors, torch.ones_like(values), [range(400)])
    for estimate, low, high in ((values, 0.0, 0.3), (better, 0.75, 1.1)):
        chosen = estimate.argsort()[:100]
        assert low <= (estimate[chosen].sum() / true[chosen].sum()).item() <= high


@pytest.mark.parametrize("order", [1, 2, 3])
def test_levels_are_shrunk_by_the_standard_error_over_images(relu_network, images, labels, order, monkeypatch):
    monkeypatch.setattr(taylor, "BLOCK", 50)  # a few images at once
    batches = [(images, labels)]
    pruner = EnhancedFilterPruner(relu_network, images, order, progress=False).rank(batches, batches)
    found = pruner.collected.of_order(order)
    of_samples = loss_change(order, *found.moments(order=order)).double()
    if order == 1:
        of_samples = of_samples.square() / 2
    errors = of_samples.std(0) / math.sqrt(len(images))
    assert torch.allclose(pruner.collected.levels(order).double(), of_samples.mean(0))
    assert torch.allclose(pruner.collected.level_errors(order), errors)
    found = pruner.behind_repair
    closed_form = removal_costs(pruner.model, found.moments, found.fisher, len(pruner.graph.units)).marginal
    expected = shrunk(of_samples.mean(0), errors, closed_form, by_layers(pruner.graph.units).values())
    assert torch.allclose(pruner.levels().double(), expected)
    assert not torch.allclose(expected, of_samples.mean(0))


def test_levels_are_computed_once_for_every_order(plain_network, images, labels, monkeypatch):
    batches, passes = [(images, labels)], []
    pruner = EnhancedFilterPruner(plain_network, images, progress=False).rank(batches, batches)
    of_samples = taylor.Directions.loss_changes
    monkeypatch.setattr(taylor.Directions, "loss_changes", lambda *args: passes.append(args) or of_samples(*args))
    pruner.get_pruning_plan(30)
    pruner.get_pruning_plan(50)
    assert len(passes) == 1
