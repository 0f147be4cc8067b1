"""The embedded data set: ten classes of 32x32 colour images, drawn by this program for runs without files."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from taylor_pruning.errors import InputError
from taylor_pruning.experiment.data import ImageData, TensorImages

SHAPES = ("disc", "square", "triangle", "cross", "star")
TEXTURES = ("striped", "checkered")
EMBEDDED_SIZE = 32  # pixels
CHUNK = 500  # images that one generator draws
TRAIN_IMAGES, VAL_IMAGES = 3000, 2000


def embedded_data(train_images: int = TRAIN_IMAGES, val_images: int = VAL_IMAGES) -> ImageData:
    """Ten classes of 32x32 colour images, drawn by this program: five shapes, each striped or checkered.

    Position, size, rotation, colours, background, clutter and noise are random and independent of the label, so that a
    classifier that is linear in the pixels stays below 25 %. The images are the same on every machine, in every call;
    each class has the same share of them, and a smaller set is the beginning of a larger one.

    Raises InputError below 10 images a split.
    """
    if min(train_images, val_images) < 10:
        raise InputError(f"the embedded data set needs 10 images a split or more, got {train_images} and {val_images}")
    evaluation = TensorImages(*_draw_split(train_images, 0))
    return ImageData(
        name="embedded",
        train=replace(evaluation, padding=EMBEDDED_SIZE // 8, flip=True),
        val=TensorImages(*_draw_split(val_images, 1)),
        evaluation_train=evaluation,
        classes=[f"{texture} {shape}" for shape in SHAPES for texture in TEXTURES],
        num_classes=len(SHAPES) * len(TEXTURES),
        image_size=EMBEDDED_SIZE,
        imagenet_labels=False,
    )


@dataclass(frozen=True)
class ShapeImages:
    """Images of the embedded data set with what was drawn: for segmentation, detection and regression.

    Attributes:
        images: float [N, 3, 32, 32], about 0 with deviation 1. labels: int64 [N] class number of the shape in `SHAPES`.
        masks: int64 [N, 32, 32], 0 for background, 1 + label where the shape is.
        boxes: float [N, 4] x1, y1, x2, y2 around the mask. angles: float [N] by which the shape is turned, radians.
    """

    images: torch.Tensor
    labels: torch.Tensor
    masks: torch.Tensor
    boxes: torch.Tensor
    angles: torch.Tensor


def embedded_shapes(count: int, split: int, shapes: Sequence[str] = SHAPES) -> ShapeImages:
    """The first `count` images of a split (0 train, 1 validation) whose objects have the given shapes, in turn.

    Raises InputError for an unknown shape.
    """
    if unknown := set(shapes) - set(SHAPES):
        raise InputError(f"there is no shape {unknown.pop()}; choose from {', '.join(SHAPES)}")
    numbers = np.array([SHAPES.index(shape) for shape in shapes]) * len(TEXTURES)
    kinds = (numbers[:, None] + np.arange(len(TEXTURES))).flatten()
    images, inside, angles = _draw_chunks(count, split, kinds)
    labels = torch.from_numpy(kinds)[torch.arange(count) % len(kinds)] // len(TEXTURES)
    ends = []
    for axis in (1, 2):  # over rows: extent in x; over columns: extent in y
        touched = inside.any(axis)
        ends.append((touched.argmax(1), touched.shape[1] - touched[:, ::-1].argmax(1)))
    (x1, x2), (y1, y2) = ends
    return ShapeImages(
        (torch.from_numpy(images).float() / 255 - 0.45) / 0.25,
        labels,
        torch.from_numpy(inside).long() * (1 + labels[:, None, None]),
        torch.from_numpy(np.stack([x1, y1, x2, y2], 1)).float(),
        torch.from_numpy(angles).float(),
    )


def _draw_split(count: int, split: int) -> tuple[torch.Tensor, torch.Tensor]:
    classes = len(SHAPES) * len(TEXTURES)
    return torch.from_numpy(_draw_chunks(count, split, np.arange(classes))[0]), torch.arange(count) % classes


def _draw_chunks(count: int, split: int, kinds: np.ndarray) -> tuple[np.ndarray, ...]:
    """What `_draw` gives for `count` images of the classes `kinds`, in turn."""
    # Chunks of a fixed size, each with its own generator: a smaller set is then the beginning of a larger one.
    labels = kinds[np.arange(CHUNK) % len(kinds)]
    drawn = [_draw(labels, np.random.default_rng([split, start])) for start in range(0, count, CHUNK)]
    return tuple(np.concatenate(parts)[:count] for parts in zip(*drawn, strict=True))


def _draw(labels: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images uint8 [n, 3, 32, 32], whether a pixel lies in the object [n, 32, 32], the object's angle [n].

    In float64, so that last-bit differences between machines vanish in the rounding.
    """
    n, size = len(labels), EMBEDDED_SIZE
    y, x = np.mgrid[:size, :size] + 0.5
    across, along = _frame(rng.uniform(0, size, (n, 2)), rng.uniform(0, 2 * np.pi, n), x, y)
    colour = rng.uniform(0.05, 0.45, (n, 3, 1, 1))
    canvas = colour + rng.uniform(-0.012, 0.012, (n, 3, 1, 1)) * along[:, None]
    for _ in range(4):
        _draw_bar(canvas, rng, x, y)

    radius = rng.uniform(8, 12, (n, 1, 1))
    centre = size / 2 + rng.uniform(-1, 1, (n, 2)) * (size / 2 - 1 - radius[:, :, 0])
    angle = rng.uniform(0, 2 * np.pi, n)
    across, along = _frame(centre, angle, x, y)
    distance = np.empty((n, size, size))
    for number, shape in enumerate(SHAPES):
        chosen = labels // len(TEXTURES) == number
        distance[chosen] = _distance(shape, across[chosen] / radius[chosen], along[chosen] / radius[chosen])
    # Objects of all classes are lighter than the background: without that, learning takes far longer.
    # Textures fainter than the noise keep the attainable accuracy below 100 %.
    base, contrast = rng.uniform(0.55, 0.95, (n, 3, 1, 1)), rng.uniform(0.12, 0.4, (n, 1, 1, 1))
    tone = contrast * rng.uniform(0.6, 1, (n, 3, 1, 1))
    texture = _texture(labels % len(TEXTURES) == 1, rng, x, y)
    _blend(canvas, base - tone * (1 - texture[:, None]) / 2, distance * radius)

    for _ in range(2):
        _draw_bar(canvas, rng, x, y)
    canvas += rng.uniform(-0.12, 0.12, canvas.shape)
    return np.rint(canvas.clip(0, 1) * 255).astype(np.uint8), distance < 0, angle


def _frame(centre: np.ndarray, angle: np.ndarray, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pixel coordinates [n, H, W] in frames turned by `angle` [n] about `centre` [n, 2]."""
    x, y = x - centre[:, 0, None, None], y - centre[:, 1, None, None]
    cos, sin = np.cos(angle)[:, None, None], np.sin(angle)[:, None, None]
    return cos * x + sin * y, cos * y - sin * x


def _blend(canvas: np.ndarray, colour: np.ndarray, distance: np.ndarray) -> None:
    """Paint `colour` where the signed distance (pixels) is negative, with an edge one pixel wide."""
    cover = (0.5 - distance).clip(0, 1)[:, None]
    canvas += cover * (colour - canvas)


def _draw_bar(canvas: np.ndarray, rng: np.random.Generator, x: np.ndarray, y: np.ndarray) -> None:
    n, size = len(canvas), EMBEDDED_SIZE
    across, along = _frame(rng.uniform(0, size, (n, 2)), rng.uniform(0, np.pi, n), x, y)
    length, width = rng.uniform(2, 6, (n, 1, 1)), rng.uniform(0.4, 1.2, (n, 1, 1))
    _blend(canvas, rng.uniform(0.1, 0.9, (n, 3, 1, 1)), np.maximum(abs(along) - length, abs(across) - width))


def _texture(checkered: np.ndarray, rng: np.random.Generator, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Stripes or checks [n, H, W] in [-1, 1], of random period, phase and direction."""
    n = len(checkered)
    across, along = _frame(rng.uniform(0, EMBEDDED_SIZE, (n, 2)), rng.uniform(0, np.pi, n), x, y)
    frequency = 2 * np.pi / rng.uniform(4, 6, (n, 1, 1))
    stripes = np.clip(2 * np.sin(frequency * across), -1, 1)
    checks = np.clip(2 * np.sin(frequency * along), -1, 1)
    return np.where(checkered[:, None, None], stripes * checks, stripes)


def _distance(shape: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Signed distance (exact or a bound, in radii) to a shape inside the unit circle; negative inside."""
    if shape == "disc":
        return np.hypot(u, v) - 0.85
    if shape == "square":
        return np.maximum(abs(u), abs(v)) - 0.75
    if shape == "cross":
        return np.minimum(np.maximum(abs(u) - 0.3, abs(v) - 0.95), np.maximum(abs(v) - 0.3, abs(u) - 0.95))
    corners = 3 if shape == "triangle" else 5
    angles = 2 * np.pi * np.arange(corners) / corners
    sides = np.stack([np.cos(a) * u + np.sin(a) * v for a in angles])
    if shape == "triangle":
        return sides.max(0) - 0.5
    # A pentagram is where at least four of the five half-planes hold.
    return np.sort(sides, axis=0)[-2] - 0.38
