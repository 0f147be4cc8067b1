"""What one experiment found, in the layout of results.json."""

import dataclasses
import hashlib
import json
import time
from dataclasses import dataclass, field

from torch import Tensor, nn

from taylor_pruning.report.json_files import plain
from taylor_pruning.surgery.graph import ChannelGraph


@dataclass
class PruningResult:
    """What one experiment found; `as_dict()` has the layout of results.json.

    Attributes:
        model: the smaller network.
        stages: one dictionary a stage, accuracy (of another task its metrics by name) and profile. "dense"; "pruned": the
            plan applied to the dense network,
            with no repair; "compensated" or "trained": what compensation or the training between the rounds made of it;
            "repaired": after the repair across layers; "fine-tuned".
        rounds: one dictionary a round:
            round, percentage, filters_removed;
            layer_bound_held: False where the percentage could not be reached within the layer bound;
            uniform_widths: True where every layer loses the same share, as where images say too little to compare layers;
            trade: {layer: {"filters": widths, "cost": predicted cost of the layer at them (nats)}}, see experiment.choices;
            measured_over_predicted: {first layer of a group of coupled layers: measured / predicted cost of the first choice in
                it}, by which the choice was corrected (selection.corrected); {} where it was not;
            loss: what the next two are of, on the calibration images: "divergence" with compensation, else the
                "cross-entropy" (another task: "loss") with the labels;
            predicted_loss_change: of what the round removes (nats), None where the criterion predicts none; with compensation
                the divergence from the network at the beginning of the round;
            measured_loss_change: over the round (nats); with compensation of the divergence from the dense network;
            label_loss_change: measured change of the cross-entropy (of the task's loss) with the labels;
            held_out: after the round, on images that neither score nor repair (training.measuring.Measuring.fidelity);
            after_selection, after_compensation, after_training: {"top1" (the task's main metric), "loss"} on some of the
                validation images;
            compensation: what it did to every layer (repair.compensation.CompensationReport), or None.
        layers: {name: {"filters", "kept", "reason"}}.
        plan: {name: indices of the removed filters in the dense network}.
        scores: {name: [filters] score by which the first round selected, None where a filter is protected}.
        criterion: what the scores are, with their unit.
        curvature: how the scores' derivatives were computed: {"path", "reason", "sampled", "h_error"}, see
            scoring.curvature.curvature_report.
        repair: of the repair across layers (repair.network.NetworkRepair), or None.
        seconds: {"score", "select", "surgery", "compensate", "evaluate", "train", "repair"}: summed over the rounds.
        fine_tuning: one dictionary an epoch.
        accuracy_at_steps: [{"step", "top1", "loss"}] while fine-tuning, on the images that a round is evaluated on.
        gradient_flow: see `flow_with_stage`. oracle: see EnhancedPruning.oracle. None where they were not asked for.
        stopped: where the guard ended the rounds, {"asked", "reached", "tried": per cent of the budget, "held_out": of the
            round that was not taken}; else None.
        latency: where the budget was one, milliseconds of a forward of `batch_size` images on `device`: "dense_ms" and
            "pruned_ms" as measured at the end, in turn, "asked_ms", and "predicted_ms" from the layers' times.
        dense_fingerprint: of the dense network's weights, by which a result of another one is told apart.
        notes: one line on each kind of wrapper (DataParallel, torch.compile, ...) that was taken off the network.
    """

    model: nn.Module
    stages: list
    rounds: list
    layers: dict
    plan: dict
    seconds: dict
    scores: dict = field(default_factory=dict)
    criterion: str | None = None
    curvature: dict = field(default_factory=dict)
    repair: dict | None = None
    fine_tuning: list = field(default_factory=list)
    accuracy_at_steps: list = field(default_factory=list)
    gradient_flow: dict | None = None
    oracle: dict | None = None
    notes: list = field(default_factory=list)
    latency: dict | None = None
    stopped: dict | None = None
    dense_fingerprint: str | None = None

    @property
    def identity(self) -> dict:
        """Plain values by which the network is told apart from others, for checkpoints."""
        plan = json.dumps(sorted(self.plan.items()))
        filters = hashlib.sha256(plan.encode()).hexdigest()[:12]
        return {"the dense network": self.dense_fingerprint, "the removed filters": filters}

    def as_dict(self) -> dict:
        """All but the model, as values that JSON knows: NaN and infinities are None."""
        return plain({f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "model"})


def layer_table(graph: ChannelGraph, kept: dict) -> dict:
    """{layer: {"filters", "kept", "reason" (why none may be removed, or None)}}."""
    return {
        name: {
            "filters": info.filters,
            "kept": len(kept[name]),
            "reason": None if info.removable.any() else info.reason,
        }
        for name, info in graph.layers.items()
    }


def plain_scores(by_filter: dict[str, Tensor]) -> dict:
    """{layer: [filters] numbers, None for nan}."""
    return {name: [None if v != v else v for v in values.tolist()] for name, values in by_filter.items()}


def flow_with_stage(flow: dict, stage: str, report: dict) -> dict:
    """The gradient-flow dictionary of results.json with one more stage's report (GradientFlowReport.as_dict).

    A layer that could not be measured at that stage has None.
    """
    layers = {name: dict(values) for name, values in flow["layers"].items()}
    for name, figures in report["layers"].items():
        layers.setdefault(name, {})[stage] = figures["mean"]
    return {**flow, "layers": layers, "reports": {**flow["reports"], stage: report}}


def flow_with_kept(flow: dict, graph: ChannelGraph, kept: dict) -> dict:
    """The gradient-flow dictionary with, of every unit, whether it was kept."""
    there = {(name, index) for name, indices in kept.items() for index in indices}
    return {**flow, "units": {**flow["units"], "kept": [unit.filters[0] in there for unit in graph.units]}}


def ranking_of(pruner) -> dict:
    """What results.json says of the ranking of the dense network by an EnhancedFilterPruner."""
    scores, criterion = pruner.criterion()
    flow = None
    if pruner.use_gradient_flow:
        units = {"flow": pruner.directions.flow.double().mean(0).tolist(), "score": scores.tolist()}
        flow = {"layers": {}, "units": units, "reports": {}}
        flow = flow_with_stage(flow, "dense", pruner.flow_report().as_dict())
    return {
        "scores": plain_scores(pruner.by_filter(scores)),
        "criterion": criterion,
        "curvature": pruner.curvature_report(),
        "gradient_flow": flow,
    }


def round_record(number, percentage, choice, plan, before, after, accuracy, compensation) -> dict:
    """A round's entry in results.json.

    Args:
        choice: experiment.choices.Choice.
        before, after: losses before and after the round (training.measuring.Measuring.losses).
        accuracy: {"selection", "compensation", "training": accuracy on the monitored images after it, or None}.
        compensation: what it did, as a dictionary; None without.
    """
    with_labels = next(name for name in after if name != "divergence")
    loss = with_labels if compensation is None else "divergence"
    change = {name: after[name] - before[name] for name in after}
    return {
        "round": number,
        "percentage": percentage,
        "filters_removed": sum(map(len, plan.values())),
        "layer_bound_held": choice.chosen.layer_bound_held,
        "uniform_widths": choice.chosen.uniform_widths,
        "trade": choice.trade,
        "measured_over_predicted": choice.chosen.measured_over_predicted,
        "times": choice.times,
        "loss": loss,
        "predicted_loss_change": choice.chosen.predicted_loss_change,
        "measured_loss_change": change[loss],
        "label_loss_change": change[with_labels],
        **{f"after_{step}": figures for step, figures in accuracy.items()},
        "compensation": compensation,
    }


class Stopwatch:
    """Adds up seconds by step, on top of those of earlier rounds, in `total`."""

    def __init__(self, seconds: dict):
        self.total, self.last = dict(seconds), time.perf_counter()

    def lap(self, step: str) -> None:
        """Count the time since the last lap as the step's."""
        now = time.perf_counter()
        self.total[step] = self.total.get(step, 0.0) + now - self.last
        self.last = now


def all_filters(graph: ChannelGraph) -> dict:
    """{layer: indices of all its filters}."""
    return {name: list(range(info.filters)) for name, info in graph.layers.items()}


def removed(graph: ChannelGraph, kept: dict) -> dict:
    """{layer: filters of `graph` that are not in `kept`, sorted}."""
    return {name: sorted(set(range(graph.layers[name].filters)) - set(indices)) for name, indices in kept.items()}


def remaining(kept: dict, plan: dict) -> dict:
    """{layer: the indices in `kept` whose positions `plan` does not remove}."""
    gone = {name: set(positions) for name, positions in plan.items()}
    return {
        name: [index for position, index in enumerate(indices) if position not in gone.get(name, ())]
        for name, indices in kept.items()
    }
