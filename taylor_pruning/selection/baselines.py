"""Published criteria to compare with: one score a unit, low scores are removed first.

A unit has the sum over its filters, because what it saves counts all of them: a mean would make a channel of a residual
stream, which ends in many layers, look cheap for what it saves.
"""

import torch

from taylor_pruning.errors import InputError


def molchanov2017(graph, directions):
    """mean_n |phi_n|, l2-normalised per layer: |activation x gradient| of Molchanov et al. 2017 (arXiv:1611.06440).

    The mean over space in their eq. 8 differs from phi's sum by a factor a layer, which the normalisation removes.
    """
    score = directions.moments(order=1)[0].double().abs().mean(0).cpu()
    return _by_layer(graph, score, lambda values: values / values.norm().clamp_min(torch.finfo(values.dtype).tiny))


def molchanov2019(graph, directions):
    """mean_n phi_n^2: the gate criterion of Molchanov et al. 2019 (arXiv:1906.10771), eq. 8, with one gate a unit."""
    return directions.moments(order=1)[0].double().square().mean(0).cpu()


def magnitude(graph):
    """L2 norm of the filter's weights (Li et al. 2017, arXiv:1608.08710, with L2) over its layer's mean."""

    def score(weights):
        norms = weights.norm(dim=1)
        return norms / norms.mean().clamp_min(torch.finfo(norms.dtype).tiny)

    return _of_weights(graph, score)


def lamp(graph):
    """Squared norm of the filter's weights over the sum of those of its layer that are as large or larger.

    LAMP (Lee et al. 2021, arXiv:2010.07611, eq. 4), which compares weights of different layers, with filters in the place
    of weights.
    """

    def score(weights):
        squares, order = weights.square().sum(1).sort(descending=True)
        scores = torch.empty_like(squares)
        scores[order] = squares / squares.cumsum(0).clamp_min(torch.finfo(squares.dtype).tiny)
        return scores

    return _of_weights(graph, score)


def fpgm(graph):
    """Sum of the distances to the layer's other filters (He et al. 2019, arXiv:1811.00250, eq. 4) over its layer's mean."""

    def score(weights):
        distances = torch.cdist(weights, weights).sum(1)
        return distances / distances.mean().clamp_min(torch.finfo(distances.dtype).tiny)

    return _of_weights(graph, score)


OF_GRADIENTS = {f.__name__: f for f in (molchanov2017, molchanov2019)}  # f(graph, scoring.taylor.Directions on it)
OF_WEIGHTS = {f.__name__: f for f in (magnitude, lamp, fpgm)}  # f(graph)
BASELINES = (*OF_GRADIENTS, *OF_WEIGHTS, "random")


def baseline_scores(name, graph, directions=None, seed=0):
    """[units] scores of the baseline `name`, float64; those of "random" are uniform and follow from the seed alone.

    Args:
        directions: scoring.taylor.Directions on the graph, for a criterion of gradients.

    Raises:
        InputError: there is no such baseline, or it needs directions and there are none.
    """
    if name in OF_WEIGHTS:
        return OF_WEIGHTS[name](graph)
    if name == "random":
        return torch.rand(len(graph.units), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    if name not in OF_GRADIENTS:
        raise InputError(f"unknown baseline {name}; choose from {', '.join(BASELINES)}")
    if directions is None:
        raise InputError(f"the criterion {name} needs class logits; take one of weights, as magnitude")
    return OF_GRADIENTS[name](graph, directions)


def _of_weights(graph, score):
    """[units] sum over a unit's filters of `score`, which maps a layer's weights [filters, ...] to [filters] values.

    Raises InputError if a layer has no such weights.
    """
    total = torch.zeros(len(graph.units), dtype=torch.float64)
    for name, weight in graph.filter_weights().items():
        if weight is None:
            raise InputError(
                f"a criterion of weights needs a weight of {name} that the network computes from its parameters, with a "
                f"dimension for the filters; take a Taylor order, {' or '.join(OF_GRADIENTS)}, or exclude {name}"
            )
        info = graph.layers[name]
        scores = score(weight.detach().double().cpu().reshape(len(weight), -1))
        total.index_add_(0, info.unit_of[info.removable], scores[info.removable])
    return total


def _by_layer(graph, scores, normalise):
    result = torch.empty_like(scores)
    groups = {}
    for unit in graph.units:
        groups.setdefault(unit.filters[0][0], []).append(unit.index)
    for indices in groups.values():
        result[indices] = normalise(scores[indices])
    return result
