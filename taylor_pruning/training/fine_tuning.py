"""Evaluating, fine-tuning and re-calibrating a classifier, on one device or on several.

Fine-tuning is SGD with Nesterov momentum, linear warm-up and cosine decay to zero, label cross-entropy plus
distillation from a teacher (Hinton et al. 2015, arXiv:1503.02531), and optionally an exponential moving average of the
weights. Every epoch ends in a checkpoint, and the best epoch's weights are what the caller gets.
"""

import itertools
import math
import pickle
import random
import time
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from taylor_pruning.training.distributed import all_reduce_sum, barrier, broadcast_buffers, gather_objects, is_main, rank, world_size
from taylor_pruning.errors import InputError, atomic_file

AMP_DTYPES = {None: None, "bf16": torch.bfloat16, "fp16": torch.float16}

# Training counts as diverged above this multiple of the validation loss before training (of 1 nat where that is less):
# 100 nats and more mean that the right class has probability e^-100, which a network only reaches on its way to Inf.
DIVERGED_AT = 100


class TrainingDiverged(RuntimeError):
    """NaN, Inf or a huge loss; carries `epoch`, `step` (from 1, within the epoch), `lr`, `checkpoint` (or None)."""

    def __init__(self, message: str, epoch: int, step: int, lr: float, checkpoint: Path | None):
        super().__init__(message)
        self.epoch, self.step, self.lr, self.checkpoint = epoch, step, lr, checkpoint


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during training; `checkpoint` holds the last finished epoch (None if there is no checkpoint)."""

    def __init__(self, message: str, checkpoint: Path | None):
        super().__init__(message)
        self.checkpoint = checkpoint


@dataclass(frozen=True)
class Accuracy:
    """Top-1 and top-min(5, classes) accuracy in per cent, mean cross-entropy in nats, number of images."""

    top1: float
    top5: float
    loss: float
    images: int


@dataclass(frozen=True)
class Recipe:
    """How to fine-tune. Raises InputError on a value outside its range.

    epochs: passes over the training images, 0 for evaluation only.
    lr, momentum, weight_decay: of SGD, Nesterov where there is momentum; the decay acts on all parameters.
    warmup_epochs: epochs, or a fraction of one, of linear warm-up before the cosine decay to zero; less than `epochs`.
    label_smoothing, distillation_weight w, temperature T: loss = (1 - w) CE + w T^2 KL(teacher || model), the KL at
        logits / T.
    ema_decay: per optimiser step, 0 for off; weights older than about 1 / (1 - decay) steps are forgotten, so a decay
        that outlasts the run hardly leaves the start.
    amp: None, "bf16" or "fp16" (with gradient scaling) for mixed-precision training; evaluation stays in full.
    accumulate: batches of the loader per optimiser step, weighted by their images, so that one step equals the step of
        one big batch (BatchNorm apart, which sees the batches one by one).
    clip_norm: largest gradient norm, None for no clipping.
    sync_batchnorm: BatchNorm over the batches of all processes (CUDA only); no effect in one process.
    """

    epochs: int = 5
    lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 1e-4
    warmup_epochs: float = 0.0
    label_smoothing: float = 0.0
    distillation_weight: float = 0.0
    temperature: float = 4.0
    ema_decay: float = 0.0
    amp: str | None = None
    accumulate: int = 1
    clip_norm: float | None = None
    channels_last: bool = False
    compile: bool = False
    sync_batchnorm: bool = False

    def __post_init__(self):
        ranges = {
            "epochs": (self.epochs >= 0, "0 or more"),
            "lr": (0 < self.lr < math.inf, "positive"),
            "momentum": (0 <= self.momentum < 1, "in [0, 1)"),
            "weight_decay": (0 <= self.weight_decay < math.inf, "0 or more"),
            "warmup_epochs": (0 <= self.warmup_epochs < max(self.epochs, 1), "0 or more and less than epochs"),
            "label_smoothing": (0 <= self.label_smoothing < 1, "in [0, 1)"),
            "distillation_weight": (0 <= self.distillation_weight <= 1, "in [0, 1]"),
            "temperature": (0 < self.temperature < math.inf, "positive"),
            "ema_decay": (0 <= self.ema_decay < 1, "in [0, 1)"),
            "amp": (self.amp in AMP_DTYPES, "None, 'bf16' or 'fp16'"),
            "accumulate": (self.accumulate >= 1, "1 or more"),
            "clip_norm": (self.clip_norm is None or self.clip_norm > 0, "None or positive"),
        }
        for name, (valid, wanted) in ranges.items():
            if not valid:
                raise InputError(f"fine-tuning: {name} is {getattr(self, name)!r}; it must be {wanted}")


@dataclass
class History:
    """What fine-tuning did. epochs[e]: dict(epoch=e, lr, train_loss, top1, top5, loss, seconds).

    `lr` is the largest of the epoch and `train_loss` its mean training loss (nats); the other three are from the
    validation images. Epoch 0 is the model as it was given (lr 0, train_loss None).
    """

    epochs: list[dict]
    best_epoch: int


@contextmanager
def _modes_kept(*models: nn.Module) -> Iterator[None]:
    """Give every submodule its train/eval mode back at the end."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _check_images(images: Tensor, where: str) -> None:
    if not images.isfinite().all():
        raise InputError(f"{where} holds NaN or Inf pixels; look for broken images or a zero in the normalisation")


def _check_batch(images: Tensor, labels: Tensor, logits: Tensor, where: str) -> None:
    """Raise InputError before cross-entropy turns a bad batch into NaN, or into a CUDA assert that ends the process."""
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(labels):
        found = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise InputError(f"the model gave {found} for {where}; it must give logits [{len(labels)}, classes]")
    _check_images(images, where)
    lowest, highest = torch.stack(labels.aminmax()).tolist()
    classes = logits.shape[1]
    if lowest < 0 or highest >= classes:
        label = lowest if lowest < 0 else highest
        raise InputError(
            f"{where} holds label {label}, but the model has {classes} outputs (labels 0 to {classes - 1}); "
            "give the model as many outputs as the data has classes"
        )


def _nonfinite_tensor(model: nn.Module) -> str | None:
    """Name of the first parameter or buffer that holds NaN or Inf."""
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        if not tensor.isfinite().all():
            return name
    return None


@torch.no_grad()
def evaluate(model: nn.Module, loader, *, description: str = "evaluate", progress: bool = True) -> Accuracy:
    """Accuracy of `model` (images [B, C, H, W] -> logits [B, K]) over all (images, labels) of `loader`, in eval mode.

    Under torch.distributed the counts of all processes are summed. The modes of the model come back as they were.
    Raises InputError on an empty loader, NaN weights, NaN images, or labels outside the logits' range.
    """
    if name := _nonfinite_tensor(model):
        raise InputError(f"{name} of the model holds NaN or Inf; load sound weights")
    device = next(model.parameters()).device
    sums = torch.zeros(4, dtype=torch.float64, device=device)  # top-1 hits, top-5 hits, loss, images
    with _modes_kept(model):
        model.eval()
        bar = tqdm(loader, desc=description, leave=False, disable=not (progress and is_main()))
        for index, (images, labels) in enumerate(bar):
            logits = model(images)
            _check_batch(images, labels, logits, f"{description}: batch {index}")
            hits = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
            loss = F.cross_entropy(logits.double(), labels, reduction="sum")
            sums += torch.stack([hits[:, 0].sum(), hits.sum(), loss, loss.new_tensor(len(labels))])
    top1, top5, loss, images = all_reduce_sum(sums).tolist()
    if not images:
        raise InputError(f"{description}: the loader gives no images; check the data path and the number of images")
    return Accuracy(100 * top1 / images, 100 * top5 / images, loss / images, int(images))


@torch.no_grad()
def reestimate_batchnorm(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Replace, in place, every BatchNorm's running statistics by the averages over `batches`.

    Each batch is (images [B, C, H, W], labels) and weighs by its images. All other modules run in eval mode; modes and
    momenta come back as they were. No communication: under torch.distributed every process gives the same batches.
    Raises InputError if there is no batch.
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    momenta = [norm.momentum for norm in norms]
    seen = 0
    with _modes_kept(model):
        model.eval()
        for norm in norms:
            norm.train()
        try:
            for index, (images, _) in enumerate(batches):
                _check_images(images, f"BatchNorm statistics: batch {index}")
                seen += len(images)
                for norm in norms:
                    if index == 0:
                        norm.reset_running_stats()  # momentum 1 alone would keep an old NaN
                    norm.momentum = len(images) / seen
                model(images)
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum
    if not seen:
        raise InputError("BatchNorm statistics: there are no batches; give at least one batch of images")


def distillation_loss(logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """T^2 KL(softmax(teacher / T) || softmax(logits / T)), mean over the batch (Hinton et al. 2015). Both [B, K]."""
    log_p = F.log_softmax(logits / temperature, dim=1)
    log_q = F.log_softmax(teacher_logits / temperature, dim=1)
    return temperature**2 * F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)


def lr_factor(step: int, warmup_steps: float, total_steps: int) -> float:
    """Linear warm-up to 1 at `warmup_steps`, then half a cosine to 0 at `total_steps`."""
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    return 0.5 + 0.5 * math.cos(math.pi * (step - warmup_steps) / max(total_steps - warmup_steps, 1))


def _rng_state(device: torch.device) -> dict:
    """State of all random generators of this process, in types that torch.load(weights_only=True) takes."""
    name, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (name, keys.tolist(), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def _set_rng_state(state: dict, device: torch.device) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)


def _copy(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in state.items()}


class _Run:
    """One fine-tuning under way: all that a checkpoint holds, and how a step, an epoch and a checkpoint are made."""

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        teacher: nn.Module | None,
        batches: int,
        checkpoint: Path | None = None,
        constant_lr: bool = False,
    ):
        self.model, self.recipe, self.teacher, self.checkpoint = model, recipe, teacher, checkpoint
        self.device = next(model.parameters()).device
        self.steps = math.ceil(batches / recipe.accumulate)  # per epoch
        self.identity = {**asdict(recipe), "batches per epoch": batches, "processes": world_size()}
        if recipe.channels_last:
            model.to(memory_format=torch.channels_last)
        self.optimizer = torch.optim.SGD(
            [parameter for parameter in model.parameters() if parameter.requires_grad],
            lr=recipe.lr,
            momentum=recipe.momentum,
            weight_decay=recipe.weight_decay,
            nesterov=recipe.momentum > 0,
        )
        warmup, total = recipe.warmup_epochs * self.steps, recipe.epochs * self.steps
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: 1.0 if constant_lr else lr_factor(step, warmup, total)
        )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=recipe.amp == "fp16")
        self.network = self._training_network()
        self.ema = None
        if recipe.ema_decay:
            self.ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(recipe.ema_decay), use_buffers=True)
            self.ema.update_parameters(model)  # the first call only copies: the average starts at the given weights
        self.history = History([], 0)
        self.best = _copy(model.state_dict())
        self.saved_epoch: int | None = None

    def _training_network(self) -> nn.Module:
        """What runs forward in training: the model in its DistributedDataParallel and torch.compile wrappers."""
        network, self.gradient_sync_off = self.model, nullcontext
        if world_size() > 1:
            if self.recipe.sync_batchnorm:
                # Other modules around the same tensors, so that the caller's model keeps its plain BatchNorm.
                tensors = itertools.chain(self.model.parameters(), self.model.buffers())
                network = deepcopy(self.model, {id(tensor): tensor for tensor in tensors})
                network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
            ids = [self.device.index] if self.device.type == "cuda" else None
            network = DistributedDataParallel(network, device_ids=ids)
            self.gradient_sync_off = network.no_sync
        return torch.compile(network) if self.recipe.compile else network

    @property
    def evaluated_model(self) -> nn.Module:
        return self.ema.module if self.ema else self.model

    @property
    def lr(self) -> float:
        return self.optimizer.param_groups[0]["lr"]

    def loss(self, images: Tensor, labels: Tensor, where: str) -> Tensor:
        """Training loss of one batch, mean over its images."""
        recipe = self.recipe
        if recipe.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        with torch.autocast(self.device.type, AMP_DTYPES[recipe.amp], enabled=recipe.amp is not None):
            logits = self.network(images)
            with torch.no_grad():
                teacher_logits = self.teacher(images) if recipe.distillation_weight else None
        _check_batch(images, labels, logits, where)
        if recipe.amp:
            logits = logits.float()
        loss = F.cross_entropy(logits, labels, label_smoothing=recipe.label_smoothing)
        if teacher_logits is None:
            return loss
        if teacher_logits.shape != logits.shape:
            raise InputError(
                f"the teacher has {teacher_logits.shape[1]} outputs and the model {logits.shape[1]}; "
                "distillation needs a teacher of the same classes"
            )
        soft = distillation_loss(logits, teacher_logits.to(logits.dtype), recipe.temperature)
        return (1 - recipe.distillation_weight) * loss + recipe.distillation_weight * soft

    def step(self, batches: list[tuple[Tensor, Tensor]], epoch: int, step: int) -> tuple[float, int]:
        """One optimiser step on the images of all `batches`; returns loss sum and number of images of all processes.

        Processes weigh equally, as in DistributedDataParallel. A bad loss raises before it reaches the weights.
        """
        count = sum(len(labels) for _, labels in batches)
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        for index, (images, labels) in enumerate(batches):
            where = f"training: epoch {epoch}, batch {(step - 1) * self.recipe.accumulate + index}"
            with self.gradient_sync_off() if index + 1 < len(batches) else nullcontext():
                loss = self.loss(images, labels, where)
                self.scaler.scale(loss * (len(labels) / count)).backward()
            loss_sum += loss.detach() * len(labels)
        loss_sum, images = all_reduce_sum(torch.stack([loss_sum, loss_sum.new_tensor(count)])).tolist()
        self.check_loss(loss_sum / images, epoch, step)
        if self.recipe.clip_norm is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip_norm)
        scale = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.scaler.get_scale() >= scale:  # a lower scale tells that an fp16 overflow made the step void
            self.scheduler.step()
            if self.ema:
                self.ema.update_parameters(self.model)
        return loss_sum, int(images)

    def check_loss(self, loss: float, epoch: int, step: int) -> None:
        limit = DIVERGED_AT * max(1.0, self.history.epochs[0]["loss"])
        if not loss <= limit:  # NaN too
            self.diverged(f"training loss {loss:.3g} (limit {limit:.3g})", epoch, step)

    def diverged(self, what: str, epoch: int, step: int) -> None:
        saved = f"{self.checkpoint} (epoch {self.saved_epoch})" if self.saved_epoch is not None else "none"
        raise TrainingDiverged(
            f"training diverged in epoch {epoch}, step {step} of {self.steps}, at learning rate {self.lr:.3g}: {what}. "
            f"Lower the learning rate or lengthen the warm-up; the model keeps the weights of epoch "
            f"{self.history.best_epoch}, last good checkpoint: {saved}",
            epoch,
            step,
            self.lr,
            self.checkpoint if self.saved_epoch is not None else None,
        )

    def train_epoch(self, loader, epoch: int, bar: tqdm, limit: int | None = None) -> dict:
        """The steps of one epoch, `limit` at most; returns its largest learning rate and mean training loss per image."""
        self.network.train()
        if hasattr(loader, "set_epoch"):
            loader.set_epoch(epoch)
        loss_sum = images = lr = step = 0
        iterator = iter(loader)
        while step != limit and (batches := list(itertools.islice(iterator, self.recipe.accumulate))):
            step, lr = step + 1, max(lr, self.lr)
            step_loss, step_images = self.step(batches, epoch, step)
            loss_sum, images = loss_sum + step_loss, images + step_images
            bar.set_postfix(loss=f"{loss_sum / images:.3f}", lr=f"{self.lr:.2g}", refresh=False)
            bar.update()
        if name := _nonfinite_tensor(self.model):
            self.diverged(f"{name} of the model holds NaN or Inf", epoch, step)
        return {"lr": lr, "train_loss": loss_sum / images}

    def finish_epoch(self, record: dict, accuracy: Accuracy) -> None:
        """Note the epoch in the history, keep its weights if they are the best so far, write the checkpoint."""
        record |= {"top1": accuracy.top1, "top5": accuracy.top5, "loss": accuracy.loss}
        self.history.epochs.append(record)
        best = self.history.epochs[self.history.best_epoch]
        if (record["top1"], -record["loss"]) > (best["top1"], -best["loss"]):
            self.history.best_epoch = record["epoch"]
            self.best = _copy(self.evaluated_model.state_dict())
        if self.checkpoint:
            self.save()

    def save(self) -> None:
        rng = gather_objects(_rng_state(self.device))
        if is_main():
            state = {
                "identity": self.identity,
                "history": self.history.epochs,
                "best_epoch": self.history.best_epoch,
                "best": self.best,
                "model": self.model.state_dict(),
                "ema": self.ema.state_dict() if self.ema else None,
                "optimizer": self.optimizer.state_dict(),
                "scheduler": self.scheduler.state_dict(),
                "scaler": self.scaler.state_dict(),
                "rng": rng,
            }
            with atomic_file(self.checkpoint) as file:
                torch.save(state, file)
        barrier()
        self.saved_epoch = self.history.epochs[-1]["epoch"]

    def load(self) -> None:
        """Go back to the state in the checkpoint. Raises InputError if it is of another recipe, loader or network."""
        state = _read_checkpoint(self.checkpoint)
        differing = [
            f"{name} ({state['identity'].get(name)!r} there, {value!r} here)"
            for name, value in self.identity.items()
            if state["identity"].get(name) != value
        ]
        shapes = {name: tensor.shape for name, tensor in self.model.state_dict().items()}
        if shapes != {name: tensor.shape for name, tensor in state["model"].items()}:
            differing.append("shapes of the network's tensors")
        if differing:
            raise InputError(
                f"{self.checkpoint} is of another fine-tuning: {', '.join(differing)}; "
                "give the same settings, or start anew without resuming"
            )
        self.history = History(state["history"], state["best_epoch"])
        self.best = state["best"]
        self.model.load_state_dict(state["model"])
        if self.ema:
            self.ema.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.scaler.load_state_dict(state["scaler"])
        _set_rng_state(state["rng"][rank()], self.device)
        self.saved_epoch = self.history.epochs[-1]["epoch"]

    def restore_best(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self.model.load_state_dict(self.best)
        if self.recipe.channels_last:
            self.model.to(memory_format=torch.contiguous_format)


def _read_checkpoint(path: Path) -> dict:
    problem = InputError(f"{path} is not a fine-tuning checkpoint; give the right path, or start anew without resuming")
    if not zipfile.is_zipfile(path):
        raise problem
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError) as error:
        raise problem from error
    if not isinstance(state, dict) or "identity" not in state:
        raise problem
    return state


def _check_fine_tuning(model: nn.Module, train_loader, recipe: Recipe, teacher: nn.Module | None) -> None:
    if recipe.epochs and not len(train_loader):
        raise InputError("fine-tuning: the training loader is empty; check the data path and the batch size")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise InputError("fine-tuning: no parameter of the model requires a gradient; call model.requires_grad_(True)")
    if recipe.distillation_weight and teacher is None:
        raise InputError("fine-tuning: distillation needs a teacher; give one, or set distillation_weight to 0")
    if recipe.sync_batchnorm and world_size() > 1 and next(model.parameters()).device.type != "cuda":
        raise InputError("fine-tuning: sync_batchnorm works on CUDA only; turn it off on this device")


def fine_tune(
    model: nn.Module,
    train_loader,
    val_loader,
    recipe: Recipe,
    *,
    teacher: nn.Module | None = None,
    checkpoint: Path | None = None,
    resume: bool = False,
    description: str = "fine-tune",
    progress: bool = True,
) -> History:
    """Train `model` in place; it ends with the weights of the epoch of best validation top-1 (ties: least loss).

    Loaders yield (images [B, C, H, W], labels [B]) on the model's device; `train_loader.set_epoch(epoch)`, where there is
    one, sets order and augmentation, epochs count from 1. The given weights compete as epoch 0, so the result is never
    worse than they are on the validation images. With an EMA, its weights are the ones validated and kept.

    `checkpoint` is written after every epoch. `resume=True` goes on from it (from the start if there is no such file),
    on CPU with the same bits as an unbroken run if the loader has `set_epoch`. Under torch.distributed each process calls
    this with its own shard of equally many batches; rank 0 writes and prints.

    Raises InputError (settings, data, a checkpoint of another run, GPU memory), TrainingDiverged, and Interrupted on
    Ctrl-C; in each case the model holds the best weights so far.
    """
    _check_fine_tuning(model, train_loader, recipe, teacher)
    checkpoint = Path(checkpoint) if checkpoint else None
    with _modes_kept(model, *([] if teacher is None else [teacher])):
        if teacher is not None:
            teacher.eval()
        run = _Run(model, recipe, teacher, len(train_loader), checkpoint)
        try:
            if resume and checkpoint and checkpoint.exists():
                run.load()
            _run_epochs(run, train_loader, val_loader, description, progress)
        except KeyboardInterrupt:
            raise _interrupted(run) from None
        except torch.OutOfMemoryError as error:
            raise _out_of_memory(run, description) from error
        finally:
            run.restore_best()
    return run.history


def train_steps(
    model: nn.Module,
    train_loader,
    recipe: Recipe,
    steps: int,
    *,
    loss_before: float,
    teacher: nn.Module | None = None,
    turn: int = 0,
    seed: int = 0,
    description: str = "train",
    progress: bool = True,
) -> None:
    """Train `model` in place for `steps` optimiser steps at the constant rate `recipe.lr`; it keeps the last weights.

    For the short trainings between pruning rounds (Molchanov et al. 2017): the recipe without epochs, warm-up, decay and
    weight averaging, and without validation. `loss_before` (nats), of the model as it is given, sets the limit above which
    training counts as diverged. Each `turn` on one loader sees epochs of its own, from 1 on. Dropout follows `seed` and
    `turn`, and the random generators come back as they were, so that what follows does not depend on this training.

    Raises InputError and TrainingDiverged as fine_tune does; the model then has its weights from before.
    """
    recipe = replace(recipe, epochs=1, warmup_epochs=0.0, ema_decay=0.0)
    _check_fine_tuning(model, train_loader, recipe, teacher)
    with _modes_kept(model, *([] if teacher is None else [teacher])):
        if teacher is not None:
            teacher.eval()
        run = _Run(model, recipe, teacher, len(train_loader), constant_lr=True)
        run.history.epochs.append({"epoch": 0, "loss": loss_before})
        epochs, rng = math.ceil(steps / run.steps), _rng_state(run.device)
        torch.manual_seed(seed + turn)
        try:
            with tqdm(total=steps, desc=description, unit="step", leave=False, disable=not (progress and is_main())) as bar:
                for epoch in range(epochs):
                    run.train_epoch(train_loader, 1 + turn * epochs + epoch, bar, steps - epoch * run.steps)
            broadcast_buffers(model)
            run.best = _copy(model.state_dict())
        except torch.OutOfMemoryError as error:
            raise _out_of_memory(run, description) from error
        finally:
            run.restore_best()
            _set_rng_state(rng, run.device)


def _run_epochs(run: _Run, train_loader, val_loader, description: str, progress: bool) -> None:
    epochs = run.recipe.epochs
    quiet = not (progress and is_main())
    for epoch in range(len(run.history.epochs), epochs + 1):
        start = time.perf_counter()
        name = f"{description} {epoch}/{epochs}"
        record = {"epoch": epoch, "lr": 0.0, "train_loss": None}
        if epoch:
            with tqdm(total=run.steps, desc=name, unit="step", leave=False, disable=quiet) as bar:
                record |= run.train_epoch(train_loader, epoch, bar)
            broadcast_buffers(run.model)
        broadcast_buffers(run.evaluated_model)
        accuracy = evaluate(run.evaluated_model, val_loader, description=f"{name}, validation", progress=progress)
        record["seconds"] = time.perf_counter() - start
        run.finish_epoch(record, accuracy)
        if not quiet:
            train_loss = f"train loss {record['train_loss']:.4f}, " if epoch else ""
            tqdm.write(
                f"{name}: {train_loss}validation loss {accuracy.loss:.4f}, "
                f"top-1 {accuracy.top1:.2f} %, top-5 {accuracy.top5:.2f} %"
            )


def _out_of_memory(run: _Run, description: str) -> InputError:
    return InputError(
        f"{description}: out of memory on {run.device} in epoch {len(run.history.epochs)}; lower --batch-size, "
        f"or lower it and raise --accumulate (now {run.recipe.accumulate}) by the same factor"
    )


def _interrupted(run: _Run) -> Interrupted:
    if run.saved_epoch is None:
        return Interrupted("training was interrupted and there is no checkpoint; start it again", None)
    return Interrupted(
        f"training was interrupted; {run.checkpoint} holds epoch {run.saved_epoch} of {run.recipe.epochs}, "
        "start again with resume to go on from there",
        run.checkpoint,
    )
