"""Numbers the units of a network: which filters go together, which stay and why, and which tensors and numbers follow."""

import torch

from taylor_pruning.surgery.ids import ONE_CHANNEL, ChannelIds
from taylor_pruning.surgery.layers import Layers, kept_classes
from taylor_pruning.surgery.units import LayerInfo, Unit, group


class Numbering:
    """The units of one analysis.

    Args:
        ids, layers: of surgery.analysis.Analysis. prune_linear, prune_heads: see ChannelGraph.

    Attributes:
        units, layers, tensors: see ChannelGraph.
        unit_of_id: [ids] unit index or -1.
        widths, settings, places: see surgery.cut.cut.
        stuck: names of layers whose filters all go together, so that none of them may.
    """

    def __init__(self, ids: ChannelIds, layers: Layers, prune_linear: bool, prune_heads: bool):
        roots = ids.roots()
        classes = {name: roots[along] for name, along in layers.filters.items()}
        reason_of = self._reasons(ids, roots, kept_classes(ids, layers, roots, prune_linear, prune_heads))
        whole = {name: int(own[0]) for name, own in classes.items() if (own == own[0]).all()}
        self.stuck = {name for name, root in whole.items() if reason_of.get(root, ONE_CHANNEL) == ONE_CHANNEL}
        for name, root in whole.items():
            if reason_of.get(root) == ONE_CHANNEL and len(classes[name]) > 1:
                del reason_of[root]
            reason_of.setdefault(root, f"all filters of {name} go together")
        _keep_one(ids.tensors, roots, classes, reason_of)
        if not prune_linear and not prune_heads:  # those of linear layers that only go with filters of convs
            kept = {name for name in layers.linear if reason_of.keys() >= set(classes[name].tolist())}
            classes = {name: own for name, own in classes.items() if name not in kept}
        filters = [(name, index) for name, of_filter in classes.items() for index in range(len(of_filter))]
        members = group(filters, torch.cat([torch.zeros(0, dtype=torch.long), *classes.values()]))
        removable = [root for root in members if root not in reason_of]
        self.units = tuple(Unit(index, members[root]) for index, root in enumerate(removable))
        unit_of_root = torch.full((ids.count,), -1, dtype=torch.long)
        unit_of_root[torch.tensor(removable, dtype=torch.long)] = torch.arange(len(removable))
        self.unit_of_id = unit_of_root[roots]
        self._follow(ids, layers)
        self.layers = {}
        for name, of_filter in classes.items():
            units = self.unit_of_id[layers.filters[name]]
            protected = of_filter[units < 0].tolist()
            self.layers[name] = LayerInfo(len(units), units, reason_of[protected[0]] if protected else None)

    @staticmethod
    def _reasons(ids, roots, more):
        """{class: why it stays}; the first of several reasons counts."""
        reason_of = {}
        for some, reason in ids.reasons:
            for root in roots[some].unique().tolist():
                reason_of.setdefault(root, reason)
        for root, reason in more:
            reason_of.setdefault(root, reason)
        return reason_of

    def _follow(self, ids, layers):
        """Which tensors, numbers and settings shrink with which units."""
        self.tensors = {}
        for (name, dim), along in ids.tensors.items():
            units = self.unit_of_id[along]
            if dim < 2 or bool((units >= 0).any()):
                self.tensors[name, dim] = units
        self.widths = {
            width: (self.unit_of_id[uses[0][0]], uses[0][1])
            for width, uses in ids.widths.items()
            if bool((self.unit_of_id[uses[0][0]] >= 0).any())
        }
        self.places = {name: self.unit_of_id[along] for name, along in ids.indexed.items()}
        self.settings = {name: self.unit_of_id[along] for name, along in layers.settings.items()}

    @property
    def filters(self):
        """Number of filters that may go."""
        return sum(len(unit.filters) for unit in self.units)


def _keep_one(tensors, roots, classes, reason_of):
    """Protects a channel of every tensor that could lose all its channels although every layer keeps a filter.

    Plans leave every layer a filter. That keeps a channel of what reads all filters of a layer, but not of a parameter or
    buffer that runs along some of them.

    Args:
        tensors: of ChannelIds. roots: [ids] class of every id.
        classes: {layer: [filters] class}. reason_of: {class: why it stays}; what is protected here is added.
    """
    free = [own for of_filter in classes.values() if (own := set(of_filter.tolist())).isdisjoint(reason_of)]
    for (name, _), along in tensors.items():
        own = set(roots[along].tolist())
        if own.isdisjoint(reason_of) and not any(layer <= own for layer in free):
            reason_of[min(own)] = f"the last channel of {name}"
