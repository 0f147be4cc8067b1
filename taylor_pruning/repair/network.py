"""Repair across layers: all weights of a pruned network follow the dense network's outputs, without labels.

Least squares of single layers (repair.compensation) cannot trade an error of one layer against another's. From where they
end, a few passes of Adam lower the divergence of the network's outputs from the dense network's, on the images that the
layers were fitted to; a classifier's are also mirrored. BatchNorms keep their statistics meanwhile. Steps are made in
coordinates in which a layer's inputs are white (repair.whitening), and are a share of the weights there, so that one rate
suits all networks; rates fall to zero along half a cosine. Other images judge: the weights that diverge least on them are
kept, if the gain over the first weights exceeds two of its standard errors. So a repair on few images does no harm.
"""

import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from taylor_pruning.distributed import all_reduce_sum, gather_objects, rank, world_size
from taylor_pruning.errors import InputError
from taylor_pruning.modes import frozen, modes_kept, own_precision, requirements_kept
from taylor_pruning.repair.paired_runs import refresh_batchnorms
from taylor_pruning.repair.whitening import WhiteAdam, white_coordinates
from taylor_pruning.stored import restore, snapshot
from taylor_pruning.surgery.parts import recorded_inputs
from taylor_pruning.tasks.batches import join, select, shapes, size
from taylor_pruning.tasks.batches import split as in_parts
from taylor_pruning.tasks.classification import is_classification, task_of
from taylor_pruning.tasks.task import Task, flatten

PASSES = 2  # over the images
IMAGES_A_STEP = 8
# The largest learning rate of Adam is RATE_A_PASS times the number of passes, but at most LARGEST_RATE, relative to the root
# mean square of each tensor. The first steps lead away from the closed form; with more steps to follow they may lead further.
RATE_A_PASS, LARGEST_RATE = 0.001, 0.005
WARM_UP = 0.1  # share of the steps: Adam's averages of the gradient begin with a single one
HELD_OUT, MOST_HELD_OUT = 0.2, 500  # share of the images that judges, and its largest number
JUDGED = 10  # times in all
SURE = 2.0  # standard errors by which a gain must exceed zero


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
    """(batches to fit to, batches that judge), the samples of `batches` drawn at random; a fifth judges, at most 500.

    What has been fitted to the images that judge would look better than it is.
    """
    number = sum(map(size, batches))
    count = min(max(1, int(HELD_OUT * number)), MOST_HELD_OUT)
    judges = torch.randperm(number, generator=torch.Generator().manual_seed(seed)) < count
    parts, first = ([], []), 0
    for batch in batches:
        chosen = judges[first : first + size(batch)]
        first += size(batch)
        for part, mask in zip(parts, (~chosen, chosen), strict=True):
            if mask.any():
                part.append(select(batch, mask.nonzero().flatten()))
    return parts


def check_repairable(batches: list) -> None:
    """Raises InputError if the repair cannot use these images: they are fewer than two, or cannot be joined to batches."""
    if sum(map(size, batches)) < 2:
        raise InputError("repair of the network: there is one image or none; give at least two compensation images")
    check_joinable(batches)


def check_joinable(batches: list) -> None:
    """Raises InputError if the samples of the batches cannot be joined to others."""
    if len({shapes(batch) for batch in batches}) > 1:
        raise InputError(
            "repair of the network: images of different sizes cannot form one batch; give images of one size, or repair "
            "the layers alone"
        )


@own_precision()
def repair_network(
    dense: nn.Module,
    smaller: nn.Module,
    batches: list,
    held_out: list,
    losses: Callable,
    *,
    task: Task | None = None,
    parts: Sequence[str] = ("",),
    passes: float = PASSES,
    rate: float | None = None,
    seed: int = 0,
    progress: bool = True,
) -> NetworkRepair:
    """Trains `smaller`, in place, to answer as `dense` does; it ends with the weights that do so best on held-out images.

    Args:
        dense: the network before any pruning.
        smaller: the pruned network, its layers fitted already.
        batches: list of batches of `task` (default: classification), labels are not used. held_out: others, to which nothing
            was fitted.
        losses: how far outputs are from the dense network's, losses(outputs, wanted) -> [samples]. Behind a softmax a
            temperature of 4 gives more accuracy than 1, at which answers that are sure already say little.
        parts: names of the modules that can be traced; their BatchNorms take new statistics at the end.
        passes: over the images, in steps of 8, or of as many as the largest batch has. A classifier's dense network runs
            once over all images and their mirror images; that of another task, whose outputs may be large, runs at every step
            and whenever `smaller` is judged, 11 times in all.
        rate: largest learning rate relative to the size of the weights; default: 0.001 for each pass, 0.005 at most.
        seed: of the order and the mirroring.

    Under torch.distributed every process takes a part of each step's images; gradients are averaged.

    Raises InputError if there are no images, images cannot be joined to batches, or the dense network answers NaN or Inf.
    """
    if not (batches and held_out):
        raise InputError("repair of the network: some images are fitted to and others judge; give at least two")
    check_joinable(batches)
    start, task = time.perf_counter(), task_of(task)
    rate = min(RATE_A_PASS * passes, LARGEST_RATE) if rate is None else rate
    mine = _Samples(dense, task, batches, held_out, seed)
    steps = max(1, round(passes * len(mine.places) / mine.at_once))
    with _trainable(smaller) as parameters:
        before = best = mine.judge(smaller, losses)
        kept, at, between = snapshot(smaller), 0, math.ceil(steps / JUDGED)
        optimizer = WhiteAdam(white_coordinates(smaller, mine.forwards(smaller)))
        for step in tqdm(range(1, steps + 1), desc="repair", unit="step", leave=False, disable=not progress):
            batch, wanted = mine.draw()
            losses(task.forward(smaller, batch), wanted).mean().backward()
            _average_gradients(parameters)
            optimizer.step(rate * _rate_factor(step, steps))
            if step % between == 0 or step == steps:
                now = mine.judge(smaller, losses)
                if now.mean() < best.mean() and _is_sure(before - now):
                    best, kept, at = now, snapshot(smaller), step
        restore(smaller, kept)
    if at:
        _refresh_batchnorms(smaller, parts, task, batches)
    seconds = time.perf_counter() - start
    used = len(mine.places), sum(map(size, held_out))
    return NetworkRepair(before.mean().item(), best.mean().item(), at, steps, *used, seconds)


class _Samples:
    """Samples with the dense network's outputs: all to train on, and this process's share of the held-out ones that judge."""

    def __init__(self, dense: nn.Module, task: Task, batches: list, held_out: list, seed: int):
        self.dense, self.task, self.batches = dense, task, batches
        self.generator = torch.Generator().manual_seed(seed)
        self.places = [(number, row) for number, batch in enumerate(batches) for row in range(size(batch))]
        self.at_once = min(IMAGES_A_STEP, max(map(size, batches)))
        self.few, held_out = (
            [part for batch in given for part in in_parts(batch, self.at_once)] for given in (batches, held_out)
        )
        self.held_out = held_out[rank() :: world_size()]
        self.wanted = self.wanted_held_out = None
        if is_classification(task):
            self.wanted_held_out = [self._answers(part) for part in self.held_out]
            kept = [[self._answers(part, mirror) for part in self.few] for mirror in (False, True)]
            self.wanted = torch.stack([torch.cat(outputs) for outputs in kept])
        self.order = torch.empty(0, dtype=torch.long)

    def forwards(self, model: nn.Module) -> Iterator[Callable]:
        """Calls of `model` on all samples to train on, a few at a time."""
        return (functools.partial(self.task.forward, model, part) for part in self.few)

    def draw(self) -> tuple:
        """This process's part of the next step's samples, and what is wanted; a classifier's with probability 1/2 mirrored."""
        if len(self.order) < self.at_once:
            self.order = torch.cat([self.order, torch.randperm(len(self.places), generator=self.generator)])
        chosen, self.order = self.order[: self.at_once], self.order[self.at_once :]
        mirrored = torch.randint(2, (self.at_once,), generator=self.generator)
        mine = slice(rank() % self.at_once, None, world_size())
        chosen, mirrored = chosen[mine], mirrored[mine]
        batch = self._joined([self.places[i] for i in chosen])
        if self.wanted is None:
            return batch, self._answers(batch)
        images, *rest = batch
        flipped = mirrored.bool().to(images.device).view(-1, *[1] * (images.dim() - 1))
        wanted = self.wanted[mirrored.to(images.device), chosen.to(images.device)]
        return (torch.where(flipped, images.flip(-1), images), *rest), wanted

    @torch.no_grad()
    def judge(self, model: nn.Module, losses: Callable) -> Tensor:
        """[held-out samples of all processes] the losses, the same in all processes."""
        wanted = map(self._answers, self.held_out) if self.wanted_held_out is None else self.wanted_held_out
        pairs = zip(self.held_out, wanted, strict=True)
        found = [losses(self.task.forward(model, batch), answers).double().cpu() for batch, answers in pairs]
        return torch.cat(gather_objects(torch.cat(found) if found else torch.empty(0, dtype=torch.float64)))

    def _joined(self, places):
        return join([select(self.batches[number], torch.tensor([row])) for number, row in places])

    @torch.no_grad()
    def _answers(self, batch, mirror: bool = False):
        """The dense network's outputs."""
        if mirror:
            batch = (batch[0].flip(-1), *batch[1:])
        with frozen(self.dense):
            outputs = self.task.forward(self.dense, batch)
        if not flatten(outputs).isfinite().all():
            raise InputError(
                "repair of the network: the dense network answers NaN or Inf; check the images and its weights"
            )
        return outputs


def _is_sure(gains: Tensor) -> bool:
    """Whether a mean gain [samples] is more than chance; of a single sample it never is."""
    return len(gains) > 1 and (gains.mean() > SURE * gains.std() / math.sqrt(len(gains))).item()


def _refresh_batchnorms(model: nn.Module, parts: Sequence[str], task: Task, batches: list) -> None:
    for name in parts:
        inputs = [recorded_inputs(model, name, functools.partial(task.forward, batch=batch)) for batch in batches]
        refresh_batchnorms(model.get_submodule(name), inputs)


def _rate_factor(step: int, steps: int) -> float:
    """From 0 up within the first steps, and down along half a cosine to 0 behind the last; `step` counts from 1."""
    return min(1.0, step / (WARM_UP * steps)) * (0.5 + 0.5 * math.cos(math.pi * (step - 1) / steps))


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
    with modes_kept(model), requirements_kept(model):
        try:
            model.eval().requires_grad_(True)
            yield parameters
        finally:
            for parameter in parameters:
                parameter.grad = None
