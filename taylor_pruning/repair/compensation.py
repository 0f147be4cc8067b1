"""New weights for a pruned network in closed form: every layer is refitted to the dense network's outputs.

After filters are removed, each conv and linear layer whose inputs differ from the dense network's (channels are missing,
or layers before it answer differently) is fitted by ridge least squares on calibration images, in the order of the data:
inputs come from the pruned network, compensated up to there, targets are the dense network's outputs of the same layer
(He et al. 2017, arXiv:1707.06168; Luo et al. 2017, arXiv:1707.06342). For a layer with inputs x (patches, as rows),
present weights W and dense outputs y,

    min over D, b of  sum |y - x (W + D) - b|^2 + ridge * mean(diag C) * |D|^2,      C = centred Gram matrix of x,

so with nothing to repair nothing changes, and few images do little harm. The intercept b goes into the layer's bias, or
into the running mean of the BatchNorm behind it. Where a layer's output is added to a stream (y + s), the sum is
matched: the target becomes y + (s of the dense network) - (s of this network), so errors do not pile up on the stream.
The layer that gives a classifier's logits is fitted to the dense network's predictions instead (repair.logits).
"""

import time
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor
from tqdm import tqdm

from taylor_pruning.checks import nonfinite_weight
from taylor_pruning.errors import InputError
from taylor_pruning.memory import fitting, held_bytes, merged
from taylor_pruning.modes import frozen, own_precision
from taylor_pruning.repair.logits import LogitsRegression
from taylor_pruning.repair.paired_runs import PairedRuns
from taylor_pruning.repair.plan import RepairPlan
from taylor_pruning.repair.regression import LayerFit, LayerRegression
from taylor_pruning.surgery.nested import map_tensors


@dataclass
class CompensationReport:
    """What `compensate` did: fits in the order of the data, and layers left alone with the reason."""

    layers: list[LayerFit] = field(default_factory=list)
    left_alone: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    def as_dict(self):
        return asdict(self)


@torch.no_grad()
@own_precision()
def compensate(
    dense,
    smaller,
    batches,
    kept=None,
    *,
    progress=True,
    activation_budget=None,
    memory_limit=None,
    seed=0,
    smaller_batches=None,
    recorded=None,
    to_predictions=True,
    only_logits=False,
):
    """Refit the layers of `smaller`, in place, so that it answers as `dense` does on the calibration images.

    Args:
        dense: the network before any pruning.
        smaller: what `ChannelGraph.remove` made of it, in one round or in several, compensated in between or not.
        batches: list of (images [B, C, H, W], labels), labels are not used; a fifth of the images, drawn at random, chooses
            the ridge. Networks of several inputs get a tuple or dictionary of them in the place of the images.
        smaller_batches: what `smaller` reads in their place, where that is something else.
        recorded: the dense network's surgery.execution.Execution on such inputs, where it has been traced already.
        kept: {layer name: indices of the filters of `dense` that `smaller` still has, in its order}. A layer that is not
            named has all its filters, or is depthwise.
        activation_budget: bytes of activations that may be held between two layers; on batches for which there is no room
            the networks run again from the last place that fitted (at most once for every layer). Default: half of the
            memory that is left, on a CPU without a limit 2 GB at most.
        to_predictions: a linear layer that gives the network's logits is fitted to its predictions (repair.logits). False where
            the outputs are no logits of classes, or least squares are wanted.
        only_logits: fit no other layer, and none where `to_predictions` is False.
        memory_limit: bytes, see memory.Portions; batches that do not fit are split. On a GPU they are joined as far as they
            fit, so that it does not wait between small ones. The result does not depend on it.
        seed: of that draw, and of the output positions that are drawn where a layer has many: over all images 16,384,
            fewer where a wide layer makes them dear, but two for each column of its matrix.

    Conv1d-3d and Linear are fitted, with any stride, padding, dilation and groups. Transposed and depthwise convs, layers
    called more than once and layers with tied weights are left alone; the layers behind them repair what they miss.
    A layer of more than 6,144 columns is fitted on at most as many output positions, through their Gram matrix.

    Returns a CompensationReport. Raises InputError if the networks or `kept` do not belong together, there are no images
    or NaNs in them, or new weights overflow.
    """
    start = time.perf_counter()
    if not batches:
        raise InputError("compensation: there are no calibration images; give at least one batch")
    plan = RepairPlan(dense, smaller, kept or {}, map_tensors(batches[0][0], lambda tensor: tensor[:1]), recorded)
    report = CompensationReport(left_alone=dict(plan.left_alone))
    held = held_bytes(next(dense.parameters()).device, memory_limit) if activation_budget is None else activation_budget
    runs = PairedRuns(plan, _fitting(dense, [batches, smaller_batches or batches], memory_limit), held)
    layers = [layer for layer in plan.layers if not only_logits or (to_predictions and layer.gives_logits)]
    for layer in tqdm(layers, desc="compensate", unit="layer", leave=False, disable=not progress):
        regression = LogitsRegression if to_predictions and layer.gives_logits else LayerRegression
        _fit_layer(layer, runs, regression(layer, seed, runs.images), report)
    if report.layers:
        runs.update_batchnorms()
        _check_range(smaller)
    report.seconds = time.perf_counter() - start
    return report


def _check_range(model):
    if name := nonfinite_weight(model):
        raise InputError(
            f"compensation: the new values of {name} are beyond the range of its type; prune the network in another one, as "
            "model.float()"
        )


def _fitting(dense, batches, limit):
    """The inputs of both networks in batches that fit into memory; those that are no plain tensors stay as they are."""
    inputs = [[images for images, _ in given] for given in batches]
    if not all(isinstance(batch, Tensor) for given in inputs for batch in given):
        return inputs
    first, device = inputs[0][0], next(dense.parameters()).device
    with frozen(dense):
        size = fitting(lambda part: dense(first[part]), len(first), device, limit, copies=2)
    joined = [[images for images, _ in merged([(x, None) for x in given], device, size)] for given in inputs]
    return [[part for batch in given for part in batch.split(size)] for given in joined]


def _fit_layer(layer, runs, fit, report):
    """Collect the rows of the layer's fit, solve it and change its weights, or report why it is left alone."""
    for batch, dense_state, state in runs.to(layer):
        fit.add(batch, *_values(layer, runs, dense_state, state))
    if fit.agrees():
        report.left_alone[layer.name] = "its outputs are the dense network's"
    else:
        report.layers.append(fit.solve())


def _values(layer, runs, dense_state, state):
    """The layer's input, its dense output, and the two values of the stream that it is added to (None without one).

    Samples come first in all of them.
    """
    node = runs.plan.order[1][layer.position]
    values = [state[node.all_input_nodes[0].name], runs.value(dense_state, 0, layer.position), None, None]
    if layer.stream is not None:
        values[2:] = runs.value(dense_state, 0, layer.stream), runs.value(state, 1, layer.stream)
    return [None if value is None else value.movedim(layer.sample_dim, 0) for value in values]
