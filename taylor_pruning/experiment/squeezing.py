"""Squeezes a plan's units while the network trains, then cuts them: the cut changes nothing."""

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from taylor_pruning.surgery.graph import ChannelGraph
from taylor_pruning.surgery.training_gates import for_training
from taylor_pruning.training.fine_tuning import Recipe, train_steps
from taylor_pruning.training.squeezing import SqueezedNetwork


def squeeze_and_cut(
    graph: ChannelGraph,
    plan: dict,
    example: Tensor,
    train_loader: Iterable,
    recipe: Recipe,
    steps: int,
    **settings,
) -> nn.Module:
    """A copy of the graph's model that was trained for `steps` while the gates of the plan's units closed, without them.

    Args:
        graph: ChannelGraph of the network, which is not changed. plan: {layer: filters that go}.
        example: an image [1, C, H, W].
        train_loader, recipe, steps, settings: of training.fine_tuning.train_steps.
    """
    model = copy.deepcopy(graph.model)
    gated = for_training(graph, model, example)
    closing = torch.zeros(len(graph.units), dtype=torch.bool, device=example.device)
    closing[graph.units_of(plan)] = True
    network = SqueezedNetwork(model, gated.gated, closing, steps * recipe.accumulate)
    train_steps(network, train_loader, recipe, steps, **settings)
    return gated.remove(plan)
