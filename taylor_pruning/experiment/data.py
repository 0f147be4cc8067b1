"""Image folders, their transforms, and loaders whose epochs can be repeated bit for bit.

    data = load_image_folder("imagenet-mini", weights=VGG16_Weights.DEFAULT)
    loader = make_loader(data.train, 64, shuffle=True, seed=0, device=device)
    loader.set_epoch(3)
    for images, labels in loader:                                               # on `device`
        ...

Small images (shorter side up to 64 pixels) are decoded once into one uint8 tensor and augmented batch by batch on the
device; large ones are decoded by DataLoader workers. Order and augmentation depend on (seed, epoch) alone, never on the
number of workers or on what was drawn before, so a resumed run sees the images that an unbroken run would have seen.
"""

import copy
import io
import os
import statistics
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Subset, default_collate
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS, has_file_allowed_extension
from torchvision.transforms import InterpolationMode, v2
from tqdm import tqdm

from taylor_pruning.errors import InputError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
SMALL_SIDE = 64  # pixels; up to here a set keeps its native size and is decoded once
MEMORY_LIMIT = 2**30  # bytes of uint8 pixels that may be held decoded
FLOATS_AT_ONCE = 2**23  # normalised pixels that are made at once: 32 MiB
# What Pillow's decoders raise on broken files; struct and zlib errors come from damaged PNG and TIFF chunks.
DECODING_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)
LAYOUT = "expected PATH/train/CLASS/*.jpg and PATH/val/CLASS/*.jpg (or PATH/test/...), one folder a class"


class CorruptImageError(InputError):
    """A file that cannot be decoded as an image."""


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
    mean: tuple[float, ...] = IMAGENET_MEAN  # of the normalisation: (value in [0, 1] - mean) / std
    std: tuple[float, ...] = IMAGENET_STD


# ----------------------------------------------------------------------------------------------- reading images


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
        reason = "not an image" if isinstance(error, Image.UnidentifiedImageError) else str(error)
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
    """ImageFolder with given labels; `dataset[i]` raises InputError naming the file when it cannot be decoded."""

    def __init__(self, root: Path, class_to_idx: dict[str, int]):
        self._class_to_idx = class_to_idx
        super().__init__(str(root), loader=read_image, is_valid_file=self._is_visible_image, allow_empty=True)

    def _is_visible_image(self, path: str) -> bool:
        """Not so: what editors, notebooks and file managers leave in hidden files and folders (._0.png, .ipynb_checkpoints)."""
        return has_file_allowed_extension(path, IMG_EXTENSIONS) and f"{os.sep}." not in path.removeprefix(str(self.root))

    def find_classes(self, directory) -> tuple[list[str], dict[str, int]]:
        return list(self._class_to_idx), self._class_to_idx

    def keep(self, samples: list[tuple[str, int]]) -> None:
        self.samples = self.imgs = samples
        self.targets = [label for _, label in samples]

    def with_transform(self, transform) -> "FolderImages":
        other = copy.copy(self)
        other.transform = transform
        return other


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


# ------------------------------------------------------------------------------------------------- image folders


def load_image_folder(path, *, image_size: int | None = None, weights=None, skip_corrupt: bool = False) -> ImageData:
    """Read an ImageFolder root that holds `train/` and `val/` (or `test/`).

    image_size: side in pixels; None keeps the native size of small images (no blow-up), else takes the crop size of
        `weights`, else 224.
    weights: a torchvision WeightsEnum member whose resize, crop, mean and std are used; None means ImageNet's.
    skip_corrupt: decode everything once, leave out what cannot be decoded and list it in `ImageData.skipped`.

    When all class folders are ImageNet synset ids, labels follow ImageNet's order, whichever classes are missing.
    Raises InputError on a wrong layout, empty or unknown class folders, fewer than two classes, undecodable images.
    """
    if image_size is not None and image_size < 1:
        raise InputError(f"image size must be at least 1 pixel, got {image_size}; leave it out to use the native size")
    path = Path(path).expanduser()
    train, val, imagenet_labels = _scan(path)
    skipped = _drop_corrupt(train) + _drop_corrupt(val) if skip_corrupt else []
    _check_not_empty(train)
    _check_not_empty(val)

    native = _native_size(train)
    preset = _Preset.of(weights)
    small = max(native, image_size or native) <= SMALL_SIDE
    size = image_size or (native if small else preset.crop)
    if small and (len(train) + len(val)) * 3 * size**2 <= MEMORY_LIMIT:
        evaluation = _decode(train, size, preset)
        augmented = replace(evaluation, padding=size // 8, flip=True)
        validation = _decode(val, size, preset)
    else:
        evaluation = train.with_transform(preset.evaluation(size, small))
        augmented = train.with_transform(preset.training(size, small))
        validation = val.with_transform(preset.evaluation(size, small))
    return ImageData(
        name=path.resolve().name, train=augmented, val=validation, evaluation_train=evaluation, classes=train.classes,
        num_classes=len(train.classes), image_size=size, imagenet_labels=imagenet_labels, skipped=skipped,
        mean=preset.mean, std=preset.std,
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
    names = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        raise InputError(f"{root} has no class folders; {LAYOUT}")
    return names


def _check_not_empty(dataset: FolderImages) -> None:
    present = set(dataset.targets)
    empty = [name for name in _class_names(Path(dataset.root)) if dataset.class_to_idx[name] not in present]
    if empty:
        raise InputError(f"{dataset.root} has class folders without any image: {_listed(empty)}; fill or remove them")


def _listed(names: list[str]) -> str:
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


def _native_size(dataset: FolderImages) -> int:
    """Median shorter side, in pixels, of up to 32 images spread over the set (read from their headers)."""
    sides = []
    for path, _ in dataset.samples[:: max(1, len(dataset) // 32)][:32]:
        try:
            with Image.open(path) as image:
                sides.append(min(image.size))
        except (OSError, SyntaxError):  # a broken file says nothing here; it is reported when it is decoded
            continue
    if not sides:
        read_image(dataset.samples[0][0])
    return statistics.median_low(sides)


def _decode(dataset: FolderImages, size: int, preset: "_Preset") -> "TensorImages":
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


@dataclass(frozen=True)
class _Preset:
    """The numbers behind a torchvision classification preset and the transforms made from them."""

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


# ------------------------------------------------------------------------------------------- tensors and loaders


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


class EpochBatches:
    """Which images make up the batches of an epoch: a function of (seed, epoch), cut over `shard` = (rank, world size).

    Shuffled (training): every rank gets equally many images and batches; up to `world - 1` images of an epoch, other
    ones each time, are left out. Batches are as even as can be, so that no last batch of one image meets BatchNorm.
    In order (evaluation): every image exactly once over all ranks.
    """

    def __init__(self, length: int, batch_size: int, *, shuffle: bool, seed: int, shard: tuple[int, int] = (0, 1)):
        rank, world = shard
        if batch_size < 1:
            raise InputError(f"batch size must be at least 1, got {batch_size}")
        if length < (world if shuffle else 1):
            raise InputError(f"{length} images cannot be spread over {world} process(es); give more images")
        self.length, self.batch_size, self.shuffle, self.seed, self.shard = length, batch_size, shuffle, seed, shard
        self.share = length // world if shuffle else len(range(rank, length, world))
        self.epoch = 0

    def __len__(self) -> int:
        return -(-self.share // self.batch_size)

    def batches(self) -> list[np.ndarray]:
        rank, world = self.shard
        if not self.shuffle:
            order = np.arange(rank, self.length, world)
            return [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.length)
        return np.array_split(order[: self.share * world][rank::world], len(self))

    def spread(self, samples: int) -> tuple[list[int], "EpochBatches"]:
        """About `samples` positions, evenly spread, and the batches of them alone, in order."""
        rows = list(range(0, self.length, max(1, self.length // samples)))
        return rows, EpochBatches(len(rows), self.batch_size, shuffle=False, seed=self.seed, shard=self.shard)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        """Batches as DataLoader keys; the epoch travels with every index, so that persistent workers know it."""
        for batch in self.batches():
            yield [(self.epoch, index) for index in batch.tolist()]


class BatchLoader:
    """Loads a TensorImages on `device`, where the uint8 images live; no loop over images.

    Several batches are cropped, flipped and normalised at once and then handed out one by one, which takes fewer launches
    on a GPU. Nothing waits for the device but the copy of an epoch's order at its beginning.
    """

    def __init__(self, dataset: TensorImages, plan: EpochBatches, device: torch.device):
        self.dataset, self.plan, self.device = dataset, plan, device
        self.smallest_batch = min(map(len, plan.batches()))
        self._resident = dataset.to(device)

    def __len__(self) -> int:
        return len(self.plan)

    def set_epoch(self, epoch: int) -> None:
        self.plan.epoch = epoch

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        data, batches = self._resident, self.plan.batches()
        if not batches:  # of one process of several, on very few images
            return
        shifts, flips = self._draws()
        order = torch.from_numpy(np.concatenate(batches)).to(self.device)
        together = max(1, FLOATS_AT_ONCE // (data.images[0].numel() * len(batches[0])))
        first = 0
        for start in range(0, len(batches), together):
            sizes = [len(batch) for batch in batches[start : start + together]]
            index = order[first : first + sum(sizes)]
            first += sum(sizes)
            images = data.take(
                index, None if shifts is None else shifts[index], None if flips is None else flips[index]
            )
            yield from zip(images.split(sizes), data.targets[index].split(sizes), strict=True)

    def spread(self, samples: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Batches of about `samples` images spread evenly over the set, which may be sorted by class; reads no others."""
        rows, plan = self.plan.spread(samples)
        data = replace(self.dataset, images=self.dataset.images[rows], targets=self.dataset.targets[rows])
        return list(BatchLoader(data, plan, self.device))

    def _draws(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Shifts [N, 2] and flips [N] of all images, drawn on the CPU: the same for every batch size, shard and device."""
        data, shifts, flips = self._resident, None, None
        rng = np.random.default_rng([self.plan.seed, self.plan.epoch, 1])
        if data.padding:
            shifts = torch.from_numpy(rng.integers(2 * data.padding + 1, size=(len(data), 2))).to(self.device)
        if data.flip:
            flips = torch.from_numpy(rng.integers(2, size=len(data)).astype(bool)).to(self.device)
        return shifts, flips


class WorkerLoader:
    """A DataLoader behind the surface of BatchLoader: batches on `device`, `set_epoch`, errors of workers as raised."""

    def __init__(self, dataset: Dataset, plan: EpochBatches, device: torch.device, workers: int):
        self.dataset, self.plan, self.device = dataset, plan, device
        self.smallest_batch = min(map(len, plan.batches()))
        self._loader = DataLoader(
            _SeededItems(dataset, plan.seed), batch_sampler=plan, num_workers=workers, collate_fn=_collate,
            pin_memory=device.type == "cuda", persistent_workers=workers > 0,
            generator=torch.Generator().manual_seed(plan.seed),  # keeps the DataLoader off the global generator
        )  # fmt: skip

    def __len__(self) -> int:
        return len(self.plan)

    def set_epoch(self, epoch: int) -> None:
        self.plan.epoch = epoch

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for batch in self._loader:
            if isinstance(batch, InputError):
                raise batch
            images, labels = batch
            yield images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)


    def spread(self, samples: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """As that of BatchLoader."""
        rows, plan = self.plan.spread(samples)
        return list(WorkerLoader(Subset(self.dataset, rows), plan, self.device, self._loader.num_workers))


class _SeededItems(Dataset):
    """Items with the random transforms seeded by (seed, epoch, index); InputErrors are returned in place of items.

    A DataLoader wraps what a worker raises into a message that holds the whole traceback; a returned error arrives
    as it is, and the loader raises it.
    """

    def __init__(self, dataset: Dataset, seed: int):
        self.dataset, self.seed = dataset, seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int]):
        seed = np.random.SeedSequence([self.seed, *key]).generate_state(1, np.uint64)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int(seed[0]))
            try:
                return self.dataset[key[1]]
            except InputError as error:
                return error


def _collate(items: list):
    error = next((item for item in items if isinstance(item, InputError)), None)
    return default_collate(items) if error is None else error


def make_loader(
    dataset: Dataset,
    batch_size: int,
    *,
    shuffle: bool = False,
    workers: int = 0,
    seed: int = 0,
    device: torch.device | str = "cpu",
    distributed: bool = False,
) -> BatchLoader | WorkerLoader:
    """Iterable of (images float32 [B, 3, H, W], labels int64 [B]) on `device`, with `len`, `dataset`, `set_epoch`.

    workers: processes that decode images; a set that is decoded already needs none. distributed: this process's share
    under torch.distributed, see EpochBatches. Raises InputError on an empty set or a batch size below 1, and while
    iterating on an image that cannot be decoded.
    """
    device = torch.device(device)
    shard = (torch.distributed.get_rank(), torch.distributed.get_world_size()) if distributed else (0, 1)
    plan = EpochBatches(len(dataset), batch_size, shuffle=shuffle, seed=seed, shard=shard)
    if isinstance(dataset, TensorImages):
        return BatchLoader(dataset, plan, device)
    return WorkerLoader(dataset, plan, device, workers)


def calibration_batches(
    data: ImageData, samples: int, batch_size: int, *, seed: int = 0, device: torch.device | str = "cpu"
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Class-balanced training images under the evaluation transform, as [(images, labels)] on `device`.

    The classes take turns, each giving its images in random order without repetition; a class that has no more is
    passed over, and `samples` above the size of the set means all of it. The sequence of images depends on `seed`
    alone, `batch_size` only cuts it. Raises InputError when samples or batch_size is below 1.
    """
    if samples < 1 or batch_size < 1:
        raise InputError(f"calibration needs at least 1 sample and batch size 1, got {samples} and {batch_size}")
    order = _balanced_order(np.asarray(data.evaluation_train.targets), seed)[:samples].tolist()
    with ThreadPool(min(8, os.cpu_count() or 1)) as pool:
        items = pool.map(data.evaluation_train.__getitem__, order)
    batches = [default_collate(items[i : i + batch_size]) for i in range(0, len(items), batch_size)]
    return [(images.to(device), labels.to(device)) for images, labels in batches]


def _balanced_order(labels: np.ndarray, seed: int) -> np.ndarray:
    """All indices, ordered by (how many of its class came before, random rank of the class)."""
    rng = np.random.default_rng(seed)
    shuffled = rng.permutation(len(labels))
    class_rank = rng.permutation(labels.max() + 1)[labels[shuffled]]
    by_class = np.argsort(class_rank, kind="stable")
    _, starts, counts = np.unique(class_rank[by_class], return_index=True, return_counts=True)
    turn = np.empty(len(labels), np.int64)
    turn[by_class] = np.arange(len(labels)) - np.repeat(starts, counts)
    return shuffled[np.lexsort((class_rank, turn))]
