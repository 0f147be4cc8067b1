"""How much training signal flows back through each unit of filters, and what is wrong with it.

    >>> import torch
    >>> from torch import nn
    >>> _ = torch.manual_seed(1)
    >>> layers = [layer for width in (3, 8, 8) for layer in (nn.Conv2d(width, 8, 3), nn.ReLU())]
    >>> model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    >>> images, labels = torch.randn(40, 3, 12, 12), torch.arange(40) % 4
    >>> model[4].weight.data[5] = 0
    >>> model[4].bias.data[5] = -1  # its ReLU never opens
    >>> print(GradientFlowAnalyzer(model, images[:1]).analyze([(images, labels)]))
    Gradient flow of 3 of 3 layers on 40 images:
    dead filters: 1 of 8 in 4 (5)

The flow of unit u on sample n is the L2 norm of the gradient of that sample's loss with respect to the unit's channels
a after the last affine operation, before the activation function:

    F[n, u] = sqrt( sum over channels c of u and positions x of (d loss_n / d a[n, c, x])^2 )

All figures derive from F [N, units], which `collect_flow` or the ranking of a network collects. Scores and
selection do not use them; scoring.flow derives optional weights of scores from F.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import accumulate, compress, pairwise
from statistics import linear_regression, median

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from taylor_pruning.checks import check_gradient_mode
from taylor_pruning.errors import InputError
from taylor_pruning.first_batch import Batches, check_first, device_of
from taylor_pruning.modes import frozen
from taylor_pruning.scoring.flow import unit_gradient_norms
from taylor_pruning.scoring.gates import gated_outputs, open_gates
from taylor_pruning.selection.constraints import require_units
from taylor_pruning.surgery.graph import ChannelGraph, checked_graph
from taylor_pruning.tasks.classification import Classification

NEAR_ZERO = 1e-2  # of the layer's mean: a unit below it hardly trains
DEAD = 1e-6  # of the layer's mean: a unit below it does not train at all
DEAD_SAMPLES = 32  # on fewer images a ReLU may be inactive by chance, so that no filter is reported as dead
TREND = 1e3  # fitted change of the layer norm over the whole depth from which the gradient vanishes or explodes
OUTLYING = TREND**0.5  # times off the network's median: a layer that a trend's finding names
BOTTLENECK = 0.02  # of the network's median step: a step towards the input that loses this much is a bottleneck
TREND_LAYERS = 4  # fewer layers show no trend
NAMED = 5  # names (or lines of one kind) a finding spells out


def collect_flow(model: nn.Module, graph: ChannelGraph, batches: Iterable) -> Tensor:
    """[N, units] flow F of every image and unit under cross-entropy, on the CPU.

    Args:
        graph: the model's ChannelGraph.
        batches: iterable of (images [B, ...], labels [B]) on the model's device.

    Raises:
        InputError: no unit, no batch, NaN in images or weights, labels outside the logits' range.
    """
    check_gradient_mode("gradient flow")
    require_units(graph)
    flows, name, task = [], "the images of gradient flow", Classification()
    batches = list(batches) if isinstance(batches, Iterator) else batches
    loader = Batches(batches, name, device_of(model), task)
    check_first(model, loader)
    for number, (images, labels) in enumerate(loader):
        gates, gated = open_gates(graph, images), []

        def record(site, output, gated=gated):
            if output.requires_grad:  # a part of the forward under no_grad has no gradient
                gated.append((site, get_gradient_edge(output)))

        with frozen(model):
            batch, where = (images, labels), f"batch {number} of {name}"
            logits = gated_outputs(graph, task, batch, gates, where, on_activation=record)
        loss = task.loss(logits, batch).sum()
        flows.append(unit_gradient_norms(loss, gated, *gates.shape, retain_graph=False).cpu())
    return torch.cat(flows)


def _signal_to_noise(values):
    """[columns] mean over sd of [N, columns] non-negative values; at most 1000, 0 where all are 0."""
    mean = values.mean(0)
    noise = torch.hypot(values.std(0, correction=0), 1e-3 * mean)
    return torch.where(mean > 0, mean / noise.clamp_min(torch.finfo(values.dtype).tiny), 0.0)


@dataclass(frozen=True)
class LayerFlow:
    """Flow of one layer, over those of its filters that belong to a unit. None where there is nothing to measure.

    A unit gated in several places (residual stream) counts with F / sqrt(number of its channels).

    Attributes:
        name: layer. filters: how many it has. measured: how many of them belong to a unit.
        reason: why the others do not, and so are not measured.
        same_as: an earlier layer with exactly the same units, whose figures these are too; left out of the trend.
        mean, spread: mean and standard deviation over units of the mean flow over samples.
        norm: mean over samples of the L2 norm of the whole layer's gradient, sqrt(sum_u F^2).
        signal_to_noise: mean over standard deviation, across samples, of that norm (at most 1000).
        near_zero: share of units with mean flow below NEAR_ZERO x `mean`. dead: filters of units below DEAD x `mean`.
        ratio_previous, ratio_next: `norm` over that of the neighbouring measured layer towards input and output.
    """

    name: str
    filters: int
    measured: int
    reason: str | None
    same_as: str | None = None
    mean: float | None = None
    spread: float | None = None
    norm: float | None = None
    signal_to_noise: float | None = None
    near_zero: float | None = None
    dead: tuple[int, ...] = ()
    ratio_previous: float | None = None
    ratio_next: float | None = None


@dataclass(frozen=True)
class GradientFlowReport:
    """Gradient flow per unit and per layer, and what is wrong with it.

    Attributes:
        samples: number N of images.
        unit_flow: [units] mean over samples of F.
        filter_flow: {layer: tensor [filters] of the flow of each filter's unit, nan where protected}.
        layers: tuple of `LayerFlow` in order of execution.
        shrinkage: factor by which the passing norm (below) changes per layer towards the input, fitted to its
            logarithm, bottlenecks left out; None with fewer than TREND_LAYERS layers.
        findings: at most ten lines, () for a healthy network:
            no gradient: the layer's norm is 0.
            dead filters: mean flow at most DEAD x the layer's mean, on DEAD_SAMPLES images or more.
            vanishing, exploding: the fitted change over the depth is TREND or more; the finding names the layers whose
                passing norm is OUTLYING times below (above) the network's median.
            bottlenecks: steps towards the input whose ratio of passing norms is below BOTTLENECK x the median step.

    The passing norm of layer l is min(max_{k <= l} norm_k, max_{k >= l} norm_k). It is the norm itself in a chain; in a
    side branch (squeeze-and-excitation, a weak residual branch) it is what passes by, since a gradient that is small in
    the branch alone and large again before it is not lost.
    """

    samples: int
    unit_flow: Tensor
    filter_flow: dict
    layers: tuple[LayerFlow, ...]
    shrinkage: float | None
    findings: tuple[str, ...]

    @classmethod
    def from_flow(cls, graph: ChannelGraph, flow: Tensor) -> "GradientFlowReport":
        """The report on flows [N, units] that `collect_flow` or the ranker has collected.

        Raises InputError if they do not fit the graph, or are not finite.
        """
        if flow.dim() != 2 or flow.shape[1] != len(graph.units) or not flow.numel():
            raise InputError(f"flow must be [images, {len(graph.units)} units], both at least 1, not {[*flow.shape]}")
        if not torch.isfinite(flow).all():
            raise InputError("the loss gradient is NaN or infinite; check images and weights")
        flow = flow.detach().double().cpu()
        unit_flow = flow.mean(0)
        padded = torch.cat([unit_flow, unit_flow.new_tensor([torch.nan])])  # index -1: protected
        layers = _with_ratios(_layer_flows(graph, flow))
        chain = _chain(layers)
        narrow, passing = _split_bottlenecks(_passing(chain))
        shrinkage = _shrinkage(passing)
        findings = (*_dead_findings(chain, len(flow)), *_trend_findings(passing, shrinkage), *narrow)
        filter_flow = {name: padded[info.unit_of] for name, info in graph.layers.items()}
        return cls(len(flow), unit_flow, filter_flow, layers, shrinkage, findings)

    def as_dict(self) -> dict:
        """Plain values for JSON.

        {"samples", "shrinkage", "findings": [str], "thresholds": {name: float}, "layers": {name: `LayerFlow`'s fields},
        "filters": {layer: [flow or None where protected]}}
        """
        filters = {
            name: [None if value != value else value for value in values.tolist()]
            for name, values in self.filter_flow.items()
        }
        layers = {layer.name: {**asdict(layer), "dead": list(layer.dead)} for layer in self.layers}
        for figures in layers.values():
            del figures["name"]
        thresholds = {"near_zero": NEAR_ZERO, "dead": DEAD, "trend": TREND, "bottleneck": BOTTLENECK}
        return {
            "samples": self.samples,
            "shrinkage": self.shrinkage,
            "findings": list(self.findings),
            "thresholds": thresholds,
            "layers": layers,
            "filters": filters,
        }

    def __str__(self):
        measured = sum(layer.norm is not None for layer in self.layers)
        head = f"Gradient flow of {measured} of {len(self.layers)} layers on {self.samples} images"
        return "\n".join([f"{head}: {'' if self.findings else 'nothing remarkable'}".rstrip(), *self.findings])


def _layer_flows(graph, flow):
    """A LayerFlow for every layer of the graph, without ratios."""
    channels = torch.zeros(len(graph.units))
    for site in graph.activations:
        channels += torch.bincount(site.units[site.units >= 0].cpu(), minlength=len(graph.units))
    flow = flow / channels.clamp_min(1).sqrt()
    first, layers = {}, []
    for name, info in graph.layers.items():
        units = info.unit_of[info.removable].unique()
        measured = int(info.removable.sum())
        if not measured:
            layers.append(LayerFlow(name, info.filters, 0, info.reason))
            continue
        owner = first.setdefault(tuple(units.tolist()), name)
        means = flow[:, units].mean(0)
        mean = means.mean().item()
        norms = torch.linalg.vector_norm(flow[:, units], dim=1)
        dead = torch.zeros(len(graph.units) + 1, dtype=torch.bool)  # the last entry stands for index -1
        dead[units] = means <= DEAD * mean
        layers.append(
            LayerFlow(
                name,
                info.filters,
                measured,
                info.reason,
                same_as=owner if owner != name else None,
                mean=mean,
                spread=means.std(correction=0).item(),
                norm=norms.mean().item(),
                signal_to_noise=_signal_to_noise(norms[:, None]).item() if len(norms) > 1 else None,
                near_zero=(means <= NEAR_ZERO * mean).double().mean().item(),
                dead=tuple(torch.nonzero(dead[info.unit_of]).flatten().tolist()),
            )
        )
    return layers


def _chain(layers):
    """The layers to which a trend is fitted: measured ones; of layers with the same units only the first."""
    return [layer for layer in layers if layer.norm is not None and layer.same_as is None]


def _with_ratios(layers):
    """The layers with the ratios of their norm to those of their neighbours in the chain."""
    chain = _chain(layers)
    ratios = {layer.name: {} for layer in layers}
    for near_input, near_output in pairwise(chain):
        if near_input.norm > 0 and near_output.norm > 0:
            ratios[near_output.name]["ratio_previous"] = near_output.norm / near_input.norm
            ratios[near_input.name]["ratio_next"] = near_input.norm / near_output.norm
    return tuple(replace(layer, **ratios[layer.name]) for layer in layers)


def _passing(chain):
    """(layer, passing norm) of the layers that a gradient reaches, see `GradientFlowReport`."""
    live = [layer for layer in chain if layer.norm > 0]
    norms = [layer.norm for layer in live]
    from_input = accumulate(norms, max)
    from_output = reversed(list(accumulate(reversed(norms), max)))
    return list(zip(live, map(min, from_input, from_output), strict=True))


def _split_bottlenecks(passing):
    """Findings on the bottlenecks, and the passing norms with each such step set to the median one."""
    if len(passing) < TREND_LAYERS:
        return [], passing
    steps = [before / after for (_, before), (_, after) in pairwise(passing)]
    usual = median(steps)
    narrow = [step < BOTTLENECK * usual for step in steps]
    names = [f"{after.name} -> {before.name}" for (before, _), (after, _) in compress(pairwise(passing), narrow)]
    findings = [f"bottlenecks: most of the gradient is lost at {_named(names)}"] if names else []
    layer, norm = passing[-1]
    steady = [(layer, norm)]
    for (layer, _), step, is_narrow in reversed(list(zip(passing[:-1], steps, narrow, strict=True))):
        norm *= usual if is_narrow else step
        steady.append((layer, norm))
    return findings, steady[::-1]


def _shrinkage(passing):
    """Least-squares factor per layer of the passing norm towards the input, None with too few layers."""
    if len(passing) < TREND_LAYERS:
        return None
    return math.exp(-linear_regression(range(len(passing)), [math.log(norm) for _, norm in passing]).slope)


def _named(names):
    rest = len(names) - NAMED
    return ", ".join(map(str, names[:NAMED])) + (f" and {rest} more" if rest > 0 else "")


def _dead_findings(chain, samples):
    silent = [layer.name for layer in chain if layer.norm == 0]
    lines = [f"no gradient: none reaches {_named(silent)}"] if silent else []
    dead = [layer for layer in chain if layer.dead and layer.norm > 0] if samples >= DEAD_SAMPLES else []
    for layer in dead[:NAMED]:
        lines.append(f"dead filters: {len(layer.dead)} of {layer.measured} in {layer.name} ({_named(layer.dead)})")
    if dead[NAMED:]:
        count = sum(len(layer.dead) for layer in dead[NAMED:])
        lines.append(f"dead filters: {count} more in {len(dead[NAMED:])} further layers")
    return lines


def _trend_findings(passing, shrinkage):
    if shrinkage is None or max(shrinkage, 1 / shrinkage) ** (len(passing) - 1) < TREND:
        return []
    middle = median(norm for _, norm in passing)
    if shrinkage < 1:
        kind, extreme = "vanishing", [layer.name for layer, norm in passing if norm < middle / OUTLYING]
    else:
        kind, extreme = "exploding", [layer.name for layer, norm in passing if norm > middle * OUTLYING]
    where = f", most in {_named(extreme)}" if extreme else ""
    return [f"{kind} gradient: x {shrinkage:.2g} per layer towards the input{where}"]


class GradientFlowAnalyzer:
    """Measures the gradient flow of a model's units under cross-entropy.

    Args:
        model: classifier; comes back as it was given.
        example_input: [1, C, H, W] tensor.
        graph: its ChannelGraph, which says which layers are measured; default: all that can be pruned.
    """

    def __init__(self, model: nn.Module, example_input: Tensor, graph: ChannelGraph | None = None):
        self.graph = checked_graph(graph, model) or ChannelGraph(model, example_input)
        self.model = self.graph.model

    def analyze(self, batches: Iterable) -> GradientFlowReport:
        """The report on batches of (images, labels). Raises InputError as `collect_flow` does."""
        return GradientFlowReport.from_flow(self.graph, collect_flow(self.model, self.graph, batches))
