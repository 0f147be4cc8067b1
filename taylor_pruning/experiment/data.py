"""What a data set is: two splits of labelled images with their classes, size and normalisation."""

from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch
from torch.utils.data import Dataset

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
SMALL_IMAGE = 64  # pixels: sets up to here keep their size and are decoded once; networks below have another stem


@dataclass
class ImageData:
    """One classification data set. `classes[label]` is the folder name of a label; labels are below `num_classes`."""

    name: str
    train: Dataset
    val: Dataset
    evaluation_train: Dataset  # the training images under the evaluation transform
    classes: list[str]
    num_classes: int
    image_size: int  # pixels; a batch is [B, 3, image_size, image_size]
    imagenet_labels: bool  # labels are positions in ImageNet's 1,000 classes
    skipped: list[Path] = field(default_factory=list)  # corrupt files that were left out
    shared: list[str] = field(default_factory=list)  # validation images that are training images too: links or copies
    mean: tuple[float, ...] = IMAGENET_MEAN  # of the normalisation: (value in [0, 1] - mean) / std
    std: tuple[float, ...] = IMAGENET_STD
    # What tells these images from others, cheaply, in plain values; None where they cannot change. {"classes": folder names
    # in the order of their labels, "train", "val": {"images": their number, "names", "sizes": hashes of those of all files}}
    listing: dict | None = None


@dataclass(eq=False)
class TensorImages(Dataset):
    """Decoded images of one size. Items are (float32 [3, H, W] normalised, label); `take` gives whole batches.

    With `padding` > 0 an item is a random crop of the image reflected by that many pixels, with `flip` it is mirrored
    half of the time; both follow torch's global generator, or the draws that are handed to `take`.
    """

    images: torch.Tensor  # uint8 [N, 3, H, W]
    targets: torch.Tensor  # int64 [N]
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    padding: int = 0
    flip: bool = False

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        shifts = torch.randint(2 * self.padding + 1, (1, 2)) if self.padding else None
        flips = torch.randint(2, (1,)).bool() if self.flip else None
        return self.take(torch.tensor([index]), shifts, flips)[0], int(self.targets[index])

    def to(self, device) -> "TensorImages":
        return replace(self, images=self.images.to(device), targets=self.targets.to(device))

    def take(self, index: torch.Tensor, shifts=None, flips=None) -> torch.Tensor:
        """Float32 [B, 3, H, W] of the images `index` [B].

        shifts: int [B, 2], rows and columns of the crop's corner in the padded image, 0 to 2 * padding; None: no crop.
        flips: bool [B]; None: no flip. All on the device of the images.
        """
        plain = shifts is None and flips is None
        batch = self.images[index] if plain else self._crop_and_flip(index, shifts, flips)
        mean, std = self._statistics
        return batch.to(torch.float32).div_(255).sub_(mean).div_(std)

    @cached_property
    def _statistics(self) -> torch.Tensor:
        """[2, 1, 3, 1, 1] mean and standard deviation, on the device once: the host waits for such a copy."""
        return torch.tensor([self.mean, self.std], device=self.images.device).view(2, 1, 3, 1, 1)

    def _crop_and_flip(self, index, shifts, flips) -> torch.Tensor:
        # One gather does it all: reflection, crop and flip are arithmetic on row and column numbers.
        height, width = self.images.shape[2:]
        device = self.images.device
        rows = torch.arange(height, device=device).expand(len(index), -1)
        columns = torch.arange(width, device=device).expand(len(index), -1)
        if flips is not None:
            columns = torch.where(flips[:, None], width - 1 - columns, columns)
        if shifts is not None:
            rows = _reflect(rows + shifts[:, :1] - self.padding, height)
            columns = _reflect(columns + shifts[:, 1:] - self.padding, width)
        channels = torch.arange(3, device=device)[:, None, None]
        return self.images[index[:, None, None, None], channels, rows[:, None, :, None], columns[:, None, None, :]]


def _reflect(position: torch.Tensor, size: int) -> torch.Tensor:
    """Mirror positions in (-size, 2 * size - 1) at the first and last pixel, as padding_mode="reflect" does."""
    return (size - 1) - ((size - 1) - position.abs()).abs()
