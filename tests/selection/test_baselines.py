"""Published criteria against their formulas."""

import pytest
import torch
from torch.nn import functional as F

from taylor_pruning.errors import InputError
from taylor_pruning.selection.baselines import BASELINES, OF_GRADIENTS, OF_WEIGHTS, baseline_scores


@pytest.mark.parametrize("name", sorted(BASELINES))
def test_baselines_score_every_unit(plain_network, graph, directions, name):
    scores = baseline_scores(name, graph, directions)
    assert scores.shape == (len(graph.units),) and scores.isfinite().all() and (scores >= 0).all()


def test_random_scores_follow_from_the_seed(graph):
    one, again, other = (baseline_scores("random", graph, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one, again) and not torch.equal(one, other)


@pytest.mark.parametrize("name, message", [("taylor", "unknown baseline taylor; choose from")]
                         + [(name, f"{name} needs class logits") for name in OF_GRADIENTS])  # fmt: skip
def test_what_cannot_be_scored_is_refused(graph, name, message):
    with pytest.raises(InputError, match=message):
        baseline_scores(name, graph)


def test_molchanov_2017_is_the_normalised_mean_of_absolute_means(plain_network, graph, directions, images, labels):
    """By the paper's own words: activation and gradient, mean over space, absolute value, mean over samples, l2 norm."""
    kept = []
    handle = plain_network[1].register_forward_hook(lambda module, x, y: (y.retain_grad(), kept.append(y))[1])
    loss = F.cross_entropy(plain_network(images), labels, reduction="sum")
    handle.remove()
    loss.backward()
    theta = (kept[0] * kept[0].grad).mean((2, 3)).abs().mean(0).detach()
    torch.testing.assert_close(baseline_scores("molchanov2017", graph, directions)[:5], theta / theta.norm())


def test_magnitude_is_the_norm_over_the_layers_mean(plain_network, graph):
    norms = plain_network[4].weight.detach().flatten(1).norm(dim=1)
    torch.testing.assert_close(baseline_scores("magnitude", graph)[5:], norms / norms.mean())


def test_lamp_is_the_share_of_the_filters_that_are_as_large_or_larger(plain_network, graph):
    squares = plain_network[4].weight.detach().flatten(1).square().sum(1)
    wanted = torch.stack([s / squares[squares >= s].sum() for s in squares])
    torch.testing.assert_close(baseline_scores("lamp", graph)[5:], wanted)


@pytest.mark.parametrize("name", sorted(OF_WEIGHTS))
def test_a_unit_has_the_sum_over_its_filters(resnet, name):
    """So that a stream's channels, which end in many layers and save as much, do not look cheap."""
    model, graph = resnet
    scores = baseline_scores(name, graph)
    stream = next(unit for unit in graph.units if len(unit.filters) > 2)
    weights = [model.get_submodule(layer).weight.detach().double().flatten(1) for layer, _ in stream.filters]
    if name == "magnitude":
        parts = [(w.norm(dim=1) / w.norm(dim=1).mean())[i] for w, (_, i) in zip(weights, stream.filters, strict=True)]
        assert scores[stream.index] == pytest.approx(sum(parts).item())
    sizes = torch.tensor([len(unit.filters) for unit in graph.units])
    per_filter = scores / sizes
    many, one = per_filter[sizes == len(stream.filters)].mean(), per_filter[sizes == 1].mean()
    assert 1 / 3 < many / one < 3


def test_fpgm_is_the_distance_to_the_other_filters(plain_network, graph):
    weights = plain_network[4].weight.detach().flatten(1)
    wanted = torch.stack([sum((w - other).norm() for other in weights) for w in weights])
    torch.testing.assert_close(baseline_scores("fpgm", graph)[5:], wanted / wanted.mean())
