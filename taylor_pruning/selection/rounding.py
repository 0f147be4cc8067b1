"""Widths that are multiples of a number, as near to the budget of a selection as they can be."""

from collections import Counter


def round_widths(selection, scores):
    """Removes more units, or gives some back, until cut layers have multiples of `round_to` and the budget is met best.

    Units that share all their layers form a cohort. A cohort whose layers also belong to other units (grouped or
    concatenated channels) stays as it is. Cohorts with the largest savings come first, so that smaller ones can make up
    for them. Units with the lowest `scores` are removed first, and those chosen last are given back first.
    """
    step, chosen = selection.constraints.round_to, set(selection.chosen)
    cut = [units for units in _cohorts(selection) if not chosen.isdisjoint(units)] if step > 1 else []
    cut.sort(key=lambda units: float(selection.savings(units[0])), reverse=True)
    widths = [_widths(selection, units, chosen) for units in cut]
    changes = [_nearest(selection, u, _to_multiples(step, *now)) for u, now in zip(cut, widths, strict=True)]
    while True:  # by further steps while these bring the total closer
        cohorts = zip(cut, widths, changes, strict=True)
        further = [_nearest(selection, u, _steps(step, *now, change)) for u, now, change in cohorts]
        if not any(further):
            break
        changes = [change + number for change, number in zip(changes, further, strict=True)]
    for units, change in zip(cut, changes, strict=True):
        if change > 0:
            chosen |= set(sorted((u for u in units if u not in chosen), key=lambda u: scores[u])[:change])
        elif change < 0:
            cohort = set(units)
            chosen -= set([u for u in selection.chosen if u in cohort][change:])
    selection.chosen = sorted(chosen)


def _widths(selection, units, chosen):
    """(filters that a layer of the cohort has left, how many it has to keep, how many it had)."""
    filters = selection.graph.layers[next(iter(selection.layer_counts[units[0]]))].filters
    left = filters - len(chosen.intersection(units))
    return left, max(selection.constraints.min_filters, 1, filters - len(units)), filters


def _to_multiples(step, width, least, filters):
    """How many more units of a cohort may go (less than none: come back) so that its width is a multiple of `round_to`."""
    possible = [number for number in (-(-width % step), width % step) if least <= width - number <= filters]
    return possible or [width - filters]  # no multiple is left between the least width and the whole one


def _steps(step, width, least, filters, change):
    """The possible further changes after `change`: none, or to the next multiple above or below."""
    width -= change
    return [0] + [number for number in (-step, step) if width % step == 0 and least <= width - number <= filters]


def _nearest(selection, units, numbers):
    """The one of `numbers` with which the budget is met best; the selection counts it as removed."""
    best = min(numbers, key=lambda number: abs(selection.missing_without(units[0], number)))
    selection.book(units[0], best)
    return best


def _cohorts(selection):
    """Lists of the units that share all their layers with each other and none with other units, one filter in each."""
    cohorts = {}
    for unit, counts in enumerate(selection.layer_counts):
        cohorts.setdefault(frozenset(counts.items()), []).append(unit)
    shared = Counter(name for key in cohorts for name, _ in key)
    return [units for key, units in cohorts.items() if all(n == 1 and shared[name] == 1 for name, n in key)]
