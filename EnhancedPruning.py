"""The pipeline: evaluate, rank, prune in rounds, compensate, fine-tune, profile.

    pruning = EnhancedPruning(model, train_loader, val_loader)
    result = pruning.run_full_pruning(pruning_percentage=30, taylor_order=2, fine_tune_epochs=5)
    result.model, result.as_dict()
"""

import copy
import dataclasses
import io
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from EnhancedFilterPruner import CLASS_PROBES, TAYLOR_ORDERS, EnhancedFilterPruner
from GradientFlowAnalyzer import GradientFlowAnalyzer
from taylor_pruning.errors import InputError, atomic_file, one_of
from taylor_pruning.modes import frozen
from taylor_pruning.repair.compensation import compensate
from taylor_pruning.selection.baselines import baseline_scores
from taylor_pruning.selection.greedy import Constraints, Ledger, Selection, check_reachable, select_by_score
from taylor_pruning.surgery.graph import ChannelGraph
from taylor_pruning.training.distributed import is_main
from taylor_pruning.training.fine_tuning import Recipe, evaluate, fine_tune, reestimate_batchnorm, train_steps

MONITOR_IMAGES = 500  # validation images on which every round is watched
LATENCY_RUNS = 15


@dataclass(frozen=True)
class PruningSettings:
    """How filters are chosen and the network is repaired; arguments of EnhancedFilterPruner unless said here.

    rounds: collections of statistics on the way to the percentage, each at the network pruned so far.
    compensate: least squares on the calibration images after every round (repair.compensation), each time from the dense
        network's weights: fitted on top of earlier fits they would drift away from them round by round.
    steps_between_rounds: training steps after every round but the last (Molchanov et al. 2017), at the recipe's learning
        rate. Compensation then fits to the network before the round's cut, from its weights, not to the dense one, which
        would undo the training: each round repairs its own cut, and training what remains of earlier ones.
    reestimate_batchnorm: new BatchNorm statistics from the calibration images before fine-tuning.
    """

    rounds: int = 5
    selection: str = "auto"
    curvature: str = "auto"
    class_probes: int = CLASS_PROBES
    constraints: Constraints = Constraints()
    exclude: tuple = ()
    prune_linear: bool = False
    compensate: bool = True
    steps_between_rounds: int = 0
    reestimate_batchnorm: bool = False
    seed: int = 0

    def __post_init__(self):
        if self.rounds < 1:
            raise InputError(f"rounds must be at least 1, not {self.rounds}")
        if self.steps_between_rounds < 0:
            raise InputError(f"steps_between_rounds must be at least 0, not {self.steps_between_rounds}")


@dataclass
class PruningResult:
    """What one experiment found; `as_dict()` has the layout of results.json.

    Attributes:
        model: the smaller, fine-tuned network.
        stages: one dictionary a stage (dense, pruned, compensated, fine-tuned): accuracy and profile.
        rounds: one dictionary a round: filters removed, predicted and measured loss change, accuracy on MONITOR_IMAGES
            after selection, compensation and, where there is some before the next round, training.
        layers: {name: {"filters", "kept", "reason"}}.
        scores: {name: [filters] estimated loss change of removing each filter alone from the dense network, or None}.
        plan: {name: removed filters, in the dense network's numbering}.
        seconds: {"score", "select", "surgery", "compensate", "watch", "train"}: summed over the rounds.
        curvature: {"path": "exact" or "hvp", "reason", "sampled": share of it that random directions stand for}.
        fine_tuning: one dictionary an epoch.
        gradient_flow, oracle: see results.json in the README, or None.
    """

    model: torch.nn.Module
    stages: list
    rounds: list
    layers: dict
    plan: dict
    seconds: dict
    scores: dict = field(default_factory=dict)
    curvature: dict = field(default_factory=dict)
    fine_tuning: list = field(default_factory=list)
    gradient_flow: dict | None = None
    oracle: dict | None = None

    def as_dict(self):
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "model"}


@dataclass
class PrunedNetwork:
    """A point on the way: the network at some percentage, and how it came there."""

    percentage: float
    model: torch.nn.Module
    uncompensated: torch.nn.Module
    kept: dict  # {layer: indices of the kept filters in the dense network}
    rounds: list
    seconds: dict  # by stage, summed over the rounds
    loss: float | None = None  # nats, on the calibration images; None: not measured


class EnhancedPruning:
    """Prunes and fine-tunes `model`, which itself stays as it is.

    Args:
        model: classifier that `torch.fx` can trace.
        train_loader, val_loader: iterables with a length of (images [B, C, H, W], labels [B]) on the model's device.
        calibration: list of such batches for scoring; default: `calibration_samples` images from
            `train_loader`.
        compensation: list of such batches for compensation; default: `calibration`.
        dense_stage: the dense network's stage where it is known already.
        settings, recipe: PruningSettings, training.fine_tuning.Recipe.
        progress: show tqdm bars.

    Raises:
        InputError: empty loaders, a network that cannot be traced or pruned.
    """

    def __init__(
        self,
        model,
        train_loader,
        val_loader,
        *,
        calibration=None,
        calibration_samples=500,
        compensation=None,
        dense_stage=None,
        settings=None,
        recipe=None,
        progress=True,
    ):
        self.model, self.train_loader, self.val_loader = model, train_loader, val_loader
        self.settings, self.recipe, self.progress = settings or PruningSettings(), recipe or Recipe(), progress
        self.calibration = list(calibration) if calibration else _first_images(train_loader, calibration_samples)
        if not self.calibration:
            raise InputError("there are no calibration images; the training loader is empty")
        self.compensation = list(compensation) if compensation else self.calibration
        self.example = self.calibration[0][0][:1]
        self.monitor = _every_kth_image(val_loader, MONITOR_IMAGES)
        self.graph = ChannelGraph(model, self.example, self.settings.exclude, self.settings.prune_linear)
        self._dense_stage, self._dense_pruners = dense_stage, {}

    # -- the whole way -----------------------------------------------------------------------------------------------

    def run_full_pruning(
        self,
        pruning_percentage=30,
        taylor_order=2,
        use_gradient_flow=False,
        fine_tune_epochs=None,
        *,
        oracle_samples=0,
        checkpoint=None,
        resume=False,
    ):
        """Evaluate, prune in rounds, fine-tune: `prune` and then `fine_tune`, whose arguments these are.

        The last round is kept beside the checkpoint of fine-tuning, with the suffix .rounds.
        """
        rounds = Path(checkpoint).with_suffix(".rounds") if checkpoint else None
        result = self.prune(pruning_percentage, taylor_order, use_gradient_flow, oracle_samples=oracle_samples,
                            checkpoint=rounds, resume=resume)  # fmt: skip
        return self.fine_tune(result, fine_tune_epochs, checkpoint=checkpoint, resume=resume)

    def prune(
        self,
        pruning_percentage=30,
        taylor_order=2,
        use_gradient_flow=False,
        *,
        oracle_samples=0,
        checkpoint=None,
        resume=False,
    ):
        """Evaluates the dense network, prunes it in rounds and evaluates it again.

        Args:
            pruning_percentage: in (0, 100), of the budget in the settings' constraints.
            taylor_order: 1, 2 or 3.
            use_gradient_flow: weigh scores by gradient flow and report it.
            oracle_samples: filters whose true loss change is measured, see `oracle`.
            checkpoint: file that is written after every round.
            resume: go on from it, if it exists, with the same arguments.

        Returns:
            PruningResult without fine-tuning.

        Raises:
            InputError: an argument, the data or the checkpoint is wrong, see the message.
        """
        start = self.restored(checkpoint) if resume and checkpoint else None
        if start and start.percentage > pruning_percentage:
            raise InputError(
                f"{checkpoint} is of another pruning, at {start.percentage:g} % already; "
                "give the same settings, or start anew without resuming"
            )
        method = f"order {taylor_order}"
        (network,) = self.path(
            method, [pruning_percentage], use_gradient_flow=use_gradient_flow, start=start, checkpoint=checkpoint
        )
        result = self.result_of(network, taylor_order, use_gradient_flow)
        if oracle_samples:
            result.oracle = self.oracle(oracle_samples)
        return result

    def path(self, method, percentages, *, use_gradient_flow=False, seed=0, start=None, checkpoint=None):
        """Yields a PrunedNetwork at every one of the ascending `percentages`, on one way down.

        Args:
            method: "order 1", "order 2", "order 3" (rounds, compensated as the settings say) or the name of a baseline
                (one shot from the dense network, as published, so that no training lies between rounds).
            checkpoint: file that is written after every round.
            start: PrunedNetwork that such a file gave (`restored`), where this same way was broken off.
        """
        percentages = sorted(percentages)
        for percentage in percentages:  # wrong ones fail before anything is computed
            check_reachable(self.graph, percentage, self.settings.constraints)
        if not method.startswith("order "):
            for percentage in percentages:
                yield self._baseline(method, percentage, seed)
            return
        order = int(method.removeprefix("order "))
        one_of("taylor_order", order, TAYLOR_ORDERS)
        constraints = self.settings.constraints
        ledger = Ledger.open(self.graph, constraints)
        network = start or PrunedNetwork(0.0, self.model, self.model, _all_filters(self.graph), [], {})
        ledger.record(self._plan(network.kept))
        steps = {percentages[-1] * (i + 1) / self.settings.rounds for i in range(self.settings.rounds)}
        for percentage in sorted(p for p in steps | set(percentages) if p >= network.percentage):
            if percentage > network.percentage:
                network = self._trained(network)
                network = self._round(network, order, percentage, ledger, use_gradient_flow)
                if checkpoint and is_main():
                    self._save(network, checkpoint)
            if percentage in percentages:
                yield network

    @staticmethod
    def _save(network, checkpoint):
        state = {f.name: getattr(network, f.name) for f in dataclasses.fields(network)}
        same = network.uncompensated is network.model
        state["model"] = network.model.state_dict()
        state["uncompensated"] = None if same else network.uncompensated.state_dict()
        with atomic_file(checkpoint) as file:
            torch.save(state, file)

    def restored(self, checkpoint):
        """The PrunedNetwork in a file that `path` wrote, with this dense network and these settings; None without a file."""
        if not Path(checkpoint).exists():
            return None
        state = torch.load(checkpoint, map_location=self.example.device, weights_only=True)
        for name in ("model", "uncompensated"):
            if state[name]:
                weights, state[name] = state[name], self.graph.remove(self._plan(state["kept"]))
                state[name].load_state_dict(weights)
        return PrunedNetwork(**state | {"uncompensated": state["uncompensated"] or state["model"]})

    def _round(self, network, order, percentage, ledger, use_gradient_flow):
        """One round: score the network as it is, select, cut, compensate; returns the next network."""
        clock = _Clock(network.seconds)
        if network.model is self.model:
            pruner = self.dense_pruner(order, use_gradient_flow, self.settings.compensate)
        else:
            pruner = self._ranked(network.model, order, use_gradient_flow, self.settings.compensate)
        clock.lap("score")
        plan = pruner.get_pruning_plan(percentage, ledger)
        clock.lap("select")
        smaller, kept = self._cut(pruner.graph, plan, network.kept)
        ledger.record(plan)
        clock.lap("surgery")
        record = {
            "round": len(network.rounds) + 1,
            "percentage": percentage,
            "filters_removed": sum(map(len, plan.values())),
            "predicted_loss_change": pruner.predicted_loss_change,
            "measured_loss_change": None,
            "after_selection": self._watch(smaller),
            "after_compensation": None,
            "after_training": None,
        }
        uncompensated = smaller
        clock.lap("watch")
        if self.settings.compensate:
            if self.settings.steps_between_rounds:  # see PruningSettings
                smaller = self._compensated(smaller, _without(_all_filters(pruner.graph), plan), network.model)
            else:
                smaller = self._compensated(self.graph.remove(self._plan(kept)), kept)
            clock.lap("compensate")
            record["after_compensation"] = self._watch(smaller)
        loss = self._loss(smaller)
        record["measured_loss_change"] = loss - (self._loss(network.model) if network.loss is None else network.loss)
        clock.lap("watch")
        return PrunedNetwork(percentage, smaller, uncompensated, kept, [*network.rounds, record], clock.seconds, loss)

    def _baseline(self, name, percentage, seed):
        clock = _Clock({})
        directions = self.dense_pruner(1).directions
        scores = baseline_scores(name, self.graph, directions, seed)
        clock.lap("score")
        constraints = dataclasses.replace(self.settings.constraints, layer_bound=None)
        plan = self.graph.plan_of(select_by_score(Selection(self.graph, percentage, constraints), scores))
        smaller, kept = self._cut(self.graph, plan, _all_filters(self.graph))
        clock.lap("surgery")
        return PrunedNetwork(percentage, smaller, smaller, kept, [], clock.seconds)

    def _trained(self, network):
        """The network of a round after the training that lies before the next; the dense network as it is."""
        if not (network.rounds and self.settings.steps_between_rounds):
            return network
        clock, last, model = _Clock(network.seconds), network.rounds[-1], copy.deepcopy(network.model)
        train_steps(
            model,
            self.train_loader,
            self.recipe,
            self.settings.steps_between_rounds,
            loss_before=(last["after_compensation"] or last["after_selection"])["loss"],
            teacher=self.model if self.recipe.distillation_weight else None,
            turn=last["round"] - 1,
            seed=self.settings.seed,
            description=f"train after round {last['round']}",
            progress=self.progress,
        )
        clock.lap("train")
        rounds = [*network.rounds[:-1], {**last, "after_training": self._watch(model)}]
        return dataclasses.replace(network, model=model, rounds=rounds, seconds=clock.seconds, loss=None)

    @staticmethod
    def _cut(graph, plan, kept):
        return graph.remove(plan), _without(kept, plan)

    def _plan(self, kept):
        """{layer: removed filters} in the dense network's numbering."""
        return {n: sorted(set(range(self.graph.layers[n].filters)) - set(k)) for n, k in kept.items()}

    def _compensated(self, smaller, kept, target=None):
        """A copy of `smaller` fitted to the outputs of `target` (default: dense), in whose numbering `kept` is."""
        smaller = copy.deepcopy(smaller)
        target = self.model if target is None else target
        compensate(target, smaller, self.compensation, kept, progress=self.progress)
        return smaller

    def result_of(self, network, taylor_order=None, use_gradient_flow=False):
        """The PruningResult of a pruned network before fine-tuning; `taylor_order` is None for a baseline."""
        stages = [self.dense_stage(), self.stage("pruned", network.uncompensated, sum(network.seconds.values()))]
        if network.model is not network.uncompensated:
            stages.append(self.stage("compensated", network.model, network.seconds["compensate"]))
        result = PruningResult(
            model=network.model,
            stages=stages,
            rounds=network.rounds,
            layers={
                name: {
                    "filters": info.filters,
                    "kept": len(network.kept[name]),
                    "reason": None if info.removable.any() else info.reason,
                }
                for name, info in self.graph.layers.items()
            },
            plan=self._plan(network.kept),
            seconds=network.seconds,
        )
        if taylor_order:
            pruner = self.dense_pruner(taylor_order, use_gradient_flow)
            ranks = pruner.filter_ranks.items()
            result.scores = {name: [None if v != v else v for v in values.tolist()] for name, values in ranks}
            result.curvature = pruner.curvature_report()
            if use_gradient_flow:
                result.gradient_flow = self._gradient_flow(pruner, network)
        return result

    def fine_tune(self, result, epochs=None, *, checkpoint=None, resume=False):
        """Fine-tunes a pruned network and evaluates it.

        Args:
            result: PruningResult of `prune`; it is not changed.
            epochs: default: the recipe's; 0 returns `result`.
            checkpoint, resume: see training.fine_tuning.fine_tune.

        Returns:
            PruningResult with the stage "fine-tuned".
        """
        epochs = self.recipe.epochs if epochs is None else epochs
        if not epochs:
            return result
        recipe = dataclasses.replace(
            self.recipe, epochs=epochs, warmup_epochs=min(self.recipe.warmup_epochs, epochs / 2)
        )
        start, model = time.perf_counter(), copy.deepcopy(result.model)
        torch.manual_seed(self.settings.seed)  # dropout does not depend on what ran before, as after an interruption
        if self.settings.reestimate_batchnorm:
            reestimate_batchnorm(model, self.calibration)
        history = fine_tune(
            model,
            self.train_loader,
            self.val_loader,
            recipe,
            teacher=self.model if recipe.distillation_weight else None,
            checkpoint=checkpoint,
            resume=resume,
            progress=self.progress,
        )
        stages = [*result.stages, self.stage("fine-tuned", model, time.perf_counter() - start)]
        flow = result.gradient_flow
        if flow:
            flow = _with_stage(flow, "fine-tuned", self._flow_report(model))
        return dataclasses.replace(
            result, model=model, stages=stages, fine_tuning=history.epochs[1:], gradient_flow=flow
        )

    # -- parts -------------------------------------------------------------------------------------------------------

    def dense_stage(self):
        """The dense network's stage, measured once."""
        if self._dense_stage is None:
            self._dense_stage = self.stage("dense", self.model)
        return self._dense_stage

    def dense_pruner(self, order, use_gradient_flow=False, repairs=False):
        """A pruner that has ranked the dense network. All orders share one pass over the calibration images.

        Args:
            repairs: score what compensation cannot repair (EnhancedFilterPruner.rank) instead of the removal alone.
        """
        cached = self._dense_pruners.get(repairs)
        if cached is None or (use_gradient_flow and not cached.use_gradient_flow):
            cached = self._ranked(self.model, 3, use_gradient_flow, repairs, self.graph)
            self._dense_pruners[repairs] = cached
        return cached.with_order(order, use_gradient_flow)

    def _ranked(self, model, order, use_gradient_flow, repairs, graph=None):
        settings = self.settings
        pruner = EnhancedFilterPruner(
            model,
            self.example,
            order,
            use_gradient_flow,
            selection=settings.selection,
            curvature=settings.curvature,
            class_probes=settings.class_probes,
            constraints=settings.constraints,
            exclude=settings.exclude,
            prune_linear=settings.prune_linear,
            graph=graph,
            seed=settings.seed,
            progress=self.progress,
        )
        return pruner.rank(self.calibration, self.compensation if repairs else None)

    def oracle(self, samples):
        """The true loss change of removing `samples` randomly drawn units, one at a time, against every order's estimate.

        Measured on the calibration images by closing gates.

        Returns:
            dict(filters, true, predicted {"1", "2", "3"}, spearman {"1", "2", "3"}).
        """
        pruner = self.dense_pruner(3)
        generator = torch.Generator().manual_seed(self.settings.seed)
        units = torch.randperm(len(self.graph.units), generator=generator)[:samples]
        true = true_loss_changes(self.model, self.graph, self.calibration, units.tolist(), progress=self.progress)
        predicted = {str(order): pruner.scores(order)[units] for order in (1, 2, 3)}
        return {
            "filters": [self.graph.units[u].filters[0] for u in units.tolist()],
            "true": true.tolist(),
            "predicted": {order: values.tolist() for order, values in predicted.items()},
            "spearman": {order: spearman(values, true) for order, values in predicted.items()},
        }

    def _gradient_flow(self, pruner, network):
        """Flow per layer of the dense and the pruned network; flow per unit against its score."""
        first = [unit.filters[0] for unit in self.graph.units]
        kept = {name: set(indices) for name, indices in network.kept.items()}
        flow = {
            "layers": {},
            "units": {
                "flow": pruner.directions.flow.double().mean(0).tolist(),
                "score": pruner.scores().tolist(),
                "kept": [index in kept[name] for name, index in first],
            },
            "reports": {},
        }
        flow = _with_stage(flow, "dense", pruner.flow_report().as_dict())
        return _with_stage(flow, "pruned", self._flow_report(network.model))

    def _flow_report(self, model):
        return GradientFlowAnalyzer(model, self.example).analyze(self.calibration).as_dict()

    def stage(self, name, model, seconds=None):
        """Accuracy on the validation images and profile of one network, as in results.json."""
        start = time.perf_counter()
        accuracy = evaluate(model, self.val_loader, description=name, progress=self.progress)
        if seconds is None:
            seconds = time.perf_counter() - start
        return {"stage": name, **dataclasses.asdict(accuracy), **profile(model, self.example), "seconds": seconds}

    def _watch(self, model):
        accuracy = evaluate(model, self.monitor, progress=False)
        return {"top1": accuracy.top1, "loss": accuracy.loss}

    def _loss(self, model):
        return evaluate(model, self.calibration, progress=False).loss


def _with_stage(flow, stage, report):
    """The gradient-flow dictionary of results.json with one more stage's report."""
    layers = {name: dict(values) for name, values in flow["layers"].items()}
    for name, figures in report["layers"].items():
        layers.setdefault(name, {})[stage] = figures["mean"]
    return {**flow, "layers": layers, "reports": {**flow["reports"], stage: report}}


class _Clock:
    """Adds up seconds by name on top of those of earlier rounds."""

    def __init__(self, seconds):
        self.seconds, self.last = dict(seconds), time.perf_counter()

    def lap(self, name):
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self.last
        self.last = now


def profile(model, example):
    """Parameters, multiply-accumulates of one image, bytes of the saved weights, median latency in ms of one image."""
    with frozen(model), torch.no_grad():
        with FlopCounterMode(display=False) as counter:
            model(example)
        buffer = io.BytesIO()
        torch.save(model.state_dict(), buffer)
        return {
            "parameters": sum(p.numel() for p in model.parameters()),
            "macs": counter.get_total_flops() // 2,
            "file_bytes": buffer.tell(),
            "latency_ms": latency(model, example),
        }


def latency(model, example, runs=LATENCY_RUNS):
    """Median wall-clock milliseconds of a forward after warm-up."""
    times = []
    for run in range(runs + 3):
        start = time.perf_counter()
        model(example)
        if example.is_cuda:
            torch.cuda.synchronize(example.device)
        if run >= 3:
            times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times)


def true_loss_changes(model, graph, batches, units, *, progress=True):
    """[len(units)] loss change (nats, mean over the batches) of closing each unit's gate, in float64."""
    def losses(gates):
        total, count = 0.0, 0
        for images, labels in batches:
            with graph.gated(gates.to(images)):
                logits = model(images).double()
            total += torch.nn.functional.cross_entropy(logits, labels, reduction="sum").item()
            count += len(labels)
        return total / count

    changes = []
    with frozen(model), torch.no_grad():
        everything = torch.ones(len(graph.units))
        dense = losses(everything)
        for unit in tqdm(units, desc="oracle", leave=False, disable=not progress):
            gates = everything.clone()
            gates[unit] = 0
            changes.append(losses(gates) - dense)
    return torch.tensor(changes, dtype=torch.float64)


def spearman(a, b):
    """Spearman's rank correlation of two vectors (ties in order of appearance)."""
    ranks = torch.stack([torch.as_tensor(v).double().argsort().argsort().double() for v in (a, b)])
    return torch.corrcoef(ranks)[0, 1].item()


def _all_filters(graph):
    return {name: list(range(info.filters)) for name, info in graph.layers.items()}


def _without(kept, plan):
    """{layer: the indices in `kept` whose positions `plan` does not remove}."""
    gone = {name: set(positions) for name, positions in plan.items()}
    return {
        name: [index for position, index in enumerate(indices) if position not in gone.get(name, ())]
        for name, indices in kept.items()
    }


def _first_images(loader, samples):
    batches, taken = [], 0
    for images, labels in loader:
        batches.append((images[: samples - taken], labels[: samples - taken]))
        taken += len(batches[-1][1])
        if taken >= samples:
            break
    return batches


def _every_kth_image(loader, samples):
    """About `samples` images spread evenly over the loader, which may be sorted by class."""
    batches, seen = [], 0
    stride = max(1, len(loader.dataset) // samples) if hasattr(loader, "dataset") else 1
    for images, labels in loader:
        first = -seen % stride
        seen += len(labels)
        if first < len(labels):
            batches.append((images[first::stride], labels[first::stride]))
    if not batches:
        raise InputError("there are no validation images")
    return batches
