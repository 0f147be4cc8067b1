"""Published criteria against their formulas."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune, weight_norm

from taylor_pruning.errors import InputError
from taylor_pruning.selection.baselines import BASELINES, OF_GRADIENTS, OF_WEIGHTS, baseline_scores
from taylor_pruning.surgery.graph import ChannelGraph
from taylor_pruning.surgery.parts import PartsGraph


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


class Raw(nn.Module):
    """A conv layer that is no module: its weight is a parameter of another name."""

    def __init__(self, conv):
        super().__init__()
        self.w, self.b, self.padding = conv.weight, conv.bias, conv.padding

    def forward(self, x):
        return F.conv2d(x, self.w, self.b, padding=self.padding)


class Turned(Raw):
    """A conv layer whose weight is kept as [kernel, kernel, inputs, filters]."""

    def __init__(self, conv):
        super().__init__(conv)
        self.w = nn.Parameter(conv.weight.detach().permute(2, 3, 1, 0).contiguous())

    def forward(self, x):
        return F.conv2d(x, self.w.permute(3, 2, 0, 1), self.b, padding=self.padding)


class TwoProducts(Raw):
    """Two matrices in one product: neither alone is the weight of the filters."""

    def __init__(self, conv):
        super().__init__(conv)
        self.v = nn.Parameter(torch.randn(6, 6, dtype=torch.float64))

    def forward(self, x):
        return torch.einsum("bchw,ec,de->bdhw", x, self.w[:, :, 1, 1], self.v)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", sorted(OF_WEIGHTS))
@pytest.mark.parametrize("change", [Raw, Turned, weight_norm, parametrizations.weight_norm,
                                    lambda conv: prune.l1_unstructured(conv, "weight", 0.0)],
                         ids=["parameter", "turned", "weight_norm", "parametrised", "masked"])  # fmt: skip
def test_weights_are_those_that_the_network_computes_with(plain_network, graph, images, name, change):
    """However a layer keeps its weight, its filters score the same. (Weight norm protects those of the layer before.)"""
    wanted = baseline_scores(name, graph)[5:]
    plain_network[4] = change(plain_network[4])
    torch.testing.assert_close(baseline_scores(name, ChannelGraph(plain_network, images))[-6:], wanted)


def test_filters_that_have_no_weight_of_their_own_are_refused_with_what_to_take(plain_network, images):
    plain_network[4] = TwoProducts(plain_network[4])
    graph = ChannelGraph(plain_network, images, prune_linear=True)
    with pytest.raises(InputError, match=r"a weight of 4\.w .*molchanov2019, or exclude 4\.w"):
        baseline_scores("magnitude", graph)


@pytest.mark.parametrize("name", sorted(OF_WEIGHTS))
def test_parts_of_a_network_are_scored_as_the_network(plain_network, images, name):
    wanted = baseline_scores(name, ChannelGraph(plain_network, images))
    whole = nn.Sequential(plain_network)
    parts = PartsGraph(whole, ["0"], lambda network: network(images), len(images))
    torch.testing.assert_close(baseline_scores(name, parts), wanted)


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
