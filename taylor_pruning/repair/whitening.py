"""Coordinates for a network's weights in which the inputs of every layer are white.

A conv or linear layer with weights W and inputs x answers W x. Inputs behind ReLUs are far from white: all channels are
positive, neighbouring pixels are alike, and a small step of all weights at once moves the output much further than one of
some against the others. With C = E[x x^T] = L L^T and W = V L^-1, equal steps along all entries of V move the output equally
far (Desjardins et al. 2015, arXiv:1507.00210; Benzing 2022, arXiv:2201.12250). C is taken to be a Kronecker product of the
second moments of channels and of kernel positions, so that both stay small.
"""

from collections.abc import Callable, Iterable
from contextlib import ExitStack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from taylor_pruning.distributed import all_reduce_sum, rank, world_size
from taylor_pruning.gram import add_gram, symmetric

DAMPING = 0.03  # added to second moments, relative to the mean of their diagonal
SMALLEST = 1e-3  # root mean square that a smaller one counts as, so that biases of 0 move too
WHITENED = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


class Coordinates:
    """A parameter in other coordinates: an optimiser changes `move`, which starts at 0, and the parameter follows.

    Args:
        parameter: of the network, [filters, channels of a group, *kernel] where it has `inverses`.
        inverses: L^-1 of the channels and of the kernel positions; None: the coordinates are the parameter's own.

    Attributes:
        move: nn.Parameter of the parameter's shape.
        scale: root mean square of the parameter in these coordinates.
    """

    def __init__(self, parameter: nn.Parameter, inverses: tuple[Tensor, Tensor] | None = None):
        self.parameter, self.inverses, self.first = parameter, inverses, parameter.detach().clone()
        white = self.first
        if inverses:
            dtype = torch.promote_types(white.dtype, torch.float32)  # in half precision there is no inverse
            white = _product(white.to(dtype), *(torch.linalg.inv(inverse.to(dtype)) for inverse in inverses))
        size = white.square().mean().sqrt().item()  # of weights that read large inputs it may be small
        self.scale = size if inverses and size else max(size, SMALLEST)
        self.move = nn.Parameter(torch.zeros_like(self.first))

    def take_gradient(self) -> None:
        """Gives `move` the parameter's gradient, which is gone then."""
        gradient, self.parameter.grad = self.parameter.grad, None
        if gradient is not None and self.inverses:
            gradient = _product(gradient, *(inverse.mT for inverse in self.inverses))
        self.move.grad = gradient

    @torch.no_grad()
    def apply(self) -> None:
        """Moves the parameter."""
        move = _product(self.move, *self.inverses) if self.inverses else self.move
        self.parameter.copy_(self.first + move)


def white_coordinates(model: nn.Module, forwards: Iterable[Callable[[], object]]) -> list[Coordinates]:
    """Coordinates of all parameters of `model`: white ones of conv and linear layers, of others their own.

    Args:
        model: in evaluation mode.
        forwards: each of them calls the model on a few images. Under torch.distributed the processes share them.
    """
    layers = [m for m in model.modules() if isinstance(m, WHITENED) and isinstance(m.weight, nn.Parameter)]
    moments = {layer.weight: SecondMoments(layer) for layer in layers}
    with torch.no_grad(), ExitStack() as hooks:
        for layer in layers:
            hooks.callback(layer.register_forward_pre_hook(moments[layer.weight].add, with_kwargs=True).remove)
        for number, forward in enumerate(forwards):
            if number % world_size() == rank():
                forward()
        return [Coordinates(p, moments[p].inverses() if p in moments else None) for p in model.parameters()]


class WhiteAdam:
    """Adam along coordinates; a step is a share of every parameter's size in them."""

    def __init__(self, coordinates: list[Coordinates]):
        self.coordinates = coordinates
        self.optimizer = torch.optim.Adam([{"params": [c.move], "scale": c.scale} for c in coordinates])

    def step(self, rate: float) -> None:
        """Moves all parameters by their gradients, which are gone then."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        for each in self.coordinates:
            each.take_gradient()
        self.optimizer.step()
        for each in self.coordinates:
            each.apply()


class SecondMoments:
    """Of a layer's inputs: between the channels of a group, and between the positions of the kernel.

    Args:
        module: of WHITENED.

    Attributes:
        channels: [channels of a group, channels of a group] sums. positions: [kernel positions, kernel positions]; a linear
            layer has one position.
    """

    def __init__(self, module: nn.Module):
        self.kernel, self.dilation = getattr(module, "kernel_size", ()), getattr(module, "dilation", ())
        self.dtype = module.weight.dtype
        self.groups, (_, channels, *_) = getattr(module, "groups", 1), module.weight.shape
        sizes = channels, module.weight[0, 0].numel()
        self._sums = [module.weight.new_zeros(1, size, size, dtype=torch.float64) for size in sizes]  # lower triangles

    @property
    def channels(self) -> Tensor:
        return symmetric(self._sums[0][0])

    @property
    def positions(self) -> Tensor:
        return symmetric(self._sums[1][0])

    def add(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """A forward pre-hook that sees named inputs. Positions are compared in the first image of a batch alone."""
        x, space = args[0] if args else kwargs["input"], len(self.kernel)
        x = x.movedim(-space - 1, 0)  # channels first
        add_gram(self._sums[0], x.unflatten(0, (self.groups, -1)).transpose(0, 1).flatten(1)[None])
        if space:
            first = x if x.dim() == space + 1 else x[:, 0]
            add_gram(self._sums[1], self._at_positions(first)[None])

    def _at_positions(self, x):
        """[kernel positions, rows] what every position of the kernel sees of x [channels, *space], with a stride of 1."""
        reaches = [step * (size - 1) for size, step in zip(self.kernel, self.dilation, strict=True)]
        x = F.pad(x, [side for reach in reversed(reaches) for side in (reach // 2, reach - reach // 2)])
        for axis, (reach, step) in enumerate(zip(reaches, self.dilation, strict=True), 1):
            x = x.unfold(axis, reach + 1, 1)[..., ::step]
        return x.flatten(-len(reaches)).movedim(-1, 0).flatten(1)

    def inverses(self) -> tuple[Tensor, Tensor]:
        """L^-1 of both, damped and scaled to a mean of 1 along their diagonals; of all processes."""
        totals = map(all_reduce_sum, (self.channels, self.positions))
        return tuple(_inverse_factor(total).to(self.dtype) for total in totals)


def _inverse_factor(moments):
    mean, identity = moments.diagonal().mean(), torch.eye(len(moments), dtype=moments.dtype, device=moments.device)
    if not 0 < mean < torch.inf:  # the layer was not called, sees nothing but zeros, or is linear and has no positions
        return identity
    factor = torch.linalg.cholesky(moments / mean + DAMPING * identity)
    return torch.linalg.solve_triangular(factor, identity, upper=False)


def _product(weight, channels, positions):
    """A weight times a matrix along its channels and one along its kernel positions."""
    found = torch.einsum("oit,ij,tu->oju", weight.view(*weight.shape[:2], -1), channels, positions)
    return found.view_as(weight)
