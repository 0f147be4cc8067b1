"""Compensation of a whole network, or of its pruned parts one after the other, on the batches of a task."""

from dataclasses import replace
from functools import partial

import torch
from torch import nn

from taylor_pruning.modes import frozen
from taylor_pruning.repair.compensation import CompensationReport, compensate
from taylor_pruning.surgery.graph import ChannelGraph
from taylor_pruning.surgery.parts import PartsGraph, recorded_inputs
from taylor_pruning.tasks.classification import is_classification
from taylor_pruning.tasks.task import Task


def compensate_parts(
    graph: ChannelGraph | PartsGraph,
    dense: nn.Module,
    smaller: nn.Module,
    batches: list,
    task: Task,
    kept: dict,
    *,
    to_predictions: bool = True,
    **options,
) -> CompensationReport:
    """`compensate`, whose options these are, of what `graph` prunes.

    A part reads in the pruned network what the compensated parts before it give, and is fitted to the dense network's part on
    what that reads.

    Args:
        to_predictions: the layer that gives a classifier's logits is fitted to the predictions; else by least squares.
        graph: of the dense network. batches: of the task. kept: {layer in the whole network: kept filters of `dense`}.
    """
    if isinstance(graph, ChannelGraph):
        recorded = graph.executions[False] if graph.model is dense else None
        inputs = [(task.inputs(batch), None) for batch in batches]
        return compensate(
            dense,
            smaller,
            inputs,
            kept,
            recorded=recorded,
            to_predictions=to_predictions and is_classification(task),
            **options,
        )
    report = CompensationReport()
    for number, name in enumerate(graph.parts):
        inputs = _inputs(dense, name, batches, task)
        others = _inputs(smaller, name, batches, task) if number else None
        own = {layer.removeprefix(f"{name}."): kept[layer] for layer in kept if layer.startswith(f"{name}.")}
        pair = dense.get_submodule(name), smaller.get_submodule(name)
        found = compensate(*pair, inputs, own, smaller_batches=others, to_predictions=False, **options)
        report.layers += [replace(fit, name=f"{name}.{fit.name}") for fit in found.layers]
        report.left_alone |= {f"{name}.{layer}": reason for layer, reason in found.left_alone.items()}
        report.seconds += found.seconds
    return report


def _inputs(model, name, batches, task):
    """[(what the part reads, None)] of every batch, in the order of the batches."""
    with frozen(model), torch.no_grad():
        return [(recorded_inputs(model, name, partial(task.forward, batch=batch)), None) for batch in batches]
