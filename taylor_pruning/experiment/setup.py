"""From arguments to a trained dense network with its data: what both runners do before they prune."""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import platform
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch
import torchvision
from torch.nn.modules.batchnorm import _BatchNorm

from taylor_pruning.distributed import is_main, world_size
from taylor_pruning.errors import InputError
from taylor_pruning.experiment.command import Command, DataSettings
from taylor_pruning.experiment.data import ImageData
from taylor_pruning.experiment.embedded import embedded_data
from taylor_pruning.experiment.folders import load_image_folder
from taylor_pruning.experiment.head import present_classes
from taylor_pruning.experiment.inputs import check_inputs, check_place
from taylor_pruning.experiment.loaders import calibration_batches, make_loader
from taylor_pruning.experiment.models import BuiltModel, build_model, head_name, pretrained_weights
from taylor_pruning.experiment.weights import load_own_weights
from taylor_pruning.files import atomic_file, cache_folder
from taylor_pruning.first_batch import Batches, check_training
from taylor_pruning.modes import requirements_kept
from taylor_pruning.selection.greedy import check_reachable
from taylor_pruning.selection.latency import with_times
from taylor_pruning.training.fine_tuning import fine_tune
from taylor_pruning.training.sampling import HELD_OUT, split_images

SCRATCH_EPOCHS, HEAD_EPOCHS = 12, 3
NORMALISED_LR, PLAIN_LR = 0.1, 0.02  # with BatchNorm, and without or of a new head alone
# Without BatchNorm a network needs many steps to leave the plateau at the start: where --batch-size gives fewer steps an
# epoch than these, the batch is smaller, down to PLAIN_BATCH. PLAIN_LR is the learning rate at that batch.
PLAIN_STEPS, PLAIN_BATCH = 400, 16
FEW_IMAGES = 20  # fewer held-out images than these say little of a round


@dataclass
class Experiment:
    """A dense network that is ready to be pruned, and its data."""

    command: Command
    device: torch.device
    data: ImageData
    built: BuiltModel

    def loader(self, dataset, *, shuffle=False, seed=0, batch_size=None):
        return make_loader(
            dataset,
            batch_size or self.command.data.batch_size,
            shuffle=shuffle,
            workers=self.command.data.workers,
            seed=seed,
            device=self.device,
            distributed=world_size() > 1,
        )

    def calibration(self, samples, seed):
        return calibration_batches(self.data, samples, self.command.data.batch_size, seed=seed, device=self.device)

    def pipeline_arguments(self, seed, *, dense_stage=None, batch_size=None):
        """Arguments of EnhancedPruning, with every random draw that belongs to `seed`."""
        command, settings = self.command, self.command.data
        scoring, repairing = settings.calibration_samples, settings.compensation_samples
        drawn = self.calibration(max(scoring, repairing) + HELD_OUT, seed)
        calibration = split_images(drawn, scoring)[0]
        train = self.loader(self.data.train, shuffle=True, seed=seed, batch_size=batch_size)
        if command.recipe.epochs:
            check_training(self.built.model, Batches(train, "the training loader", self.device))
        return {
            "model": self.built.model,
            "train_loader": train,
            "val_loader": self.loader(self.data.val, batch_size=batch_size),
            "dense_stage": dense_stage,
            "calibration": calibration,
            "compensation": calibration if scoring == repairing else split_images(drawn, repairing)[0],
            "held_out": split_images(drawn, max(scoring, repairing))[1],
            "settings": dataclasses.replace(command.pruning, seed=seed),
            "recipe": command.recipe,
            "progress": progress(command),
        }


def progress(command):
    return not command.run.quiet and is_main()


def prepare(command, folder, device, percentages=()):
    """Data and network; trains the network or its new head where it has no weights for the task.

    Args:
        folder: results folder, which keeps the trained dense network (the embedded data's is kept in a user cache).
        percentages: that the network will be pruned to; what cannot be is refused before any training.

    Raises:
        InputError: see experiment.inputs, experiment.data, experiment.models, surgery.graph, selection.greedy.
    """
    if command.recipe.compile and command.recipe.epochs:
        check_compiler(device)
    torch.manual_seed(command.pruning.seed)
    check_place(folder, command.data)
    data = load_data(command.data)
    check_inputs(folder, command.data, data)
    built = build_model(
        command.data.model,
        data.num_classes,
        image_size=data.image_size,
        weights=command.data.weights,
        imagenet_labels=data.imagenet_labels,
    )
    if command.data.head == "present":
        data, built = present_classes(data, built)
    built.model.to(device)
    experiment = Experiment(command, device, data, built)
    settings = command.pruning
    if settings.compensate:
        warn_of_few_images(len(data.train), command.data)
    example = torch.zeros(1, 3, data.image_size, data.image_size, device=device)
    graph = settings.graph_of(built.model, example)
    settings = with_times(settings, graph, example, print if progress(command) else None, folder)
    experiment.command = dataclasses.replace(command, pruning=settings)
    for percentage in {settings.percentage(percentage, graph) for percentage in percentages}:
        check_reachable(graph, percentage, settings.constraints)
    if built.new_head or built.weights == "none":
        train_dense(experiment, folder)
    else:
        warn_of_no_training(command.data, built)
    return experiment


def warn_of_no_training(settings: DataSettings, built: BuiltModel) -> None:
    """Warns where options ask for a training of the dense network, which has weights for the task."""
    given = [name for name in ("train_epochs", "train_lr") if getattr(settings, name)]
    for name in given if is_main() else ():
        print(
            f"--{name.replace('_', '-')} has no effect: {built.name} has its weights from {built.weights} and is not trained "
            "before pruning",
            file=sys.stderr,
        )


def warn_of_chance(dense, data):
    """Warns where the dense network (its stage in `dense`) is no better than always answering the most frequent label."""
    chance = max(Counter(map(int, data.val.targets)).values()) / len(data.val)
    if is_main() and chance == 1:
        print(
            "all validation images are of one class, so that accuracies say nothing; give others too", file=sys.stderr
        )
    elif is_main() and dense["top1"] / 100 <= chance + 2 * math.sqrt(chance * (1 - chance) / len(data.val)):
        print(
            f"the dense network is no better than chance (top-1 {dense['top1']:.1f} %), so that nothing can be learnt from "
            "pruning it; pass --weights, or train it longer with --train-epochs",
            file=sys.stderr,
        )


def warn_of_few_images(images: int, settings: DataSettings) -> None:
    """Warns where scoring and repair leave few or none of the `images` for training to judge the rounds on."""
    left = max(0, images - max(settings.calibration_samples, settings.compensation_samples))
    if is_main() and left < FEW_IMAGES:
        judge = (
            f"only {left} are left to judge the rounds"
            if left
            else "none is left, and they judge the rounds themselves"
        )
        print(
            f"of {images} training images {images - left} score and repair, {judge}; lower --calibration-samples and "
            "--compensation-samples, or give more images",
            file=sys.stderr,
        )


def choose_device(name):
    """The torch device that `--device` names. Raises InputError if it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("there is no cuda device here; pass --device cpu or auto")
    return torch.device(name)


def check_compiler(device: torch.device) -> None:
    """Raises InputError where torch.compile will not find the compiler that it calls: of C on a GPU, else of C++."""
    if device.type == "cuda":
        variable, names = "CC", ("gcc", "clang")
    else:
        variable, names = "CXX", ("clang++" if sys.platform == "darwin" else "g++",)
    if given := os.environ.get(variable):
        names = (given.split()[0],)
    if not any(map(shutil.which, names)):
        raise InputError(
            f"--compile needs a compiler, and there is no {' or '.join(names)}; install it, name one in {variable}, or leave "
            "--compile out"
        )


def load_data(settings: DataSettings) -> ImageData:
    """The folder at `--data-path`, or the embedded data set."""
    if settings.data_path is None:
        if settings.image_size not in (None, 32):
            raise InputError("the embedded images have 32 pixels; leave --image-size out or pass --data-path")
        return embedded_data()
    weights = pretrained_weights(settings.model, settings.weights, settings.image_size)
    data = load_image_folder(
        settings.data_path, image_size=settings.image_size, weights=weights, skip_corrupt=settings.skip_corrupt
    )
    if settings.skip_corrupt and is_main():
        print(f"{len(data.skipped)} corrupt image(s) left out")
    if data.shared and is_main():
        print(
            f"at least {len(data.shared)} of {len(data.val)} validation images are training images too, as {data.shared[0]}, "
            "so that accuracies are not those of new images; give others in val/",
            file=sys.stderr,
        )
    return data


def train_dense(experiment, folder):
    """Trains the whole network, or the new head alone, unless an earlier run has done it."""
    command, built = experiment.command, experiment.built
    head = built.new_head
    recipe, batch_size = dense_training(command, built, len(experiment.data.train))
    epochs = recipe.epochs
    if not epochs:
        return
    kept = folder / "dense_model.pt"
    if command.data.data_path is None:
        kept = _cache_file(experiment, recipe.resolved(experiment.device), batch_size) or kept
    checkpoint = folder / "dense_training_checkpoint.pt"
    if kept.exists():
        if is_main():
            print(f"dense {built.name} from {kept}")
            checkpoint.unlink(missing_ok=True)
        load_own_weights(built.model, kept, "remove the file to train the network again")
        return
    what = "new head" if head else "dense network"
    if is_main():
        print(f"training the {what} of {built.name} for {epochs} epochs")
    with _only_head_trains(built) if head else contextlib.nullcontext():
        fine_tune(
            built.model,
            experiment.loader(
                experiment.data.train,
                shuffle=True,
                seed=command.pruning.seed,
                batch_size=batch_size,
            ),
            experiment.loader(experiment.data.val),
            recipe,
            checkpoint=checkpoint,
            resume=command.run.resume is not None,
            description=f"train {what}",
            progress=progress(command),
        )
    if is_main():
        with atomic_file(kept) as file:
            torch.save(built.model.state_dict(), file)
        checkpoint.unlink()


def dense_training(command, built, images):
    """Recipe and batch size that train a network from scratch on so many images, or a new head alone.

    The batch is that of `--batch-size`, but without BatchNorm an epoch has PLAIN_STEPS steps where the batch can be as
    small as that. The learning rate without BatchNorm grows with the square root of the batch.
    """
    normalised = any(isinstance(module, _BatchNorm) for module in built.model.modules())
    settings, from_scratch = command.data, not built.new_head
    epochs = settings.train_epochs
    if epochs is None:
        epochs = SCRATCH_EPOCHS if from_scratch else HEAD_EPOCHS
    batch, lr = settings.batch_size, NORMALISED_LR if from_scratch and normalised else PLAIN_LR
    if from_scratch and not normalised:
        batch = min(batch, max(PLAIN_BATCH, images // PLAIN_STEPS))
        lr *= max(1.0, batch / PLAIN_BATCH) ** 0.5
    recipe = dataclasses.replace(
        command.recipe,
        epochs=epochs,
        lr=settings.train_lr or lr,
        weight_decay=5e-4,
        warmup_epochs=min(1.0, epochs / 4),
        accumulate=1,
        compile=False,
        distillation_weight=0.0,  # there is no teacher yet
    )
    return recipe, batch


@contextlib.contextmanager
def _only_head_trains(built):
    with requirements_kept(built.model):
        built.model.requires_grad_(False)
        built.model.get_submodule(head_name(built.model)).requires_grad_(True)
        yield


def _cache_file(experiment, recipe, batch_size):
    """The cached file of the dense network of these settings, None if the user has no writable cache folder."""
    folder = cache_folder()
    if folder is None:
        return None
    model, data, seed = experiment.built.model, experiment.data, experiment.command.pruning.seed
    images = hashlib.sha256(data.train.images.numpy().tobytes() + data.val.images.numpy().tobytes()).hexdigest()
    key = json.dumps([str(model), images, seed, batch_size, repr(recipe), torch.__version__])
    return folder / f"{experiment.built.name.replace('/', '-')}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.pt"


def environment(device):
    """Versions, device and git commit, for config.json."""
    here = Path(__file__).parents[2]
    git = ["git", "-C", str(here), "rev-parse", "HEAD"]
    commit = None
    if (here / ".git").exists():  # else it is installed, perhaps inside another project's checkout
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "numpy": numpy.__version__,
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{device.type} {platform.machine()}",
        "threads": torch.get_num_threads(),
        "processes": world_size(),
        "git_commit": commit,
        "command": sys.argv,
    }
