"""What tells the images of a data set from others, and which validation images are training images too.

Every file is looked up once for both. Of copies, files of equal size are read: at most READ_AT_MOST training images, so that
no data set takes long. Where more have the size of a validation image, fewer validation images are compared.
"""

import filecmp
import hashlib
import os
from collections import Counter

from tqdm import tqdm

from taylor_pruning.distributed import is_main

READ_AT_MOST = 10_000  # training images
BLOCK = 4096  # bytes from the middle of a file, by which most files of equal size differ


def listing_and_shared(train, val) -> tuple[dict, list[str]]:
    """`listing` and `shared` of experiment.data.ImageData, of two data sets of experiment.folders.FolderImages."""
    present = set(train.targets)
    classes = [name for name, label in train.class_to_idx.items() if label in present]
    (of_train, train_files), (of_val, val_files) = map(_names_and_sizes, (train, val))
    known = {_place(file) for file in train_files.values()}
    shared = {path for path, file in val_files.items() if _place(file) in known}
    if is_main():  # which says so
        sizes = [
            {path: file.st_size for path, file in files.items() if path not in shared}
            for files in (train_files, val_files)
        ]
        shared |= copies(*sizes)
    return {"classes": classes, "train": of_train, "val": of_val}, [path for path, _ in val.samples if path in shared]


def _place(file: os.stat_result) -> tuple[int, int]:
    return file.st_dev, file.st_ino


def _names_and_sizes(dataset) -> tuple[dict, dict[str, os.stat_result]]:
    """What tells the images from others, and {path: what the system says of it}."""
    names, sizes, files = hashlib.sha256(), hashlib.sha256(), {}
    for path, _ in dataset.samples:
        files[path] = file = os.stat(path)
        names.update(os.fsencode(os.path.relpath(path, dataset.root)) + b"\0")
        sizes.update(b"%d\0" % file.st_size)
    return {"images": len(dataset), "names": names.hexdigest()[:16], "sizes": sizes.hexdigest()[:16]}, files


def copies(train: dict[str, int], val: dict[str, int]) -> set[str]:
    """The validation images, of those that are compared, with the content of a training image. {path: size in bytes}."""
    number, compared = Counter(train.values()), list(val)
    while len(compared) > 1 and sum(number[size] for size in {val[path] for path in compared}) > READ_AT_MOST:
        compared = compared[::2]  # spread over the classes
    wanted = {val[path] for path in compared}
    same_size = [path for path, size in train.items() if size in wanted][:READ_AT_MOST]
    found = {}
    for path in tqdm(same_size, "comparing with val", unit="image", leave=False, disable=None):
        found.setdefault(_block(path, train[path]), []).append(path)
    suspects = {path: found.get(_block(path, val[path]), []) for path in compared if number[val[path]]}
    return {path for path, others in suspects.items() if any(_equal(path, other) for other in others)}


def _block(path: str, size: int) -> tuple[int, bytes]:
    try:
        with open(path, "rb") as file:
            file.seek(max(0, size - BLOCK) // 2)
            return size, file.read(BLOCK)
    except OSError:  # reported where the image is decoded
        return size, path.encode(errors="surrogateescape")


def _equal(first: str, second: str) -> bool:
    try:
        return filecmp.cmp(first, second, shallow=False)
    except OSError:
        return False
