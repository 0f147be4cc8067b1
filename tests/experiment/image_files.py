"""Image files and folders that several tests write."""

import numpy as np
import torch
from PIL import Image

from taylor_pruning.experiment.data import IMAGENET_MEAN, IMAGENET_STD


def write_image(path, size=(32, 32), colour=None, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    if colour is None:
        pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
        Image.fromarray(pixels).save(path)
    else:
        Image.new("RGB", size, colour).save(path)


def write_folder(root, classes=("cat", "dog"), per_class=3, size=(32, 32), splits=("train", "val")):
    for split in splits:
        for c, name in enumerate(classes):
            for i in range(per_class):
                write_image(root / split / name / f"{i}.png", size, seed=[c, i, split == "train"])
    return root


def break_image(path, kind):
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("this is no image")
    else:
        write_image(path, (48, 48))
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


def normalised(pixels, mean=IMAGENET_MEAN, std=IMAGENET_STD):
    """Reference: float64 [3, H, W] from uint8 [H, W, 3]."""
    return torch.from_numpy(((np.asarray(pixels, np.float64) / 255 - mean) / std).transpose(2, 0, 1))
