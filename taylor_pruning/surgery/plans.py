"""Plans of filters to remove: their check against the units of a network, and filters that no plan may name."""

import fnmatch
from collections.abc import Iterable

from taylor_pruning.errors import InputError
from taylor_pruning.options import has_type


def units_of(plan, units, layers):
    """The units that a plan removes, as sorted indices.

    Args:
        plan: {layer name: filter indices}, or an iterable of units.
        units, layers: of the ChannelGraph.

    Raises InputError if the plan names an unknown layer, a protected filter, a part of a unit, or what is no index.
    """
    if not isinstance(plan, Iterable):
        raise InputError(f"the plan is {plan!r}; give {{layer name: filter indices}}, or units of graph.units")
    if not isinstance(plan, dict):
        chosen = set(plan)
        if foreign := chosen.difference(units):
            raise InputError(f"{foreign.pop()} is no unit of this graph; take units from graph.units")
        return sorted(unit.index for unit in chosen)
    plan = {name: _whole_numbers(name, indices) for name, indices in plan.items()}
    chosen = set()
    for name, indices in plan.items():
        if name not in layers:
            raise InputError(f"the plan names {name}, which is not a prunable layer")
        unit_of = layers[name].unit_of.tolist()
        for index in indices:
            if not 0 <= index < len(unit_of) or unit_of[index] < 0:
                reason = layers[name].reason or "no such filter"
                raise InputError(f"filter {index} of {name} cannot be removed ({reason})")
            chosen.add(unit_of[index])
    for index in chosen:
        for name, filter_index in units[index].filters:
            if name in layers and filter_index not in plan.get(name, ()):
                raise InputError(
                    f"filter {filter_index} of {name} must go together with {units[index].filters[0]}; add it to the plan"
                )
    return sorted(chosen)


def _whole_numbers(name, indices):
    """The set of indices, also of NumPy and torch; a mask would read as the filters 0 and 1."""
    try:
        indices = {index.item() if hasattr(index, "item") else index for index in indices}
        whole = all(has_type(index, int) for index in indices)
    except (TypeError, ValueError, RuntimeError):  # nothing to iterate, or lists and tensors in it
        whole = False
    if not whole:
        raise InputError(
            f"the plan of {name} must be a list of filter indices, as [0, 3]; of a mask give where it is True"
        )
    return indices


def plan_of(indices, units, layers):
    """The plan {layer name: sorted filter indices} that removes the units of the given indices."""
    plan = {name: [] for name in layers}
    for index in indices:
        for name, filter_index in units[index].filters:
            plan[name].append(filter_index)
    return {name: sorted(filters) for name, filters in plan.items() if filters}


def exclude_filters(ids, layers, patterns):
    """Protects the filters of the layers whose names match; raises InputError if a pattern matches none.

    Args:
        ids: surgery.ids.ChannelIds. layers: surgery.layers.Layers.
    """
    if isinstance(patterns, str) or not isinstance(patterns, Iterable):
        raise InputError(f"exclude must be a list of names or patterns, not {patterns!r}")
    outputs = layers.settings | layers.filters
    for pattern in patterns:
        names = fnmatch.filter(outputs, pattern)
        if not names:
            raise InputError(f"--exclude {pattern} matches no layer; layers are: {', '.join(layers.filters)}")
        for name in names:
            ids.protect(outputs[name], f"excluded by {pattern}")
