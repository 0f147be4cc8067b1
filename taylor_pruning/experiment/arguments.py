"""The command line that both runners share, and what its values mean for the rooms below."""

import argparse
import dataclasses
import json
import math
from pathlib import Path

from taylor_pruning.selection.baselines import BASELINES
from taylor_pruning.errors import InputError
from taylor_pruning.experiment.settings import CURVATURES, SELECTIONS, TAYLOR_ORDERS, PruningSettings
from taylor_pruning.selection.greedy import BUDGETS
from taylor_pruning.training.fine_tuning import Recipe


def percentage(text):
    value = float(text)
    if not 0 < value < 100:  # also refuses NaN
        raise argparse.ArgumentTypeError(f"must lie between 0 and 100 (both excluded), not {text}")
    return value


def number(kind, low, low_included=True):
    """An argparse type: a finite int or float from `low` on."""

    def parse(text):
        value = kind(text)
        if not math.isfinite(value) or value < low or (value == low and not low_included):
            raise argparse.ArgumentTypeError(f"must be {'at least' if low_included else 'above'} {low}, not {text}")
        return value

    parse.__name__ = kind.__name__
    return parse


class _Formatter(argparse.HelpFormatter):
    """Appends the default to every help line that has one."""

    def _get_help_string(self, action):
        silent = isinstance(action.default, bool) or action.default in (None, argparse.SUPPRESS, [])
        if silent or "default" in action.help:
            return action.help
        default = " ".join(map(str, action.default)) if isinstance(action.default, list) else "%(default)s"
        return f"{action.help} (default: {default})"


def new_parser(description):
    return argparse.ArgumentParser(description=description, formatter_class=_Formatter, allow_abbrev=False)


def add_single_arguments(parser):
    """What only one experiment has."""
    group = parser.add_argument_group("experiment")
    group.add_argument("--pruning-percentage", type=percentage, default=30.0, help="per cent of the budget to remove")
    group.add_argument("--taylor-order", type=int, choices=TAYLOR_ORDERS, default=2, help="order of the Taylor scores")
    group.add_argument("--oracle-samples", type=number(int, 0), default=0, metavar="N", help="measure the true loss "
                       "change of N random filters and plot it against the scores")  # fmt: skip
    group.add_argument("--export", nargs="+", choices=("onnx", "pt2"), default=[], help="also write the pruned network "
                       "as files that run without this toolkit")  # fmt: skip


def add_sweep_arguments(parser):
    """What only a sweep has."""
    group = parser.add_argument_group("sweep")
    group.add_argument("--pruning-percentages", type=percentage, nargs="+", default=[10.0, 30.0, 50.0, 70.0],
                       metavar="P", help="per cent of the budget to remove")  # fmt: skip
    group.add_argument("--taylor-orders", type=int, nargs="+", choices=TAYLOR_ORDERS, default=[1, 2, 3],
                       help="orders of the Taylor scores")  # fmt: skip
    group.add_argument("--compare-baseline", action="store_true", help="also run the criteria of --baselines")
    group.add_argument("--baselines", nargs="+", choices=sorted(BASELINES), default=["molchanov2017"],
                       help="published criteria, one shot")  # fmt: skip
    group.add_argument("--seeds", type=int, nargs="+", default=[0], help="calibration draw and fine-tuning order")


def add_shared_arguments(parser):
    """Model, data, selection, compensation, fine-tuning, run: the same in both runners."""
    _add_model_and_data(parser.add_argument_group("model and data"))
    _add_selection(parser.add_argument_group("selection"))
    _add_training(parser.add_argument_group("fine-tuning"))
    _add_run(parser.add_argument_group("run"))


def _add_model_and_data(group):
    group.add_argument("--model", help="a torchvision classification network, e.g. vgg16, vgg19, resnet50 "
                       "or vgg7_bn (default: vgg16; vgg7_bn on the embedded data)")  # fmt: skip
    group.add_argument("--weights", default="auto", help="auto (torchvision's default weights; none below 64 pixels), "
                       "default, none, or a file")  # fmt: skip
    group.add_argument("--data-path", help="folder with train/ and val/ (or test/), one folder a class in each "
                       "(default: the embedded data set)")  # fmt: skip
    group.add_argument("--image-size", type=number(int, 1), help="pixels (default: native up to 64, else the weights')")
    group.add_argument("--skip-corrupt", action="store_true", help="leave out images that cannot be decoded")
    group.add_argument("--batch-size", type=number(int, 1), default=64, help="images a step")
    group.add_argument("--workers", type=number(int, 0), default=2, help="processes that decode images")
    group.add_argument("--train-epochs", type=number(int, 0), help="epochs that train the dense network, or its new "
                       "head, where there are no weights for it (default: 12 from scratch, 3 for a head)")  # fmt: skip
    group.add_argument("--train-lr", type=number(float, 0, False), help="largest learning rate of that training (default: "
                       "0.1 from scratch with BatchNorm, else 0.02)")  # fmt: skip


def _add_selection(group):
    group.add_argument("--use-gradient-flow", action="store_true", help="weigh scores by gradient flow and report it")
    group.add_argument("--calibration-samples", type=number(int, 1), default=300, help="training images that score")
    group.add_argument("--selection", choices=SELECTIONS, default=PruningSettings.selection, help="with regard to each other, "
                       "each alone, or auto: joint, independent with compensation")  # fmt: skip
    group.add_argument("--rounds", type=number(int, 1), default=PruningSettings.rounds, help="collections of scores on "
                       "the way down")  # fmt: skip
    group.add_argument("--curvature", choices=CURVATURES, default="auto", help="exact class directions, Hessian-vector "
                       "products, or exact where the network is piecewise linear")  # fmt: skip
    group.add_argument("--class-probes", type=number(int, 2), default=PruningSettings.class_probes, help="class directions a sample")
    group.add_argument("--budget", choices=BUDGETS, default="filters", help="what the percentage counts")
    group.add_argument("--layer-bound", type=number(float, 1), help="no layer loses more than this multiple of "
                       "the target share of its filters (default: 1.03 for a budget in filters, else none)")  # fmt: skip
    group.add_argument("--exclude", nargs="+", default=[], metavar="PATTERN", help="layers whose filters all stay")
    group.add_argument("--min-filters", type=number(int, 1), default=1, help="filters that every layer keeps at least")
    group.add_argument("--round-to", type=number(int, 1), default=1, help="filter counts of cut layers are multiples of it")
    group.add_argument("--prune-linear", action="store_true", help="also prune hidden fully connected units")
    group.add_argument("--compensate", action=argparse.BooleanOptionalAction, default=PruningSettings.compensate,
                       help="least squares after every round (default: on)")  # fmt: skip
    group.add_argument("--compensation-samples", type=number(int, 1), help="training images for it (default: "
                       "--calibration-samples)")  # fmt: skip


def _add_training(group):
    recipe = Recipe()
    group.add_argument("--fine-tune-epochs", type=number(int, 0), default=2, help="epochs after pruning, 0 for none")
    group.add_argument("--fine-tune-between", type=number(int, 0), default=PruningSettings.fine_tune_between,
                       metavar="STEPS", help="training steps after every round but the last")  # fmt: skip
    group.add_argument("--lr", type=number(float, 0, False), default=recipe.lr, help="largest learning rate")
    group.add_argument("--momentum", type=number(float, 0), default=recipe.momentum, help="of SGD")
    group.add_argument("--weight-decay", type=number(float, 0), default=recipe.weight_decay, help="of SGD")
    group.add_argument("--warmup-epochs", type=number(float, 0), default=recipe.warmup_epochs, help="linear warm-up")
    group.add_argument("--label-smoothing", type=number(float, 0), default=recipe.label_smoothing, help="of the cross-entropy")
    group.add_argument("--distillation-weight", type=number(float, 0), default=recipe.distillation_weight,
                       help="share of the loss that follows the dense network")  # fmt: skip
    group.add_argument("--temperature", type=number(float, 0, False), default=recipe.temperature, help="of distillation")
    group.add_argument("--ema-decay", type=number(float, 0), default=recipe.ema_decay, help="weight averaging, 0 for none")
    group.add_argument("--reestimate-batchnorm", action="store_true", help="new BatchNorm statistics before fine-tuning")
    group.add_argument("--accumulate", type=number(int, 1), default=1, help="batches a step")
    group.add_argument("--amp", choices=("auto", "none", "bf16", "fp16"), default="auto", help="mixed precision; auto: "
                       "bf16 or fp16 on CUDA, none elsewhere")  # fmt: skip
    group.add_argument("--channels-last", action="store_true", help="channels-last memory layout (default: "
                       "on CUDA with mixed precision)")  # fmt: skip
    group.add_argument("--compile", action="store_true", help="torch.compile the training steps")
    group.add_argument("--sync-batchnorm", action="store_true", help="BatchNorm over all processes under torchrun")


def _add_run(group):
    group.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="where to compute")
    group.add_argument("--seed", type=int, default=0, help="of initial weights, calibration draw and order of batches")
    group.add_argument("--output-dir", help="results folder (default: runs/ and a name from the arguments)")
    group.add_argument("--resume", metavar="DIR", help="go on with the interrupted run in that results folder")
    group.add_argument("--quiet", action="store_true", help="no progress bars")


def settings_from(args):
    """PruningSettings of the parsed arguments, whose names are those of its fields."""
    fields = {field.name for field in dataclasses.fields(PruningSettings)}
    return PruningSettings(**{name: value for name, value in vars(args).items() if name in fields})


def recipe_from(args, device):
    """Fine-tuning Recipe of the parsed arguments; what is automatic in it is decided for the device."""
    recipe = Recipe(
        epochs=args.fine_tune_epochs,
        lr=args.lr,
        momentum=args.momentum,
        weight_decay=args.weight_decay,
        warmup_epochs=min(args.warmup_epochs, args.fine_tune_epochs / 2),
        label_smoothing=args.label_smoothing,
        distillation_weight=args.distillation_weight,
        temperature=args.temperature,
        ema_decay=args.ema_decay,
        amp=None if args.amp == "none" else args.amp,
        accumulate=args.accumulate,
        channels_last=args.channels_last or None,
        compile=args.compile,
        sync_batchnorm=args.sync_batchnorm,
    )
    return recipe.resolved(device)


def parse(parser, argv):
    """Parses and checks what argparse alone cannot. Exits with code 2 on bad input.

    With --resume, arguments that are not given are those of the run in that folder.
    """
    args = parser.parse_args(argv)
    if args.resume:
        try:
            parser.set_defaults(**_arguments_of_run(Path(args.resume), vars(args)))
        except InputError as error:
            parser.error(str(error))
        args = parser.parse_args(argv)
    if args.model is None:
        args.model = "vgg16" if args.data_path else "vgg7_bn"
    if args.compensation_samples is None:
        args.compensation_samples = args.calibration_samples
    try:
        settings_from(args)
    except InputError as error:
        parser.error(str(error))
    return args


def _arguments_of_run(folder, known):
    """{name: value} of the arguments in the folder's config.json that this command has; {} where there is no such file."""
    config = folder / "config.json"
    if not config.exists():  # run.open_folder says so
        return {}
    try:
        arguments = json.loads(config.read_text(encoding="utf-8"))["arguments"]
        return {name: value for name, value in arguments.items() if name in known and name != "resume"}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{config} is not the config.json of a run ({error}); pass the folder of an interrupted run") from error
