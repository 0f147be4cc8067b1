"""The true loss change of removing single units, against which estimates are judged."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from tqdm import tqdm

from taylor_pruning.modes import frozen
from taylor_pruning.surgery.graph import ChannelGraph
from taylor_pruning.surgery.nested import map_tensors
from taylor_pruning.tasks.batches import size
from taylor_pruning.tasks.classification import task_of
from taylor_pruning.tasks.task import Task


def true_loss_changes(
    model: nn.Module,
    graph: ChannelGraph,
    batches: Iterable,
    units: Iterable[int],
    *,
    progress: bool = True,
    task: Task | None = None,
) -> Tensor:
    """[len(units)] change of the task's loss (mean over the images) when a unit's gate is closed, in float64.

    `task`: default classification, whose cross-entropy is in nats.
    """
    task, like = task_of(task), next(model.parameters())

    def loss(gates):
        total, count = 0.0, 0
        for batch in batches:
            with graph.gated(gates.to(like)):
                outputs = task.forward(model, batch)
            outputs = map_tensors(outputs, lambda t: t.double() if t.is_floating_point() else t)
            total += task.loss(outputs, batch).sum().item()
            count += size(batch)
        return total / count

    changes = []
    with frozen(model), torch.no_grad():
        everything = torch.ones(len(graph.units))
        dense = loss(everything)
        for unit in tqdm(units, desc="oracle", leave=False, disable=not progress):
            gates = everything.clone()
            gates[unit] = 0
            changes.append(loss(gates) - dense)
    return torch.tensor(changes, dtype=torch.float64)


def judge_estimates(
    model: nn.Module,
    graph: ChannelGraph,
    batches: Iterable,
    estimates: dict,
    samples: int,
    seed: int,
    *,
    progress: bool,
    task: Task | None = None,
) -> dict:
    """Estimates against the true loss changes of removing `samples` random units, one at a time, without compensation.

    Args:
        estimates: {name: [units] estimated loss changes}.

    Returns:
        {"filters": [(layer, index)], "true": [samples], "predicted": {name: [samples]}, "spearman": {name: correlation}}.
    """
    generator = torch.Generator().manual_seed(seed)
    units = torch.randperm(len(graph.units), generator=generator)[:samples]
    true = true_loss_changes(model, graph, batches, units.tolist(), progress=progress, task=task)
    predicted = {name: values[units] for name, values in estimates.items()}
    return {
        "filters": [graph.units[u].filters[0] for u in units.tolist()],
        "true": true.tolist(),
        "predicted": {name: values.tolist() for name, values in predicted.items()},
        "spearman": {name: spearman(values, true) for name, values in predicted.items()},
    }


def ranks(values: Tensor) -> Tensor:
    """Ranks from 0 on of a vector; equal values share the mean of their ranks."""
    _, group, count = values.unique(return_inverse=True, return_counts=True)
    last = count.cumsum(0).double()
    return (last - (count + 1) / 2)[group]


def spearman(a, b) -> float:
    """Spearman's rank correlation of two vectors, the correlation of their ranks; nan where one is constant or too short."""
    if len(a) < 2:
        return float("nan")
    pair = torch.stack([ranks(torch.as_tensor(values).double()) for values in (a, b)])
    return torch.corrcoef(pair)[0, 1].item()
