"""Gradient clipping by the weights of each filter."""

import torch
from torch import nn

from taylor_pruning.training.clipping import SMALLEST, FilterClipping


class Mixed(nn.Module):
    """Layers of several kinds, a scalar, a BatchNorm that starts at zero, and a layer without a gradient."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm, self.linear = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Linear(4, 2)
        self.scale, self.unused = nn.Parameter(torch.tensor(2.0)), nn.Linear(3, 3)
        nn.init.zeros_(self.norm.weight)
        self.requires_grad_().double()
        self.linear.bias.requires_grad_(False)


def clipped(ratio):
    model = Mixed().to(memory_format=torch.channels_last)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not name.startswith("unused"):
            parameter.grad = torch.randn_like(parameter)
    before = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    FilterClipping(model, ratio).clip()
    return model, before


def test_no_filter_has_a_gradient_longer_than_its_share_and_no_direction_changes():
    model, before = clipped(0.1)
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert gradients.keys() == before.keys()
    for name, gradient in gradients.items():
        rows, old = (g.reshape(g.shape[:1].numel(), -1) for g in (gradient, before[name]))
        torch.testing.assert_close(rows / rows.norm(dim=1, keepdim=True), old / old.norm(dim=1, keepdim=True))
    filters = model.conv.weight
    torch.testing.assert_close(filters.grad.flatten(1).norm(dim=1), 0.1 * filters.detach().flatten(1).norm(dim=1))
    torch.testing.assert_close(model.linear.weight.grad.norm(dim=1), 0.1 * model.linear.weight.detach().norm(dim=1))
    norm = torch.stack([model.norm.weight.grad, model.norm.bias.grad]).norm(dim=0)
    torch.testing.assert_close(norm, torch.full_like(norm, 0.1 * SMALLEST))  # so that it can grow
    assert abs(model.scale.grad) <= 0.1 * model.scale


def test_short_gradients_stay_as_they_are():
    model, before = clipped(1e9)
    for name, old in before.items():
        torch.testing.assert_close(model.get_parameter(name).grad, old, rtol=0, atol=0)


def test_parameters_without_elements_play_no_part():
    model = nn.Linear(2, 2)
    model.none = nn.Parameter(torch.empty(0))
    model.none.grad, model.weight.grad = torch.empty(0), torch.ones(2, 2)
    FilterClipping(model, 1e-3).clip()
    assert (model.weight.grad < 1).all() and not model.none.grad.numel()


def test_a_parameter_without_a_gradient_counts_among_the_weights():
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    model.weight.grad = torch.ones(2, 3)
    FilterClipping(model, 0.1).clip()
    filters = torch.cat([model.weight, model.bias[:, None]], 1).detach()
    torch.testing.assert_close(model.weight.grad.norm(dim=1), 0.1 * filters.norm(dim=1))
