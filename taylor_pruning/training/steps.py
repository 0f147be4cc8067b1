"""One optimiser step: forward, backward, clipping, SGD, averaging, without waiting for the device."""

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from taylor_pruning.checks import check_logits
from taylor_pruning.distributed import world_size
from taylor_pruning.errors import InputError
from taylor_pruning.stored import restore, stored
from taylor_pruning.surgery.copying import structure_of
from taylor_pruning.surgery.nested import map_tensors
from taylor_pruning.tasks.batches import size
from taylor_pruning.tasks.classification import is_classification, kl_divergence, task_of
from taylor_pruning.tasks.task import Task
from taylor_pruning.training.averaging import WeightAverage
from taylor_pruning.training.checks import batch_facts, input_facts, valid_labels
from taylor_pruning.training.clipping import FilterClipping
from taylor_pruning.training.cuda_graphs import GraphedPass
from taylor_pruning.training.recipe import AMP_DTYPES, Recipe, lr_factor


class OptimiserSteps:
    """Trains `model` in place, step by step.

    Args:
        recipe: a resolved one.
        teacher: gives the soft labels where the recipe distils.
        total: steps after which the cosine ends; None for a constant learning rate.
        warmup: steps of linear warm-up before it.
        task: default classification; the loss of another task takes the place of the cross-entropy.

    Attributes:
        number: steps made.
        average: the WeightAverage, or None.
        classes: outputs of the model, known from the first step on.
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        teacher: nn.Module | None,
        *,
        total: int | None,
        warmup: float = 0.0,
        task: Task | None = None,
    ):
        self.model, self.recipe, self.teacher, self.task = model, recipe, teacher, task_of(task)
        self.total, self.warmup = total, warmup
        self.device = next(model.parameters()).device
        self._set_layout(torch.channels_last)
        self.optimizer = torch.optim.SGD(
            [parameter for parameter in model.parameters() if parameter.requires_grad],
            lr=recipe.lr,
            momentum=recipe.momentum,
            weight_decay=recipe.weight_decay,
            nesterov=recipe.momentum > 0,
            fused=True,
        )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=recipe.amp == "fp16")
        if recipe.momentum:
            # Zeros mean the same as none, but fused SGD starts either all of them or none (a parameter may get its first
            # gradient in a later step), and where an fp16 overflow makes the first step void, they stay uninitialised memory.
            for parameter in self.optimizer.param_groups[0]["params"]:
                self.optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        self.clipping = FilterClipping(model, recipe.clip_ratio) if recipe.clip_ratio is not None else None
        self.average = WeightAverage(model, recipe.ema_decay) if recipe.ema_decay else None
        self.network, self._gradient_sync_off = self._training_network()
        graphs = recipe.cuda_graphs and recipe.accumulate == 1 and world_size() == 1
        graphs &= self.device.type == "cuda" and not recipe.compile
        self.classifies = is_classification(self.task)
        self._single_pass = GraphedPass(model, self._of_pair, teacher) if graphs and self.classifies else None
        self.number, self.classes = 0, 0

    def _training_network(self):
        """What runs forward, the model in its wrappers, and a context in which processes do not average gradients."""
        network, sync_off = self.model, nullcontext
        if world_size() > 1:
            if self.recipe.sync_batchnorm:
                # Other modules around the same tensors, so that the caller's model keeps its plain BatchNorm.
                network = nn.SyncBatchNorm.convert_sync_batchnorm(structure_of(self.model))
            ids = [self.device.index] if self.device.type == "cuda" else None
            network = DistributedDataParallel(network, device_ids=ids)
            sync_off = network.no_sync
        return torch.compile(network) if self.recipe.compile else network, sync_off

    @property
    def evaluated_model(self) -> nn.Module:
        """The model, or its average where the recipe has one."""
        return self.average.model if self.average else self.model

    @property
    def lr(self) -> float:
        """Learning rate of the next step."""
        if self.total is None:
            return self.recipe.lr
        return self.recipe.lr * lr_factor(self.number, self.warmup, self.total)

    def step(self, batches: list, places: list[str]) -> list[Tensor]:
        """One optimiser step on the images of all `batches`; returns the `batch_facts` of each.

        The facts stay on the device: that a loss is bad is known once they are read, steps later. `places` says in error
        messages which batch is meant. A step that an fp16 overflow makes void counts in the schedule nevertheless.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr
        if self._single_pass and len(batches) == 1:
            facts = [self._single_pass(*batches[0], places[0])]
        else:
            facts = self._accumulated(batches, places)
        if self.clipping:
            self.scaler.unscale_(self.optimizer)
            self.clipping.clip()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.number += 1
        if self.average:
            self.average.update(self.model)
        return facts

    def _accumulated(self, batches: list, places: list[str]) -> list[Tensor]:
        images, facts = sum(map(size, batches)), []
        for index, (batch, where) in enumerate(zip(batches, places, strict=True)):
            with self._gradient_sync_off() if index + 1 < len(batches) else nullcontext():
                facts.append(self._forward_backward(batch, where, size(batch) / images))
        return facts

    def _of_pair(self, images: Tensor, labels: Tensor, where: str) -> Tensor:
        return self._forward_backward((images, labels), where)

    def _forward_backward(self, batch, where: str, share: float = 1.0) -> Tensor:
        """Adds `share` times the gradient of the mean loss of a batch to the gradients; returns its `batch_facts`."""
        loss = self._cross_entropy(*batch, where) if self.classifies else self._task_loss(batch, where)
        self.scaler.scale(loss * share).backward()
        return batch_facts(loss, *batch) if self.classifies else input_facts(loss, self.task.inputs(batch))

    def _task_loss(self, batch, where: str) -> Tensor:
        """Training loss of one batch of any task, mean over its samples."""
        with torch.autocast(self.device.type, AMP_DTYPES[self.recipe.amp], enabled=self.recipe.amp is not None):
            outputs = self.task.forward(self.network, batch)
        if self.recipe.amp:
            outputs = map_tensors(outputs, lambda t: t.float() if t.is_floating_point() else t)
        self.classes = 1
        with self.task.explained(outputs, batch, where):
            return self.task.loss(outputs, batch).mean()

    def _cross_entropy(self, images: Tensor, labels: Tensor, where: str) -> Tensor:
        """Training loss of one batch of a classifier, mean over its images."""
        recipe, teacher_logits = self.recipe, None
        if recipe.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        with torch.autocast(self.device.type, AMP_DTYPES[recipe.amp], enabled=recipe.amp is not None):
            logits = self.network(images)
            if recipe.distillation_weight:
                with torch.no_grad():
                    teacher_logits = self.teacher(images)
        check_logits(logits, len(labels), where)
        self.classes = logits.shape[1]
        if recipe.amp:
            logits = logits.float()
        loss = F.cross_entropy(logits, valid_labels(labels, self.classes), label_smoothing=recipe.label_smoothing)
        if teacher_logits is None:
            return loss
        if teacher_logits.shape != logits.shape:
            raise InputError(
                f"the teacher has {teacher_logits.shape[1]} outputs and the model {logits.shape[1]}; "
                "distillation needs a teacher of the same classes"
            )
        soft = kl_divergence(logits, teacher_logits.to(logits.dtype), recipe.temperature).mean()
        return (1 - recipe.distillation_weight) * loss + recipe.distillation_weight * soft

    def release(self) -> None:
        """Give model and teacher back to their owner: no gradients, contiguous weights."""
        self.optimizer.zero_grad(set_to_none=True)
        self._set_layout(torch.contiguous_format)

    def _set_layout(self, layout: torch.memory_format) -> None:
        """Gives the weights of the model, and of a teacher that runs beside it, the layout, where the recipe wants another."""
        taught = self.teacher is not None and self.recipe.distillation_weight
        for network in (self.model, self.teacher) if taught else (self.model,):
            if self.recipe.channels_last:
                network.to(memory_format=layout)

    def state(self) -> dict:
        """All that the next step depends on, the random generators apart."""
        return {
            "model": stored(self.model),
            "average": stored(self.average.model) if self.average else None,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "steps": self.number,
        }

    def load_state(self, state: dict) -> None:
        restore(self.model, state["model"])
        if self.average:
            restore(self.average.model, state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.number = state["steps"]
