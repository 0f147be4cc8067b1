"""Random directions against the Fisher matrix of the predictions."""

import pytest
import torch

from taylor_pruning.tasks.directions import SAMPLES_AT_ONCE, SKEW, random_directions, random_signs, skewed_numbers


def test_the_second_moment_of_the_directions_is_the_fisher_matrix_of_the_predictions():
    logits = 2 * torch.randn(5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    every = 2 * torch.cartesian_prod(*[torch.arange(2)] * 5) - 1  # all 32 combinations of signs
    w = random_directions(logits.expand(32, -1), every)
    p = logits.softmax(0)
    torch.testing.assert_close(w.mT @ w / 32, p.diag() - p.outer(p))


@pytest.mark.parametrize("drawn", [random_signs, skewed_numbers])
def test_numbers_depend_on_the_seed_and_the_sample_and_not_on_the_split(drawn):
    whole = drawn(1, 0, 2 * SAMPLES_AT_ONCE, 50)
    assert not torch.equal(whole, drawn(0, 0, 2 * SAMPLES_AT_ONCE, 50))
    assert not torch.equal(whole[:SAMPLES_AT_ONCE], whole[SAMPLES_AT_ONCE:])
    for first, samples in ((0, 4), (SAMPLES_AT_ONCE - 2, 4), (SAMPLES_AT_ONCE, 1)):
        assert torch.equal(drawn(1, first, samples, 50), whole[first : first + samples])


@pytest.mark.parametrize(("drawn", "third"), [(random_signs, 0), (skewed_numbers, SKEW)])
def test_numbers_have_the_moments_of_their_law(drawn, third):
    """Mean 0, variance 1, and the third moment by which probes of third derivatives are divided (n = 100,000)."""
    z = drawn(0, 0, 1000, 100).double()
    for power, wanted in ((1, 0), (2, 1), (3, third)):
        assert (z**power).mean().item() == pytest.approx(wanted, abs=0.03)
