"""Repair across layers: all weights of a pruned network follow the dense network's outputs, without labels.

Least squares of single layers (repair.compensation) cannot trade an error of one layer against another's. From where they
end, a few hundred steps of Adam lower the divergence of the network's outputs from the dense network's, on the images that
the layers were fitted to and on their mirror images. BatchNorms keep their statistics meanwhile. The rate falls to zero
along half a cosine. A fifth of the images takes no part in the steps: the weights that diverge least on it are kept, those
before the first step included, so that few images do no harm.
"""

import copy
import math
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from taylor_pruning.distributed import all_reduce_sum, rank, world_size
from taylor_pruning.errors import InputError
from taylor_pruning.modes import frozen, modes_kept
from taylor_pruning.repair.paired_runs import refresh_batchnorms

STEPS = 300
IMAGES_A_STEP = 64
RATE = 0.01  # largest learning rate of Adam, relative to the root mean square of each tensor
SMALLEST = 1e-3  # root mean square of a tensor that is taken as that, so that biases of 0 move too
WARM_UP = 20  # steps; the first of Adam go by a single gradient each
HELD_OUT, MOST_HELD_OUT = 0.2, 500  # share of the images that judges the weights, and its largest number
JUDGED = 10  # times in all


@dataclass(frozen=True)
class NetworkRepair:
    """What `repair_network` did. Losses are of the held-out images."""

    loss_before: float
    loss_after: float
    steps: int  # after which the weights were best; 0: the weights are those from before
    of_steps: int
    images: int  # held-out ones included
    seconds: float

    def as_dict(self) -> dict:
        return asdict(self)


def repair_network(
    dense: nn.Module,
    smaller: nn.Module,
    batches: list,
    loss: Callable[[Tensor, Tensor], Tensor],
    *,
    steps: int = STEPS,
    seed: int = 0,
    progress: bool = True,
) -> NetworkRepair:
    """Trains `smaller`, in place, to answer as `dense` does; it ends with the weights that do so best on held-out images.

    Args:
        dense: the network before any pruning.
        smaller: the pruned network, its layers fitted already.
        batches: list of (images [B, C, H, W], labels), labels are not used.
        loss: how far outputs are from the dense network's, loss(outputs, wanted), a mean over the batch. Behind a softmax a
            temperature of 4 gives more accuracy than 1, at which answers that are sure already say little.
        steps: of 64 images each. The dense network runs once over all images and their mirror images.
        seed: of the held-out images, the order and the mirroring.

    Under torch.distributed every process takes a part of each step's images; gradients are averaged.

    Raises InputError if there are fewer than two images, or the dense network answers NaN or Inf.
    """
    start, images = time.perf_counter(), torch.cat([images for images, _ in batches]) if batches else []
    if len(images) < 2:
        raise InputError("repair of the network: there is one image or none; give at least two calibration images")
    mine = _Images(dense, images, seed)
    with _trainable(smaller) as parameters:
        best, kept, at = mine.judge(smaller, loss), _copy_of(smaller), 0
        before, between = best, math.ceil(steps / JUDGED)
        optimizer = torch.optim.Adam([{"params": [p], "scale": _scale(p)} for p in parameters])
        for step in tqdm(range(1, steps + 1), desc="repair", unit="step", leave=False, disable=not progress):
            for group in optimizer.param_groups:
                group["lr"] = RATE * group["scale"] * _rate_factor(step, steps)
            part, wanted = mine.draw()
            loss(smaller(part), wanted).backward()
            _average_gradients(parameters)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if step % between == 0 or step == steps:
                now = mine.judge(smaller, loss)
                if now < best:
                    best, kept, at = now, _copy_of(smaller), step
        smaller.load_state_dict(kept)
    if at:
        refresh_batchnorms(smaller, [images for images, _ in batches])
    return NetworkRepair(before, best, at, steps, len(images), time.perf_counter() - start)


class _Images:
    """This process's images with the dense network's answers: batches to train on, and held-out ones that judge."""

    def __init__(self, dense: nn.Module, images: Tensor, seed: int):
        self.generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(images), generator=self.generator)
        count = min(max(1, int(HELD_OUT * len(images))), MOST_HELD_OUT)
        self.images, self.held_out = images[order[count:].to(images.device)], images[order[:count].to(images.device)]
        with frozen(dense), torch.no_grad():
            self.wanted = torch.stack([_outputs(dense, part) for part in (self.images, self.images.flip(-1))])
            self.wanted_held_out = _outputs(dense, self.held_out)
        if not (torch.isfinite(self.wanted).all() and torch.isfinite(self.wanted_held_out).all()):
            raise InputError(
                "repair of the network: the dense network answers NaN or Inf; check the images and its weights"
            )
        self.order = torch.empty(0, dtype=torch.long)

    def draw(self) -> tuple[Tensor, Tensor]:
        """This process's part of the next step's images, each mirrored with probability 1/2, and what is wanted."""
        number = min(IMAGES_A_STEP, len(self.images))
        if len(self.order) < number:
            self.order = torch.cat([self.order, torch.randperm(len(self.images), generator=self.generator)])
        chosen, self.order = self.order[:number], self.order[number:]
        mirrored = torch.randint(2, (number,), generator=self.generator)
        part = slice(rank() % number, None, world_size())
        chosen, mirrored = (x[part].to(self.images.device) for x in (chosen, mirrored))
        images = self.images[chosen]
        flipped = mirrored.bool().view(-1, *[1] * (images.dim() - 1))
        return torch.where(flipped, images.flip(-1), images), self.wanted[mirrored, chosen]

    @torch.no_grad()
    def judge(self, model: nn.Module, loss: Callable) -> float:
        """The loss on the held-out images, the same in all processes."""
        value = loss(_outputs(model, self.held_out), self.wanted_held_out).double()
        return (all_reduce_sum(value) / world_size()).item()


def _scale(parameter: nn.Parameter) -> float:
    return max(parameter.detach().square().mean().sqrt().item(), SMALLEST)


def _rate_factor(step: int, steps: int) -> float:
    """From 0 up within the first steps, and down along half a cosine to 0 behind the last; `step` counts from 1."""
    return min(1.0, step / WARM_UP) * (0.5 + 0.5 * math.cos(math.pi * (step - 1) / steps))


def _outputs(model: nn.Module, images: Tensor) -> Tensor:
    return torch.cat([model(part) for part in images.split(4 * IMAGES_A_STEP)])


def _copy_of(model: nn.Module) -> dict:
    return copy.deepcopy(model.state_dict())


def _average_gradients(parameters: list[nn.Parameter]) -> None:
    """Over the processes."""
    if world_size() == 1:
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    joined = all_reduce_sum(torch.cat([gradient.flatten() for gradient in gradients])) / world_size()
    for gradient, part in zip(gradients, joined.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


@contextmanager
def _trainable(model: nn.Module):
    """While open, the model is in evaluation mode and all its parameters require gradients; then all is as it was."""
    parameters = list(model.parameters())
    wanted = [parameter.requires_grad for parameter in parameters]
    with modes_kept(model):
        try:
            model.eval().requires_grad_(True)
            yield parameters
        finally:
            for parameter, flag in zip(parameters, wanted, strict=True):
                parameter.requires_grad_(flag)
                parameter.grad = None
