"""White coordinates: the chain rule holds in them, and the inputs that they are made from are white there."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from taylor_pruning.repair.whitening import DAMPING, SecondMoments, white_coordinates

LAYERS = {
    "linear": (lambda: nn.Linear(6, 5), (7, 6)),
    "tokens": (lambda: nn.Linear(6, 5), (7, 3, 6)),
    "conv1d": (lambda: nn.Conv1d(4, 5, 3, padding=1), (7, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, (3, 2), stride=2, dilation=(1, 2), bias=False), (7, 4, 9, 8)),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, padding=1, groups=2), (7, 4, 9, 8)),
    "depthwise": (lambda: nn.Conv2d(4, 8, 3, padding="same", groups=4), (7, 4, 9, 8)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2), (7, 2, 4, 3, 5)),
}


@pytest.fixture(params=LAYERS)
def layer(request):
    """(layer, inputs like those behind a ReLU)"""
    torch.manual_seed(0)
    build, shape = LAYERS[request.param]
    return build().double(), torch.randn(shape, dtype=torch.float64).relu()


def coordinates_of(module, x):
    return white_coordinates(module, [lambda: module(x)])


def test_a_gradient_in_white_coordinates_says_what_a_move_there_changes(layer):
    """The chain rule: the loss changes along a move of the coordinates by the gradient there times the move."""
    module, x = layer
    target = torch.randn_like(module(x))

    def loss():
        return (module(x) - target).square().sum()

    loss().backward()
    coordinates, found = coordinates_of(module, x), []
    for each in coordinates:
        each.take_gradient()
        assert each.parameter.grad is None
    moves = [torch.randn_like(each.move) for each in coordinates]
    for step in (1e-3, -1e-3):
        for each, move in zip(coordinates, moves, strict=True):
            each.move.data = step * move
            each.apply()
        found.append(loss().item())
    predicted = sum((each.move.grad * move).sum().item() for each, move in zip(coordinates, moves, strict=True))
    assert (found[0] - found[1]) / 2e-3 == pytest.approx(predicted, rel=1e-6)  # exact for a quadratic


def test_a_step_changes_as_much_whatever_the_size_of_the_inputs(layer):
    """Inputs 10,000 times as large are read by weights as much smaller. Biases of 0 and weights of 0 move all the same."""
    module, x = layer
    (weight, *_) = coordinates_of(module, x)
    with torch.no_grad():
        module.weight *= 1e-4
    (small, *_) = coordinates_of(module, 1e4 * x)
    assert small.scale == pytest.approx(1e-4 * weight.scale, rel=1e-6)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    assert all(each.scale > 0 for each in coordinates_of(module, x))


def test_without_a_move_the_parameters_stay_as_they_are(layer):
    module, x = layer
    before = module(x)
    for each in coordinates_of(module, x):
        each.apply()
    assert torch.equal(module(x), before)


def test_second_moments_are_those_of_the_patches(layer):
    """Of channels over all pixels, of kernel positions over all patches of the first image with a stride of 1."""
    module, x = layer
    moments = SecondMoments(module)
    moments.add(module, (x,), {})
    groups, kernel = getattr(module, "groups", 1), getattr(module, "kernel_size", ())
    x = x.flatten(0, -2)[..., None] if not kernel else x
    parts = x.flatten(2).chunk(groups, 1)
    channels = sum(torch.einsum("ncp,ndp->cd", part, part) for part in parts)
    torch.testing.assert_close(moments.channels, channels)
    if len(kernel) != 2:
        return
    reach = [d * (k - 1) for d, k in zip(module.dilation, kernel, strict=True)]
    padded = F.pad(x[:1], (reach[1] // 2, reach[1] - reach[1] // 2, reach[0] // 2, reach[0] - reach[0] // 2))
    patches = F.unfold(padded, kernel, module.dilation).view(x.shape[1], kernel[0] * kernel[1], -1)
    torch.testing.assert_close(moments.positions, torch.einsum("ctp,cup->tu", patches, patches))


def test_the_inputs_are_white_in_the_coordinates(layer):
    module, x = layer
    moments = SecondMoments(module)
    moments.add(module, (x,), {})
    for total, inverse in zip((moments.channels, moments.positions), moments.inverses(), strict=True):
        if total.any():
            damped = total / total.diagonal().mean() + DAMPING * torch.eye(len(total))
            torch.testing.assert_close(inverse @ damped @ inverse.mT, torch.eye(len(total), dtype=torch.float64))


def test_what_cannot_be_whitened_moves_as_it_is():
    """A layer that is not called or sees zeros, one whose weight is computed from others, and all other parameters."""

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.idle, self.blind, self.normed = nn.Linear(3, 3), nn.Linear(3, 3), weight_norm(nn.Linear(3, 3))
            self.norm = nn.BatchNorm1d(3)

        def forward(self, x):
            return self.blind(0 * x) + self.norm(self.normed(input=x))

    network, x = Network().eval(), torch.randn(5, 3)
    for each in white_coordinates(network, [lambda: network(x)]):
        before = each.parameter.detach().clone()
        each.move.data.fill_(0.25)
        each.apply()
        torch.testing.assert_close(each.parameter - before, torch.full_like(before, 0.25))


@pytest.mark.parametrize("module", [nn.Linear(6, 5), nn.Conv1d(6, 5, 1)], ids=["linear", "conv"])
def test_an_input_given_by_name_is_whitened_too(module):
    x = torch.randn(7, 6, 6)
    by_name, by_place = (white_coordinates(module, [f])[0] for f in (lambda: module(input=x), lambda: module(x)))
    assert not torch.equal(by_name.inverses[0], torch.eye(6))
    torch.testing.assert_close(by_name.inverses, by_place.inverses)
