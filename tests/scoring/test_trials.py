"""Trials of cuts against really removing the units and refitting the layers behind by least squares, in float64."""

import copy

import pytest
import torch
from test_layer_costs import inputs_of, many, network, no_ridge, pooled  # noqa: F401
from torch import nn
from torch.nn import functional as F

from taylor_pruning.errors import InputError
from taylor_pruning.scoring import trials as trials_module
from taylor_pruning.scoring.estimates import input_moments
from taylor_pruning.scoring.trials import trial_divergences
from taylor_pruning.surgery.graph import ChannelGraph
from taylor_pruning.surgery.units import by_layers
from taylor_pruning.tasks.classification import Classification, MultiLabel, bernoulli_divergence


@pytest.fixture
def held_out():
    return torch.randn(9, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(6))


def trials(model, graph, fitted, held_out, sets, task=None):
    moments = input_moments(model, graph, [(fitted, None)])
    batches = [(part, torch.zeros(len(part), dtype=torch.long)) for part in held_out.split(4)]
    return trial_divergences(model, graph, moments, batches, task or Classification(), sets, progress=False)


def cuts(graph):
    """Two units of every group of coupled layers."""
    return [units[1:3] for units in by_layers(graph.units).values()]


def explained(rows, gone):
    """(weights [channels that stay, gone], intercept [gone]) of least squares on rows [n, channels]."""
    others = torch.cat([rows[:, ~gone], torch.ones(len(rows), 1, dtype=rows.dtype)], 1)
    solution = torch.linalg.lstsq(others, rows[:, gone]).solution
    return solution[:-1], solution[-1]


def divergence(dense, outputs):
    return F.kl_div(outputs.log_softmax(1), dense.log_softmax(1), reduction="batchmean", log_target=True).item()


@pytest.mark.usefixtures("no_ridge")
def test_a_trial_replaces_the_removed_channels_by_least_squares_in_every_layer_that_reads_them(
    network,  # noqa: F811
    many,  # noqa: F811
    held_out,
):
    graph = ChannelGraph(network, many)
    sets = cuts(graph)
    found = trials(network, graph, many, held_out, sets)
    with torch.no_grad():
        dense = network(held_out)
        inputs = {reader.layer: reader.to_rows(inputs_of(network, reader.layer, many)) for reader in graph.readers}
        for units, value in zip(sets, found, strict=True):
            handles = []
            for reader in graph.readers:
                gone = torch.isin(reader.units[:: reader.positions].view(reader.groups, -1)[0], torch.tensor(units))
                if not gone.any():
                    continue
                rows_of = inputs[reader.layer].unbind(1)
                fits = [explained(rows.movedim(1, 2).flatten(0, 1), gone) for rows in rows_of]

                def replace(module, inputs, reader=reader, gone=gone, fits=fits):
                    rows = reader.to_rows(inputs[0]).clone()
                    for group, (weights, intercept) in enumerate(fits):
                        rows[:, group, gone] = weights.T @ rows[:, group, ~gone] + intercept[:, None]
                    return (reader.from_rows(rows, inputs[0].shape),)

                handles.append(network.get_submodule(reader.layer).register_forward_pre_hook(replace))
            expected = divergence(dense, network(held_out))
            for handle in handles:
                handle.remove()
            assert value == pytest.approx(expected, rel=1e-6, abs=0) and value > 1e-9
        assert torch.equal(network(held_out), dense)


@pytest.mark.usefixtures("no_ridge")
@pytest.mark.parametrize("hidden", [False, True])
def test_a_trial_is_the_cut_network_with_refitted_layers(hidden, many, held_out):  # noqa: F811
    torch.manual_seed(0)
    head = (nn.Flatten(), nn.Linear(5 * 16, 4)) if hidden else (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 4))
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 5, 3), nn.ReLU(), *head).double().eval()
    graph = ChannelGraph(model, many)
    sets = cuts(graph)
    assert len(sets) == 2
    for units, value in zip(sets, trials(model, graph, many, held_out, sets), strict=True):
        smaller = graph.remove(graph.plan_of(units))
        (reader,) = (r for r in graph.readers if len(r.channels_of(units)))
        gone = torch.isin(reader.units[:: reader.positions], torch.tensor(units))
        rows = reader.to_rows(inputs_of(model, reader.layer, many))[:, 0].movedim(1, 2).flatten(0, 1)
        weights, intercept = explained(rows, gone)
        dense, cut = model.get_submodule(reader.layer), smaller.get_submodule(reader.layer)
        with torch.no_grad():
            kernel = dense.weight.reshape(len(dense.weight), len(gone), -1)
            refitted = kernel[:, ~gone] + torch.einsum("ogk,rg->ork", kernel[:, gone], weights)
            cut.weight.copy_(refitted.reshape(cut.weight.shape))
            cut.bias.copy_(dense.bias + torch.einsum("ogk,g->o", kernel[:, gone], intercept))
            expected = divergence(model(held_out), smaller(held_out))
        assert value == pytest.approx(expected, rel=1e-6, abs=0) and value > 1e-9


def test_batches_and_parts_of_them_do_not_matter_and_the_model_comes_back(network, many, held_out):  # noqa: F811
    before = copy.deepcopy(network.state_dict())
    network.train()
    graph = ChannelGraph(network, many)
    moments = input_moments(network, graph, [(many, None)])
    found = []
    for size in (1, 4, 9):
        batches = [(part, torch.zeros(len(part), dtype=torch.long)) for part in held_out.split(size)]
        found.append(trial_divergences(network, graph, moments, batches, Classification(), cuts(graph), progress=False))
    assert found[0] == pytest.approx(found[1]) and found[0] == pytest.approx(found[2])
    assert network.training and all(torch.equal(before[k], v) for k, v in network.state_dict().items())


def test_of_many_images_some_at_equal_distances_are_taken(many, held_out, monkeypatch):  # noqa: F811
    torch.manual_seed(0)
    model = pooled(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 5, 3), nn.ReLU(), width=5).double().eval()
    graph = ChannelGraph(model, many)
    some = [trials(model, graph, many, part, cuts(graph)) for part in (held_out, held_out[::3])]
    monkeypatch.setattr(trials_module, "LEAST", 3)
    for forwards, expected in ((18, some[0]), (100, some[0]), (6, some[1]), (1, some[1])):
        monkeypatch.setattr(trials_module, "FORWARDS", forwards)
        assert trials(model, graph, many, held_out, cuts(graph)) == pytest.approx(expected)
    assert some[0] != pytest.approx(some[1])


def test_the_divergence_is_the_tasks(many, held_out):  # noqa: F811
    torch.manual_seed(0)
    model = pooled(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 5, 3), nn.ReLU(), width=5).double().eval()
    graph = ChannelGraph(model, many)
    units, task = cuts(graph)[1], MultiLabel()
    moments = input_moments(model, graph, [(many, None)], task=task)
    batches = [(held_out, torch.zeros(len(held_out), 4))]
    (value,) = trial_divergences(model, graph, moments, batches, task, [units], progress=False)
    precision, mean, _ = moments["6"].precision()
    with torch.no_grad():
        x = inputs_of(model, "6", held_out)
        gone = torch.isin(torch.arange(5), torch.tensor(units) - 6)
        p, centred = precision[0], x - mean[0, :, 0]
        x[:, gone] = mean[0, gone, 0] - centred[:, ~gone] @ torch.linalg.solve(p[gone][:, gone], p[gone][:, ~gone]).T
        expected = bernoulli_divergence(model[6](x), model(held_out)).sum(1).mean().item()
    assert value == pytest.approx(expected, rel=1e-9)


def test_held_out_images_with_nan_are_refused(many, held_out):  # noqa: F811
    torch.manual_seed(0)
    model = pooled(nn.Conv2d(3, 6, 3), nn.ReLU(), width=6).double().eval()
    graph = ChannelGraph(model, many)
    held_out[5] = torch.nan
    with pytest.raises(InputError, match="held-out batch 1"):
        trials(model, graph, many, held_out, cuts(graph))
