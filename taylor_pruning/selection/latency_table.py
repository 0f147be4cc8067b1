"""Measured times: of the layers of one network, and a file of them for every device.

The file holds {device: {number format and torch version: {layer: {"inputs x outputs": milliseconds}}}}, and in the place of a
layer also whole networks, by a hash of their operations and widths: {"whole": milliseconds}.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from taylor_pruning.errors import InputError
from taylor_pruning.files import atomic_path, user_path

A_DAY = 24 * 3600e3  # milliseconds, which no layer takes


@dataclass(frozen=True)
class LayerTimes:
    """Times of one call of a layer.

    Attributes:
        weight: name of its weight. inputs, outputs: widths of the grid, ascending; a width that cannot shrink is alone.
        milliseconds: [outputs][inputs]. elements: of its output, for one output channel.
    """

    weight: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    milliseconds: tuple[tuple[float, ...], ...]
    elements: int


@dataclass(frozen=True)
class NetworkLatency:
    """Times of a network's layers, and how they and the elements make up the network's time (see selection.latency).

    `table` is the file in which measured times are kept, None where there is none.
    """

    layers: tuple[LayerTimes, ...]
    fixed: float
    scale: float
    each: float
    batch_size: int
    device: str
    table: Path | None = None


class LatencyTable:
    """Times of one device by (layer, inputs, outputs) or (network, "whole"); what a file holds of other devices stays in it.

    Args:
        path: of the file; None: nothing is kept. device, version: under which the times stand.

    Raises:
        InputError: the file is no such table.
    """

    def __init__(self, path: str | Path | None, device: str, version: str):
        self.path, self.place = None if path is None else user_path(path), (device, version)
        self.times: dict[str, dict[str, float]] = self._at(self._read())

    def _read(self):
        if self.path is None or not self.path.exists():
            return {}
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
            for widths in (w for v in content.values() for layers in v.values() for w in layers.values()):
                if not all(isinstance(time, float) and 0 < time < A_DAY for time in widths.values()):
                    raise ValueError("a time is not a number of milliseconds")
        except OSError as error:
            raise InputError(f"cannot read the latency table {self.path}: {error.strerror}; check the path") from error
        except (ValueError, AttributeError) as error:
            raise InputError(f"{self.path} is not a latency table ({error}); remove it or give another file") from error
        return content

    def _at(self, content):
        device, version = self.place
        return content.setdefault(device, {}).setdefault(version, {})

    def __contains__(self, key: tuple) -> bool:
        name, *sizes = key
        return _text(sizes) in self.times.get(name, {})

    def __getitem__(self, key: tuple) -> float:
        name, *sizes = key
        return self.times[name][_text(sizes)]

    def update(self, times: Iterable[tuple[tuple, float]]) -> None:
        """Adds (key, milliseconds), and all new times to the file, whole or not at all.

        Times that another process has added to the file meanwhile stay.
        """
        new: dict[str, dict[str, float]] = {}
        for (name, *sizes), milliseconds in times:
            new.setdefault(name, {})[_text(sizes)] = milliseconds
        if not new:
            return
        _merge(self.times, new)
        if self.path is None:
            return
        content = self._read()
        _merge(self._at(content), self.times)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(self.path) as temporary:
            temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _merge(times: dict, new: dict) -> None:
    for name, of_sizes in new.items():
        times[name] = times.get(name, {}) | of_sizes


def _text(sizes: list) -> str:
    return "x".join(map(str, sizes))
