"""Repair across layers: closer to the dense network on images that took no part, and never further away."""

import copy
import functools

import pytest
import torch
from conftest import NETWORKS, plain, randomise
from torch import nn

from taylor_pruning.errors import InputError
from taylor_pruning.repair import network
from taylor_pruning.repair.compensation import compensate
from taylor_pruning.repair.network import repair_network, split
from taylor_pruning.surgery.graph import ChannelGraph
from taylor_pruning.tasks.classification import Classification, kl_divergence

LOSSES = functools.partial(kl_divergence, temperature=4.0)


def images(number, seed=1):
    x = torch.randn(number, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    return [(part, torch.zeros(len(part), dtype=torch.long)) for part in x.split(30)]


def case(name, seed, number):
    """(dense network, its images in batches, function that fits a pruned network to some batches)"""
    torch.manual_seed(seed)
    dense = randomise(NETWORKS[name]()).float()
    list(dense.modules())[-1].weight.data.mul_(20)  # answers that differ between images
    batches = images(number, seed + 1)
    graph = ChannelGraph(dense, batches[0][0][:1])
    plan = graph.plan_of([0, 1, 6])
    kept = {
        name: [i for i in range(layer.filters) if i not in plan.get(name, ())] for name, layer in graph.layers.items()
    }

    def fitted(some):
        smaller = graph.remove(plan)
        compensate(dense, smaller, some, kept, progress=False)
        return smaller

    return dense, batches, fitted


@pytest.fixture(params=NETWORKS, scope="module")
def fitted_once(request):
    dense, batches, fitted = case(request.param, 2, 400)
    return dense, fitted(batches), batches


@pytest.fixture
def compensated(fitted_once):
    """(dense, compensated network, the images of its fit)"""
    dense, smaller, batches = fitted_once
    return dense, copy.deepcopy(smaller), batches


def loss_on(dense, smaller, x):
    with torch.no_grad():
        return LOSSES(smaller(x), dense(x)).mean().item()


def test_the_network_answers_more_like_the_dense_one_on_new_images(compensated):
    dense, smaller, batches = compensated
    x = torch.randn(200, 3, 8, 8, generator=torch.Generator().manual_seed(5))
    before, state = loss_on(dense, smaller, x), copy.deepcopy(dense.state_dict())
    report = repair_network(dense, smaller, *split(batches, 2), LOSSES, progress=False)
    assert loss_on(dense, smaller, x) < 0.99 * before  # the layers were fitted already
    assert report.loss_after < report.loss_before and 0 < report.steps <= report.of_steps
    assert all(torch.equal(tensor, state[name]) for name, tensor in dense.state_dict().items())
    assert not smaller.training and all(p.requires_grad and p.grad is None for p in smaller.parameters())


def test_the_weights_stay_where_no_step_lowers_the_loss_on_the_held_out_images(compensated):
    dense, smaller, batches = compensated
    before = copy.deepcopy(smaller.state_dict())
    report = repair_network(dense, smaller, *split(batches, 2), LOSSES, rate=10.0, progress=False)
    assert report.steps == 0 and report.loss_after == report.loss_before
    assert all(torch.equal(tensor, before[name]) for name, tensor in smaller.state_dict().items())


@pytest.mark.parametrize(("name", "seed"), [("plain", 0), ("residual", 1)])
def test_fifty_images_do_no_harm(name, seed):
    """Ten images judge, and find a gain by chance: the network is no worse than the fit to all fifty."""
    dense, batches, fitted = case(name, seed, 50)
    some, judging = split(batches, seed)
    smaller = fitted(some)
    report = repair_network(dense, smaller, some, judging, LOSSES, passes=40, progress=False)
    chosen = smaller if report.steps else fitted(batches)  # as experiment.rounds.Rounds.repaired chooses
    x = torch.randn(3000, 3, 8, 8, generator=torch.Generator().manual_seed(500))
    assert loss_on(dense, chosen, x) <= 1.01 * loss_on(dense, fitted(batches), x)


def test_a_gain_on_a_single_image_counts_for_nothing():
    dense, batches, fitted = case("residual", 0, 9)
    some, judging = split(batches, 0)
    smaller = fitted(some)
    before = copy.deepcopy(smaller.state_dict())
    report = repair_network(dense, smaller, some, judging, LOSSES, passes=40, progress=False)
    assert report.held_out == 1 and report.steps == 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in smaller.state_dict().items())


def test_a_fifth_of_the_images_judges_and_no_image_does_both():
    batches = [(torch.arange(7.0), torch.arange(7)), (torch.arange(7.0, 23.0), torch.arange(7, 23))]
    fitted, judging = ([torch.cat(parts) for parts in zip(*part, strict=True)] for part in split(batches, 3))
    assert len(judging[0]) == 4 and sorted([*fitted[0].tolist(), *judging[0].tolist()]) == list(range(23))
    assert all(torch.equal(images, labels.float()) for images, labels in (fitted, judging))
    assert not torch.equal(judging[0], torch.cat([images for images, _ in split(batches, 4)[1]]))


def test_training_starts_at_the_repaired_network(compensated):
    """In training mode, which normalises by the batch, the network gives what it gives in evaluation."""
    dense, smaller, batches = compensated
    fitted, judging = split(batches, 2)
    assert repair_network(dense, smaller, fitted, judging, LOSSES, progress=False).steps
    x = torch.cat([x for x, _ in fitted])
    with torch.no_grad():
        torch.testing.assert_close(copy.deepcopy(smaller).train()(x), smaller(x), rtol=1e-3, atol=1e-3)


def test_a_network_without_batchnorm_and_with_frozen_weights_is_repaired():
    torch.manual_seed(0)
    dense = randomise(nn.Sequential(*(m for m in plain() if not isinstance(m, nn.BatchNorm2d))))
    smaller = copy.deepcopy(dense).requires_grad_(False)
    smaller[0].weight.mul_(0.7)
    batches = [(torch.randn(60, 3, 8, 8, dtype=torch.float64), torch.zeros(60))]
    before = loss_on(dense, smaller, batches[0][0])
    repair_network(dense, smaller, *split(batches, 0), LOSSES, passes=40, progress=False)
    assert loss_on(dense, smaller, batches[0][0]) < 0.5 * before
    assert not any(p.requires_grad for p in smaller.parameters())


def test_the_cost_is_bounded_by_passes_over_the_images(compensated):
    dense, smaller, batches = compensated
    trained = []

    def losses(outputs, wanted):
        trained.append(len(outputs) * outputs.requires_grad)
        return LOSSES(outputs, wanted)

    report = repair_network(dense, smaller, *split(batches, 0), losses, passes=2, progress=False)
    assert report.images == 320 and report.of_steps == 80 and sum(trained) == 2 * 320


NANS = [(torch.full((4, 3, 8, 8), torch.nan), torch.zeros(4))]


@pytest.mark.parametrize(
    ("batches", "message"), [([], "at least two"), (images(1), "at least two"), (NANS, "NaN or Inf")]
)
def test_images_that_cannot_repair_are_refused(batches, message):
    dense = randomise(plain()).float()
    with pytest.raises(InputError, match=message):
        repair_network(dense, copy.deepcopy(dense), *split(batches, 0), LOSSES, progress=False)


def test_no_held_out_sample_judges_in_two_processes(compensated, monkeypatch):
    """Copies of a sample would make chance look sure."""
    dense, smaller, batches = compensated
    fitted, held_out = split(batches, 2)
    fitted = fitted[:1]  # they do not judge
    whole = network._Samples(dense, Classification(), fitted, held_out, 0).judge(smaller, LOSSES)
    shares = []
    monkeypatch.setattr(network, "gather_objects", lambda share: [share])
    monkeypatch.setattr(network, "world_size", lambda: 20)
    for number in range(20):
        monkeypatch.setattr(network, "rank", lambda number=number: number)
        shares.append(network._Samples(dense, Classification(), fitted, held_out, 0).judge(smaller, LOSSES))
    assert min(map(len, shares)) == 0  # fewer batches than processes
    assert torch.equal(torch.cat(shares).sort()[0], whole.sort()[0])


def test_what_is_wanted_of_mirrored_images_is_the_answer_to_them(compensated):
    dense, _, batches = compensated
    samples = network._Samples(dense, Classification(), batches[:2], batches[2:3], 0)
    for _ in range(4):
        batch, wanted = samples.draw()
        with torch.no_grad():
            torch.testing.assert_close(dense(batch[0]), wanted)
    drawn = torch.cat([samples.draw()[0][0] for _ in range(20)])
    known = torch.cat([x for x, _ in batches[:2]])
    share = torch.tensor([any(torch.equal(x, y) for y in known) for x in drawn]).double().mean()
    assert 0.3 < share < 0.7  # the others are mirrored


def test_rates_rise_within_a_tenth_of_the_steps_and_fall_to_nothing():
    rates = [network._rate_factor(step, 100) for step in range(1, 101)]
    assert rates.index(max(rates)) == 9 and rates[0] == pytest.approx(0.1) and rates[-1] < 1e-3
    assert rates[50] == pytest.approx(0.5)
