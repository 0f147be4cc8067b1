"""Weights from files as training scripts leave them: read without running code, named as the network names them."""

import pickle
import struct
from collections import Counter
from collections.abc import Collection
from pathlib import Path

import torch
from torch import Tensor, nn

from taylor_pruning.checks import nonfinite_tensor
from taylor_pruning.errors import InputError
from taylor_pruning.files import is_whole_archive
from taylor_pruning.memory import raise_out_of_memory

try:
    from safetensors import SafetensorError  # torch.load hands .safetensors to that package, where it is installed
except ImportError:
    SafetensorError = RuntimeError

# Where training scripts keep the weights in a checkpoint, beside others. The first one is taken: averages come last.
STATE_KEYS = ("state_dict", "model_state_dict", "model", "net", "network", "ema_state_dict", "model_ema", "ema")
NESTED = 4  # such keys that lead from one dictionary to the next
PRUNED_FORMAT = "pruned-network"  # of the files of experiment.pruned_file

# What torch.load(weights_only=True) raises on pickled code, damaged archives and files of another kind.
UNREADABLE = (
    *(pickle.UnpicklingError, struct.error, RuntimeError, AssertionError, EOFError),
    *(LookupError, ValueError, AttributeError, TypeError, SafetensorError),
)


def read_tensors(
    path: Path,
    device: str | torch.device = "cpu",
    remedy: str = "save it again with torch.save(model.state_dict(), path)",
):
    """Content of a file of tensors and plain values. Pickled code is refused, never run.

    Raises InputError, ending in `remedy`, if it cannot be read.
    """
    try:
        with open(path, "rb") as file:
            is_archive = file.read(2) == b"PK"
        if is_archive and not is_whole_archive(path):
            raise pickle.UnpicklingError("a checksum is wrong")
        return torch.load(path, map_location=device, weights_only=True)
    except OSError as error:
        raise InputError(f"cannot open {path}: {error.strerror}; check the path") from error
    except UNREADABLE as error:
        if isinstance(error.__cause__, ImportError):
            raise InputError(f"{path} cannot be read without safetensors; pip install safetensors") from error
        raise_out_of_memory(error)
        raise InputError(
            f"{path} cannot be read as tensors: it is damaged, of another kind, or holds pickled code, which is "
            f"refused; {remedy}"
        ) from error


def read_state(path: Path, expected: Collection[str]) -> dict[str, Tensor]:
    """The state_dict in a file, without a prefix of its names that the `expected` ones do not have."""
    content = read_tensors(path)
    if isinstance(content, dict) and content.get("format") == PRUNED_FORMAT:
        raise InputError(f"{path} is a pruned network, not weights for a whole one; load it with load_pruned")
    for _ in range(NESTED):
        content = _kept_in(content)
    if not _is_state(content):
        raise InputError(f"{path} holds no state_dict; save it with torch.save(model.state_dict(), path)")
    if strange := [key for key, value in content.items() if not _is_dense(value)]:
        raise InputError(
            f"{path} holds {strange[0]} quantised, sparse or without values; save the weights of the float network instead"
        )
    state = {key.replace("_orig_mod.", ""): value for key, value in content.items()}  # of torch.compile, at any depth
    return _without_prefix(state, expected, path)


def _kept_in(content):
    """What a checkpoint keeps under one of the keys, or else its only state_dict; `content` where there is none."""
    if not isinstance(content, dict):
        return content
    known = [content[key] for key in STATE_KEYS if isinstance(content.get(key), dict)]
    states = [value for value in content.values() if _is_state(value)]
    return known[0] if known else states[0] if len(states) == 1 else content


def _is_state(content) -> bool:
    return isinstance(content, dict) and bool(content) and all(map(_is_entry, content.items()))


def _is_entry(item: tuple) -> bool:
    return isinstance(item[0], str) and isinstance(item[1], Tensor)


def _is_dense(value: Tensor) -> bool:
    float8 = value.is_floating_point() and value.element_size() == 1  # which goes with scales
    return value.layout == torch.strided and not (value.is_quantized or float8 or value.is_meta)


def _without_prefix(state: dict[str, Tensor], expected: Collection[str], path: Path) -> dict[str, Tensor]:
    """The tensors under the prefix whose removal gives most names in `expected`, by the names without it.

    Other tensors in the file (a loss's buffers, metrics) are left out where there is such a prefix. Raises InputError if
    two prefixes serve equally well, as those of a teacher and a student do.
    """
    found = Counter()
    for key in state:
        starts = [0, *(i + 1 for i, letter in enumerate(key) if letter == ".")]
        found.update(key[:start] for start in starts if key[start:] in expected)
    (prefix, count), (other, second) = (*found.most_common(2), ("", 0), ("", 0))[:2]
    if not prefix:
        return state
    if count == second:
        raise InputError(f"{path} holds two networks, {prefix}* and {other}*; save one of them alone")
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def copy_weights(model: nn.Module, state: dict[str, Tensor], source: str, head: str) -> bool:
    """Copies `state` into `model`, except a layer `head` for another number of classes; True if that stayed new.

    Raises InputError, naming the first tensors and `source`, if they do not fit or are not finite.
    """
    expected = model.state_dict()
    new, old = expected[f"{head}.weight"], state.get(f"{head}.weight")
    new_head = old is not None and old.shape[1:] == new.shape[1:] and len(old) != len(new)
    if new_head:
        for names in (expected, state):
            names.pop(f"{head}.weight")
            names.pop(f"{head}.bias", None)

    missing = [key for key in expected if key not in state and not key.endswith("num_batches_tracked")]
    wrong = {
        "missing": missing,
        "unexpected": [key for key in state if key not in expected],
        "of another shape": [key for key in expected if key in state and state[key].shape != expected[key].shape],
        # copying would round weights that were quantised to whole numbers
        "of another type": [key for key in expected if key in state and not _same_kind(state[key], expected[key])],
    }
    if any(wrong.values()):
        raise InputError(f"{source} is for another network: {first_names(wrong)}; check --model and --image-size")
    if name := nonfinite_tensor(state):
        raise InputError(f"{source} has NaN or infinite values in {name}; train it again or use other weights")
    if name := next((key for key, value in state.items() if key.endswith("running_var") and (value < 0).any()), None):
        raise InputError(f"{source} has negative variances in {name}; train it again or use other weights")
    for key, value in state.items():
        expected[key].copy_(value)
    return new_head


def _same_kind(value: Tensor, expected: Tensor) -> bool:
    return value.is_floating_point() or value.dtype == torch.bool or not expected.is_floating_point()


def load_own_weights(model: nn.Module, path: Path, remedy: str) -> None:
    """Loads a state_dict that an earlier run wrote of this very network.

    Raises InputError, ending in `remedy`, if the file cannot be read or is of another network.
    """
    content = read_tensors(path, next(model.parameters()).device, remedy)
    try:
        model.load_state_dict(content)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise_out_of_memory(error)
        raise InputError(f"{path} is of another network, as one for other classes; {remedy}") from error


def first_names(groups: dict[str, list[str]]) -> str:
    """What is wrong with which tensors: "2 missing (a, b); 5 unexpected (c, d, e, ...)"."""
    return "; ".join(
        f"{len(keys)} {kind} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
        for kind, keys in groups.items()
        if keys
    )
