"""Networks, images and dense weights of orders.py: CIFAR-10 as JPEG, Imagenette, and one ImageNet photograph a class."""

import sys
import tarfile
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]

from cifar_resnets import cifar_resnet

from taylor_pruning.experiment.data import TensorImages
from taylor_pruning.experiment.loaders import make_loader
from taylor_pruning.experiment.models import build_model

HELD_OUT = 500  # training images that choose the epoch of fine-tuning; compensation does not use them


@dataclass(frozen=True)
class Subject:
    """A network, its images and how it is pruned.

    levels: per cent of the multiply-accumulates that are left. tuning: images, epochs, learning rate; None: no training.
    tests: {name of the figure: file of images}. max_scoring: more images than these cannot score.
    """

    images: str
    tests: dict
    levels: tuple
    compensation: int
    batch: int
    tuning: tuple | None = None
    max_scoring: int = 1000


CIFAR = {"images": "cifar_train", "tests": {"top1": "cifar_test"}, "levels": (53, 35), "compensation": 1000, "batch": 500,
         "tuning": (8000, 2, 0.02)}  # fmt: skip
SUBJECTS = {
    "resnet32": Subject(**CIFAR),
    "resnet44": Subject(**CIFAR),
    "vgg7_bn": Subject(**CIFAR),
    "vgg16_bn": Subject(**CIFAR),
    "mobilenet_v2": Subject("nette_train", {"top1": "nette_val"}, (50, 35, 25), 240, 60, (1100, 2, 0.005), 240),
    "mobilenet_v2, one image a class": Subject(
        "one", {"top1": "one_rest", "imagenette top1": "nette_val"}, (80,), 240, 60, None, 240
    ),
}


def decode(path):
    """uint8 [H, W, 3], of large images the centre of 224 pixels."""
    with Image.open(path) as image:
        pixels = np.array(image.convert("RGB"))
    top, left = (max(0, side - 224) // 2 for side in pixels.shape[:2])
    return pixels[top : top + 224, left : left + 224]


def in_turn(folder, each):
    """[(path, its class)] of `each` images a class, the classes in turn."""
    classes = sorted(path for path in folder.iterdir() if path.is_dir())
    files = [sorted(path.iterdir())[:each] for path in classes]
    return [(file, file.parent.name) for group in zip(*files, strict=True) for file in group]


def prepare(arguments):
    """Unpacks and decodes what the networks need into the scratch folder, as (uint8 images, labels)."""
    scratch, data = Path(arguments.scratch), Path(arguments.data)
    scratch.mkdir(parents=True, exist_ok=True)
    wanted = {SUBJECTS[name].images for name in arguments.networks}
    sets = {}
    if "cifar_train" in wanted:
        sets |= {
            "cifar_train": ("cifar10-jpeg.tar.xz", "train", 2000),
            "cifar_test": ("cifar10-jpeg.tar.xz", "test", 1000),
        }
    if wanted & {"nette_train", "one"}:
        sets |= {
            "nette_train": ("imagenette.tar", "nette/train", 120),
            "nette_val": ("imagenette.tar", "nette/val", 40),
        }
    if "one" in wanted:
        sets["one"] = ("imagenet-one-a-class.tar", "one_a_class", None)
    synsets = (Path(__file__).parent.parent / "taylor_pruning/experiment/imagenet_synsets.txt").read_text().split()
    for name, (archive, folder, each) in sets.items():
        if (scratch / f"{name}.pt").exists():
            continue
        if not (scratch / folder).exists():
            with tarfile.open(data / archive) as tar:
                tar.extractall(scratch, filter="data")
        if each is None:
            items = [(path, path.stem) for path in sorted((scratch / folder).iterdir())]
        else:
            items = in_turn(scratch / folder, each)
        names = synsets if items[0][1] in synsets else sorted({name for _, name in items})
        place = {name: label for label, name in enumerate(names)}
        with ThreadPool() as pool:
            images = torch.from_numpy(np.stack(pool.map(decode, [path for path, _ in items]))).permute(0, 3, 1, 2)
        torch.save((images.contiguous(), torch.tensor([place[name] for _, name in items])), scratch / f"{name}.pt")


@lru_cache(maxsize=8)
def images_of(scratch, name):
    images, labels = torch.load(Path(scratch) / f"{name}.pt", weights_only=True)
    return TensorImages(images, labels)


def loader(images, index, batch, device, *, padding=0, flip=False, **settings):
    part = TensorImages(images.images[index], images.targets[index], padding=padding, flip=flip)
    return make_loader(part, batch, device=device, **settings)


@lru_cache(maxsize=8)
def dense_network(name, data, device):
    """The dense network in eval mode."""
    name = name.partition(",")[0]
    if name.startswith("resnet"):
        model = cifar_resnet(name, Path(data) / f"{name}.th")
    elif name == "mobilenet_v2":
        weights = Path(data) / "mobilenet_v2_imagenet.pth"
        model = build_model(name, 1000, image_size=224, weights=weights, imagenet_labels=True).model.float()
    else:
        model = build_model(name, 10, image_size=32, weights=Path(data) / f"{name}.pt").model
    return model.eval().to(device)


def training_loader(scratch, subject, index, device, seed):
    """Shuffled batches of 64 images, flipped and, on CIFAR-10, shifted."""
    padding = 4 if subject.images.startswith("cifar") else 0
    return loader(
        images_of(scratch, subject.images), index, 64, device, shuffle=True, seed=seed, flip=True, padding=padding
    )
