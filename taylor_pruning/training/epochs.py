"""A training in progress: its epochs, the best weights so far, and its checkpoint."""

import math
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path

from torch import nn
from tqdm import tqdm

from taylor_pruning.checks import nonfinite_weight
from taylor_pruning.distributed import barrier, broadcast_buffers, gather_objects, is_main, rank, world_size
from taylor_pruning.errors import InputError
from taylor_pruning.generators import rng_state, set_rng_state
from taylor_pruning.stored import restore, snapshot, stored
from taylor_pruning.tasks.batches import size
from taylor_pruning.tasks.classification import task_of
from taylor_pruning.tasks.task import Task
from taylor_pruning.training.checkpoint import check_same_loss, read_checkpoint, write_checkpoint
from taylor_pruning.training.checks import BatchLog
from taylor_pruning.training.curve import StepCurve
from taylor_pruning.training.evaluation import Accuracy, figures, measure
from taylor_pruning.training.recipe import Recipe
from taylor_pruning.training.steps import OptimiserSteps

# Training counts as diverged above this multiple of the validation loss before training (of 1 nat where that is less):
# 100 nats and more mean that the right class has probability e^-100, which a network only reaches when it diverges.
DIVERGED_AT = 100


OF_EPOCH = ("epoch", "lr", "train_loss", "seconds")  # entries of an epoch that are no metrics


class TrainingDiverged(RuntimeError):
    """NaN, Inf or a huge loss; carries `epoch`, `step` (from 1, within the epoch), `lr`, `checkpoint` (or None).

    The message says `reason`, what happened and what to do, and what is left.
    """

    def __init__(self, reason: str, left: str, epoch: int, step: int, lr: float, checkpoint: Path | None):
        super().__init__(f"{reason}; {left}")
        self.reason, self.epoch, self.step, self.lr, self.checkpoint = reason, epoch, step, lr, checkpoint


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during training; `checkpoint` holds the last finished epoch (None if there is no checkpoint).

    The message says `reason`, in one line, and what to do from Python.
    """

    def __init__(self, reason: str, advice: str, checkpoint: Path | None):
        super().__init__(f"{reason}; {advice}")
        self.reason, self.checkpoint = reason, checkpoint


@dataclass
class History:
    """What fine-tuning did. epochs[e]: dict(epoch=e, lr, train_loss, top1, top5, loss, images, seconds).

    `lr` is the largest of the epoch and `train_loss` its mean training loss (nats); top1, top5, loss and images are the
    Accuracy on the validation images; another task has its own metrics in their place. Epoch 0 is the model as it was given
    (lr 0, train_loss None). steps: points of the StepCurve, [] where there is none.
    """

    epochs: list[dict]
    best_epoch: int
    steps: list[dict] = field(default_factory=list)

    @property
    def best(self) -> Accuracy | dict:
        """Of the weights that the model ended with."""
        figures = {key: value for key, value in self.epochs[self.best_epoch].items() if key not in OF_EPOCH}
        return Accuracy(**figures) if "top5" in figures else figures


class Training:
    """A training in progress: its steps, its history, the best weights so far, and its checkpoint."""

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        teacher: nn.Module | None,
        batches: int,
        checkpoint: Path | None = None,
        constant_lr: bool = False,
        monitor: list | None = None,
        task: Task | None = None,
        memory_limit: int | None = None,
        start: dict | None = None,
    ):
        self.model, self.checkpoint, self.task, self.memory_limit = model, checkpoint, task_of(task), memory_limit
        self.device = next(model.parameters()).device
        self.recipe = recipe = recipe.resolved(self.device, teacher is not None)
        self.start = start or {}
        self.identity = {**asdict(recipe), "batches per epoch": batches, "processes": world_size(), **self.start}
        self.batches = batches
        self.steps_per_epoch = math.ceil(batches / recipe.accumulate)
        total, warmup = (self.steps_per_epoch * epochs for epochs in (recipe.epochs, recipe.warmup_epochs))
        self.steps = OptimiserSteps(model, recipe, teacher, total=None if constant_lr else total, warmup=warmup,
                                    task=self.task)  # fmt: skip
        curve = monitor and recipe.accuracy_at_steps and recipe.epochs
        self.curve = StepCurve(monitor, total, self.task, memory_limit) if curve else None
        self.history = History([], 0, self.curve.points if self.curve else [])
        self.keep_weights()
        self.saved_epoch: int | None = None

    def train_epoch(self, loader, epoch: int, bar: tqdm, limit: int | None = None) -> dict:
        """The steps of one epoch, `limit` at most; returns its largest learning rate and mean training loss per image.

        Raises InputError if the loader gives no batch, as one that can be read only once.
        """
        self.steps.network.train()
        if hasattr(loader, "set_epoch"):
            loader.set_epoch(epoch)
        log, totals = BatchLog(self.device), _Totals()
        # A stream may give batches without an end; other loaders are read to their end, where they may count epochs.
        iterator, rates = (batch for batch, _ in zip(loader, range(self.batches), strict=False)), []
        while len(rates) != limit and (batches := list(islice(iterator, self.recipe.accumulate))):
            first = len(rates) * self.recipe.accumulate
            places = [f"training: epoch {epoch}, batch {first + index}" for index in range(len(batches))]
            rates.append(self.steps.lr)
            facts = self.steps.step(batches, places)
            for batch, values, where in zip(batches, facts, places, strict=True):
                log.add(values, classes=self.steps.classes, count=size(batch), where=where)
            measured = self.curve is not None and self.curve.due(self.steps.number)
            if log.due or measured:
                self._read(log, totals, epoch, rates)
                bar.set_postfix(loss=f"{totals.mean_loss:.3f}", lr=f"{rates[-1]:.2g}", refresh=False)
            if measured:
                self._check_weights(epoch, rates)
                self.measure()
            bar.update()
        if not rates:
            raise InputError(
                f"training: the loader gives no batch in epoch {epoch}; give one that can be read again and again"
            )
        self._read(log, totals, epoch, rates)
        self._check_weights(epoch, rates)
        broadcast_buffers(self.model)
        return {"lr": max(rates), "train_loss": totals.mean_loss}

    def _read(self, log: BatchLog, totals: "_Totals", epoch: int, rates: list[float]) -> None:
        """Check the batches since the last read, the same in all processes, and add their losses to the totals."""
        limit = DIVERGED_AT * max(1.0, self.history.epochs[0]["loss"])
        for shards in zip(*gather_objects(log.read()), strict=True):  # one big batch, spread over the processes
            for batch in shards:
                batch.check()
            images = sum(batch.count for batch in shards)
            loss = sum(batch.facts[0] * batch.count for batch in shards) / images
            step = 1 + totals.batches // self.recipe.accumulate
            if not loss <= limit:  # NaN too
                self._diverged(f"training loss {loss:.3g} (limit {limit:.3g})", epoch, step, rates)
            totals.add(loss, images)

    def _check_weights(self, epoch: int, rates: list[float]) -> None:
        if name := nonfinite_weight(self.model):
            self._diverged(f"{name} of the model holds NaN or Inf", epoch, len(rates), rates)

    def _diverged(self, what: str, epoch: int, step: int, rates: list[float]) -> None:
        lr = rates[step - 1]
        saved = f"{self.checkpoint} (epoch {self.saved_epoch})" if self.saved_epoch is not None else "none"
        raise TrainingDiverged(
            f"training diverged in epoch {epoch}, step {step} of {self.steps_per_epoch}, at learning rate {lr:.3g}: "
            f"{what}. Lower the learning rate",
            f"the model keeps the weights of epoch {self.history.best_epoch}, last good checkpoint: {saved}",
            epoch,
            step,
            lr,
            self.checkpoint if self.saved_epoch is not None else None,
        )

    def validate(self, loader, description: str, progress: bool) -> Accuracy | dict:
        model = self.steps.evaluated_model
        broadcast_buffers(model)
        amp = self.recipe.amp if self.recipe.amp_validation else None
        return measure(self.task, model, loader, amp=amp, description=description, progress=progress,
                       memory_limit=self.memory_limit)  # fmt: skip

    def measure(self) -> None:
        """Adds a point to the curve, if there is one."""
        if self.curve:
            broadcast_buffers(self.steps.evaluated_model)
            self.curve.measure(self.steps.number, self.steps.evaluated_model)

    def finish_epoch(self, record: dict) -> None:
        """Note the epoch in the history, keep its weights if they are the best so far, write the checkpoint."""
        self.history.epochs.append(record)
        if self._merit(record) > self._merit(self.history.epochs[self.history.best_epoch]):
            self.history.best_epoch = record["epoch"]
            self.keep_weights()
        if self.checkpoint:
            self.save()

    def _merit(self, record):
        value = record[self.task.main]
        return value if self.task.larger_is_better else -value, -record["loss"]

    def keep_weights(self) -> None:
        """Keeps the present weights; the model ends with them unless later ones are better."""
        self.best = snapshot(self.steps.evaluated_model)

    def save(self) -> None:
        generators = gather_objects(rng_state(self.device))
        if is_main():
            progress = {
                "history": self.history.epochs,
                "curve": self.history.steps,
                "best_epoch": self.history.best_epoch,
                "best": self.best,
            }
            state = {"identity": self.identity, **progress, **self.steps.state(), "rng": generators}
            write_checkpoint(self.checkpoint, state)
        barrier()
        self.saved_epoch = self.history.epochs[-1]["epoch"]

    def load(self, before: Accuracy | dict | None = None) -> None:
        """Go back to the state in the checkpoint.

        before: metrics of the model as it is given, where they are known.

        Raises InputError if the state is of another recipe, loader, network or of other validation images.
        """
        state = read_checkpoint(self.checkpoint, self.identity, stored(self.model), newer=self.start)
        if before is not None:
            self._check_start(state["history"][0], figures(before))
        self.history = History(state["history"], state["best_epoch"], state["curve"])
        if self.curve:
            self.curve.points = self.history.steps
        self.best = state["best"]
        self.steps.load_state(state)
        set_rng_state(state["rng"][rank()], self.device)
        self.saved_epoch = self.history.epochs[-1]["epoch"]

    def _check_start(self, then: dict, now: dict) -> None:
        if then.get("images") != now.get("images"):
            raise InputError(
                f"{self.checkpoint} was written with {then.get('images')} validation images, and there are "
                f"{now.get('images')} now; give the same, or start again without resuming"
            )
        check_same_loss("on the validation images, the network before fine-tuning", then["loss"], now["loss"])

    def restore_best(self) -> None:
        """Give the model back to its owner, with the best weights so far."""
        self.steps.release()
        restore(self.model, self.best)


@dataclass
class _Totals:
    """Of an epoch so far. The loss is summed over the images."""

    loss: float = 0.0
    images: int = 0
    batches: int = 0

    def add(self, mean_loss: float, images: int) -> None:
        self.loss, self.images, self.batches = self.loss + mean_loss * images, self.images + images, self.batches + 1

    @property
    def mean_loss(self) -> float:
        return self.loss / self.images
