"""The channel graph of what an experiment prunes: the whole network, or the modules that the settings name."""

import torch
from torch import nn

from taylor_pruning.experiment.settings import PruningSettings
from taylor_pruning.surgery.graph import ChannelGraph
from taylor_pruning.surgery.parts import PartsGraph
from taylor_pruning.tasks.batches import select
from taylor_pruning.tasks.task import Task, example_of

SAMPLES = 2  # on which the inputs of modules are recorded: rows that are no images of the batch show themselves


def graph_for(task: Task, model: nn.Module, batch, settings: PruningSettings) -> ChannelGraph | PartsGraph:
    """The graph of `model`, or of its modules `settings.prune_modules`, on images like those of a batch of the task.

    Raises InputError as ChannelGraph and PartsGraph do.
    """
    if not settings.prune_modules:
        return settings.graph_of(model, example_of(task, batch))
    few = select(batch, torch.zeros(SAMPLES, dtype=torch.long))
    return PartsGraph(model, settings.prune_modules, lambda network: task.forward(network, few), SAMPLES, settings.exclude,
                      prune_linear=settings.prune_linear, prune_heads=settings.prune_heads)  # fmt: skip
