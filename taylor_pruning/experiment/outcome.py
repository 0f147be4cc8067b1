"""The PruningResult of a network that has gone through the rounds."""

from torch import nn

from taylor_pruning.experiment.checkpoint import RoundsState, fingerprint_of
from taylor_pruning.experiment.results import PruningResult, flow_with_kept, flow_with_stage, layer_table, removed
from taylor_pruning.selection.latency import latency_report
from taylor_pruning.training.measuring import Measuring

STAGES = {"repair": "repaired", "compensate": "compensated", "train": "trained"}  # by the step, the last one first


def pruning_result(state: RoundsState, rankings, measuring: Measuring, notes: tuple = ()) -> PruningResult:
    """What was found, before fine-tuning: measures the network cut alone, and as the rounds left it.

    Args:
        rankings: EnhancedFilterPruner.Rankings of the dense network.
        notes: see PruningResult.
    """
    graph, plan, seconds = rankings.graph, removed(rankings.graph, state.kept), state.seconds
    step = next((step for step in STAGES if step in seconds), None)  # the last change is what is there now
    cut = graph.remove(plan) if step else state.model
    stages = [measuring.dense_stage(), measuring.stage("pruned", cut, sum(seconds.values()))]
    repair = dict(state.repair) if state.repair else None
    if repair:
        stages.append(repair.pop("before"))
    if step:
        stages.append(measuring.stage(STAGES[step], state.model, seconds[step]))
    result = PruningResult(
        state.model, stages, state.rounds, layer_table(graph, state.kept), plan, seconds,
        notes=list(notes), repair=repair, stopped=state.stopped, latency=_latency(state, rankings),
        dense_fingerprint=fingerprint_of(graph), **state.ranking,
    )  # fmt: skip
    if result.gradient_flow:
        flow = flow_with_kept(result.gradient_flow, graph, state.kept)
        result.gradient_flow = with_flow(flow, "pruned", rankings, state.model)
    return result


def with_flow(flow: dict, stage: str, rankings, model: nn.Module) -> dict:
    """The gradient-flow dictionary of results.json with what is measured of `model`, as one more stage."""
    return flow_with_stage(flow, stage, rankings.flow_of(model).as_dict())


def _latency(state, rankings):
    """Times of the dense and the pruned network, where the budget was one."""
    if not (rankings.settings.times and state.rounds):
        return None
    times, shares = rankings.settings.times, state.rounds[-1]["times"]
    return latency_report(rankings.graph, state.model, times, rankings.example, shares)
