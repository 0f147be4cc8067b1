"""The checkpoint of a training: written whole, refused by another training."""

import pickle
from collections.abc import Collection
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from taylor_pruning.errors import InputError
from taylor_pruning.files import atomic_file, is_whole_archive
from taylor_pruning.memory import raise_out_of_memory

SAME_LOSS = 0.01  # relative difference of two losses of one network, on two devices or in two precisions


def check_same_loss(which: str, then: float, now: float) -> None:
    """Raises InputError where `which` network that a checkpoint continues had another loss on the same data.

    A checkpoint holds weights; this shows whether the forward that they come back to, and the data, are the same too.
    """
    if not np.isclose(then, now, rtol=SAME_LOSS, atol=1e-4, equal_nan=True):
        raise InputError(
            f"{which} had a loss of {then:.4g} when the checkpoint was written, and has {now:.4g} now: its forward or the data "
            "have changed; undo that, or start again without resuming"
        )


def write_checkpoint(path: Path, state: dict) -> None:
    with atomic_file(path) as file:
        torch.save(state, file)


def read_identified(path: Path, device: str | torch.device, kind: str) -> dict:
    """The content of a checkpoint that says under "identity" what it is of. Raises InputError if it is no such `kind`."""
    problem = InputError(f"{path} is no {kind}, or is damaged; remove it, or start again without resuming")
    if not is_whole_archive(path):
        raise problem
    try:
        content = torch.load(path, map_location=device, weights_only=True)
    except (RuntimeError, pickle.UnpicklingError) as error:
        raise_out_of_memory(error)
        raise problem from error
    if not isinstance(content, dict) or "identity" not in content:
        raise problem
    return content


def read_checkpoint(path: Path, identity: dict, tensors: dict[str, Tensor], newer: Collection[str] = ()) -> dict:
    """The state in the file. Raises InputError if it is no checkpoint, or that of another recipe, loader or network.

    identity: {name: value} that the state's "identity" must have. newer: those names that checkpoints of older versions
    lack. tensors: the network's, whose shapes must be those of the state's "model".
    """
    state = read_identified(path, "cpu", "training checkpoint")
    there = state["identity"]
    differing = [
        f"{name} ({there.get(name)!r} there, {value!r} here)"
        for name, value in identity.items()
        if there.get(name) != value and (name in there or name not in newer)
    ]
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    if shapes != {name: tensor.shape for name, tensor in state["model"].items()}:
        differing.append("shapes of the network's tensors")
    if differing:
        raise InputError(
            f"{path} is of another fine-tuning: {', '.join(differing)}; "
            "give the same settings, or start again without resuming"
        )
    return state
