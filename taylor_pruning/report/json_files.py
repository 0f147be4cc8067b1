"""Results as strict JSON, written whole or not at all, and read back."""

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from taylor_pruning.errors import InputError
from taylor_pruning.files import atomic_path


@dataclass(frozen=True)
class Values:
    """Shape of a dictionary or list, either of which may be empty, all of whose values have the shape `of`."""

    of: object


def plain(value):
    """`value` as JSON can hold it: NaN and infinities become None, arrays lists, numpy scalars numbers, paths text.

    Raises TypeError for everything else that JSON does not know.
    """
    if isinstance(value, dict):
        return {key if isinstance(key, str) else str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, (np.ndarray, np.generic)):
        return plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if value is None or isinstance(value, (str, int)):
        return value
    raise TypeError(f"{type(value).__name__} cannot be written as JSON: {value!r}")


def write_json(path, value) -> None:
    """Write `value` as strict JSON, keys in the order they were put in (the layers' order carries meaning).

    Paths that are not UTF-8 reach Python as lone surrogates; they are written, and come back, as JSON's escapes.
    """
    text = json.dumps(plain(value), indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def read_json(path: Path, shape=dict) -> dict | None:
    """The results in the file, None where there is none.

    shape: what the file must hold, see `has_shape`. Raises InputError if it is damaged or holds anything else.
    """
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not has_shape(content, shape):
            raise ValueError("it holds no such results")
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is damaged ({error}); remove it, and --resume computes it again") from error
    return content


def has_shape(value, shape) -> bool:
    """Whether plain values have the types that `shape` gives: a type, or several, as for isinstance; a dictionary, whose
    keys must be there, with values of its shapes; a list of one shape, which at least one item and every item must have; or
    `Values`.
    """
    if isinstance(shape, Values):
        values = value.values() if isinstance(value, dict) else value
        return isinstance(value, (dict, list)) and all(has_shape(item, shape.of) for item in values)
    if isinstance(shape, dict):
        return isinstance(value, dict) and all(key in value and has_shape(value[key], shape[key]) for key in shape)
    if isinstance(shape, list):
        return isinstance(value, list) and bool(value) and all(has_shape(item, shape[0]) for item in value)
    return isinstance(value, shape)
