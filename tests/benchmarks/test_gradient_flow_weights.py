"""The weights from gradient flow that a benchmark compares: their formulas."""

import pytest
import torch
from gradient_flow_weights import collect_flow_change, preserved_flow, signal_to_noise
from test_gradient_flow import Chain, batches
from torch import nn
from torch.nn import functional as F

from taylor_pruning.surgery.graph import ChannelGraph


@pytest.mark.parametrize("activation", [nn.ReLU(inplace=True), nn.SiLU()])
def test_flow_change_equals_the_gate_hessian(activation):
    model, (images, labels) = Chain(activation).double().eval(), batches(1, 3, dtype=torch.float64)[0]
    graph = ChannelGraph(model, images[:1])
    change = collect_flow_change(model, graph, [(images, labels)])
    for image, label, row in zip(images, labels, change, strict=True):

        def loss(gates, image=image, label=label):
            with graph.gated(gates):
                return F.cross_entropy(model(image[None]), label[None])

        ones = torch.ones(len(graph.units), dtype=torch.float64)
        hessian = torch.autograd.functional.hessian(loss, ones)
        gradient = torch.autograd.functional.jacobian(loss, ones)
        torch.testing.assert_close(row, -2 * hessian @ gradient)


def test_flow_change_is_the_slope_of_the_squared_gate_gradient():
    model, (images, labels) = Chain(nn.SiLU()).double().eval(), batches(1, 1, dtype=torch.float64)[0]
    graph = ChannelGraph(model, images[:1])
    change = collect_flow_change(model, graph, [(images, labels)])

    def squared_gradient(gates):
        gates = gates.clone().requires_grad_()
        with graph.gated(gates):
            loss = F.cross_entropy(model(images), labels)
        return torch.autograd.grad(loss, gates)[0].square().sum()

    ones, step = torch.ones(len(graph.units), dtype=torch.float64), 1e-4
    for unit in range(len(graph.units)):
        less, more = ones.clone(), ones.clone()
        less[unit] -= step
        more[unit] += step
        slope = (squared_gradient(less) - squared_gradient(more)) / (2 * step)
        torch.testing.assert_close(slope, change[0, unit], rtol=1e-5, atol=1e-9)


def test_signal_to_noise_formula():
    graph = ChannelGraph(Chain(), torch.zeros(1, 3, 8, 8))
    flow = torch.rand(6, 9, dtype=torch.float64)
    ratio = flow.mean(0) / flow.std(0, correction=0)
    expected = 0.1 + 0.9 * torch.cat([ratio[:5] / ratio[:5].mean(), ratio[5:] / ratio[5:].mean()])
    torch.testing.assert_close(signal_to_noise(graph, flow), expected, rtol=1e-4, atol=0)
    flow[:, 0] = 1  # samples that agree have a ratio of 1000, not infinity
    weights = signal_to_noise(graph, flow)
    assert ((weights[0] - 0.1) / (weights[1] - 0.1)).item() == pytest.approx(1000 / ratio[1].item(), rel=1e-3)


def test_preserved_flow_keeps_units_whose_removal_takes_flow_away():
    graph = ChannelGraph(Chain(), torch.zeros(1, 3, 8, 8))
    change = torch.tensor([[-3.0, -1, 0, 1, 1000, -1, 1, 0, 0]])
    weights = preserved_flow(graph, change)
    assert weights[0] > weights[1] > weights[2] > weights[3] > weights[4]
    assert weights[5] > 1 > weights[6]
    raw = 2 / (1 + torch.exp(change[0, 5:].double() / 0.5**0.5))
    torch.testing.assert_close(weights[5:], 0.1 + 0.9 * raw / raw.mean())
