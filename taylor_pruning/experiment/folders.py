"""Data sets from image folders: what is read, what is refused, and the transforms that belong to a network's weights.

    data = load_image_folder("imagenet-mini", weights=VGG16_Weights.DEFAULT)

Small images (shorter side up to 64 pixels) are decoded once into one uint8 tensor; large ones when they are needed.
"""

import copy
import io
import os
import stat
import statistics
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS, has_file_allowed_extension
from torchvision.transforms import InterpolationMode, v2
from tqdm import tqdm

from taylor_pruning.errors import InputError
from taylor_pruning.experiment.data import IMAGENET_MEAN, IMAGENET_STD, SMALL_IMAGE, ImageData, TensorImages
from taylor_pruning.experiment.listing import listing_and_shared
from taylor_pruning.files import user_path

# Also those that this Pillow may be unable to read: they are refused by name, and not left out in silence.
SUFFIXES = (*IMG_EXTENSIONS, ".avif", ".gif", ".heic", ".heif", ".jfif", ".jp2", ".jxl")
MEMORY_LIMIT = 2**30  # bytes of uint8 pixels that may be held decoded
# What Pillow's decoders raise on broken files: AVIF's RuntimeError; struct and zlib errors on damaged PNG and TIFF chunks.
DECODING_ERRORS = (
    *(OSError, SyntaxError, ValueError, EOFError, RuntimeError),
    *(struct.error, zlib.error, Image.DecompressionBombError),
)
LAYOUT = "expected PATH/train/CLASS/*.jpg and PATH/val/CLASS/*.jpg (or PATH/test/...), one folder a class"


class CorruptImageError(InputError):
    """A file that cannot be decoded as an image."""


def read_image(path) -> Image.Image:
    """Decode one file as 8-bit RGB; 16-bit gray is scaled, alpha is dropped.

    Raises CorruptImageError when the file is no complete image, InputError when it cannot be read at all.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}; check the file and its permissions") from error
    try:
        with Image.open(io.BytesIO(data)) as image:
            return _to_rgb(image)
    except DECODING_ERRORS as error:
        reason = "not an image that Pillow reads" if isinstance(error, Image.UnidentifiedImageError) else str(error)
        raise CorruptImageError(
            f"cannot decode {path}: {reason}; repair or remove the file, or pass --skip-corrupt to leave such files out"
        ) from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # Pillow's own conversion would clip at 255
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("gray values outside 16 bit")
        image = Image.fromarray(((values + 128) // 257).astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("floating point gray values have no defined white")
    elif "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


class FolderImages(ImageFolder):
    """ImageFolder with given labels; `dataset[i]` raises InputError naming the file when it cannot be decoded.

    Raises InputError for a folder that cannot be listed and for an image that is no file, as a pipe.
    """

    def __init__(self, root: Path, class_to_idx: dict[str, int]):
        self._class_to_idx = class_to_idx
        super().__init__(str(root), loader=read_image)

    def find_classes(self, directory) -> tuple[list[str], dict[str, int]]:
        return list(self._class_to_idx), self._class_to_idx

    @staticmethod
    def make_dataset(directory: str, class_to_idx: dict[str, int], **_) -> list[tuple[str, int]]:
        """[(path, label)] by class and path."""
        folders = {name: os.path.join(directory, name) for name in sorted(class_to_idx)}
        present = [name for name, folder in folders.items() if os.path.isdir(folder)]
        return [(path, class_to_idx[name]) for name in present for path in _image_files(folders[name])]

    def keep(self, samples: list[tuple[str, int]]) -> None:
        self.samples = self.imgs = samples
        self.targets = [label for _, label in samples]

    def with_transform(self, transform) -> "FolderImages":
        other = copy.copy(self)
        other.transform = transform
        return other


def _image_files(folder: str) -> Iterator[str]:
    """The images in a folder and the folders below it, but for what editors, notebooks and file managers hide there.

    Every folder counts once, however many symbolic links lead to it: one that leads upwards would give images for ever.
    """

    def refuse(error: OSError):
        raise InputError(f"cannot list {error.filename}: {error.strerror}; check --data-path and its permissions")

    listed, seen = [], set()
    for place, folders, names in os.walk(folder, followlinks=True, onerror=refuse):
        real = os.path.realpath(place)
        # sorted, so that which of several links counts does not depend on the file system
        folders[:] = [] if real in seen else sorted(name for name in folders if not name.startswith("."))
        if real not in seen:
            listed.append((place, names))
        seen.add(real)
    for place, names in sorted(listed):
        for name in sorted(names):
            path = os.path.join(place, name)
            # A link without an extension leads to a folder of images, which may be on a disk that is not there.
            if not name.startswith(".") and (has_file_allowed_extension(name, SUFFIXES) or _leads_nowhere(path)):
                yield _regular_file(path)


def _leads_nowhere(path: str | Path) -> bool:
    return os.path.islink(path) and not os.path.exists(path)


def _regular_file(path: str) -> str:
    try:
        if stat.S_ISREG(os.stat(path).st_mode):
            return path
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}; check the file and its permissions") from error
    raise InputError(f"cannot read {path}: it is a pipe, socket or device; remove it")  # reading it could wait for ever


def _threaded(function, items, description: str) -> Iterator:
    """`map` in order over a thread pool (decoding releases the GIL), with a progress bar."""
    with ThreadPool(min(8, os.cpu_count() or 1)) as pool:
        yield from tqdm(pool.imap(function, items, chunksize=16), description, len(items), unit="image", disable=None)


def _drop_corrupt(dataset: FolderImages) -> list[Path]:
    """Decode every image, keep those that can be decoded and return the paths of the others."""

    def decodes(sample: tuple[str, int]) -> bool:
        try:
            read_image(sample[0])
        except CorruptImageError:
            return False
        return True

    good = list(_threaded(decodes, dataset.samples, f"checking {Path(dataset.root).name}"))
    skipped = [Path(path) for (path, _), ok in zip(dataset.samples, good, strict=True) if not ok]
    dataset.keep([sample for sample, ok in zip(dataset.samples, good, strict=True) if ok])
    return skipped


@dataclass(frozen=True)
class _Preset:
    """The numbers of a torchvision classification preset and the transforms made from them."""

    crop: int = 224
    resize: int = 256
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    interpolation: InterpolationMode = InterpolationMode.BILINEAR

    @classmethod
    def of(cls, weights) -> "_Preset":
        if weights is None:
            return cls()
        t = weights.transforms()
        return cls(t.crop_size[0], t.resize_size[0], tuple(t.mean), tuple(t.std), t.interpolation)

    def fit(self, size: int) -> list:
        return [v2.Resize(size, self.interpolation, antialias=True), v2.CenterCrop(size)]

    def _tensor(self) -> list:
        return [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(self.mean, self.std)]

    def evaluation(self, size: int, small: bool) -> v2.Compose:
        resize = size if small else round(size * self.resize / self.crop)
        return v2.Compose([self.fit(resize)[0], v2.CenterCrop(size), *self._tensor()])

    def training(self, size: int, small: bool) -> v2.Compose:
        if small:
            crop = [*self.fit(size), v2.RandomCrop(size, padding=size // 8, padding_mode="reflect")]
        else:
            crop = [v2.RandomResizedCrop(size, interpolation=self.interpolation, antialias=True)]
        return v2.Compose([*crop, v2.RandomHorizontalFlip(), *self._tensor()])


def load_image_folder(path, *, image_size: int | None = None, weights=None, skip_corrupt: bool = False) -> ImageData:
    """Read an ImageFolder root that holds `train/` and `val/` (or `test/`).

    image_size: side in pixels; None keeps the native size of small images (no blow-up), else takes the crop size of
        `weights`, else 224.
    weights: a torchvision WeightsEnum member or TimmWeights, whose resize, crop, mean and std are used; None means ImageNet's.
    skip_corrupt: decode everything once, leave out what cannot be decoded and list it in `ImageData.skipped`.

    When all class folders are ImageNet synset ids, labels follow ImageNet's order, whichever classes are missing.
    Raises InputError on a wrong layout, empty or unknown class folders, fewer than two classes, undecodable images, and
    on folders that cannot be read.
    """
    if image_size is not None and image_size < 1:
        raise InputError(f"image size must be at least 1 pixel, got {image_size}; leave it out to use the native size")
    path = user_path(path)
    try:
        train, val, imagenet_labels = _scan(path)
    except OSError as error:
        place = error.filename or path
        raise InputError(f"cannot read {place}: {error.strerror}; check --data-path and its permissions") from error
    skipped = _drop_corrupt(train) + _drop_corrupt(val) if skip_corrupt else []
    _check_not_empty(train)
    _check_not_empty(val)

    native = _native_size(train)
    preset = _Preset.of(weights)
    small = max(native, image_size or native) <= SMALL_IMAGE
    size = image_size or (native if small else preset.crop)
    if small and (len(train) + len(val)) * 3 * size**2 <= MEMORY_LIMIT:
        evaluation = _decode(train, size, preset)
        augmented = replace(evaluation, padding=size // 8, flip=True)
        validation = _decode(val, size, preset)
    else:
        evaluation = train.with_transform(preset.evaluation(size, small))
        augmented = train.with_transform(preset.training(size, small))
        validation = val.with_transform(preset.evaluation(size, small))
    listing, shared = listing_and_shared(train, val)
    return ImageData(
        name=path.resolve().name, train=augmented, val=validation, evaluation_train=evaluation, classes=train.classes,
        num_classes=len(train.classes), image_size=size, imagenet_labels=imagenet_labels, skipped=skipped,
        mean=preset.mean, std=preset.std, listing=listing, shared=shared,
    )  # fmt: skip


def _scan(path: Path) -> tuple[FolderImages, FolderImages, bool]:
    """Find the two splits, check their class folders and decide on the labels."""
    if not path.is_dir():
        raise InputError(f"no data folder {path}; {LAYOUT}")
    train_root = path / "train"
    val_root = next((path / name for name in ("val", "test") if (path / name).is_dir()), None)
    if not train_root.is_dir() or val_root is None:
        missing = "val/ or test/" if train_root.is_dir() else "train/"
        raise InputError(f"{path} has no folder {missing}; {LAYOUT}")
    names = _class_names(train_root)
    unknown = sorted(set(_class_names(val_root)) - set(names))
    if unknown:
        raise InputError(
            f"{val_root} has class folders that {train_root} lacks: {_listed(unknown)}; add them there or remove them"
        )
    if len(names) < 2:
        raise InputError(f"{train_root} has only the class {names[0]}; nothing to classify, give at least two classes")
    synsets = Path(__file__).with_name("imagenet_synsets.txt").read_text().split()
    imagenet_labels = set(names) <= set(synsets)
    class_to_idx = {name: label for label, name in enumerate(synsets if imagenet_labels else names)}
    return FolderImages(train_root, class_to_idx), FolderImages(val_root, class_to_idx), imagenet_labels


def _class_names(root: Path) -> list[str]:
    entries = [entry for entry in root.iterdir() if not entry.name.startswith(".")]
    if broken := sorted(entry.name for entry in entries if _leads_nowhere(entry)):
        raise InputError(
            f"{root} has links that lead nowhere: {_listed(broken)}; mount what they lead to or remove them"
        )
    names = sorted(entry.name for entry in entries if entry.is_dir())
    if not names:
        raise InputError(f"{root} has no class folders; {LAYOUT}")
    return names


def _check_not_empty(dataset: FolderImages) -> None:
    present = set(dataset.targets)
    empty = [name for name in _class_names(Path(dataset.root)) if dataset.class_to_idx[name] not in present]
    if empty:
        raise InputError(
            f"{dataset.root} has class folders without any image: {_listed(empty)}; fill or remove them "
            f"(read are {', '.join(SUFFIXES)})"
        )


def _listed(names: list[str]) -> str:
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


def _native_size(dataset: FolderImages) -> int:
    """Median shorter side, in pixels, of up to 32 images spread over the set (read from their headers)."""
    sides = []
    for path, _ in dataset.samples[:: max(1, len(dataset) // 32)][:32]:
        try:
            with Image.open(path) as image:
                sides.append(min(image.size))
        except DECODING_ERRORS:  # a broken file says nothing here; it is reported when it is decoded
            continue
    if not sides:
        read_image(dataset.samples[0][0])
    return statistics.median_low(sides)


def _decode(dataset: FolderImages, size: int, preset: "_Preset") -> TensorImages:
    """All images of a small set as one uint8 tensor; the few of another size are resized and centre-cropped."""
    images = np.empty((len(dataset), size, size, 3), np.uint8)
    fit = v2.Compose(preset.fit(size))

    def decode(path: str) -> np.ndarray:
        image = read_image(path)
        return np.asarray(image if image.size == (size, size) else fit(image))

    paths = [path for path, _ in dataset.samples]
    for row, pixels in enumerate(_threaded(decode, paths, f"decoding {Path(dataset.root).name}")):
        images[row] = pixels
    images = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
    return TensorImages(images, torch.tensor(dataset.targets), preset.mean, preset.std)
