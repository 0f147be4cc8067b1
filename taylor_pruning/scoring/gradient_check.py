"""Refuses networks whose gradient along the gates is not the derivative: parts under no_grad, behind detach or a step.

Networks that mix the samples of a batch are refused, too.
"""

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from taylor_pruning.errors import InputError
from taylor_pruning.memory import raise_out_of_memory
from taylor_pruning.scoring.gates import checked_outputs, open_gates
from taylor_pruning.surgery.graph import ChannelGraph
from taylor_pruning.tasks import batches
from taylor_pruning.tasks.task import Task, flatten

IMAGES = 4  # of the first batch that are looked at
WEIGHTINGS = 4  # random linear functions of the outputs whose derivatives are compared
STEP = 1e-2  # by which gates are moved to measure a derivative
TOLERANCE = 0.2  # relative difference to the gradient, well above the effect of kinks within the step
NOISE = 1e-3  # relative to the outputs: smaller derivatives drown in float32's rounding at this step
FOREIGN = 1e-4  # relative to a sample's own gates: what other samples' gates may do to its outputs by rounding
REMEDY = "take no_grad, detach and rounding out of the forward, or exclude these layers"


FLAT = {"round", "floor", "ceil", "trunc", "fix", "sign", "sgn", "heaviside"}  # their derivative is zero everywhere


class _StoppedGradients(TorchFunctionMode):
    """While open, records whether an operation turns a tensor with a gradient into one without, or is flat."""

    found = False

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        constant = function.__name__.startswith("new_") or function.__name__.endswith("_like")  # of the shape alone
        if isinstance(result, Tensor) and not (result.requires_grad or constant):
            self.found |= any(isinstance(argument, Tensor) and argument.requires_grad for argument in args)
        self.found |= function.__name__.strip("_") in FLAT
        return result


def check_gradients(graph: ChannelGraph, batch, task: Task) -> None:
    """Raises InputError naming the layers along whose gates the gradient is not the derivative of the outputs.

    It is raised, too, if the outputs of a sample depend on other samples. Nothing else is checked unless the forward stops a
    gradient somewhere. Then closing the gates of a layer without any gradient shows whether the outputs depend on it, and the
    gradient of every other layer is compared with central differences of a step of STEP along all its gates. (A zero gradient
    at units whose ReLUs are all zero is the derivative.)

    Args:
        batch: of the task, of which the first IMAGES are looked at. The model is frozen (`modes.frozen`).
    """
    batch = batches.select(batch, torch.arange(min(IMAGES, batches.size(batch))))
    gates = open_gates(graph, batch)
    with torch.enable_grad(), graph.gated(gates), _StoppedGradients() as stopped:
        found = task.forward(graph.model, batch)
    outputs = flatten(checked_outputs(found, task, batch, gates, "the first batch"))
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(WEIGHTINGS, outputs.numel(), generator=generator).to(outputs)
    _check_apart(outputs * weights[0].view_as(outputs), gates)
    if stopped.found:
        _check_derivatives(graph, batch, task, gates, outputs, weights)


def _check_apart(outputs, gates):
    """Raises InputError if `outputs` [B, D] have no gradient along gates [B, units], or one along those of other samples."""
    try:
        rows = [torch.autograd.grad(output.sum(), gates, retain_graph=True)[0] for output in outputs]
    except RuntimeError as error:
        raise_out_of_memory(error)
        reason = str(error).splitlines()[0].rstrip(".")
        raise InputError(f"the network gives no gradient along its filters ({reason}); change its forward") from error
    if len(outputs) != len(gates):
        return
    largest = torch.stack(rows).abs().amax(2)  # [samples, samples whose gates]
    own = largest.diagonal()
    if (largest - own.diag() > FOREIGN * own[:, None]).any():
        raise InputError(
            "the outputs of an image depend on the other images of its batch, also in evaluation mode, so that scores of "
            "single images would mean nothing; give every BatchNorm running statistics, and compute nothing over the batch"
        )


def _check_derivatives(graph, batch, task, gates, outputs, weights):
    """Raises InputError naming the layers along whose gates derivatives of weighted `outputs` are not their gradients."""
    rows = [torch.autograd.grad(outputs, gates, w.view_as(outputs), retain_graph=True)[0] for w in weights]
    gradient, outputs = torch.stack(rows).sum(1), outputs.detach()  # [weightings, units]
    layers = {
        name: info.unit_of[info.removable].unique() for name, info in graph.layers.items() if info.removable.any()
    }

    def outputs_at(value, units):
        moved = torch.ones_like(gates)
        moved[:, units.to(gates.device)] = value
        with torch.no_grad(), graph.gated(moved):
            return flatten(task.forward(graph.model, batch)).to(outputs)

    def cut_off(units):
        return not gradient[:, units].any() and not torch.allclose(outputs_at(0, units), outputs)

    def differs(units):
        measured = weights @ (outputs_at(1 + STEP, units) - outputs_at(1 - STEP, units)).flatten() / (2 * STEP)
        error = (gradient[:, units].sum(1) - measured).norm()
        return bool(error > TOLERANCE * measured.norm() and error > NOISE * (weights @ outputs.flatten()).norm())

    if names := [name for name, units in layers.items() if cut_off(units)]:
        raise InputError(
            f"no gradient reaches the filters of {', '.join(names)} although the outputs depend on them, so that their "
            f"scores would mean nothing; {REMEDY}"
        )
    if names := [name for name, units in layers.items() if differs(units)]:
        raise InputError(
            f"the gradient at the filters of {', '.join(names)} is not the derivative of the outputs, so that their scores "
            f"would mean nothing; {REMEDY}"
        )
