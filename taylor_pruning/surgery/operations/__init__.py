"""What every operation does to channel ids: one registry, keyed by the operation's name, one file for each family."""

from taylor_pruning.surgery.operations import (  # noqa: F401
    elementwise,
    indexing,
    joins,
    layers,
    products,
    reductions,
    space,
    views,
)
from taylor_pruning.surgery.operations.registry import RULES, Call, Info

__all__ = ["RULES", "Call", "Info"]
