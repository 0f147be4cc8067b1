"""How filters are chosen and the network is repaired: one dataclass, whose fields have the command line's names."""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, nn

from taylor_pruning.errors import InputError, instance_of
from taylor_pruning.memory import parse_bytes
from taylor_pruning.options import check, option, options, python_value
from taylor_pruning.repair.network import PASSES
from taylor_pruning.selection.constraints import Constraints, check_percentage
from taylor_pruning.selection.costs import cost_model
from taylor_pruning.selection.targets import Target, parse_target
from taylor_pruning.surgery.graph import ChannelGraph

DEFAULT_PERCENTAGE = 30.0
TAYLOR_ORDERS = (1, 2, 3)
SELECTIONS = ("auto", "joint", "independent")
CURVATURES = ("auto", "exact", "hvp")
REPAIRS = ("auto", "none", "layer", "network")
# of numpy's and torch's generators, also where a seed stands for a billion others
SEEDS = {"low": 0, "high": 2**32 - 1}


@dataclass(frozen=True)
class PruningSettings(Constraints):
    """How filters are chosen and how the network is repaired.

    Attributes:
        rounds: number of score-and-prune rounds in which the percentage is reached.
        selection: "joint" or "auto": greedy, given those chosen already (selection.greedy); "independent": by single scores.
        curvature: without `compensate`, "exact": second and third derivatives from class directions (the Gauss-Newton part
            along residual streams, and in networks that are not piecewise linear); "hvp": from random probes (scoring.probes);
            "auto": exact for a classifier, else hvp. With `compensate`, directions of the outputs give them in any network.
        class_probes: class directions of every sample; at most classes - 1 are used. None: 12, but one random direction at
            order 2 with `compensate`, whose time is better spent on more images. Order 1 then takes one in any case. With
            `compensate`, tasks other than classification take random directions of the outputs, 4 where this is None.
        hessian_probes: random probes of every sample where the curvature is "hvp", and at order 3 of other tasks.
        budget, layer_bound, min_filters, round_to, min_share, latency_batch, latency_table, times: see Constraints. A
            `layer_bound` of None is no bound for a joint selection with `compensate`, whose costs compare between layers.
        target_macs, target_params, target_latency: what must be left of the network, as "50%", "150M" or "5ms"
            (selection.targets). One of them takes the place of the budget and of the pruning percentage.
        exclude: patterns (`fnmatch`) of layers whose filters are never removed.
        prune_modules: names of modules, as "backbone": they alone are traced, scored, cut and repaired, while the whole network
            runs. Percentages are then of the modules. Those that cannot be traced are left whole and named in the notes.
        prune_linear: also remove outputs of hidden fully connected layers.
        prune_heads: remove whole attention heads, also those of fully connected layers.
        compensate: least squares on the calibration images after every round (repair.compensation), each time from the
            dense network's weights, because fits on top of earlier fits would drift away from them.
        repair: "layer": `compensate`; "none": nothing, as without `compensate`; "network": `compensate`, and after the last
            round steps on all weights that lower the divergence from the dense network (repair.network); "auto": as
            `compensate` says.
        repair_passes: over the compensation images, of the repair "network".
        correct_levels: with `compensate` and a joint selection, the predicted costs of every group of layers are compared with
            what a trial measures on held-out images, and the choice is made once more (selection.corrected).
        guard: with `compensate`, the rounds end before one that destroys the network on held-out calibration images, after
            smaller ones were tried: it diverges more from the dense network than the mean of that network's answers does, and
            agrees with it on fewer images.
        fine_tune_between: training steps after every round but the last (Molchanov et al. 2017), at the recipe's learning
            rate. Compensation then fits to the network before the round's cut, because a fit to the dense network would
            undo the training.
        reestimate_batchnorm: new BatchNorm statistics from the calibration images before fine-tuning.
        memory_limit: what the process may hold, as "4GB", on the GPU where there is one; None: most of what is free, on a
            CPU no more than is fast (memory.ENOUGH). Batches are split so that scoring, compensation and evaluation stay
            within it; results do not depend on it.
        seed: of every random draw: probes, positions and images of a fit, random scores, dropout.

    Raises:
        InputError: a value outside its range.
    """

    rounds: int = option(
        5,
        "score-and-prune rounds",
        "Every round scores the smaller network again. One round is the fastest; five follow the loss more closely when "
        "much is removed.",
        low=1,
    )
    selection: str = option(
        "auto",
        "joint: greedy, given the filters already chosen; independent: by single scores; auto: joint",
        "joint is better when many filters are removed at once.",
        choices=SELECTIONS,
    )
    curvature: str = option(
        "auto",
        "second and third derivatives without --compensate: exact, from directions of the logits; hvp, from Hessian-vector "
        "products; auto: exact for a classifier, hvp for other tasks",
        "With SiLU, GELU or sigmoids exact is the Gauss-Newton part; hvp has all of the curvature, but is noisy and slow.",
        choices=CURVATURES,
        needs=("--no-compensate or --oracle-samples",),
    )
    class_probes: int | None = option(
        None,
        "directions of the logits for each image, each a backward pass",
        "More of them estimate the curvature better and cost time: give 12 where there are few images.",
        low=1,
        default_text="12; 1 at order 2 with --compensate",
        needs=("--taylor-order 2/3 or --taylor-orders 2/3 or --oracle-samples",),
    )
    hessian_probes: int = option(
        8,
        "random probes for each image with curvature hvp, which other tasks than classification take without repair",
        "More of them reduce the noise and cost time.",
        low=1,
        command_line=False,
    )
    exclude: tuple[str, ...] = option(
        (),
        "layers whose filters all stay, by name or pattern, as 'features.*'",
        "To protect layers that other programs read. results.json lists all names under layers.",
        metavar="PATTERN",
    )
    prune_modules: tuple[str, ...] = option(
        (),
        "modules of the network that are pruned, the whole network where none is named",
        "For networks that cannot be traced as a whole, as detectors: their backbone.",
        metavar="MODULE",
        command_line=False,
    )
    prune_linear: bool = option(
        False,
        "also prune hidden fully connected units",
        "In VGG and AlexNet at 224 pixels they hold most parameters.",
    )
    prune_heads: bool = option(
        False,
        "also prune whole attention heads",
        "In transformers, with --prune-linear: their other layers are behind a LayerNorm, which keeps their channels.",
    )
    compensate: bool = option(
        True,
        "repair the following layers by least squares after every round",
        "Leave it on; turn it off to compare criteria as published.",
        needs=("--repair auto/layer/network",),
    )
    repair: str = option(
        "auto",
        "none; layer: by least squares after every round, as --compensate; network: then also steps on all weights towards "
        "the dense network's outputs, without labels; auto: layer, or none with --no-compensate",
        "network costs about as much as --repair-passes passes of training over the compensation images. On a ResNet-32 with "
        "35 % of its multiply-accumulates left it gained 3 points with 1,000 --compensation-samples.",
        choices=REPAIRS,
    )
    repair_passes: int = option(
        PASSES,
        "passes over the compensation images of --repair network",
        "More passes gain more, where time does not matter.",
        low=1,
        needs=("--repair network",),
    )
    correct_levels: bool = option(
        False,
        "measure on held-out images what the cut of each layer costs, correct the predicted costs and choose again",
        "Where the calibration images say little about each class: on a MobileNetV2 with one photograph a class it gained "
        "5 points. On a ResNet-32 with five rounds it gained nothing. It costs every round as much as scoring 500 images.",
        needs=("--compensate", "--selection auto/joint"),
    )
    guard: bool = option(
        True,
        "do not take a round that leaves a network worse than a constant answer on held-out images; smaller rounds are tried "
        "first",
        "Turn it off if long training follows, which makes up for any cut.",
        needs=("--compensate",),
    )
    fine_tune_between: int = option(
        0,
        "training steps after every round but the last",
        "It lost 3 points on ResNet-32 and gained nothing on VGG-11.",
        low=0,
        command_line=False,
    )
    reestimate_batchnorm: bool = option(
        False,
        "new BatchNorm statistics before fine-tuning",
        "It made no difference with compensation.",
        command_line=False,
    )
    target_macs: str | None = option(
        None,
        "multiply-accumulates that must be left, as 50% or 150M, in place of a percentage",
        "When the network must fit a budget.",
        metavar="LEFT",
    )
    target_params: str | None = option(
        None,
        "parameters that must be left, as 50% or 3M, in place of a percentage",
        "When the file must fit a budget.",
        metavar="LEFT",
    )
    target_latency: str | None = option(
        None,
        "time of a forward that must be left, as 50% or 5ms, in place of a percentage",
        "When the network must answer in time on this machine: its layers are timed first.",
        metavar="LEFT",
    )
    memory_limit: str | None = option(
        None,
        "memory within which scoring, compensation and evaluation stay, as 4GB",
        "Where other programs need memory too. Results do not depend on it.",
        metavar="BYTES",
        default_text="most of what is free on a GPU; on a CPU less, where more would not be faster",
    )
    seed: int = option(
        0,
        "seed of initial weights, calibration images and order of batches",
        "To repeat a run, or to see how far it depends on chance.",
        **SEEDS,
    )

    def __post_init__(self):
        for name in ("exclude", "prune_modules"):
            if isinstance(getattr(self, name), Iterable) and not isinstance(getattr(self, name), str):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        check(self)
        if self.repair in ("layer", "network") and not self.compensate:
            raise InputError(f"--repair {self.repair} and --no-compensate contradict each other; give one of the two")
        if self.repair == "network" and self.fine_tune_between:
            raise InputError("repair network would undo the training of fine_tune_between; give one of the two")
        if self.repair == "none":
            object.__setattr__(self, "compensate", False)
        if target := self.target:
            if self.budget not in ("filters", target.kind):  # the default, or what the target says
                raise InputError(
                    f"--target-{target.kind} and --budget {self.budget} contradict each other; leave --budget out"
                )
            object.__setattr__(self, "budget", target.kind)
        if self.prune_modules and self.budget == "latency":
            given = "--target-latency" if self.target_latency else "--budget latency"
            raise InputError(
                f"{given} and prune_modules exclude each other, as only whole networks are timed; give macs or params"
            )
        if self.memory_limit is not None:
            parse_bytes(self.memory_limit)

    @property
    def target(self) -> Target | None:
        """What must be left of the network, where that is given."""
        given = {"macs": self.target_macs, "params": self.target_params, "latency": self.target_latency}
        targets = [parse_target(kind, text) for kind, text in given.items() if text is not None]
        if len(targets) > 1:
            raise InputError("give one target, --target-macs, --target-params or --target-latency, not several")
        return targets[0] if targets else None

    def graph_of(self, model: nn.Module, example: Tensor) -> ChannelGraph:
        """The ChannelGraph of a network with what these settings exclude and include."""
        return ChannelGraph(model, example, self.exclude, self.prune_linear, prune_heads=self.prune_heads)

    def percentage(self, given: float | None, graph: ChannelGraph) -> float:
        """Per cent of the budget to remove: the `given`, or what reaches the target, or else DEFAULT_PERCENTAGE.

        Raises InputError if it is no percentage, or is given beside a target.
        """
        if given is None:
            target = self.target
            given = target.percentage(cost_model(graph, self.constraints).total()) if target else DEFAULT_PERCENTAGE
        elif self.target:
            raise InputError("a pruning percentage and a target contradict each other; give one of the two")
        check_percentage(given)
        return python_value(given)

    @property
    def memory_bytes(self) -> int | None:
        """The memory limit in bytes, None where there is none."""
        return None if self.memory_limit is None else parse_bytes(self.memory_limit)

    @property
    def constraints(self) -> Constraints:
        """The fields that a selection must respect."""
        return Constraints(**{f.name: getattr(self, f.name) for f in dataclasses.fields(Constraints)})

    def as_dict(self) -> dict:
        """Plain values, by field."""
        lists = {name: list(getattr(self, name)) for name in ("exclude", "prune_modules")}
        return {f.name: getattr(self, f.name) for f in options(self)} | lists


def settings_of(settings: PruningSettings | None) -> PruningSettings:
    """The settings, the defaults where none are given. Raises InputError if they are something else."""
    if settings is None:
        return PruningSettings()
    instance_of("settings", settings, PruningSettings)
    return settings
