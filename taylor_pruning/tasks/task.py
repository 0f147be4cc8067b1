"""What a network is for: how it is run on a batch, what its errors cost, how far two outputs are apart, how it is judged.

    class Depth(Task):
        name, main, larger_is_better = "depth", "rmse", False

        def loss(self, outputs, batch):                     # with labels: training, scores without compensation
            return (outputs - batch[1]).square().flatten(1).mean(1)

        def divergence(self, outputs, dense_outputs):       # without labels: scores behind compensation
            return (outputs - dense_outputs).square().flatten(1).mean(1)

        def statistics(self, outputs, batch): ...           # or evaluate(model, loader)

Ready-made tasks: Classification, MultiLabel, Segmentation, Regression, Detection (taylor_pruning.tasks.*).
"""

import math
from collections.abc import Mapping
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from taylor_pruning.checks import describe
from taylor_pruning.distributed import all_reduce_sum
from taylor_pruning.errors import InputError
from taylor_pruning.modes import in_evaluation
from taylor_pruning.options import has_type
from taylor_pruning.surgery.nested import map_tensors, tensors_in
from taylor_pruning.tasks import batches
from taylor_pruning.tasks.directions import root_times


class Task:
    """What a network is for. A batch has the structure of tasks.batches; outputs are tensors in any nested structure.

    Attributes:
        name: what messages call the task.
        main: name of the metric by which networks are compared. larger_is_better: whether that metric grows.
        loss_name: what the loss with labels is called in results.
        samples_apart: False where `loss` cannot tell the samples of a batch apart, as with torchvision's detectors; scores then
            take batches of one sample. A loss that compares samples with each other leaves this at True; while scoring it sees
            parts of batches that fit into memory.
    """

    name = "task"
    main: str | None = None
    larger_is_better = True
    loss_name = "loss"
    samples_apart = True

    def read(self, batch, where: str, device: torch.device | None = None):
        """The batch of a loader on `device`. Raises InputError, which begins with `where`, if it cannot be used."""
        if not tensors_in(batch):
            raise InputError(
                f"{where} holds no tensors; let the loader give tensors, or tuples, lists and dicts of them"
            )
        if not batches.size(batch):
            raise InputError(f"{where} holds no samples; leave out empty batches")
        return batches.to_device(batch, device)

    def inputs(self, batch):
        """What the network is called with: a tensor, a tuple of arguments, or a dict of named ones.

        Default: the tensor itself, or the first field of a tuple or list. Raises InputError for a dict.
        """
        if isinstance(batch, dict):
            raise InputError(
                f"the task {self.name} does not say which of {', '.join(map(str, batch))} the network reads; define its inputs"
            )
        return batch[0] if isinstance(batch, (tuple, list)) else batch

    def forward(self, model: nn.Module, batch):
        """The network's outputs for a batch."""
        inputs = self.inputs(batch)
        if isinstance(inputs, dict):
            return model(**inputs)
        return model(*inputs) if type(inputs) is tuple else model(inputs)

    def loss(self, outputs, batch) -> Tensor:
        """[B] loss of every sample with its labels."""
        raise self._undefined("loss", "training and scores without compensation need")

    def divergence(self, outputs, dense_outputs) -> Tensor:
        """[B] how far every sample's outputs are from others, zero where they are equal; no labels."""
        raise self._undefined("divergence", "compensation needs")

    def projection(self, outputs, signs: Tensor) -> Tensor:
        """[B] w.z of every sample's outputs z along a random direction w of the divergence (tasks.directions).

        Default: for any divergence, by its Hessian-vector products. `signs`: [B, numbers of a sample's outputs].
        """
        flat = flatten(outputs)
        leaf = flat.detach().requires_grad_()
        with torch.enable_grad():
            at = unflatten(leaf, outputs)
            value = self.divergence(at, map_tensors(outputs, Tensor.detach))
            if len(value) != len(flat):
                raise InputError(
                    f"compensation needs outputs with one row a sample, but the task {self.name} gives {len(flat)} rows for "
                    f"{len(value)} samples; define its forward(model, batch) so that samples come first"
                )
            (slope,) = torch.autograd.grad(value.sum(), leaf, create_graph=True)
            if not slope.requires_grad:
                raise InputError(
                    f"divergence of the task {self.name} has no second derivative; take one that is smallest, and curved, "
                    "where both outputs are equal, as the squared difference"
                )

            def product(vectors):
                return torch.autograd.grad(slope, leaf, vectors, retain_graph=True, materialize_grads=True)[0]

            direction = root_times(product, signs.to(flat))
        return (flat * direction).sum(1)

    def evaluate(self, model: nn.Module, loader) -> dict[str, float]:
        """{metric: value} over a loader in evaluation mode, `main` among them.

        Default: from the sums over all batches, and all processes, of `statistics`.
        """
        sums = None
        with in_evaluation(model), torch.no_grad():
            for number, batch in enumerate(loader):
                outputs = self.forward(model, batch)
                with self.explained(outputs, batch, f"batch {number} of the evaluation"):
                    found = self.statistics(outputs, batch).double()
                sums = found if sums is None else sums + found
        if sums is None:
            raise InputError(f"{self.name}: the loader gives no samples to evaluate; check the data")
        return self.metrics(all_reduce_sum(sums))

    def statistics(self, outputs, batch) -> Tensor:
        """[n] numbers of a batch whose sums over the batches `metrics` needs."""
        raise self._undefined("evaluate", "every stage needs")

    def metrics(self, sums: Tensor) -> dict[str, float]:
        """{metric: value} from the sums of `statistics`."""
        raise self._undefined("metrics", "evaluate needs")

    # -- what the pipeline asks ----------------------------------------------------------------------------------------

    def defines(self, name: str) -> bool:
        """Whether the method is the task's own."""
        if name == "evaluate":
            return type(self).evaluate is not Task.evaluate or self.defines("statistics") and self.defines("metrics")
        return getattr(type(self), name) is not getattr(Task, name)

    def require(self, name: str, purpose: str) -> None:
        """Raises InputError if the task does not define what `purpose`, as "compensation needs", takes."""
        if not self.defines(name):
            raise self._undefined(name, purpose)

    def check(self, outputs, batch, where: str) -> None:
        """Raises InputError if outputs cannot be used: no tensors, not one row a sample, or NaN."""
        tensors = [t for t in tensors_in(outputs) if t.is_floating_point()]
        if not tensors:
            raise InputError(f"{self.name}: the network gives no numbers for {where}; define forward(model, batch)")
        if any(not t.isfinite().all() for t in tensors):
            raise InputError(f"the network gives NaN or infinite outputs for {where}; check its weights and the inputs")

    def check_kind(self, model: nn.Module, outputs, batch) -> None:
        """Raises InputError if the network's last step gives another kind of outputs, as probabilities in place of logits."""

    def evaluated(self, model: nn.Module, loader, where: str = "the evaluation") -> dict:
        """What `evaluate` gives, numbers as Python's. Raises InputError if the main metric is not among them."""
        found = self.evaluate(model, loader)
        if not isinstance(found, Mapping):
            raise InputError(f"evaluate of the task {self.name} gives {describe(found)}; give {{metric: number}}")
        metrics = _python_values(found)
        if self.main not in metrics:
            raise InputError(
                f"evaluate of the task {self.name} gives {', '.join(map(str, metrics))} for {where}, but its main metric is "
                f"{self.main}"
            )
        if not has_type(metrics[self.main], float):
            raise InputError(f"{self.main} of the task {self.name} is {describe(found[self.main])}; give a number")
        return metrics

    @contextmanager
    def explained(self, outputs, batch, where: str):
        """An error in the block becomes that of `check` where the batch is at fault: later batches are not checked before."""
        try:
            yield
        except (RuntimeError, ValueError, TypeError, LookupError):
            self.check(outputs, batch, where)
            raise

    def _undefined(self, name, purpose):
        return InputError(
            f"the task {self.name} does not define {name}, which {purpose}; define it in a Task of your own (tasks.task)"
        )


def _python_values(value):
    """Numbers of torch and NumPy as Python's: a checkpoint could not be read again with NumPy's, nor JSON hold torch's."""
    if isinstance(value, Mapping):
        return {name: _python_values(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_python_values(item) for item in value]
    if isinstance(value, (Tensor, np.ndarray, np.generic)):
        return value.item() if math.prod(value.shape) == 1 else value.tolist()
    return value


def example_of(task: Task, batch):
    """What the network is called with for the first sample of a batch alone."""
    return task.inputs(batches.select(batch, torch.zeros(1, dtype=torch.long)))


def flatten(outputs) -> Tensor:
    """[B, D] all floating-point outputs of every sample."""
    return torch.cat([t.reshape(len(t), -1) for t in tensors_in(outputs) if t.is_floating_point()], 1)


def unflatten(flat: Tensor, outputs):
    """Inverse of `flatten` in the structure of `outputs`."""
    widths = [t[0].numel() for t in tensors_in(outputs) if t.is_floating_point()]
    parts = iter(flat.split(widths, 1))
    return map_tensors(outputs, lambda t: next(parts).reshape(t.shape) if t.is_floating_point() else t)
