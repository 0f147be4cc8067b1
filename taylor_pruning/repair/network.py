"""Repair across layers: all weights of a pruned network follow the dense network's outputs, without labels.

Least squares of single layers (repair.compensation) cannot trade an error of one layer against another's. From where they
end, a few hundred steps of Adam lower the divergence of the network's outputs from the dense network's, on the images that
the layers were fitted to and on their mirror images. BatchNorms keep their statistics meanwhile. Each tensor's rate is a
share of its size, so that one rate suits all networks; rates fall to zero along half a cosine. Other images judge: the
weights that diverge least on them are kept, those before the first step included, so that few images do no harm.
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
HELD_OUT, MOST_HELD_OUT = 0.2, 500  # share of the images that judges, and its largest number
JUDGED = 10  # times in all


@dataclass(frozen=True)
class NetworkRepair:
    """What `repair_network` did. Losses are of the held-out images."""

    loss_before: float
    loss_after: float
    steps: int  # after which the weights were best; 0: the weights are those from before
    of_steps: int
    images: int  # of the steps
    held_out: int
    seconds: float

    def as_dict(self) -> dict:
        return asdict(self)


def split(batches: list, seed: int) -> tuple[list, list]:
    """(batches to fit to, batches that judge) of batches (images, labels), drawn at random; a fifth judges, at most 500.

    What has been fitted to the images that judge would look better than it is.
    """
    number = sum(len(images) for images, _ in batches)
    count = min(max(1, int(HELD_OUT * number)), MOST_HELD_OUT)
    judges = torch.randperm(number, generator=torch.Generator().manual_seed(seed)) < count
    parts, first = ([], []), 0
    for images, labels in batches:
        chosen = judges[first : first + len(images)].to(images.device)
        first += len(images)
        for part, mask in zip(parts, (~chosen, chosen), strict=True):
            if mask.any():
                part.append((images[mask], labels[mask.to(labels.device)]))
    return parts


def repair_network(
    dense: nn.Module,
    smaller: nn.Module,
    batches: list,
    held_out: list,
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
        batches: list of (images [B, C, H, W], labels), labels are not used. held_out: others, to which nothing was fitted.
        loss: how far outputs are from the dense network's, loss(outputs, wanted), a mean over the batch. Behind a softmax a
            temperature of 4 gives more accuracy than 1, at which answers that are sure already say little.
        steps: of 64 images each, or as many as the largest batch has. The dense network runs once over all images and
            their mirror images.
        seed: of the order and the mirroring.

    Under torch.distributed every process takes a part of each step's images; gradients are averaged.

    Raises InputError if there are no images, or the dense network answers NaN or Inf.
    """
    if not (batches and held_out):
        raise InputError("repair of the network: there is one image or none; give at least two calibration images")
    start, mine = time.perf_counter(), _Images(dense, batches, held_out, seed)
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
    used = len(mine.images), len(mine.held_out)
    return NetworkRepair(before, best, at, steps, *used, time.perf_counter() - start)


class _Images:
    """This process's images with the dense network's answers: batches to train on, and held-out ones that judge."""

    def __init__(self, dense: nn.Module, batches: list, held_out: list, seed: int):
        self.generator = torch.Generator().manual_seed(seed)
        # views of single images, no copies
        self.images, self.held_out = ([x for part, _ in parts for x in part] for parts in (batches, held_out))
        self.at_once = min(IMAGES_A_STEP, max(len(part) for part, _ in batches))
        with frozen(dense):
            self.wanted = torch.stack([self._outputs(dense, self.images, mirrored) for mirrored in (False, True)])
            self.wanted_held_out = self._outputs(dense, self.held_out)
        if not (torch.isfinite(self.wanted).all() and torch.isfinite(self.wanted_held_out).all()):
            raise InputError(
                "repair of the network: the dense network answers NaN or Inf; check the images and its weights"
            )
        self.order = torch.empty(0, dtype=torch.long)

    def draw(self) -> tuple[Tensor, Tensor]:
        """This process's part of the next step's images, each mirrored with probability 1/2, and what is wanted."""
        if len(self.order) < self.at_once:
            self.order = torch.cat([self.order, torch.randperm(len(self.images), generator=self.generator)])
        chosen, self.order = self.order[: self.at_once], self.order[self.at_once :]
        mirrored = torch.randint(2, (self.at_once,), generator=self.generator)
        mine = slice(rank() % self.at_once, None, world_size())
        chosen, mirrored = chosen[mine], mirrored[mine]
        images = torch.stack([self.images[i] for i in chosen])
        flipped = mirrored.bool().to(images.device).view(-1, *[1] * (images.dim() - 1))
        wanted = self.wanted[mirrored.to(images.device), chosen.to(images.device)]
        return torch.where(flipped, images.flip(-1), images), wanted

    def judge(self, model: nn.Module, loss: Callable) -> float:
        """The loss on the held-out images, the same in all processes."""
        value = loss(self._outputs(model, self.held_out), self.wanted_held_out).double()
        return (all_reduce_sum(value) / world_size()).item()

    @torch.no_grad()
    def _outputs(self, model: nn.Module, images: list[Tensor], mirrored: bool = False) -> Tensor:
        parts = (torch.stack(images[i : i + self.at_once]) for i in range(0, len(images), self.at_once))
        return torch.cat([model(part.flip(-1) if mirrored else part) for part in parts])


def _scale(parameter: nn.Parameter) -> float:
    return max(parameter.detach().square().mean().sqrt().item(), SMALLEST)


def _rate_factor(step: int, steps: int) -> float:
    """From 0 up within the first steps, and down along half a cosine to 0 behind the last; `step` counts from 1."""
    return min(1.0, step / WARM_UP) * (0.5 + 0.5 * math.cos(math.pi * (step - 1) / steps))


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
