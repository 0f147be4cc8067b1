"""Fine-tuning: epochs of training steps, each validated and kept in a checkpoint; the best epoch's weights stay.

SGD with Nesterov momentum, cosine decay to zero, cross-entropy, and what else a `Recipe` names: warm-up, distillation from
a teacher (Hinton et al. 2015, arXiv:1503.02531), an exponential moving average of the weights. No step waits for a GPU:
losses and checks of the batches are read every 32 steps, and by then a bad loss has spoilt weights that are thrown away.
"""

import math
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from taylor_pruning.distributed import is_main, world_size
from taylor_pruning.errors import InputError
from taylor_pruning.files import checkpoint_file
from taylor_pruning.generators import rng_state, seed_torch, set_rng_state
from taylor_pruning.modes import in_evaluation, modes_kept
from taylor_pruning.tasks.classification import is_classification, task_of
from taylor_pruning.tasks.task import Task
from taylor_pruning.training.epochs import History, Interrupted, Training, TrainingDiverged
from taylor_pruning.training.evaluation import Accuracy, evaluate, figures, reestimate_batchnorm
from taylor_pruning.training.recipe import Recipe

__all__ = ["Accuracy", "History", "Interrupted", "Recipe", "TrainingDiverged",
           "evaluate", "fine_tune", "reestimate_batchnorm", "train_steps"]  # fmt: skip


def fine_tune(
    model: nn.Module,
    train_loader: Iterable,
    val_loader: Iterable,
    recipe: Recipe,
    *,
    teacher: nn.Module | None = None,
    before: Accuracy | dict | None = None,
    monitor: list | None = None,
    task: Task | None = None,
    memory_limit: int | None = None,
    checkpoint: Path | None = None,
    resume: bool = False,
    start: dict | None = None,
    description: str = "fine-tune",
    progress: bool = True,
) -> History:
    """Train `model` in place; it ends with the weights of the epoch of best validation top-1 (ties: least loss).

    Loaders yield (images [B, C, H, W], labels [B]) on the model's device, or the batches of `task`, whose loss is then
    trained and whose main metric chooses the epoch; `train_loader` has a length, and
    `train_loader.set_epoch(epoch)`, where there is one, sets order and augmentation, epochs count from 1. The given
    weights compete as epoch 0, so the result is never worse than they are on the validation images; `before` is their
    accuracy where it is known. `monitor`: batches on which accuracy is measured at some steps (training.curve), this
    process's share. With an EMA, its weights are the ones validated and kept. `memory_limit`: bytes within which validation
    stays, see training.evaluation.evaluate; training itself takes what a batch needs.

    `checkpoint` is written after every epoch. `resume=True` continues from it (from the start if there is no such file), on
    CPU with the same bits as an unbroken run if the loader has `set_epoch`. Weights come from the checkpoint, so that those
    of the given model do not matter; `start`, plain values that say where they come from, must be those of the checkpoint.
    Under torch.distributed each process calls this with its own shard of equally many batches; rank 0 writes and prints.

    Raises InputError (settings, data, a checkpoint of another run, GPU memory), TrainingDiverged, and Interrupted on
    Ctrl-C; in each case the model holds the best weights so far.
    """
    task = task_of(task)
    _check_arguments(model, train_loader, recipe, teacher, task)
    checkpoint = checkpoint_file(checkpoint, resume)
    with modes_kept(model), _teaching(teacher, model):
        run = Training(model, recipe, teacher, len(train_loader), checkpoint, monitor=monitor, task=task,
                       memory_limit=memory_limit, start=start)  # fmt: skip
        try:
            if resume and checkpoint and checkpoint.exists():
                run.load(before)
            _run_epochs(run, train_loader, val_loader, before, description, progress)
        except KeyboardInterrupt:
            raise _interrupted(run) from None
        except torch.OutOfMemoryError as error:
            raise _out_of_memory(run, description) from error
        finally:
            run.restore_best()
    return run.history


@contextmanager
def _teaching(teacher: nn.Module | None, model: nn.Module) -> Iterator[None]:
    """The teacher in evaluation mode. It comes back as it was, but for modules that it shares with the trained model."""
    if teacher is None:
        yield
        return
    shares = not set(teacher.modules()).isdisjoint(model.modules())
    with modes_kept(teacher) if shares else in_evaluation(teacher):
        teacher.eval()
        yield


def _run_epochs(
    run: Training, train_loader, val_loader, before: Accuracy | dict | None, description: str, progress: bool
) -> None:
    epochs = run.recipe.epochs
    quiet = not (progress and is_main())
    for epoch in range(len(run.history.epochs), epochs + 1):
        start, accuracy = time.perf_counter(), None if epoch else before
        name = f"{description} {epoch}/{epochs}"
        record = {"epoch": epoch, "lr": 0.0, "train_loss": None}
        if not epoch:
            run.measure()
        else:
            with tqdm(total=run.steps_per_epoch, desc=name, unit="step", leave=False, disable=quiet) as bar:
                record |= run.train_epoch(train_loader, epoch, bar)
        if accuracy is None:
            accuracy = run.validate(val_loader, f"{name}, validation", progress)
        run.finish_epoch({**record, **figures(accuracy), "seconds": time.perf_counter() - start})
        if not quiet:
            train_loss = f"train loss {record['train_loss']:.4f}, " if epoch else ""
            tqdm.write(f"{name}: {train_loss}{_in_words(accuracy)}")


def _in_words(accuracy: Accuracy | dict) -> str:
    if isinstance(accuracy, Accuracy):
        top1, top5 = accuracy.top1, accuracy.top5
        return f"validation loss {accuracy.loss:.4f}, top-1 {top1:.2f} %, top-5 {top5:.2f} %"
    return "validation " + ", ".join(f"{name} {value:.4g}" for name, value in accuracy.items())


def train_steps(
    model: nn.Module,
    train_loader: Iterable,
    recipe: Recipe,
    steps: int,
    *,
    loss_before: float,
    teacher: nn.Module | None = None,
    task: Task | None = None,
    round_index: int = 0,
    seed: int = 0,
    description: str = "train",
    progress: bool = True,
) -> None:
    """Train `model` in place for `steps` optimiser steps at the constant rate `recipe.lr`; it keeps the last weights.

    For the short trainings between pruning rounds (Molchanov et al. 2017): the recipe without epochs, warm-up, decay and
    weight averaging, and without validation. `loss_before` (nats), of the model as it is given, sets the limit above which
    training counts as diverged. Trainings of different `round_index` (from 0) on one loader see different epochs of it.
    Dropout follows `seed` and `round_index`, and the random generators come back as they were, so that what follows does
    not depend on this training.

    Raises InputError and TrainingDiverged as fine_tune does; the model then has its weights from before.
    """
    recipe = replace(recipe, epochs=1, warmup_epochs=0.0, ema_decay=0.0)
    task = task_of(task)
    _check_arguments(model, train_loader, recipe, teacher, task)
    with modes_kept(model), _teaching(teacher, model):
        run = Training(model, recipe, teacher, len(train_loader), constant_lr=True, task=task)
        run.history.epochs.append({"epoch": 0, "loss": loss_before})
        epochs, rng = math.ceil(steps / run.steps_per_epoch), rng_state(run.device)
        seed_torch(seed + round_index, run.device)
        quiet = not (progress and is_main())
        try:
            with tqdm(total=steps, desc=description, unit="step", leave=False, disable=quiet) as bar:
                for epoch in range(epochs):
                    first = 1 + round_index * epochs
                    run.train_epoch(train_loader, first + epoch, bar, steps - epoch * run.steps_per_epoch)
            run.keep_weights()
        except torch.OutOfMemoryError as error:
            raise _out_of_memory(run, description) from error
        finally:
            run.restore_best()
            set_rng_state(rng, run.device)


def _check_arguments(model: nn.Module, train_loader, recipe: Recipe, teacher: nn.Module | None, task: Task) -> None:
    if recipe.epochs and not len(train_loader):
        raise InputError("fine-tuning: the training loader is empty; check the data path and the batch size")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise InputError("fine-tuning: no parameter of the model requires a gradient; call model.requires_grad_(True)")
    if recipe.distillation_weight and teacher is None:
        raise InputError("fine-tuning: distillation needs a teacher; give one, or set distillation_weight to 0")
    check_recipe(recipe, task)
    if recipe.sync_batchnorm and world_size() > 1 and next(model.parameters()).device.type != "cuda":
        raise InputError("fine-tuning: sync_batchnorm works on CUDA only; turn it off on this device")


def check_recipe(recipe: Recipe, task: Task) -> None:
    """Raises InputError naming what the recipe asks for that only class logits have, or that the task does not define."""
    if not recipe.epochs or is_classification(task):
        return
    task.require("loss", "training needs")
    for name in ("label_smoothing", "distillation_weight", "amp_validation"):
        if getattr(recipe, name):
            raise InputError(
                f"fine-tuning: {name} needs class logits, which the task {task.name} has not; leave it at 0"
            )


def _out_of_memory(run: Training, description: str) -> InputError:
    return InputError(
        f"{description}: out of memory on {run.device} in epoch {len(run.history.epochs)}; lower --batch-size, "
        f"or lower it and raise --accumulate (now {run.recipe.accumulate}) by the same factor"
    )


def _interrupted(run: Training) -> Interrupted:
    if run.saved_epoch is None:
        return Interrupted("training was interrupted and there is no checkpoint", "start it again", None)
    return Interrupted(
        f"training was interrupted; {run.checkpoint} holds epoch {run.saved_epoch} of {run.recipe.epochs}",
        "resume=True continues from there",
        run.checkpoint,
    )
