"""Costs of a network while units are removed from it, and what each further unit would save."""

import torch

from taylor_pruning.errors import InputError
from taylor_pruning.selection.latency_table import NetworkLatency
from taylor_pruning.surgery.graph import ChannelGraph


def units_along(graph: ChannelGraph, parameter: str, dim: int) -> torch.Tensor:
    """[length] unit index along a parameter's dimension, -1 for what always stays."""
    found = graph.tensors.get((parameter, dim))
    return torch.full((graph.model.get_parameter(parameter).shape[dim],), -1) if found is None else found


class Costs:
    """How many channels of every tensor dimension are there while units go; subclasses say what they cost.

    Args:
        dims: [dimensions] of ([length] unit index or -1).
        units: number of units.
    """

    def __init__(self, dims: list[torch.Tensor], units: int):
        self.alive = torch.tensor([float(len(unit_of)) for unit_of in dims], dtype=torch.float64)
        counts = [torch.bincount(unit_of[unit_of >= 0], minlength=units).float() for unit_of in dims]
        # Units that shrink the same dimensions by equally much save equally much: one column stands for all of them.
        self.counts, self.kind = torch.stack(counts).unique(dim=1, return_inverse=True)

    def total(self) -> float:
        """What the network costs now."""
        raise NotImplementedError

    def slopes(self) -> torch.Tensor:
        """[dimensions] what one channel less of each would save."""
        raise NotImplementedError

    def savings(self, units=slice(None)) -> torch.Tensor:
        """[units] what removing each unit alone would save, to first order in its counts."""
        return (self.slopes().float() @ self.counts)[self.kind[units]]

    def remove(self, unit: int, number: int = 1) -> None:
        """Takes out `number` units that shrink the same dimensions as this one; puts them back if it is negative."""
        self.alive -= number * self.counts[:, self.kind[unit]]


class CostModel(Costs):
    """Parameters or multiply-accumulates, `kind` "params" or "macs"."""

    def __init__(self, graph: ChannelGraph, kind: str):
        name = {"params": "parameters"}.get(kind, kind)
        terms = [(scale, term.dims) for term in graph.cost_terms() if (scale := getattr(term, name))]
        self.scale = torch.tensor([scale for scale, _ in terms], dtype=torch.float64)
        widest = max((len(own) for _, own in terms), default=0)
        # Entry 0, of one channel that stays, pads terms of fewer dimensions. Equal dimensions are counted once.
        dims, places = [torch.tensor([-1])], {}
        self.rows = torch.zeros(len(terms), widest, dtype=torch.long)
        for row, (_, own) in zip(self.rows, terms, strict=True):
            for d, unit_of in enumerate(own):
                key = unit_of.numpy().tobytes()
                if key not in places:
                    places[key] = len(dims)
                    dims.append(unit_of)
                row[d] = places[key]
        super().__init__(dims, len(graph.units))

    def total(self):
        return (self.scale * self.alive[self.rows].prod(1)).sum().item()

    def slopes(self):
        sizes = self.alive[self.rows]
        others = sizes.prod(1, keepdim=True) / sizes.clamp_min(1)
        return torch.zeros_like(self.alive).index_add_(0, self.rows.flatten(), (self.scale[:, None] * others).flatten())


class LatencyCosts(Costs):
    """Milliseconds of a network from the times of its layers.

    A slope is that of the next quarter of the layer's dense width, because measured times go down in steps.

    Args:
        graph: of the network that was timed or of one cut from it.
        latency: selection.latency_table.NetworkLatency.
    """

    def __init__(self, graph: ChannelGraph, latency: NetworkLatency):
        self.latency, dims = latency, []
        for layer in latency.layers:
            in_dim = 0 if self._is_transposed(graph, layer.weight) else 1
            dims += [units_along(graph, layer.weight, dim) for dim in (in_dim, 1 - in_dim)]
        super().__init__(dims, len(graph.units))
        self.elements = torch.tensor([float(layer.elements) for layer in latency.layers], dtype=torch.float64)
        self.points = torch.tensor([[_padded(layer.inputs), _padded(layer.outputs)] for layer in latency.layers],
                                   dtype=torch.float64)  # fmt: skip
        times = [self._times(layer) for layer in latency.layers]
        self.times = torch.stack(times).cummax(1).values.cummax(2).values  # a wider layer is not faster, but for noise

    @staticmethod
    def _is_transposed(graph, weight):
        module = graph.model.get_submodule(weight.rpartition(".")[0])
        return bool(getattr(module, "transposed", False))

    @staticmethod
    def _times(layer):
        """[5, 5] times of outputs x inputs; a width that cannot shrink has the same time everywhere."""
        times = torch.tensor(layer.milliseconds, dtype=torch.float64)
        for dim in (0, 1):
            missing = 5 - times.shape[dim]
            times = torch.cat([times.narrow(dim, 0, 1)] * missing + [times], dim)
        return times

    def _layer_times(self, inputs, outputs):
        """[layers] interpolated times at these widths [layers]; below the grid by the slope of its first cell."""
        found, corners = torch.zeros(len(inputs), dtype=torch.float64), []
        for side, widths in enumerate((inputs, outputs)):
            points = self.points[:, side].contiguous()
            upper = torch.searchsorted(points, widths[:, None].contiguous())[:, 0].clamp(1, points.shape[1] - 1)
            low, high = (points.gather(1, index[:, None])[:, 0] for index in (upper - 1, upper))
            corners.append((upper, (widths - low) / (high - low)))
        (right, x), (top, y) = corners
        rows = torch.arange(len(inputs))
        for out, wy in ((top - 1, 1 - y), (top, y)):
            for into, wx in ((right - 1, 1 - x), (right, x)):
                found += wy * wx * self.times[rows, out, into]
        return found.clamp_min(0)

    def parts(self) -> tuple[float, float]:
        """(sum of the layers' times, number of elements of their outputs) at the present widths."""
        inputs, outputs = self.alive[::2], self.alive[1::2]
        return self._layer_times(inputs, outputs).sum().item(), (self.elements * outputs).sum().item()

    def total(self):
        times, elements = self.parts()
        return self.latency.fixed + self.latency.scale * times + self.latency.each * elements

    def slopes(self):
        inputs, outputs = self.alive[::2], self.alive[1::2]
        now, slopes = self._layer_times(inputs, outputs), torch.zeros_like(self.alive)
        for side, widths in enumerate((inputs, outputs)):
            step = torch.minimum((self.points[:, side, -1] / 4).clamp_min(1), widths)
            less = self._layer_times(*((inputs - step, outputs) if side == 0 else (inputs, outputs - step)))
            slopes[side::2] = self.latency.scale * (now - less) / step.clamp_min(1)
        slopes[1::2] += self.latency.each * self.elements
        return slopes


def _padded(points: tuple[int, ...]) -> list[float]:
    """Five widths, ascending, of which the last ones are the points."""
    return [points[0] - float(k) for k in range(5 - len(points), 0, -1)] + [float(p) for p in points]


def cost_model(graph: ChannelGraph, constraints) -> Costs | None:
    """What a budget counts (selection.constraints.Constraints); None for filters. Raises InputError without times."""
    if constraints.budget == "filters":
        return None
    if constraints.budget != "latency":
        return CostModel(graph, constraints.budget)
    if constraints.times is None:
        raise InputError("a budget of latency needs measured times; give times=measure_latency(graph, example)")
    return LatencyCosts(graph, constraints.times)
