"""Probed derivatives against brute force and against the exact path."""

import pytest
import torch
from test_taylor_scores import brute_force
from torch import nn
from torch.nn import functional as F
from watching import interrupted_at

from EnhancedFilterPruner import EnhancedFilterPruner
from GradientFlowAnalyzer import collect_flow
from taylor_pruning.errors import InputError
from taylor_pruning.memory import Portions
from taylor_pruning.scoring import probes as probes_module
from taylor_pruning.scoring.collecting import Wanted, collect_directions
from taylor_pruning.scoring.probes import probe_derivatives, probed_second
from taylor_pruning.surgery.graph import ChannelGraph
from taylor_pruning.tasks.directions import SKEW


def test_probes_agree_with_brute_force_on_a_smooth_network(silu_network, images, labels):
    graph = ChannelGraph(silu_network, images)
    images, labels = images[:4], labels[:4]
    wanted = brute_force(silu_network, graph, images, labels).mean(1)
    batches = [(images.repeat(15, 1, 1, 1), labels.repeat(15))] * 4
    found = probe_derivatives(silu_network, graph, batches, order=3, probes=10, progress=False)
    torch.testing.assert_close(found.phi, wanted[0], rtol=1e-8, atol=1e-12)
    # the standard error counts the spread over the repeated samples too, so that it is an upper bound here
    for value, error, true in ((found.h, found.h_error, wanted[1]), (found.t, found.t_error, wanted[2])):
        z = (value - true) / error
        assert z.abs().max() < 4 and z.square().mean() < 2
        assert (error < true.abs().max()).all()


def test_sure_predictions_have_their_derivatives_in_single_precision_too(silu_network, images, labels):
    """All but 1e-8 of the probability is on one class: 1 - p has no digits in single precision."""
    with torch.no_grad():
        silu_network[-1].bias[0] += 20
    found = []
    for dtype in (torch.float32, torch.float64):
        model, batch = silu_network.to(dtype), (images.to(dtype), torch.zeros_like(labels))
        graph = ChannelGraph(model, batch[0])
        derivatives = probe_derivatives(model, graph, [batch], order=2, progress=False)
        flow = collect_directions(model, graph, [batch], Wanted(1, curvature=False, flow=True), progress=False).flow
        found.append(
            [derivatives.phi, derivatives.h, flow.mean(0).double(), collect_flow(model, graph, [batch])[0].double()]
        )
    for single, double in zip(*found, strict=True):
        torch.testing.assert_close(single, double, rtol=1e-3, atol=1e-3 * double.abs().max().item())


def all_signs(units):
    """[16, units] of -1 and 1 whose mean of z_i z_j is 0 unless i = j: columns of a Hadamard matrix."""
    two = torch.tensor([[1, 1], [1, -1]])
    return torch.kron(torch.kron(two, two), torch.kron(two, two))[:, :units]


def all_skewed_numbers(units):
    """[243, units] of the skewed law whose mean of z_i z_j z_k is 0 unless i = j = k.

    An orthogonal array of strength 3: the columns, of 5 numbers modulo 3, are independent in threes.
    """
    points = torch.cartesian_prod(*[torch.arange(3)] * 5)
    columns = []
    for point in points[1:]:
        factors = [(a, b) for a in (1, 2) for b in (0, 1, 2)]
        spanned = (((a * p + b * q) % 3).equal(point) for p in columns for q in columns for a, b in factors)
        if len(columns) < units and not any(spanned):
            columns.append(point)
    return torch.where(points @ torch.stack(columns, 1) % 3 == 0, 2**0.5, -SKEW).double()


@pytest.mark.parametrize(("order", "name"), [(2, "random_signs"), (3, "skewed_numbers")])
def test_probes_of_an_orthogonal_array_give_the_derivatives_of_brute_force(
    order, name, silu_network, images, labels, monkeypatch
):
    """Not in the mean alone: the products of other indices cancel exactly."""
    graph = ChannelGraph(silu_network, images)
    array = {2: all_signs, 3: all_skewed_numbers}[order](len(graph.units))
    monkeypatch.setattr(probes_module, name, lambda seed, first, samples, units: array[first % len(array) :][:samples])
    wanted = brute_force(silu_network, graph, images[:2], labels[:2])[order - 1]
    for n in range(2):
        batches = [(images[n : n + 1].expand(len(array), -1, -1, -1), labels[n : n + 1].expand(len(array)))]
        found = probe_derivatives(silu_network, graph, batches, order=order, probes=1, progress=False)
        torch.testing.assert_close(found.h if order == 2 else found.t, wanted[n], rtol=1e-7, atol=1e-12)


def test_probes_do_not_depend_on_how_batches_are_split(silu_network, images, labels):
    """One byte: every image by itself. Much: all images but the first ones at once."""
    graph, found = ChannelGraph(silu_network, images), []
    for length, limit in ((12, 2**40), (12, 1), (5, 2**40)):
        batches = list(zip(images.split(length), labels.split(length), strict=True))
        portions = Portions(images.device, limit)
        found.append(probe_derivatives(silu_network, graph, batches, order=3, portions=portions, progress=False))
    for other in found[1:]:
        for name, values in vars(found[0]).items():
            torch.testing.assert_close(getattr(other, name), values)


def test_probes_stay_within_the_memory_limit(silu_network, images, labels, monkeypatch):
    seen = interrupted_at(monkeypatch, probes_module, "open_gates", None)
    pruner = EnhancedFilterPruner(silu_network, images, 2, curvature="hvp", memory_limit="1", progress=False)
    pruner.rank([(images, labels)])
    assert [len(x) for _, (x, _) in seen] == [4, *[1] * 8]  # the first part says how many images fit


def test_every_image_has_probes_of_its_own(silu_network, images, labels):
    graph, twice = ChannelGraph(silu_network, images), [(images[:1].expand(2, -1, -1, -1), labels[:1].expand(2))]
    found = probe_derivatives(silu_network, graph, twice, order=3, probes=1, progress=False)
    assert found.h_error.abs().max() > 1e-6 and found.t_error.abs().max() > 1e-6


def test_probes_agree_with_the_exact_path_on_a_relu_network(plain_network, images, labels):
    exact = EnhancedFilterPruner(plain_network, images, 3, curvature="exact", progress=False).rank([(images, labels)])
    graph = exact.graph
    batches = [(images.repeat(5, 1, 1, 1), labels.repeat(5))] * 6
    found = probe_derivatives(plain_network, graph, batches, order=3, probes=20, progress=False)
    _, h, t = (m.mean(0) for m in exact.directions.moments())
    assert ((found.h - h).abs() <= 4 * found.h_error).all()
    assert ((found.t - t).abs() <= 4 * found.t_error).all()


def test_auto_takes_class_directions_and_says_where_they_are_not_exact(relu_network, silu_network, images):
    assert EnhancedFilterPruner(relu_network, images, progress=False).curvature_path == "exact"
    smooth = EnhancedFilterPruner(silu_network, images, progress=False)
    assert smooth.curvature_path == "gauss-newton" and "silu" in smooth.curvature_reason


def test_another_loss_is_scored_by_probes(plain_network, images, labels):
    """Half the squared norm of the logits: h along a gate of a piecewise linear network is |v|^2."""

    def loss(logits, labels):
        return logits.square().sum(1) / 2

    pruner = EnhancedFilterPruner(
        plain_network, images, 2, loss=loss, selection="independent", hessian_probes=400, progress=False
    ).rank([(images, labels)])
    exact = EnhancedFilterPruner(plain_network, images, 2, class_probes=4, progress=False).rank([(images, labels)])
    # the class directions hold v without its component along the vector of ones; here it counts
    gates = torch.ones(len(images), len(exact.graph.units), dtype=torch.float64, requires_grad=True)
    with exact.graph.gated(gates):
        logits = plain_network(images)
    v = torch.stack([torch.autograd.grad(logits[:, k].sum(), gates, retain_graph=True)[0] for k in range(4)])
    wanted = v.square().sum(0).mean(0)
    assert ((pruner.collected.probed.h - wanted).abs() <= 4 * pruner.collected.probed.h_error).all()
    assert len(pruner.get_pruning_plan(30))


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 4)

    def forward(self, x):
        x = self.conv(x).flatten(2).mT[:, None]
        return self.fc(F.scaled_dot_product_attention(x, x, x, scale=0.5).mean((1, 2)))


def test_fused_attention_has_second_and_third_derivatives(labels):
    torch.manual_seed(0)
    network, x = Attending().eval(), torch.randn(len(labels), 3, 8, 8)
    graph = ChannelGraph(network, x[:1])
    found = probe_derivatives(network, graph, [(x, labels)], order=3, probes=2, progress=False)
    assert found.h.abs().min() > 0 and found.t.abs().min() > 0


def test_order_1_of_another_task_takes_no_second_derivatives(images, labels):
    class Backward(torch.autograd.Function):
        @staticmethod
        def forward(ctx, gradient):
            return gradient.clone()

        @staticmethod
        def backward(ctx, gradient):
            raise RuntimeError("derivative for aten::once_backward is not implemented")

    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return Backward.apply(gradient)

    network = nn.Sequential(nn.Conv2d(3, 6, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)).eval()
    batches, options = (
        [(images.float(), labels)],
        {"loss": lambda y, _: Once.apply(y).square().sum(1), "progress": False},
    )
    pruner = EnhancedFilterPruner(network, images[:1], 1, **options).rank(batches)
    assert pruner.get_pruning_plan(30) and pruner.provides(1) and not pruner.provides(2)
    with pytest.raises(InputError, match="orders 2 and 3 cannot be probed"):
        EnhancedFilterPruner(network, images[:1], 2, selection="independent", **options).rank(batches)


@pytest.mark.parametrize(
    "message",
    [
        "derivative for aten::once_backward is not implemented",  # as grid_sample until torch 2.12
        "double backwards on deform_conv2d not supported",
        "trying to differentiate twice a function that was marked with @once_differentiable",
    ],
)
def test_a_derivative_that_an_operation_lacks_is_named(message):
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.square()

        @staticmethod
        def backward(ctx, gradient):
            raise RuntimeError(message)

    gates = torch.ones(2, 3, requires_grad=True)
    gamma = Once.apply(gates)
    with pytest.raises(InputError, match=f"{message}.*Use order 1, compensate"):
        probed_second(gamma, gates, 1, 0, 0)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_a_loss_that_is_linear_along_every_gate_is_exact_at_every_order(order, images, labels):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)).double()

    def loss(logits, labels):
        return -logits.gather(1, labels[:, None])[:, 0]

    pruner = EnhancedFilterPruner(model, images, order, loss=loss, progress=False).rank([(images, labels)])
    before = loss(model(images), labels).mean()
    for unit, score in enumerate(pruner.scores()):
        change = loss(pruner.graph.remove(pruner.graph.plan_of([unit]))(images), labels).mean() - before
        torch.testing.assert_close(score, change)
