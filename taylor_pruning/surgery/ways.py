"""Which way to cut is taken where several ways keep a network exact."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Ways:
    """One choice for every place of a network.

    Attributes:
        heads: where a view splits channels into heads, whole heads are units; else the channels inside all heads.
        groups: names of modules whose grouped convs lose whole groups; all others lose the same filters of every group.
    """

    heads: bool = False
    groups: frozenset = frozenset()
