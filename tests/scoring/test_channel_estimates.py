import copy

import pytest
import torch
import torch.nn.functional as F
from test_surgery import BLOCKS, net
from test_surgery import images as noise
from torch import nn

from EnhancedFilterPruner import EnhancedFilterPruner
from taylor_pruning.errors import InputError
from taylor_pruning.repair.compensation import compensate
from taylor_pruning.scoring.collecting import Wanted, collect_directions
from taylor_pruning.scoring.estimates import channel_estimates, input_moments
from taylor_pruning.scoring.folds import by_fold
from taylor_pruning.scoring.oracle import spearman
from taylor_pruning.surgery.graph import ChannelGraph


def readers_inputs(model, name, images):
    seen = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        model(images)
    handle.remove()
    return seen[0]


def settled(*layers):
    torch.manual_seed(0)
    return nn.Sequential(*layers).double().eval()


def test_estimates_are_least_squares_on_the_other_channels(plain_network, images, labels, monkeypatch):
    monkeypatch.setattr(
        "taylor_pruning.scoring.estimates.RIDGE", -5 / (12 * 16) + 1e-12
    )  # no ridge for layer 4: 5 channels, 192 rows
    graph = ChannelGraph(plain_network, images)
    estimate = channel_estimates(input_moments(plain_network, graph, [(images[:5], labels), (images[5:], labels)]))["4"]
    x = readers_inputs(plain_network, "4", images)
    rows = x.movedim(1, -1).reshape(-1, 5)
    for u in range(5):
        others = torch.cat([rows[:, torch.arange(5) != u], torch.ones(len(rows), 1, dtype=x.dtype)], 1)
        expected = others @ torch.linalg.lstsq(others, rows[:, u]).solution
        assert torch.allclose(estimate(x)[:, u].flatten(), expected, atol=1e-8)


@pytest.mark.parametrize(
    "layers",
    [
        [nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3)],
        [nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3, groups=2)],
        [nn.Conv2d(3, 6, 3), nn.Flatten(), nn.Linear(6 * 36, 4)],
        [nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3, groups=6), nn.Conv2d(6, 4, 1)],
    ],
    ids=["conv", "grouped", "flattened", "behind a depthwise conv"],
)
def test_a_closed_channel_is_replaced_by_its_estimate(layers, images, labels):
    """And the estimate does not look at the channel itself."""
    model = settled(*layers)
    graph = ChannelGraph(model, images)
    name = str(len(layers) - 1)
    estimates = channel_estimates(input_moments(model, graph, [(images, labels)]))
    x = readers_inputs(model, name, images)
    (reader,) = (r for r in graph.readers if r.layer == name)
    gone = reader.units == 1
    dim = -1 if reader.is_linear else 1
    mask = gone.view(-1 if dim == 1 else 1, *(1,) * (x.dim() - 2), *(() if dim == 1 else (len(gone),))).expand_as(x)
    with torch.no_grad():
        expected = model[-1](torch.where(mask, estimates[name](torch.where(mask, 7.0, x)), x))
        gates = torch.ones(len(graph.units), dtype=torch.float64)
        gates[1] = 0
        with graph.gated(gates, estimates=estimates):
            assert torch.allclose(model(images), expected, atol=1e-9)
        with graph.gated(torch.ones_like(gates), estimates=estimates):
            assert torch.allclose(model(images), model(images))
    assert gone.sum() == (36 if reader.is_linear else 2 if reader.groups == 2 else 1)


@pytest.mark.parametrize("scale", [2.0**-40, 2.0**40])
def test_the_size_of_activations_changes_no_estimate(plain_network, images, labels, scale):
    """Not in single precision either, where a channel's size is of no account to the layer that reads it."""
    model, x = plain_network.float(), images.float()
    graph, found = ChannelGraph(model, x), []
    for factor in (1.0, scale):
        with torch.no_grad():
            model[1].weight *= factor
            model[1].bias *= factor
        estimate = channel_estimates(input_moments(model, graph, [(x, labels)]))["4"]
        found.append((estimate.matrix, estimate.offset / factor))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


def test_channels_that_never_vary_have_finite_estimates(plain_network, images, labels):
    for model, x in ((plain_network, images), (copy.deepcopy(plain_network).float(), images.float())):
        with torch.no_grad():
            model[1].weight.zero_()
        graph = ChannelGraph(model, x)
        moments = input_moments(model, graph, [(x, labels)])
        assert torch.isfinite(moments["4"].precision(dtype=torch.float64).matrix).all()
        for estimate in channel_estimates(moments).values():
            assert torch.isfinite(estimate.matrix).all() and torch.isfinite(estimate.offset).all()


@pytest.mark.parametrize("kind", BLOCKS, ids=lambda kind: kind.__name__)
def test_estimates_in_networks_of_all_kinds(kind):
    """They are finite, do nothing while gates are open, and are all that is added where gates close."""
    model, x = net(kind), noise()
    graph = ChannelGraph(model, x)
    estimates = channel_estimates(input_moments(model, graph, [(x, None)]))
    assert "classifier" in estimates
    gates = torch.ones(len(graph.units), dtype=x.dtype)
    with torch.no_grad():
        dense = model(x)
        with graph.gated(gates, estimates=estimates):
            torch.testing.assert_close(model(x), dense, rtol=1e-12, atol=1e-12)
        gates[::2] = 0
        with graph.gated(gates, estimates=estimates):
            assert torch.isfinite(model(x)).all()
        with graph.gated(gates):
            removed = model(x)
        for estimate in estimates.values():
            estimate.matrix, estimate.offset = estimate.matrix * 0, estimate.offset * 0
        with graph.gated(gates, estimates=estimates):
            assert torch.equal(model(x), removed)


def test_directions_are_derivatives_of_the_replacement(relu_network, images, labels):
    graph = ChannelGraph(relu_network, images)
    estimates = channel_estimates(input_moments(relu_network, graph, [(images, labels)]))
    directions = collect_directions(
        relu_network, graph, [(images, labels)], Wanted(12), progress=False, estimates=estimates
    )
    step = 1e-6
    for unit in range(len(graph.units)):
        logits = []
        for sign in (1, -1):
            gates = torch.ones(len(graph.units), dtype=torch.float64)
            gates[unit] += sign * step
            with torch.no_grad(), graph.gated(gates, estimates=estimates):
                logits.append(relu_network(images))
        slope = (logits[0] - logits[1]) / (2 * step)
        ours = torch.einsum("nkr,nr->nk", directions.basis, directions.coordinates[:, unit])
        assert torch.allclose(ours, slope - slope.mean(1, keepdim=True), atol=1e-6)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_a_channel_that_others_make_up_for_goes_first(images, labels, order):
    """Channel 4 is the sum of 0 and 1: any of the three can be spared, and by themselves all matter more than 3."""
    model = settled(nn.Conv2d(3, 5, 3), nn.Conv2d(5, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with torch.no_grad():
        model[0].weight[4] = model[0].weight[0] + model[0].weight[1]
        model[1].weight[:, 3] *= 0.5
        model[1].weight[:, [0, 1, 4]] *= 2
    batches = [(images, labels)]
    pruner = EnhancedFilterPruner(model, images, order, selection="independent", exclude=["1"], progress=False)
    (filter_index,) = pruner.rank(batches, batches).get_pruning_plan(20)["0"]
    assert filter_index in (0, 1, 4)
    if order == 1:
        assert pruner.rank(batches).get_pruning_plan(20)["0"] == [3]


class Swish(nn.Module):
    def forward(self, x):
        return x * x.sigmoid()


@pytest.mark.parametrize("function", [nn.ReLU, nn.SiLU, nn.GELU, nn.Tanh, Swish])
def test_a_channel_that_is_there_twice_costs_nothing(images, labels, function):
    """Also behind a smooth function: what is replaced is its result, as the layer behind reads it."""
    model = settled(nn.Conv2d(3, 5, 3, bias=False), nn.BatchNorm2d(5), function(), nn.Conv2d(5, 4, 3),
                    nn.AdaptiveAvgPool2d(1), nn.Flatten())  # fmt: skip
    with torch.no_grad():
        for tensor in (*model[0].parameters(), *model[1].state_dict().values()):
            if tensor.dim():
                tensor[4] = tensor[0]
    batches = [(images, labels)]
    scores = EnhancedFilterPruner(model, images, progress=False).rank(batches, batches).scores()
    assert scores[[0, 4]].max() < 1e-2 * scores[1:4].median()


@pytest.fixture(scope="module")
def trained():
    """A small network that has learned to tell four noisy patterns apart, and its images."""
    generator = torch.Generator().manual_seed(3)
    patterns = torch.randn(4, 3, 8, 8, generator=generator)
    labels = torch.arange(200) % 4
    images = patterns[labels] + 1.5 * torch.randn(200, 3, 8, 8, generator=generator)
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 10, 3),
        nn.ReLU(),
        nn.Conv2d(10, 10, 3),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(10, 4),
    )
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
    return model.double().eval(), images.double(), labels


def test_scores_follow_the_true_change_after_compensation(trained):
    """The divergence from the dense network that is left when a filter is really removed and the layers are refitted."""
    model, images, labels = trained
    batches = [(images, labels)]
    pruner = EnhancedFilterPruner(model, images, 3, progress=False)
    plain = pruner.rank(batches).scores()
    repaired = pruner.rank(batches, batches)
    true = []
    for unit in pruner.graph.units:
        smaller = copy.deepcopy(pruner.graph.remove([unit]))
        ((name, index),) = unit.filters
        kept = {name: [i for i in range(pruner.graph.layers[name].filters) if i != index]}
        compensate(model, smaller, batches, kept, progress=False)
        with torch.no_grad():
            true.append(F.kl_div(smaller(images).log_softmax(1), model(images).softmax(1), reduction="batchmean"))
    true = torch.stack(true)
    for order in (2, 3):
        assert spearman(repaired.scores(order), true) > 0.8
    assert spearman(plain, true) < spearman(repaired.scores(3), true)


def test_own_targets_give_the_whole_second_derivative_of_a_smooth_network(silu_network, images, labels):
    graph = ChannelGraph(silu_network, images)
    moments = input_moments(silu_network, graph, [(images, labels)])
    folds = [(part, channel_estimates(moments, without=fold)) for fold, part in by_fold([(images, labels)])]
    pruner = EnhancedFilterPruner(silu_network, images, 2, graph=graph, class_probes=4, progress=False)
    scores = pruner.rank([(images, labels)], [(images, labels)]).scores()
    for unit in range(len(graph.units)):

        def loss(gate, unit=unit):
            gates = torch.ones(len(graph.units), dtype=torch.float64).index_put((torch.tensor(unit),), gate)
            total = 0.0
            for [(part, _)], estimates in folds:
                with torch.no_grad():
                    targets = silu_network(part).softmax(1)
                with graph.gated(gates, estimates=estimates):
                    total = total + F.cross_entropy(silu_network(part), targets, reduction="sum")
            return total / len(images)

        second = torch.autograd.functional.hessian(loss, torch.tensor(1.0, dtype=torch.float64))
        assert scores[unit] == pytest.approx(second.item() / 2, rel=1e-8)


def test_another_loss_has_no_scores_behind_compensation(plain_network, images, labels):
    def squares(logits, labels):
        return (logits - F.one_hot(labels, logits.shape[1])).square().sum(1)

    batches = [(images, labels)]
    pruner = EnhancedFilterPruner(plain_network, images, 2, loss=squares, selection="independent", progress=False)
    with pytest.raises(InputError, match="does not define divergence, which compensation needs"):
        pruner.rank(batches, batches)
    assert len(pruner.rank(batches).get_pruning_plan(30)) > 0
