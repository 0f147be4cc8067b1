"""Random directions against the Fisher matrix of the predictions."""

import torch

from taylor_pruning.tasks.directions import SIGNS_AT_ONCE, random_directions, random_signs


def test_the_second_moment_of_the_directions_is_the_fisher_matrix_of_the_predictions():
    logits = 2 * torch.randn(5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    every = 2 * torch.cartesian_prod(*[torch.arange(2)] * 5) - 1  # all 32 combinations of signs
    w = random_directions(logits.expand(32, -1), every)
    p = logits.softmax(0)
    torch.testing.assert_close(w.mT @ w / 32, p.diag() - p.outer(p))


def test_signs_depend_on_the_seed_and_the_image_and_not_on_the_split():
    whole = random_signs(1, 0, 2 * SIGNS_AT_ONCE, 50)
    assert whole.abs().eq(1).all() and abs(whole.double().mean()) < 0.05
    assert not torch.equal(whole, random_signs(0, 0, 2 * SIGNS_AT_ONCE, 50))
    assert not torch.equal(whole[:SIGNS_AT_ONCE], whole[SIGNS_AT_ONCE:])
    for first, samples in ((0, 4), (SIGNS_AT_ONCE - 2, 4), (SIGNS_AT_ONCE, 1)):
        assert torch.equal(random_signs(1, first, samples, 50), whole[first : first + samples])
