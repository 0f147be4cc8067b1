"""Scores of orders 1 to 3 of a segmentation and a regression network against brute force, in float64."""

import pytest
import torch
from conftest import randomise
from torch import nn
from torch.func import grad, jacrev, vmap
from torch.nn import functional as F

from EnhancedFilterPruner import EnhancedFilterPruner
from taylor_pruning.errors import InputError
from taylor_pruning.memory import Portions
from taylor_pruning.scoring.layer_costs import OutputFisher
from taylor_pruning.scoring.output_curvature import output_derivatives
from taylor_pruning.scoring.probes import probe_derivatives
from taylor_pruning.scoring.taylor import closed_third_order
from taylor_pruning.surgery.graph import ChannelGraph
from taylor_pruning.tasks.batches import join
from taylor_pruning.tasks.classification import Classification
from taylor_pruning.tasks.dense import Regression, Segmentation


class Upsampled(nn.Module):
    """Two convs at half the size, bilinear upsampling, one conv to a class a pixel."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 4, 3, stride=2, padding=1),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Conv2d(4, 5, 3, padding=1),
            nn.ReLU(),
        )
        self.head = nn.Conv2d(5, 3, 1)

    def forward(self, x):
        return F.interpolate(self.head(self.body(x)), scale_factor=2, mode="bilinear")


def regressor():
    layers = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.ReLU()
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 2))


@pytest.fixture(params=["segmentation", "regression"])
def case(request, images):
    """(task, network, one batch of four samples)."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(3)
    if request.param == "segmentation":
        return Segmentation(), randomise(Upsampled()), (images[:4], torch.randint(3, (4, 8, 8), generator=generator))
    return (
        Regression(2.0),
        randomise(regressor()),
        (images[:4], torch.randn(4, 2, dtype=torch.float64, generator=generator)),
    )


def brute_force(graph, task, batch, with_labels):
    """phi, h, t [units], means over the samples, of every gate alone: derivatives along a line, nested three times."""

    def loss(offset, unit):
        gates = torch.ones(len(graph.units), dtype=torch.float64) + offset * (units == unit)
        with graph.gated(gates):
            outputs = task.forward(graph.model, batch)
        return (task.loss(outputs, batch) if with_labels else task.divergence(outputs, dense)).mean()

    dense = task.forward(graph.model, batch).detach()
    zero, units = torch.zeros((), dtype=torch.float64), torch.arange(len(graph.units))
    first = grad(loss)
    second = grad(first)
    return torch.stack([vmap(f, (None, 0))(zero, units) for f in (first, second, grad(second))])


def test_derivatives_behind_compensation_agree_with_brute_force(case):
    task, model, batch = case
    graph = ChannelGraph(model, batch[0])
    slope, _, _ = brute_force(graph, task, batch, with_labels=True)
    _, h, t = brute_force(graph, task, batch, with_labels=False)
    repeated = [join([batch] * 100)]
    found = output_derivatives(model, graph, repeated, task, order=3, directions=10, probes=5, progress=False)
    torch.testing.assert_close(found["phi"][:4].mean(0), slope, rtol=1e-8, atol=1e-12)
    for values, true in ((found["h"], h), (found["t"], t)):
        of_pass = values.reshape(100, 4, -1).mean(1)
        error = of_pass.std(0) / 10
        assert ((of_pass.mean(0) - true).abs() <= 5 * error + 1e-10).all()
    assert (found["h"].mean(0) - h).norm() < 0.1 * h.norm()


def test_no_derivative_depends_on_how_batches_are_split(case):
    """One byte: every sample by itself."""
    task, model, batch = case
    graph, batch = ChannelGraph(model, batch[0]), join([batch] * 3)
    whole, split = (
        output_derivatives(
            model, graph, [batch], task, order=3, portions=Portions(batch[0].device, limit), progress=False
        )
        for limit in (2**40, 1)
    )
    torch.testing.assert_close(split, whole)


def test_probed_derivatives_of_the_loss_agree_with_brute_force(case):
    task, model, batch = case
    graph = ChannelGraph(model, batch[0])
    wanted = brute_force(graph, task, batch, with_labels=True)
    found = probe_derivatives(model, graph, [join([batch] * 40)], order=3, probes=10, task=task, progress=False)
    torch.testing.assert_close(found.phi, wanted[0], rtol=1e-8, atol=1e-12)
    assert ((found.h - wanted[1]).abs() <= 5 * found.h_error + 1e-10).all()
    assert ((found.t - wanted[2]).abs() <= 5 * found.t_error + 1e-10).all()
    squared = output_derivatives(model, graph, [batch], task, order=1, progress=False)["phi"].square().mean(0)
    torch.testing.assert_close(found.phi_squared, squared)


def test_order_two_is_the_divergence_of_really_removing_where_outputs_are_linear_in_the_gate(images):
    """Last hidden layer of a regression network, where squared error is a parabola along every gate."""
    torch.manual_seed(0)
    model, task = randomise(regressor()), Regression()
    graph = ChannelGraph(model, images)
    repeated = [join([(images, images[:, :2, 0, 0])] * 100)]
    found = output_derivatives(model, graph, repeated, task, directions=10, progress=False)
    for unit in [unit for unit in graph.units if unit.filters[0][0] == "3"]:
        true = task.divergence(graph.remove([unit])(images), model(images)).mean().item()
        assert found["h"][:, unit.index].mean().item() / 2 == pytest.approx(true, rel=0.1)


def test_the_fisher_matrix_of_a_layers_outputs_has_the_curvature_of_the_divergence(case):
    """G of the layer before the outputs, by brute force over the positions."""
    task, model, batch = case
    graph = ChannelGraph(model, batch[0])
    (reader,) = [reader for reader in graph.readers if reader.layer in ("head", "7")]
    fisher = OutputFisher([reader], 4000)
    output_derivatives(model, graph, [join([batch] * 1000)], task, directions=1, fisher=fisher, progress=False)
    found = fisher.mean()[reader.layer]

    seen = []
    layer = model.get_submodule(reader.layer)
    with layer.register_forward_hook(lambda *a: seen.append(a[2].detach())):
        model(batch[0])
    behind = (lambda y: F.interpolate(y, scale_factor=2, mode="bilinear")) if reader.layer == "head" else (lambda y: y)

    def curvature(y):  # [outputs, outputs] sum over positions of the divergence's Hessian in one sample's layer outputs
        def divergence(moved):
            return task.divergence(behind(moved[None]), behind(y[None]).detach())[0]

        hessian = jacrev(grad(divergence))(y).reshape(len(y), y[0].numel(), len(y), y[0].numel())
        return hessian.diagonal(dim1=1, dim2=3).sum(-1)

    wanted = torch.stack([curvature(y) for y in seen[0]]).mean(0)
    torch.testing.assert_close(found, wanted, rtol=0.1, atol=0.1 * wanted.abs().max().item())


@pytest.mark.parametrize("order", [1, 2, 3])
def test_levels_behind_compensation_are_never_negative_and_follow_the_order(case, order):
    task, model, batch = case
    pruner = EnhancedFilterPruner(model, batch[0], order, task=task, class_probes=10, progress=False).rank(
        [batch], [batch]
    )
    levels, probed = pruner.collected.levels(order), pruner.collected.probed
    assert (levels >= 0).all()
    if order == 2:
        torch.testing.assert_close(levels, probed.h / 2)
    if order == 3:  # the saturating estimate of both derivatives, close to the parabola where the step is small
        torch.testing.assert_close(levels, closed_third_order(torch.zeros_like(probed.h), probed.h, probed.t))
    plan = pruner.get_pruning_plan(30)
    assert sum(map(len, plan.values())) == 3
    report = pruner.curvature_report()
    assert (report["path"], report["sampled"]) == ((None, None) if order == 1 else ("directions", 1.0))
    assert (report["h_error"] is None) == (order == 1)


def test_a_classifier_scored_as_any_task_has_the_scores_of_its_closed_form(plain_network, images, labels):
    """A subclass takes the general path; class directions are exact."""

    class AsAnyTask(Classification):
        pass

    batches = [(images, labels)]
    for order, probes in ((1, 1), (2, 200)):
        exact = EnhancedFilterPruner(plain_network, images, order, class_probes=4, progress=False).rank(
            batches, batches
        )
        general = EnhancedFilterPruner(
            plain_network, images, order, task=AsAnyTask(), class_probes=probes, progress=False
        )
        levels, wanted = (p.collected.levels(order) for p in (general.rank(batches, batches), exact))
        torch.testing.assert_close(levels, wanted, rtol=1e-6 if order == 1 else 0.2, atol=1e-9 if order == 1 else 1e-3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"selection": "joint"}, "selection='joint' without compensation needs class logits"),
        ({"curvature": "exact"}, "curvature='exact' without compensation needs class logits"),
        ({"use_gradient_flow": True}, "use_gradient_flow needs class logits"),
    ],
)
def test_what_only_class_logits_have_is_refused_by_name(images, settings, message):
    pruner = EnhancedFilterPruner(randomise(regressor()), images, 2, task=Regression(), progress=False, **settings)
    with pytest.raises(InputError, match=message):
        pruner.rank([(images, images[:, :2, 0, 0])])
