"""Gates while a network trains: BatchNorms normalise by the batch and dropout drops, as in the network itself."""

import dataclasses

from torch import Tensor, nn

from taylor_pruning.surgery.analysis import live_nodes
from taylor_pruning.surgery.execution import Execution, record
from taylor_pruning.surgery.graph import ChannelGraph


def for_training(graph: ChannelGraph, model: nn.Module, example: Tensor) -> ChannelGraph:
    """The graph for `model`, of the same shapes, whose `gated` also repeats the forward of training mode.

    A `ChannelGraph` alone repeats what the modules do in evaluation where training runs the same operations: that is what
    scores need, and half the tracing.
    """
    found = graph.on(model)
    if True in found.executions:
        return found
    trace = record(model, example, training=True)
    nodes = dict(zip(live_nodes(found.executions[False].trace.graph), live_nodes(trace.graph), strict=True))
    sites = tuple(
        dataclasses.replace(site, node=nodes[site.node]) for site in found.gate_sites[False] if site.node in nodes
    )
    found.executions = {**found.executions, True: Execution(model, trace)}
    found.gate_sites = {**found.gate_sites, True: sites}
    return found
