"""The state between two pruning rounds on disk: the run that it belongs to, what was removed so far, and the records."""

import dataclasses
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from taylor_pruning.errors import InputError
from taylor_pruning.experiment.results import removed
from taylor_pruning.files import atomic_file
from taylor_pruning.stored import restore, stored
from taylor_pruning.surgery.graph import ChannelGraph
from taylor_pruning.surgery.nested import tensors_in
from taylor_pruning.training.checkpoint import read_identified


@dataclass
class RoundsState:
    """The network between two rounds, and the records of the rounds so far.

    Attributes:
        model: the network after the last round, repaired and trained as the settings say.
        kept: {layer: indices of the kept filters in the dense network}.
        rounds: one record a round, see results.json.
        seconds: {step: seconds}, summed over the rounds.
        losses: {loss: nats} of `model` on the calibration images, None where they were not measured.
        ranking: what the first round's pass over the dense network gave: scores, criterion, curvature, flow.
        stopped: why the rounds ended before the percentage was reached, see results.json; None where they did not.
        repair: what the repair across layers did and found, see results.json; None before it, or without it.
    """

    model: nn.Module
    kept: dict
    rounds: list = field(default_factory=list)
    seconds: dict = field(default_factory=dict)
    losses: dict | None = None
    ranking: dict = field(default_factory=dict)
    repair: dict | None = None
    stopped: dict | None = None


class RoundsCheckpoint:
    """A file that holds a `RoundsState`, written after every round and read only by a run with the same settings.

    Args:
        path: the file.
        graph: of the dense network.
        images: {purpose: list of batches (images, labels)}.
        settings: {name: plain value} of all else that the rounds depend on.
    """

    def __init__(self, path: Path | str, graph: ChannelGraph, images: dict, settings: dict):
        self.path, self.graph = Path(path), graph
        self.identity = {
            "the dense network": fingerprint_of(graph),
            **{
                f"the {what} images": fingerprint(x for batch in batches for x in tensors_in(batch))
                for what, batches in images.items()
            },
            **settings,
        }

    def save(self, state: RoundsState) -> None:
        content = {f.name: getattr(state, f.name) for f in dataclasses.fields(state)}
        content |= {"model": stored(state.model), "identity": self.identity}
        with atomic_file(self.path) as file:
            torch.save(content, file)

    def load(self) -> RoundsState | None:
        """The state in the file, on the dense network's device; None where there is no file.

        Raises:
            InputError: the file is no such checkpoint, or is of another pruning; the message names what differs.
        """
        if not self.path.exists():
            return None
        device = next(self.graph.model.parameters()).device
        content = read_identified(self.path, device, "checkpoint of pruning rounds")
        then = content.pop("identity")
        names = [n for n in self.identity.keys() | then.keys() if then.get(n) != self.identity.get(n)]
        if names:
            changes = ", ".join(f"{n} was {then.get(n)}, is {self.identity.get(n)}" for n in sorted(names))
            raise InputError(
                f"{self.path} is of another pruning: {changes}; give the same settings, or start again without resuming"
            )
        model = self.graph.remove(removed(self.graph, content["kept"]))
        restore(model, content["model"])
        return RoundsState(**content | {"model": model})


def fingerprint_of(graph: ChannelGraph) -> str:
    """The fingerprint of the weights of the graph's network, without what its forward writes."""
    return fingerprint(tensor for name, tensor in stored(graph.model).items() if name not in graph.written)


def fingerprint(tensors: Iterable[Tensor]) -> str:
    """Twelve hexadecimal digits of the SHA-256 of the tensors' shapes, types and bytes."""
    digest = hashlib.sha256()
    for tensor in tensors:
        tensor = tensor.detach().cpu().contiguous()
        digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:12]
