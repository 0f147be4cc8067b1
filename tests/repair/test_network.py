"""Repair across layers: closer to the dense network on images that took no part, and never further away."""

import copy
import functools

import pytest
import torch
from conftest import NETWORKS, plain, randomise
from torch import nn

from taylor_pruning.errors import InputError
from taylor_pruning.repair import network as network_module
from taylor_pruning.repair.compensation import compensate
from taylor_pruning.repair.network import repair_network
from taylor_pruning.surgery.graph import ChannelGraph
from taylor_pruning.training.steps import distillation_loss

LOSS = functools.partial(distillation_loss, temperature=4.0)


def images(number):
    x = torch.randn(number, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    return [(part, torch.zeros(len(part), dtype=torch.long)) for part in x.split(30)]


@pytest.fixture(params=NETWORKS)
def compensated(request):
    """(dense, compensated network, the images of its fit)"""
    torch.manual_seed(0)
    dense = randomise(NETWORKS[request.param]()).float()
    list(dense.modules())[-1].weight.data.mul_(20)  # answers that differ between images
    batches = images(120)
    graph = ChannelGraph(dense, batches[0][0][:1])
    plan = graph.plan_of([0, 1, 6])
    smaller = graph.remove(plan)
    kept = {
        name: [i for i in range(layer.filters) if i not in plan.get(name, ())] for name, layer in graph.layers.items()
    }
    compensate(dense, smaller, batches, kept, progress=False)
    return dense, smaller, batches


def loss_on(dense, smaller, x):
    with torch.no_grad():
        return LOSS(smaller(x), dense(x)).item()


def test_the_network_answers_more_like_the_dense_one_on_new_images(compensated):
    dense, smaller, batches = compensated
    x = torch.randn(200, 3, 8, 8, generator=torch.Generator().manual_seed(5))
    before, state = loss_on(dense, smaller, x), copy.deepcopy(dense.state_dict())
    report = repair_network(dense, smaller, batches, LOSS, progress=False)
    assert loss_on(dense, smaller, x) < 0.99 * before  # the layers were fitted already
    assert report.loss_after < report.loss_before and 0 < report.steps <= report.of_steps
    assert all(torch.equal(tensor, state[name]) for name, tensor in dense.state_dict().items())
    assert not smaller.training and all(p.requires_grad and p.grad is None for p in smaller.parameters())


def test_the_weights_stay_where_no_step_lowers_the_loss_on_the_held_out_images(compensated, monkeypatch):
    dense, smaller, batches = compensated
    before = copy.deepcopy(smaller.state_dict())
    monkeypatch.setattr(network_module, "RATE", 10.0)
    report = repair_network(dense, smaller, batches, LOSS, progress=False)
    assert report.steps == 0 and report.loss_after == report.loss_before
    assert all(torch.equal(tensor, before[name]) for name, tensor in smaller.state_dict().items())


def test_held_out_images_take_no_part_in_the_steps(compensated, monkeypatch):
    """Their pixels may be anything: the weights after the last step are the same."""
    dense, smaller, batches = compensated
    x = torch.cat([x for x, _ in batches])
    held_out = torch.randperm(len(x), generator=torch.Generator().manual_seed(3))[: len(x) // 5]
    other = x.clone()
    other[held_out] = 0.1 * torch.randn(len(held_out), *x.shape[1:])
    judged = iter(range(1000, 0, -1))
    monkeypatch.setattr(network_module._Images, "judge", lambda *arguments: next(judged))  # the last weights are kept
    monkeypatch.setattr(network_module, "refresh_batchnorms", lambda *arguments: None)
    weights = []
    for given in (x, other):
        trained = copy.deepcopy(smaller)
        repair_network(dense, trained, [(given, None)], LOSS, steps=5, seed=3, progress=False)
        weights.append(trained.state_dict())
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
    assert any(not torch.equal(tensor, smaller.state_dict()[name]) for name, tensor in weights[0].items())


def test_training_starts_at_the_repaired_network(compensated):
    """In training mode, which normalises by the batch, the network gives what it gives in evaluation."""
    dense, smaller, batches = compensated
    repair_network(dense, smaller, batches, LOSS, progress=False)
    x = torch.cat([x for x, _ in batches])
    with torch.no_grad():
        torch.testing.assert_close(copy.deepcopy(smaller).train()(x), smaller(x), rtol=1e-3, atol=1e-3)


def test_a_network_without_batchnorm_and_with_frozen_weights_is_repaired():
    torch.manual_seed(0)
    dense = randomise(nn.Sequential(*(m for m in plain() if not isinstance(m, nn.BatchNorm2d))))
    smaller = copy.deepcopy(dense).requires_grad_(False)
    smaller[0].weight.mul_(0.7)
    batches = [(torch.randn(60, 3, 8, 8, dtype=torch.float64), None)]
    before = loss_on(dense, smaller, batches[0][0])
    repair_network(dense, smaller, batches, LOSS, progress=False)
    assert loss_on(dense, smaller, batches[0][0]) < 0.5 * before
    assert not any(p.requires_grad for p in smaller.parameters())


@pytest.mark.parametrize(("batches", "message"), [([], "at least two"), (images(1), "at least two"),
                                                  ([(torch.full((4, 3, 8, 8), torch.nan), None)], "NaN or Inf")])  # fmt: skip
def test_images_that_cannot_repair_are_refused(batches, message):
    dense = randomise(plain()).float()
    with pytest.raises(InputError, match=message):
        repair_network(dense, copy.deepcopy(dense), batches, LOSS, progress=False)
