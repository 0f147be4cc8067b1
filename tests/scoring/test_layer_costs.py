"""The closed form of a removal's cost against really refitting by least squares, in float64."""

import gc
import weakref

import pytest
import torch
from conftest import randomise
from torch import nn
from torch.nn import functional as F

from EnhancedFilterPruner import EnhancedFilterPruner
from taylor_pruning.scoring import estimates, layer_costs
from taylor_pruning.scoring.behind_repair import collect_behind_repair
from taylor_pruning.scoring.collecting import Wanted, collect_directions
from taylor_pruning.scoring.estimates import channel_estimates, input_moments
from taylor_pruning.scoring.folds import FOLDS, by_fold, fold_of
from taylor_pruning.scoring.layer_costs import OutputFisher, RemovalCosts, removal_costs
from taylor_pruning.surgery.graph import ChannelGraph


class Twice(nn.Module):
    """The second conv reads every channel of the first one twice."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 6, 3), nn.Conv2d(12, 5, 3), nn.Linear(5, 4)

    def forward(self, x):
        x = self.a(x).relu()
        x = self.b(torch.cat([x, x.square().clamp(max=2)], 1))
        return self.c(nn.functional.leaky_relu(x).mean((2, 3)))


class Stream(nn.Module):
    """Two blocks and the classifier read one residual stream."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 6, 3, padding=1), nn.Linear(6, 4)
        self.a1, self.a2 = nn.Conv2d(6, 7, 3, padding=1), nn.Conv2d(7, 6, 3, padding=1)
        self.b1, self.b2 = nn.Conv2d(6, 5, 1), nn.Conv2d(5, 6, 1)

    def forward(self, x):
        x = self.stem(x).relu()
        x = x + self.a2(self.a1(x).relu())
        x = (x + self.b2(self.b1(x).relu())).relu()
        return self.head(x.mean((2, 3)))


def pooled(*layers, width):
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 4))


NETWORKS = {
    "plain": lambda: pooled(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 5, 3), nn.ReLU(), width=5),
    "grouped": lambda: pooled(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3, groups=2), nn.ReLU(), width=6),
    "depthwise": lambda: pooled(
        nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3, groups=6), nn.ReLU6(), nn.Conv2d(6, 5, 1), width=5
    ),
    "flattened": lambda: nn.Sequential(nn.Conv2d(3, 6, 5), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 16, 4)),
    "stream": Stream,
    "twice": Twice,
}


@pytest.fixture(params=NETWORKS)
def network(request):
    torch.manual_seed(0)
    return randomise(NETWORKS[request.param]())


@pytest.fixture
def many():
    """Images enough that no layer has more channels than rows."""
    return torch.randn(60, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


@pytest.fixture
def no_ridge(monkeypatch):
    """P is the inverse of the covariance itself: nothing is added to it."""

    def precision(self, without=None, dtype=None):
        rows = sum(self.rows)
        mean = (self.total.sum(0) / rows)[:, :, None]
        inverse = torch.linalg.inv(self.products.sum(0) / rows - mean @ mean.mT)
        return estimates.Precision(inverse, mean + self.shift, mean.new_zeros(mean.shape[:2]))

    monkeypatch.setattr(estimates.InputMoments, "precision", precision)


def fisher_of_outputs(model, graph, images):
    fisher = OutputFisher(graph.readers, len(images))
    batches = [(part, torch.zeros(len(part), dtype=torch.long)) for part in images.split(1000)]
    collect_directions(model, graph, batches, Wanted(1, gradient=False), progress=False, fisher=fisher)
    return fisher.mean()


def costs_of(model, graph, images, levels=None):
    moments = input_moments(model, graph, [(images, None)])
    costs = removal_costs(model, moments, fisher_of_outputs(model, graph, images), len(graph.units))
    if levels is not None:
        costs.start_at(levels)
    return costs


def inputs_of(model, layer, images):
    seen = []
    handle = model.get_submodule(layer).register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        model(images)
    handle.remove()
    return seen[0]


def least_squares_cost(model, graph, images, chosen):
    """1/2 tr(Q R) summed over readers, with R the covariance of what lstsq on the other channels leaves of the chosen."""
    fisher, cost = fisher_of_outputs(model, graph, images), 0.0
    for reader in graph.readers:
        module, x = model.get_submodule(reader.layer), reader.to_rows(inputs_of(model, reader.layer, images))
        outputs = len(module.weight) // reader.groups
        units = reader.units[:: reader.positions].view(reader.groups, -1)
        for group in range(reader.groups):
            gone = torch.isin(units[group], torch.tensor(chosen))
            rows = x[:, group].movedim(1, 2).flatten(0, 1)
            others = torch.cat([rows[:, ~gone], torch.ones(len(rows), 1, dtype=rows.dtype)], 1)
            left = rows[:, gone] - others @ torch.linalg.lstsq(others, rows[:, gone]).solution
            w = module.weight[group * outputs :][:outputs].detach().reshape(outputs, len(gone), -1)[:, gone]
            g = fisher[reader.layer][group * outputs :][:outputs, group * outputs :][:, :outputs]
            for offset in w.unbind(2):
                cost += ((left @ offset.T @ g) * (left @ offset.T)).sum() / len(left) / 2
    return float(cost)


@pytest.mark.usefixtures("no_ridge")
def test_costs_of_growing_sets_are_those_of_least_squares(network, many, monkeypatch):
    monkeypatch.setattr(layer_costs, "BLOCK", 2)  # so that matrices are brought up to date on the way
    graph = ChannelGraph(network, many)
    costs = costs_of(network, graph, many)
    chosen, total = [], 0.0
    for unit in (2, 0, 3, 4):
        total += costs.marginal[unit].item()
        costs.remove(unit)
        chosen.append(unit)
        assert total == pytest.approx(least_squares_cost(network, graph, many, chosen), rel=1e-8)
    for unit in set(range(len(graph.units))) - set(chosen):
        wanted = least_squares_cost(network, graph, many, [*chosen, unit])
        assert total + costs.marginal[unit].item() == pytest.approx(wanted, rel=1e-8)


@pytest.mark.usefixtures("no_ridge")
def test_the_cost_on_a_linear_reader_is_the_second_order_loss_of_the_refitted_layer(many):
    """Weights and bias are really fitted anew; the loss is 1/2 of the outputs' change in their Fisher metric."""
    torch.manual_seed(0)
    model = randomise(pooled(nn.Conv2d(3, 9, 3), nn.ReLU(), width=9))
    graph = ChannelGraph(model, many)
    costs = costs_of(model, graph, many)
    chosen, total = [1, 5, 6, 8], 0.0
    for unit in chosen:
        total += costs.marginal[unit].item()
        costs.remove(unit)
    x, fisher = inputs_of(model, "4", many), fisher_of_outputs(model, graph, many)["4"]
    stay = torch.cat([x[:, [u for u in range(9) if u not in chosen]], torch.ones(len(x), 1, dtype=x.dtype)], 1)
    with torch.no_grad():
        dense = model[4](x)
    change = stay @ torch.linalg.lstsq(stay, dense).solution - dense
    assert total == pytest.approx(((change @ fisher) * change).sum().item() / len(x) / 2, rel=1e-6)


def test_fisher_is_that_of_the_predictions(many):
    """Copies of one image with many random signs: J^T (diag p - p p^T) J, summed over positions."""
    torch.manual_seed(0)
    model = randomise(NETWORKS["plain"]())
    graph, image = ChannelGraph(model, many), many[:1]
    found = fisher_of_outputs(model, graph, image.expand(4000, -1, -1, -1))["2"]
    with torch.no_grad():
        x = model[2](model[1](model[0](image)))
    jacobian = torch.autograd.functional.jacobian(lambda y: model[3:](y)[0], x)[:, 0].flatten(
        2
    )  # [classes, outputs, positions]
    p = model(image).detach().softmax(1)[0]
    exact = torch.einsum("kop,kl,lqp->oq", jacobian, p.diag() - p.outer(p), jacobian)
    assert (found - exact).norm() < 0.1 * exact.norm()


def test_the_matrices_of_a_forward_are_freed_when_it_ends(many, monkeypatch):
    """Without waiting for Python to look for cycles: on a ResNet-50 they are 113 MB a forward."""
    parts, of_first = [], OutputFisher.part

    def part(fisher, first):
        found = of_first(fisher, first)
        parts.append(weakref.ref(found))
        return found

    monkeypatch.setattr(OutputFisher, "part", part)
    model = randomise(NETWORKS["plain"]())
    gc.disable()
    try:
        fisher_of_outputs(model, ChannelGraph(model, many[:2]), many)
        assert parts and not any(reference() for reference in parts)
    finally:
        gc.enable()


def test_order_1_knows_the_slope_of_the_loss_alone(many):
    """Its Fisher matrix is that of the given labels, from one backward pass, which gives the first-order terms too."""
    torch.manual_seed(0)
    model, labels = randomise(NETWORKS["plain"]()), torch.arange(len(many)) % 4
    graph = ChannelGraph(model, many)
    found = collect_behind_repair(model, graph, [(many, labels)], [(many, labels)], 1, progress=False)
    y = model[2](model[1](model[0](many))).detach().requires_grad_()
    (slopes,) = torch.autograd.grad(F.cross_entropy(model[3:](y), labels, reduction="sum"), y)
    assert torch.allclose(found.fisher["2"], torch.einsum("nohw,nphw->op", slopes, slopes) / len(many))
    assert found.directions.coordinates.shape[2] == 1
    exact = collect_behind_repair(model, graph, [(many, labels)], [(many, labels)], 2, class_probes=3, progress=False)
    phi, expected = (d.directions.moments(order=1)[0] for d in (found, exact))
    assert torch.allclose(phi, expected)


def test_levels_are_the_first_costs_and_the_closed_form_says_how_they_grow(many):
    torch.manual_seed(0)
    model = randomise(NETWORKS["stream"]())
    graph = ChannelGraph(model, many)
    levels = torch.rand(100)[: len(graph.units)]
    plain, scaled = (costs_of(model, graph, many, given) for given in (None, levels))
    factor = levels / plain.marginal
    assert torch.allclose(scaled.marginal, levels.double())
    for costs in (plain, scaled):
        costs.remove(0)
    rest = torch.arange(1, len(levels))
    assert torch.allclose(scaled.marginal[rest], (factor * plain.marginal)[rest])
    assert not torch.allclose(scaled.marginal[rest], levels.double()[rest])


def test_the_ridge_is_no_variance_of_the_channels(many, monkeypatch):
    """A set costs what ridge regression on the other channels leaves of it, penalty included, and no ridge of its own."""
    monkeypatch.setattr(layer_costs, "RIDGE_LEFT", 0.0)
    monkeypatch.setattr(estimates, "RIDGE", 3.0)
    torch.manual_seed(0)
    model = randomise(NETWORKS["plain"]())
    graph = ChannelGraph(model, many)
    costs, fisher = costs_of(model, graph, many), fisher_of_outputs(model, graph, many)
    reader = graph.readers[0]
    chosen = reader.units[:3].tolist()
    for unit in chosen:
        costs.remove(unit)
    rows = reader.to_rows(inputs_of(model, reader.layer, many)).movedim(1, 3).flatten(2).movedim(1, 0).flatten(1)
    c = torch.cov(rows, correction=0)
    weight = model.get_submodule(reader.layer).weight.detach()
    parts = weight.square().sum((2, 3)) * c.diagonal()  # [outputs, channels] of the variance of the outputs
    shares = (parts / parts.sum(1, keepdim=True)).mean(0)
    ridge = (3.0 + len(c) / rows.shape[1]) * c.diagonal() * shares.mean() / shares
    inner = torch.linalg.solve(c[3:, 3:] + ridge[3:].diag(), c[3:, :3])
    q = layer_costs.output_costs(reader, weight, fisher[reader.layer])[0, :3, :3]
    assert costs.total == pytest.approx((q * (c[:3, :3] - c[:3, 3:] @ inner)).sum().item() / 2, rel=1e-6)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_the_scale_of_channels_is_of_no_account(many, order):
    """What a ReLU lets through may be held in any scale: the weights behind it make up for it."""
    torch.manual_seed(0)
    model = randomise(pooled(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3, groups=2), nn.ReLU(), width=6))
    batches, found = [(many, torch.arange(len(many)) % 4)], []
    for size in (0, 6):
        with torch.no_grad():
            for layer, reader in ((model[0], model[2]), (model[2], model[6])):
                scales = 10 ** (torch.rand(len(layer.bias), dtype=torch.float64) * 2 * size - size)
                layer.weight.mul_(scales.view(-1, 1, 1, 1))
                layer.bias.mul_(scales)
                into = reader.weight.unflatten(0, (getattr(reader, "groups", 1), -1))
                into.div_(scales.view(len(into), 1, -1, *(1,) * (into.dim() - 3)))
        pruner = EnhancedFilterPruner(model, many, order, progress=False, budget="macs").rank(batches, batches)
        found.append((pruner.levels(), pruner.get_pruning_plan(50)))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-6, atol=1e-12)
    assert found[0][1] == found[1][1]


@pytest.mark.parametrize("size", [1, 1e-30])
def test_a_channel_counts_with_all_weights_that_read_it(many, size):
    """Behind a flatten several features are one channel, and every output counts in proportion to its largest weight."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(20, 4))
    model = randomise(model)
    model[4].weight.data *= size
    graph = ChannelGraph(model, many[:1], verify=False)
    moments = estimates.input_moments(model, graph, [(many, torch.zeros(len(many)).long())])["4"]
    squares = model[4].weight.detach().view(4, 5, 4).div(size).square().sum(2)
    assert torch.allclose(moments.effects[0], (squares / squares.amax(1, keepdim=True)).float())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_a_layer_without_weights_has_estimates(many, dtype):
    """As a new head of zeros has them, where some of its inputs are equal."""
    torch.manual_seed(0)
    model = randomise(pooled(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU(), width=6))
    with torch.no_grad():
        model[0].weight[1], model[0].bias[1] = model[0].weight[0], model[0].bias[0]
        model[2].weight.zero_()
    model, images = model.to(dtype), many.to(dtype)
    graph = ChannelGraph(model, images[:1])
    moments = estimates.input_moments(model, graph, [(images, torch.arange(len(images)) % 4)])["2"]
    inverse, _, ridge = moments.precision(dtype=torch.float64)
    covariance = torch.linalg.inv(inverse[0].tril() + inverse[0].tril(-1).mT) - ridge[0].diag()
    assert torch.allclose(ridge[0] / ridge[0, 0], torch.ones(8, dtype=torch.float64))
    assert ridge[0, 0] > estimates.RIDGE * covariance.diagonal().mean() > 0


def test_channels_that_are_rarely_active_do_not_decide_the_estimates():
    """As they would if each had a ridge in proportion to its own variance, on the images that fitted the estimates."""
    torch.manual_seed(3)
    model = randomise(pooled(nn.Conv2d(3, 40, 3, stride=2), nn.ReLU(), nn.Conv2d(40, 20, 3), nn.ReLU(), width=20))
    with torch.no_grad():
        model[0].bias -= 1.5 * (0.3 + torch.rand(40))
    images = torch.randn(140, 3, 9, 9, dtype=torch.float64) * (0.5 + torch.rand(140, 1, 1, 1))
    few, fresh = ([(part, torch.zeros(len(part)).long())] for part in (images[:40], images[40:]))
    pruner = EnhancedFilterPruner(model, images, 2, progress=False, class_probes=3)
    from_few, from_many = (pruner.rank(fresh, part).scores()[:40].sum() for part in (few, fresh))
    assert from_few < 1.5 * from_many


def test_a_unit_that_no_layer_reads_keeps_its_level():
    costs = RemovalCosts([], 2)
    costs.start_at(torch.tensor([0.5, 0.25]))
    costs.remove(0)
    assert costs.marginal.tolist() == [0.5, 0.25]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("size", [1e-150, 1e-155, 0.0])
def test_a_unit_whose_readers_have_hardly_any_weight_keeps_its_level(many, size):
    """Its closed form is rounding, or smaller than a number can be: what it grows by says nothing."""
    torch.manual_seed(0)
    model = randomise(NETWORKS["plain"]())
    graph = ChannelGraph(model, many)
    reader = graph.readers[0]
    unit = int(reader.units[0])
    with torch.no_grad():
        model.get_submodule(reader.layer).weight[:, reader.units == unit] *= size
    levels = torch.full((len(graph.units),), 5.0)
    costs = costs_of(model, graph, many, levels)
    assert torch.allclose(costs.marginal, levels.double()) and costs.marginal[unit] == 5
    costs.remove(int(reader.units[1]))
    assert costs.marginal[unit] == 5


def test_an_image_has_one_fold_in_every_batch(many):
    whole = fold_of(many)
    assert torch.equal(whole, torch.cat([fold_of(part) for part in many.split(7)]))
    assert torch.equal(fold_of(many.float()), torch.cat([fold_of(part) for part in many.float().split(11)]))
    for images in (many, many.float(), many.float().double(), (many * 8).round() / 8):
        assert fold_of(images).bincount(minlength=FOLDS).min() >= 5  # of 60 images
    labels = torch.arange(len(many))
    seen = [y for _, part in by_fold([(many[:50], labels[:50]), (many[50:], labels[50:])]) for _, y in part]
    assert torch.cat(seen).sort().values.equal(labels) and max(map(len, seen)) <= 50
    cropped = [(many[:50], labels[:50]), (many[50:, :, 1:], labels[50:])]
    seen = [(x.shape[2], y) for _, part in by_fold(cropped) for x, y in part]
    assert all((y < 50).all() == (height == many.shape[2]) for height, y in seen) and len(seen) == 2 * FOLDS


def test_estimates_are_of_the_other_folds(many):
    torch.manual_seed(0)
    model = randomise(NETWORKS["plain"]())
    graph = ChannelGraph(model, many)
    fold = int(fold_of(many[:1]))
    others = many[fold_of(many) != fold]
    one = channel_estimates(input_moments(model, graph, [(many, None)]), without=fold)["2"]
    other = channel_estimates(input_moments(model, graph, [(others, None)]))["2"]
    assert torch.allclose(one.matrix, other.matrix) and torch.allclose(one.offset, other.offset)
    assert channel_estimates(input_moments(model, graph, [(many[:1], None)]), without=fold) == {}


def test_a_layer_with_few_rows_a_channel_does_not_look_free():
    """One row an image and more channels than images: on the images that fitted the estimates everything is explained."""
    torch.manual_seed(0)
    model = randomise(pooled(nn.Conv2d(3, 40, 3), nn.ReLU(), width=40))
    images = torch.randn(430, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    few, fresh = [(images[:30], torch.zeros(30).long())], [(images[30:], torch.zeros(400).long())]
    pruner = EnhancedFilterPruner(model, images, 2, progress=False)
    cross_fitted = pruner.rank(few, few).scores().sum()
    true = pruner.rank(fresh, few).scores().sum()  # none of these images fitted
    assert 0.6 < cross_fitted / true < 1.6
