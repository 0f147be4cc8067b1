"""phi, h, t against nested torch.func derivatives; the closed third order; the scores against really removing filters."""

import math

import pytest
import torch
from torch.func import grad
from torch.nn import functional as F

from EnhancedFilterPruner import EnhancedFilterPruner
from EnhancedPruning import PruningSettings
from taylor_pruning.errors import InputError
from taylor_pruning.scoring.collecting import Wanted, collect_directions
from taylor_pruning.scoring.taylor import Directions, class_basis, closed_third_order
from taylor_pruning.surgery.graph import ChannelGraph


def loss_along_gate(model, graph, unit, image, label):
    """One sample's loss as a function of one gate."""
    others = torch.arange(len(graph.units)) != unit

    def loss(gate):
        with graph.gated(torch.where(others, 1.0, gate)):
            return F.cross_entropy(model(image[None]), label[None])

    return loss


def brute_force(model, graph, images, labels):
    """[3, N, U] first three derivatives of every sample's loss along every gate."""
    one = torch.tensor(1.0, dtype=torch.float64)
    table = torch.empty(3, len(images), len(graph.units), dtype=torch.float64)
    for n in range(len(images)):
        for unit in range(len(graph.units)):
            f = loss_along_gate(model, graph, unit, images[n], labels[n])
            for k, derivative in enumerate((grad(f), grad(grad(f)), grad(grad(grad(f))))):
                table[k, n, unit] = derivative(one)
    return table


def single_site(graph):
    """[U] whether a unit is gated in one place: there the logits are a straight line along the gate."""
    places = torch.zeros(len(graph.units), dtype=torch.long)
    for site in graph.sites:
        places[site.units[site.units >= 0]] += 1
    return places == 1


def test_derivatives_are_those_of_torch_func(relu_network, images, labels):
    graph = ChannelGraph(relu_network, images)
    images, labels = images[:4], labels[:4]
    directions = collect_directions(relu_network, graph, [(images, labels)], Wanted(3), progress=False)
    line = single_site(graph)
    assert line.any()
    found, wanted = directions.moments(), brute_force(relu_network, graph, images, labels)
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-8, atol=1e-12)  # phi is exact on residual streams too
    for k in (1, 2):
        torch.testing.assert_close(found[k][:, line], wanted[k][:, line], rtol=1e-8, atol=1e-12)


def test_scores_do_not_depend_on_the_batch_split(plain_network, images, labels, batches):
    graph = ChannelGraph(plain_network, images)
    whole = collect_directions(plain_network, graph, [(images, labels)], Wanted(3), progress=False)
    split = collect_directions(plain_network, graph, batches, Wanted(3), progress=False)
    for order in (1, 2, 3):
        torch.testing.assert_close(whole.scores(order), split.scores(order), rtol=1e-10, atol=1e-14)


def test_out_of_memory_halves_the_batch(plain_network, images, labels, monkeypatch):
    graph = ChannelGraph(plain_network, images)
    wanted = collect_directions(plain_network, graph, [(images, labels)], Wanted(3), progress=False).scores(3)
    forward = plain_network.forward

    def limited(x):
        if len(x) > 4:
            raise torch.OutOfMemoryError("out of memory")
        return forward(x)

    monkeypatch.setattr(plain_network, "forward", limited)
    found = collect_directions(plain_network, graph, [(images, labels)], Wanted(3), progress=False).scores(3)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-14)


def test_scores_are_the_true_loss_change_where_the_series_is_exact(plain_network, images, labels):
    """A last hidden layer without anything nonlinear behind it, and small steps: removal is the series."""
    for parameter in plain_network[-1].parameters():
        parameter.data *= 0.1
    graph = ChannelGraph(plain_network, images)
    pruner = EnhancedFilterPruner(plain_network, images, 3, graph=graph, progress=False).rank([(images, labels)])
    for unit in graph.units:
        if unit.filters[0][0] != "4":
            continue
        smaller = graph.remove([unit])
        with torch.no_grad():
            true = F.cross_entropy(smaller(images), labels) - F.cross_entropy(plain_network(images), labels)
        for order, tolerance in ((2, 0.05), (3, 0.01)):
            estimate = pruner.scores(order)[unit.index]
            assert estimate.sign() == true.sign()
            torch.testing.assert_close(estimate, true, rtol=tolerance, atol=1e-6)


def test_filter_ranks_follow_layers_and_mark_protected_filters(relu_network, images, labels):
    excluded = [name for name, module in relu_network.named_modules() if isinstance(module, torch.nn.Conv2d)][1]
    pruner = EnhancedFilterPruner(relu_network, images, 2, exclude=[excluded], progress=False)
    ranks = pruner.rank([(images, labels)]).filter_ranks
    assert set(ranks) == set(pruner.graph.layers)
    for name, info in pruner.graph.layers.items():
        assert torch.equal(ranks[name].isnan(), ~info.removable)
    assert any(values.isnan().all() for values in ranks.values())


@pytest.mark.parametrize("classes", [3, 10])
def test_full_basis_loses_nothing(classes):
    logits = torch.randn(5, classes, dtype=torch.float64)
    basis, sampled = class_basis(logits, torch.arange(5) % classes, classes)
    assert basis.shape == (5, classes, classes - 1) and sampled == 0
    eye = torch.eye(classes - 1, dtype=torch.float64).expand(5, -1, -1)
    torch.testing.assert_close(basis.transpose(1, 2) @ basis, eye)
    torch.testing.assert_close(basis.sum(1), torch.zeros(5, classes - 1, dtype=torch.float64))


def random_signs(samples, classes):
    return 2 * torch.randint(2, (samples, classes), generator=torch.Generator().manual_seed(1)).double() - 1


def test_truncated_basis_holds_the_gradient_and_reports_what_it_samples():
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(6, 100, dtype=torch.float64, generator=generator)
    labels, signs = torch.arange(6), random_signs(6, 100)
    basis, sampled = class_basis(logits, labels, 12, signs)
    assert basis.shape == (6, 100, 12)
    basis = basis[:, :, :-1]
    p = logits.softmax(1)
    gradient = p - F.one_hot(labels, 100)
    projected = torch.einsum("nkr,njr,nj->nk", basis, basis, gradient)
    torch.testing.assert_close(projected, gradient)
    fisher = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    kept = torch.einsum("nkr,nkj,njr->", basis, fisher, basis)
    total = torch.einsum("nkk->", fisher)
    assert sampled == pytest.approx(1 - (kept / total).item(), abs=1e-9)
    assert class_basis(logits, labels, 40, signs)[1] < sampled < 0.5


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("probes, classes, draws", [(2, 60, 4000), (12, 60, 4000), (2, 1000, 400), (12, 1000, 400)])
def test_the_random_direction_makes_the_curvature_right_on_the_mean(probes, classes, draws, order):
    """Curvature of one v at many draws of the signs, against its variance under p; without the draws it is far too low.

    Also where hundreds of improbable classes have most of the curvature.
    """
    generator = torch.Generator().manual_seed(0)
    logits, v = torch.randn(2, classes, dtype=torch.float64, generator=generator)
    p, labels = logits.softmax(0), torch.zeros(draws, dtype=torch.long)
    logits = logits.expand(draws, -1)
    basis, sampled = class_basis(logits, labels, probes, random_signs(draws, classes))
    coordinates = torch.einsum("nkr,k->nr", basis, v)[:, None]
    phi, h, _ = Directions(coordinates, basis, logits, labels, sampled).moments(order=order)
    torch.testing.assert_close(phi, ((p * v).sum() - v[0]).expand_as(phi))
    true = (p * v.square()).sum() - (p * v).sum().square()
    held = Directions(coordinates[..., :-1], basis[..., :-1], logits, labels, 0.0).moments()[1]
    assert abs(h.mean() - true) < 4 * h.std() / draws**0.5 + 0.01 * true
    assert held.mean() < 0.8 * true


@pytest.mark.parametrize(
    "classes, probes, labelled", [(5, 4, True), (1000, 1, False), (100, 12, False), (1000, 12, True)]
)
@pytest.mark.parametrize("sureness", [20, 45])
def test_sure_predictions_have_their_derivatives_in_single_precision_too(classes, probes, labelled, sureness):
    """All but 1e-8 of the probability is on one class, or 1e-19: 1 - p has no digits in single precision."""
    generator, samples = torch.Generator().manual_seed(0), 40
    logits, v = (torch.randn(samples, classes, generator=generator) for _ in range(2))
    logits[:, 0] += sureness + math.log(classes)
    labels, found = torch.zeros(samples, dtype=torch.long), []
    for dtype in (torch.float32, torch.float64):
        exact = labels if labelled else None
        basis, sampled = class_basis(logits.to(dtype), exact, probes, random_signs(samples, classes))
        c = torch.einsum("nk,nkr->nr", v.to(dtype), basis)
        directions = Directions(c[:, None], basis, logits.to(dtype), labels, sampled)
        phi, h, _ = directions.moments(order=2)
        phi = phi.mean() if labelled else torch.zeros(())
        found.append([phi.item(), h.mean().item(), sampled, directions.loss_change_at(1e-3 * c)])
    assert found[0] == pytest.approx(found[1], rel=2e-2, abs=0)
    assert 0 <= found[1][2] <= 1


def series(phi, h, t):
    return -phi + h / 2 - t / 6


def test_closed_third_order_agrees_with_the_series_to_third_order():
    """Along a step e, phi e, h e^2, t e^3: the difference falls like e^4."""
    generator = torch.Generator().manual_seed(0)
    phi, t = (torch.randn(50, dtype=torch.float64, generator=generator) for _ in range(2))
    h = torch.rand(50, dtype=torch.float64, generator=generator) + 0.1
    steps = (0.1, 0.05, 0.025)
    errors = [
        (closed_third_order(phi * e, h * e**2, t * e**3) - series(phi * e, h * e**2, t * e**3)).abs().max()
        for e in steps
    ]
    for coarse, fine in zip(errors, errors[1:], strict=False):
        assert fine < coarse / 10


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_closed_third_order_is_finite_and_continuous(dtype):
    """Any h down to 0 and any t that a random variable of that variance and |x| <= 100 can have, and rounding beyond."""
    h = torch.cat([torch.zeros(1), torch.logspace(-30, 3, 400)]).to(dtype)
    for ratio in (-100.0, -1.0, 0.0, 1.0, 100.0):
        value = closed_third_order(torch.zeros_like(h), h, ratio * h)
        assert value.isfinite().all()
        assert value[0] == 0 and value[h < 1e-12].abs().max() < 1e-9
    t = torch.linspace(-5, 5, 20001, dtype=torch.float64)
    value = closed_third_order(torch.zeros_like(t), torch.ones_like(t), t)
    assert value.diff().abs().max() < 1e-2 and (value.diff() <= 1e-15).all()  # falls smoothly with t
    wild = closed_third_order(*(torch.tensor([v] * 3, dtype=dtype) for v in (1e3, 1e-20, -1e20)))
    assert wild.isfinite().all()


@pytest.mark.parametrize("skewness", [0.0, -1.0, 30.0, -1e4])
def test_closed_third_order_has_digits_where_the_network_is_sure(skewness):
    """The first moment of the two-point law is zero; what is left of exp(-x) may be far below the rounding of 1."""
    h = torch.logspace(-22, -12, 11, dtype=torch.float64)
    t = skewness * h**1.5
    found = closed_third_order(torch.zeros_like(h), h, t)
    fourth = h.square() * (skewness**2 + 1)
    torch.testing.assert_close(found, h / 2 - t / 6 + fourth / 24, rtol=1e-4, atol=0)


def test_closed_third_order_of_large_steps_is_the_log_of_the_sum():
    h = torch.logspace(-2, 8, 11, dtype=torch.float64)
    for skewness in (0.0, -2.0, 2.0):
        far = abs(skewness) / 2 + math.sqrt(1 + skewness**2 / 4)
        points = h.sqrt() * math.copysign(far, skewness), -h.sqrt() / math.copysign(far, skewness)
        logs = -points[0], -points[1] + 2 * math.log(far)
        found = closed_third_order(torch.zeros_like(h), h, skewness * h**1.5)
        torch.testing.assert_close(found, torch.logaddexp(*logs) - math.log1p(far**2), rtol=1e-9, atol=0)


def test_closed_third_order_is_exact_for_two_classes():
    """With two classes v has two points, so that the closed form is the loss change itself."""
    logits = torch.randn(9, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    v = torch.randn(9, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    labels = torch.arange(9) % 2
    basis, _ = class_basis(logits, labels, 2)
    directions = Directions(torch.einsum("nkr,nk->nr", basis, v)[:, None], basis, logits, labels, 0.0)
    true = F.cross_entropy(logits - v, labels) - F.cross_entropy(logits, labels)
    torch.testing.assert_close(directions.scores(3)[0], true)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, y: (x.fill_(torch.nan), y), "NaN"),
        (lambda x, y: (x, y + 4), "labels"),
        (lambda x, y: (x[:0], y[:0]), "no calibration images"),
    ],
)
def test_bad_batches_are_refused(plain_network, images, labels, change, message):
    pruner = EnhancedFilterPruner(plain_network, images, progress=False)
    x, y = change(images.clone(), labels.clone())
    with pytest.raises(InputError, match=message):
        pruner.rank([(x, y)] if len(y) else [])


def test_images_that_are_used_up_are_not_taken_for_no_repair(plain_network, batches):
    pruner, once = EnhancedFilterPruner(plain_network, batches[0][0], progress=False), iter(batches)
    with pytest.raises(InputError, match="there are no compensation images; .* in a list that can be read again"):
        pruner.rank(once, once)
    with pytest.raises(InputError, match="the calibration images are of type NoneType"):
        pruner.rank(None)


def test_the_model_comes_back_as_it_was(relu_network, images, labels):
    relu_network.train()
    next(relu_network.parameters()).requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in relu_network.state_dict().items()}
    EnhancedFilterPruner(relu_network, images, progress=False).rank([(images, labels)]).get_pruning_plan(30)
    assert all(module.training for module in relu_network.modules())
    assert [p.requires_grad for p in relu_network.parameters()].count(False) == 1
    assert all(torch.equal(tensor, before[name]) for name, tensor in relu_network.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in relu_network.modules())


def test_the_sampled_share_of_all_batches_is_the_mean_over_the_images(plain_network, images, labels):
    """Some batches have surer predictions than others."""
    wide = torch.cat([plain_network[-1].weight.data] * 5)
    plain_network[-1] = torch.nn.Linear(24, 20).double()
    plain_network[-1].weight.data = wide * torch.rand(20, 1, dtype=torch.float64)
    graph, shares = ChannelGraph(plain_network, images), []
    parts = [(5 * images[:2], labels[:2]), (images[2:], labels[2:])]
    for batches in (parts, parts[:1], parts[1:]):
        directions = collect_directions(plain_network, graph, batches, Wanted(4), progress=False)
        shares.append(directions.sampled_curvature)
    assert shares[1] != pytest.approx(shares[2], rel=0.01)
    assert shares[0] == pytest.approx((2 * shares[1] + 10 * shares[2]) / 12)


class RootOfZero(torch.nn.Module):
    """The root of a mean square over positions; one filter never fires, so that its root is that of zero."""

    def __init__(self, function):
        super().__init__()
        self.conv, self.next, self.head = torch.nn.Conv2d(3, 6, 3), torch.nn.Conv2d(6, 6, 3), torch.nn.Linear(6, 4)
        self.next.bias.data[2], self.function = -1000, function

    def forward(self, x):
        return self.head(self.function(self.next(self.function(self.conv(x)))).square().mean((2, 3)).sqrt())


@pytest.mark.parametrize("function, settings, order", [
    (F.gelu, PruningSettings(compensate=False), 1),
    (F.relu, PruningSettings(compensate=False, curvature="hvp"), 2),
    (F.relu, PruningSettings(compensate=False, curvature="hvp"), 3),
])  # fmt: skip
def test_derivatives_that_are_no_numbers_are_refused(function, settings, order):
    torch.manual_seed(0)
    model, images, labels = RootOfZero(function).eval(), torch.randn(4, 3, 8, 8), torch.arange(4)
    pruner = EnhancedFilterPruner(model, images, order, settings=settings, progress=False)
    with pytest.raises(InputError, match=r"derivatives along the gates of \d+ units are NaN or infinite \(conv"):
        pruner.rank([(images, labels)])


def test_third_moments_of_huge_logits_are_numbers(images, labels):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 6, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.LazyLinear(4))
    model.float()(images.float())
    with torch.no_grad():
        model[3].weight.mul_(1e15)
    settings = PruningSettings(compensate=False)
    pruner = EnhancedFilterPruner(model.eval(), images.float(), 3, settings=settings, progress=False)
    assert pruner.rank([(images.float(), labels % 4)]).scores().isfinite().all()


def test_what_was_not_collected_is_named(plain_network, images, batches):
    pruner = EnhancedFilterPruner(plain_network, images, 2, selection="independent", progress=False)
    for asked in (pruner.scores, lambda: pruner.with_order(2)):
        with pytest.raises(InputError, match=r"call rank\(batches\) first"):
            asked()
    pruner.rank(batches)
    assert pruner.provides(3) and not pruner.provides(2, use_gradient_flow=True)
    with pytest.raises(InputError, match="gradient flow was not collected; rank with use_gradient_flow=True"):
        pruner.with_order(2, use_gradient_flow=True)
    with pytest.raises(InputError, match="levels are of removals that are repaired"):
        pruner.levels()
    pruner.rank(batches, batches)
    for asked in (pruner.scores, pruner.with_order):
        with pytest.raises(InputError, match="order 3 was not collected; rank with taylor_order=3"):
            asked(3)
    assert torch.equal(pruner.levels(), pruner.collected.levels(2))  # which no closed form shrinks
