"""Checks whether the network can run on the first batch of every loader, before anything is computed, and on later ones.

loader = Batches(train_loader, "the training loader", device)
check_inputs(model, [loader])
check_training(model, loader)
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, SequentialSampler, Subset

from taylor_pruning.checks import check_gradient_mode, check_weights, describe
from taylor_pruning.errors import InputError
from taylor_pruning.memory import raise_out_of_memory
from taylor_pruning.modes import frozen
from taylor_pruning.surgery.copying import copy_of
from taylor_pruning.surgery.nested import map_tensors, tensors_in
from taylor_pruning.tasks.batches import lengths, select, size, spread_rows
from taylor_pruning.tasks.classification import is_classification, task_of
from taylor_pruning.tasks.task import Task

TINY = 1e-4  # what rounding leaves of a divergence of outputs from themselves
IMAGES = 8  # of a first batch that the network is run on
KINDS = 16  # of samples that it is tried on; where every image has a size of its own, each would be run twice
# Errors of a forward on unsuitable inputs.
FORWARD_ERRORS = (RuntimeError, ValueError, TypeError, AttributeError, LookupError, AssertionError)


class Batches:
    """A loader whose batches are those of a task on `device`: images [B, ...] and class numbers int64 [B] of a classifier.

    Args:
        loader: iterable of batches that can be read more than once.
        name: what error messages call it, for instance "the training loader".

    Raises:
        InputError: it is an iterator, which is empty after one pass; while iterating, no batch, or one that cannot be used.
    """

    def __init__(self, loader: Iterable, name: str, device: torch.device, task: Task | None = None):
        if isinstance(loader, Iterator) or not isinstance(loader, Iterable):
            kind = "can be read only once" if isinstance(loader, Iterator) else "is not iterable"
            raise InputError(f"{name} {kind}; give a DataLoader or a list of batches (images, labels)")
        self.loader, self.name, self.device, self.task = loader, name, device, task_of(task)
        self._model, self._kinds = None, set()

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator:
        number = -1
        for number, batch in enumerate(self.loader):
            yield self._read(batch, f"batch {number} of {self.name}")
        if number < 0:
            raise InputError(
                f"{self.name} gives no batch; check the data and the batch size, and that it begins anew whenever it is read"
            )

    def _read(self, batch, where):
        """The batch as the task reads it. Raises InputError if the network cannot run on samples of its kind."""
        batch = self.task.read(batch, where, self.device)
        if len(found := lengths(batch)) > 1:
            raise InputError(
                f"{where} has fields of {' and '.join(map(str, sorted(found)))} samples; give as many in each"
            )
        tries = self._model is not None and len(self._kinds) < KINDS
        if tries and (kind := self._kind(batch)) not in self._kinds:
            outputs_of(self._model, self.task, _few(batch, 2), where)  # a network need not run on one sample alone
            self._kinds.add(kind)
        return batch

    def _kind(self, batch):
        return tuple((t.dtype, t.shape) for t in tensors_in(self.task.inputs(select(batch, slice(1)))))

    def try_later(self, model: nn.Module, first) -> None:
        """From now on the network runs once on other kinds of samples than that of the batch `first`."""
        self._model, self._kinds = model, {self._kind(first)}

    @property
    def dataset(self):
        """The loader's data set. Raises AttributeError if it has none of known length."""
        dataset = self.loader.dataset
        if not hasattr(dataset, "__len__"):
            raise AttributeError(f"the data set of {self.name} has no length")
        return dataset

    @property
    def spread(self):
        """A method that picks images all over the set: the loader's, or of an unshuffled DataLoader without reading the others.

        Raises AttributeError for other loaders.
        """
        plain = isinstance(self.loader, DataLoader) and not hasattr(self.loader, "spread")
        plain = plain and self.loader.batch_size and isinstance(self.loader.sampler, SequentialSampler)
        spread = self._of_data_set if plain else self.loader.spread
        where = f"a batch of {self.name}"
        return lambda samples: [self._read(batch, where) for batch in spread(samples)]

    def _of_data_set(self, samples):
        loader, images = self.loader, self.loader.dataset
        # Not all images are read with a sampler of a part of them, or with drop_last.
        read = min(len(loader.sampler), len(loader) * loader.batch_size)
        chosen = Subset(images, spread_rows(read, samples).tolist())
        return DataLoader(chosen, loader.batch_size, collate_fn=loader.collate_fn)

    def set_epoch(self, epoch: int) -> None:
        """Calls the loader's `set_epoch`, if it has one."""
        if hasattr(self.loader, "set_epoch"):
            self.loader.set_epoch(epoch)

    def first(self):
        """The first batch; the random generator stays as it was."""
        with torch.random.fork_rng(devices=[]):
            return next(iter(self))


def _few(batch, samples):
    return select(batch, torch.arange(min(samples, size(batch))))


def device_of(model: nn.Module) -> torch.device:
    """Where the network's parameters are. Raises InputError if it has none, or they are where it cannot be pruned."""
    devices = {parameter.device for parameter in model.parameters()}
    if not devices:
        raise InputError("the network has no parameters; give one with convolutions")
    if len(devices) > 1:
        raise InputError(f"the network is on {', '.join(sorted(map(str, devices)))}; move it to one device")
    (device,) = devices
    if device.type == "mps":
        raise InputError("mps cannot compute in float64, which scores need; move the network to the cpu")
    return device


def check_inputs(model: nn.Module, loaders: Iterable[Batches]) -> None:
    """`check_first` of every loader of a pruning, which also counts the costs of one sample and evaluates on the loaders.

    Raises InputError where `check_first` does, and if the network cannot run on one sample or the task's evaluation fails.
    """
    for loader in loaders:
        batch, where = check_first(model, loader), f"the first batch of {loader.name}"
        outputs_of(model, loader.task, _few(batch, 1), f"one sample of {where}")  # as its costs are counted
        if not is_classification(loader.task) and loader.task.defines("evaluate"):
            with frozen(model), torch.no_grad():
                loader.task.evaluated(model, [batch], where)


def checked_batches(model: nn.Module, loader: Batches) -> list:
    """All batches of the loader, of images that nothing is evaluated on.

    Raises InputError where `check_first` does, or if the network cannot run on a later batch.
    """
    check_first(model, loader)
    return list(loader)


def check_first(model, loader):
    """Runs the network, in eval mode, and the losses of its task on the first samples of a loader, which it returns.

    Raises:
        InputError: weights are not finite, the network cannot run on the images, it gives no finite logits
            [batch, classes] or probabilities in their place, or labels are outside its classes; or what the task finds wrong.
    """
    if torch.is_inference_mode_enabled():
        raise InputError("scores need gradients; call this outside of torch.inference_mode()")
    check_weights(model)
    task, where = loader.task, f"the first batch of {loader.name}"
    batch = _few(loader.first(), IMAGES)
    outputs = outputs_of(model, task, batch, where)
    task.check(outputs, batch, where)
    task.check_kind(model, outputs, batch)
    if not is_classification(task):
        _check_losses(task, outputs, batch, where)
    loader.try_later(model, batch)
    return batch


def outputs_of(model: nn.Module, task: Task, batch, where: str):
    """The network's outputs in eval mode; its tensors and random generators stay. Raises InputError if it cannot run."""
    devices = {tensor.device for tensor in tensors_in(batch) if tensor.is_cuda}
    with _named(model, task.inputs(batch), where), frozen(model), torch.no_grad(), torch.random.fork_rng(devices):
        before = [(parameter, parameter.clone()) for parameter in model.parameters()]
        outputs = task.forward(model, batch)
        for parameter, value in before:
            if not torch.equal(parameter, value):  # the forward has written into it
                parameter.copy_(value)
    return outputs


@contextmanager
def _named(model, inputs, where):
    """Turns what the forward raises in the block into an InputError that says what does not fit."""
    try:
        yield
    except FORWARD_ERRORS as error:
        raise_out_of_memory(error)
        weights = next(model.parameters()).dtype
        images = next(iter(tensors_in(inputs)), None)
        if images is not None and images.dtype != weights:
            kinds = f"{images.dtype} images and {weights} weights".replace("torch.", "")
            remedy = "convert them to" if images.is_floating_point() else "scale and normalise them as in training, as"
            raise InputError(f"the network cannot run on {where}: {kinds}; {remedy} {weights}") from error
        reason = str(error).strip().splitlines() or [type(error).__name__]
        shape = f", images {[*images.shape]}" if images is not None else ""
        raise InputError(f"the network cannot run on {where}{shape}: {reason[0]}") from error


def _check_losses(task, outputs, batch, where):
    """Raises InputError if the task's loss and divergence, where it defines them, are not one finite number a sample."""

    def copied():  # a loss may write to them
        return map_tensors(outputs, lambda t: t.detach().requires_grad_(t.is_floating_point()).clone())

    with torch.enable_grad():
        found = {name: getattr(task, name) for name in ("loss", "divergence") if task.defines(name)}
        others = {"loss": batch, "divergence": map_tensors(outputs, Tensor.detach)}
        copies = {name: copied() for name in found}
        values = {name: f(copies[name], others[name]) for name, f in found.items()}
    for name, losses in values.items():
        if not isinstance(losses, Tensor) or losses.shape != (size(batch),) or not losses.is_floating_point():
            given = f"{losses.dtype} {[*losses.shape]}" if isinstance(losses, Tensor) else describe(losses)
            raise InputError(
                f"{name} of the task {task.name} gives {given} for {where}; give one number a sample, [{size(batch)}]"
            )
        if not losses.isfinite().all():
            raise InputError(f"{name} of the task {task.name} is NaN or infinite for {where}")
        if not losses.requires_grad:
            raise InputError(
                f"{name} of the task {task.name} has no gradient in the outputs; compute it from them by torch, without detach"
            )
    if "divergence" in values:
        _check_smallest(task, values["divergence"], copies["divergence"])


def _check_smallest(task, divergence, outputs):
    """Raises InputError if the divergence of outputs from themselves is not 0, or has no gradient in them."""
    if (divergence.abs() > TINY).any():
        raise InputError(f"divergence of the task {task.name} is not 0 where both outputs are the same; let it be")
    sources = [tensor for tensor in tensors_in(outputs) if tensor.requires_grad]
    gradients = torch.autograd.grad(divergence.sum(), sources, allow_unused=True)
    if any(gradient is not None and not gradient.isfinite().all() for gradient in gradients):
        raise InputError(
            f"divergence of the task {task.name} has no gradient where both outputs are the same, as a square root has none at "
            "0; give its square"
        )


def check_training(model: nn.Module, loader: Batches) -> None:
    """Raises InputError if the network cannot be trained on the loader.

    Reasons are: gradients are switched off, no parameter requires one, the loader has no length, or a batch of one image
    meets a BatchNorm that has one value a channel then.
    """
    check_gradient_mode("fine-tuning")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise InputError(
            "no parameter of the network requires a gradient, so that it cannot be fine-tuned; call "
            "model.requires_grad_(True), or fine-tune for 0 epochs"
        )
    try:
        len(loader)
    except TypeError as error:
        raise InputError(
            f"{loader.name} has no length, which the learning rate needs; give a loader with len()"
        ) from error
    if _has_single_image(loader.loader):
        _check_single_image(model, loader)


def _has_single_image(loader) -> bool:
    """Whether a batch of the loader is known to have one image."""
    if isinstance(loader, (list, tuple)):
        return any(size(batch) == 1 for batch in loader)
    if hasattr(loader, "smallest_batch"):  # a loader of experiment.loaders
        return loader.smallest_batch == 1
    sampler = getattr(loader, "batch_sampler", None)
    if isinstance(sampler, (list, tuple)):
        return any(len(indices) == 1 for indices in sampler)
    if not all(hasattr(sampler, name) for name in ("sampler", "batch_size", "drop_last")):
        return getattr(loader, "batch_size", None) == 1
    # The sampler of a data set that gives its images in its own order has no length.
    images = sampler.sampler if hasattr(sampler.sampler, "__len__") else loader.dataset
    return sampler.batch_size == 1 or (not sampler.drop_last and len(images) % sampler.batch_size == 1)


def _check_single_image(model, loader):
    one = select(loader.first(), torch.zeros(1, dtype=torch.long))
    with torch.random.fork_rng(devices={t.device for t in tensors_in(one) if t.is_cuda}), torch.no_grad():
        try:
            loader.task.forward(copy_of(model).train(), one)
        except ValueError as error:
            raise InputError(
                f"a batch of {loader.name} has one image, on which BatchNorm cannot be trained ({error}); pass another batch "
                "size, or drop_last=True"
            ) from error
