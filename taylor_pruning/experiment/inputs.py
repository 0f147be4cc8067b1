"""What a run reads besides its arguments, kept in its config.json, so that a resumed run reads the same.

A checkpoint holds positions in the list of images and numbers of classes. With other images, or with classes that were
renamed, it would go on with other labels, and the numbers of one table would be of two data sets.
"""

import hashlib
from pathlib import Path

from taylor_pruning.distributed import is_main
from taylor_pruning.errors import InputError
from taylor_pruning.experiment.command import DataSettings
from taylor_pruning.experiment.data import ImageData
from taylor_pruning.experiment.folders import CorruptImageError
from taylor_pruning.experiment.models import weights_file
from taylor_pruning.files import user_path
from taylor_pruning.report.json_files import has_shape, read_json, write_json

BYTES_AT_ONCE = 2**24
NAMED = 3  # classes that a message names


def check_place(folder: Path, settings: DataSettings) -> None:
    """Raises InputError where the results would lie among the images: their plots would be read as images."""
    places = [folder.resolve(), *folder.resolve().parents]
    root = settings.data_path and user_path(settings.data_path)
    if root and any((root / split).resolve() in places for split in ("train", "val", "test")):
        raise InputError(f"the results folder {folder} lies among the images in {root}; pass another --output-dir")


def check_inputs(folder: Path, settings: DataSettings, data: ImageData) -> None:
    """Writes into the config.json of `folder` which images and which weights file the run reads, or compares with them.

    Nothing is compared where a config.json of an older version does not say.

    Raises:
        InputError: the run that is to be resumed has read others; the message says what differs. Or the weights file cannot
            be read.
    """
    config = read_json(folder / "config.json")
    if config is None:  # the network is prepared without a runner
        return
    now, then = {"images": data.listing, "weights": _weights(settings)}, config.get("inputs")
    if then is not None and not (isinstance(then, dict) and _is_listing(then.get("images"))):
        raise InputError(f"{folder / 'config.json'} does not say which images the run read; start a new run")
    if then is None or _without_sizes(now) == then:
        if is_main():
            write_json(folder / "config.json", {**config, "inputs": now})
        return
    if now["images"] != then.get("images"):
        changes = "; ".join(_changes(then.get("images") or {}, now["images"] or {}))
        raise InputError(
            f"the images in {settings.data_path} are not those of this run: {changes}. Put back what was there, or start a "
            "new run with another --output-dir"
        )
    if now["weights"] != then.get("weights"):
        raise InputError(
            f"{settings.weights} has other content than when this run began; put the file back, or start a new run with "
            "another --output-dir"
        )


def _is_listing(images) -> bool:
    return images is None or has_shape(images, {"classes": list, "train": dict, "val": dict})


def allow_repair(folder: Path, error: Exception) -> None:
    """After an image that could not be decoded: the file may have another size when the run goes on, for it must change."""
    config = read_json(folder / "config.json") if is_main() and isinstance(error, CorruptImageError) else None
    if config and isinstance(config.get("inputs"), dict):
        write_json(folder / "config.json", {**config, "inputs": _without_sizes(config["inputs"])})


def _without_sizes(inputs: dict) -> dict:
    images = inputs.get("images") or {}
    splits = {name: {**images[name], "sizes": None} for name in ("train", "val") if isinstance(images.get(name), dict)}
    return {**inputs, "images": {**images, **splits} or None}


def _weights(settings: DataSettings) -> str | None:
    """Hash of the file at --weights; None where no file was given."""
    path = weights_file(settings.weights)
    if path is None:
        return None
    if path.exists() and not path.is_file():  # such a thing may have no end, or be read only once
        raise InputError(f"{path} is no file, but a folder, pipe or device; give --weights a file")
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while block := file.read(BYTES_AT_ONCE):
                digest.update(block)
    except OSError as error:
        raise InputError(f"cannot open {path}: {error.strerror}; check --weights") from error
    return digest.hexdigest()[:16]


def _changes(then: dict, now: dict) -> list[str]:
    """In words, how two `ImageData.listing` differ."""
    before, after = then.get("classes") or [], now.get("classes") or []
    changes = [f"the class {name} is gone" for name in before if name not in set(after)]
    changes += [f"the class {name} is new" for name in after if name not in set(before)]
    if len(changes) > NAMED:
        changes[NAMED:] = [f"{len(changes) - NAMED} more classes are gone or new"]
    for split in ("train", "val"):
        old, new = then.get(split) or {}, now.get(split) or {}
        if old.get("images") != new.get("images"):
            changes.append(f"{new.get('images')} images in {split} instead of {old.get('images')}")
        elif old != new:
            changes.append(f"images in {split} were renamed or replaced")
    return changes or ["other classes"]
