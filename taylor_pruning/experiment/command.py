"""The settings of one command besides pruning and fine-tuning: the task, the data and network, and the run itself."""

import math
from dataclasses import dataclass, field, fields, replace

from taylor_pruning.errors import InputError
from taylor_pruning.experiment.choices import WIDTHS
from taylor_pruning.experiment.settings import DEFAULT_PERCENTAGE, SEEDS, TAYLOR_ORDERS, PruningSettings
from taylor_pruning.options import check, option, option_name, options
from taylor_pruning.selection.baselines import BASELINES
from taylor_pruning.training.recipe import Recipe

EXPORTS = ("onnx", "pt2")
HEADS = ("keep", "present")
DEVICES = ("auto", "cpu", "cuda")  # scores need float64, which mps has not
PERCENTAGE = {"low": 0, "high": 100, "open_low": True, "open_high": True}


class Checked:
    """Settings whose options are checked when they are made. Raises InputError."""

    def __post_init__(self):
        check(self)


@dataclass(frozen=True)
class Task(Checked):
    """What both runners do."""

    use_gradient_flow: bool = option(
        False,
        "weigh scores by gradient flow and report it",
        "To see where gradients vanish. The weights did not raise accuracy by more than the spread.",
    )


@dataclass(frozen=True)
class ExperimentTask(Task):
    """What one experiment does."""

    pruning_percentage: float | None = option(
        None,
        "per cent of the budget to remove",
        "Start at 30 and go up until the accuracy no longer suffices.",
        **PERCENTAGE,
        default_text=f"{DEFAULT_PERCENTAGE:g}; none with a target",
        common=True,
    )
    taylor_order: int = option(
        2,
        "order of the Taylor scores",
        "Order 2 is a good first choice. Order 1 needs labels and is noisier. Order 3 pays only where very much is removed "
        "without repair.",
        choices=TAYLOR_ORDERS,
        common=True,
    )
    oracle_samples: int = option(
        0,
        "measure the true loss change of N filters and plot it against the scores",
        "To see whether the scores can be trusted on a network of your own. "
        "Each filter costs one pass over the calibration images.",
        low=0,
        metavar="N",
    )
    export: tuple[str, ...] = option(
        (),
        "also write the pruned network as a file that runs without this toolkit",
        "To deploy the network: onnx (pip install onnx onnxscript) for onnxruntime, pt2 for torch.export.load.",
        choices=EXPORTS,
    )


@dataclass(frozen=True)
class SweepTask(Task):
    """What a sweep does."""

    pruning_percentages: tuple[float, ...] = option(
        (10.0, 30.0, 50.0, 70.0),
        "per cent of the budget to remove",
        "Give fewer to save time: every percentage is pruned and fine-tuned separately.",
        **PERCENTAGE,
        metavar="P",
        common=True,
    )
    taylor_orders: tuple[int, ...] = option(
        (1, 2, 3),
        "orders of the Taylor scores",
        "Give fewer to save time: every order is pruned and fine-tuned separately.",
        choices=TAYLOR_ORDERS,
        common=True,
    )
    compare_baseline: bool = option(
        False,
        "also run the criteria of --baselines",
        "To see what the Taylor scores are worth on your network.",
        common=True,
    )
    baselines: tuple[str, ...] | None = option(
        None,
        "published criteria under the same budget; without repair they prune in one step",
        "To compare with more than the default.",
        choices=tuple(sorted(BASELINES)),
        default_text="molchanov2017",
        needs=("--compare-baseline",),
    )
    baseline_widths: tuple[str, ...] | None = option(
        None,
        "widths of the baselines: own, by their scores in all layers; uniform, the same share of every layer",
        "Uniform widths are what most papers report, and often the stronger baseline.",
        choices=WIDTHS,
        default_text="own",
        needs=("--compare-baseline",),
    )
    compensate_baselines: bool = option(
        False,
        "also run the baselines with the repair, in as many rounds as the orders",
        "It shows how much of a lead is the scores' and how much is the repair's.",
        needs=("--compare-baseline",),
    )
    seeds: tuple[int, ...] | None = option(
        None,
        "seeds of the calibration images and of the order in fine-tuning",
        "Three or more show how far the results depend on chance.",
        **SEEDS,
        default_text="that of --seed",
    )

    def __post_init__(self):
        check(self)
        if self.compare_baseline:
            object.__setattr__(self, "baselines", self.baselines or ("molchanov2017",))
            object.__setattr__(self, "baseline_widths", self.baseline_widths or ("own",))
        elif given := [n for n in ("baselines", "baseline_widths", "compensate_baselines") if getattr(self, n)]:
            raise InputError(f"--{given[0].replace('_', '-')} needs --compare-baseline; give both or none")


@dataclass(frozen=True)
class DataSettings(Checked):
    """The images, the dense network and how it is trained where there are no weights for it."""

    model: str | None = option(
        None,
        "a torchvision classification network, as vgg16 or resnet50, one of timm, as timm/resnet18, or vgg7_bn",
        "vgg7_bn is small: it is trained on the embedded images in about a minute.",
        default_text="vgg16; vgg7_bn on the embedded data",
        common=True,
    )
    data_path: str | None = option(
        None,
        "folder with train/ and val/ (or test/), one folder a class in each",
        "To prune for your own images.",
        default_text="the embedded data",
        metavar="DIR",
        common=True,
    )
    weights: str = option(
        "auto",
        "auto (torchvision's or timm's; none below 64 pixels), default, none, or a file",
        "A file with your own state_dict saves training the dense network.",
    )
    head: str = option(
        "keep",
        "classes of an ImageNet network on synset folders: keep all 1,000, or only those present in the data",
        "present, to specialise a network for the classes that you have. No label and no training is needed.",
        choices=HEADS,
    )
    image_size: int | None = option(
        None,
        "side of the images in pixels",
        "A smaller size saves time; a network that cannot run at the native size needs 224.",
        low=1,
        default_text="native up to 64, else the weights'",
    )
    skip_corrupt: bool = option(
        False,
        "leave out images that cannot be decoded",
        "For collected data sets; results.json lists what was left out.",
        needs=("--data-path",),
    )
    batch_size: int = option(
        64,
        "images in a batch",
        "Lower it when memory runs out. Training from scratch takes fewer where a network without BatchNorm would make fewer "
        "than 400 steps an epoch, but not below 16.",
        low=1,
    )
    workers: int = option(2, "processes that decode images", "Raise it when a GPU waits for images.", low=0)
    calibration_samples: int = option(
        300,
        "training images that score filters",
        "More images give steadier scores; the time grows with them.",
        low=1,
    )
    compensation_samples: int | None = option(
        None,
        "training images that the repair is fitted to",
        "Give more where layers have more channels than a few hundred images can determine.",
        low=1,
        default_text="as --calibration-samples",
        needs=("--compensate or --compensate-baselines",),
    )
    train_epochs: int | None = option(
        None,
        "epochs that train the dense network or its new head where there are no weights",
        "Give more for data that are harder than the embedded images.",
        low=0,
        default_text="12 from scratch, 3 for a head",
    )
    train_lr: float | None = option(
        None,
        "largest learning rate when the dense network or its new head is trained",
        "Lower it when that training diverges.",
        low=0,
        open_low=True,
        default_text="0.02 for a new head; from scratch 0.1 with BatchNorm, 0.02 x sqrt(batch / 16) without",
    )

    def __post_init__(self):
        check(self)
        if self.model is None:
            object.__setattr__(self, "model", "vgg16" if self.data_path else "vgg7_bn")
        if self.compensation_samples is None:
            object.__setattr__(self, "compensation_samples", self.calibration_samples)


@dataclass(frozen=True)
class RunSettings(Checked):
    """Where a run computes and writes."""

    output_dir: str | None = option(
        None,
        "results folder",
        "To keep runs apart by names of your own.",
        default_text="runs/ and a name from the arguments",
        metavar="DIR",
    )
    resume: str | None = option(
        None,
        "continue the interrupted run in that folder",
        "After an interruption. Options that are not given are those of the run.",
        metavar="DIR",
        common=True,
    )
    device: str = option("auto", "where to compute", "cpu, to compare with a GPU.", choices=DEVICES)
    quiet: bool = option(False, "no progress bars", "For log files.")


@dataclass(frozen=True)
class Command:
    """All settings of one command line, and notes on those of them that have no effect."""

    task: ExperimentTask | SweepTask
    data: DataSettings
    pruning: PruningSettings
    recipe: Recipe
    run: RunSettings
    notes: tuple[str, ...] = field(default=(), compare=False)

    def __post_init__(self):
        if self.pruning.repair == "network" and self.data.compensation_samples < 2:
            raise InputError("--repair network needs at least two images; give more --compensation-samples")
        if isinstance(self.task, SweepTask):
            if self.pruning.target:
                raise InputError("a sweep removes --pruning-percentages; give a target to run_single_experiment.py")
            if self.task.seeds is None:
                object.__setattr__(self, "task", replace(self.task, seeds=(self.pruning.seed,)))
        elif self.pruning.target and self.task.pruning_percentage is not None:
            raise InputError("--pruning-percentage and a target contradict each other; give one of the two")
        elif not self.pruning.target and self.task.pruning_percentage is None:
            object.__setattr__(self, "task", replace(self.task, pruning_percentage=DEFAULT_PERCENTAGE))

    def as_dict(self) -> dict:
        """{option: value} of every option of the command line, for config.json and results.json.

        Infinity, which JSON does not know, is "inf".
        """
        parts = [getattr(self, f.name) for f in fields(self) if f.name != "notes"]
        values = {
            option_name(f): getattr(part, f.name)
            for part in parts
            for f in options(part)
            if f.metadata["option"].command_line
        }
        return {name: "inf" if value == math.inf else value for name, value in values.items()}
