"""What must be left of a network: "50%" of its multiply-accumulates or parameters, or a number of them ("150M")."""

import re
from dataclasses import dataclass

from taylor_pruning.errors import InputError, one_of
from taylor_pruning.selection.costs import CostModel

KINDS = ("params", "macs")
FACTORS = {"": 1, "K": 1e3, "M": 1e6, "G": 1e9}


@dataclass(frozen=True)
class Target:
    """How much of the network must be left.

    Attributes:
        kind: "params" or "macs".
        share: of what the dense network has, in (0, 1); or
        amount: absolute number, multiply-accumulates of one image. Exactly one of both is given.
    """

    kind: str
    share: float | None = None
    amount: float | None = None

    def percentage(self, graph):
        """Per cent of the graph's parameters or multiply-accumulates to remove: the percentage of a budget of this kind.

        Raises:
            InputError: the network has no more than the target already.
        """
        if self.share is not None:
            return 100 * (1 - self.share)
        total = CostModel(graph, self.kind).total()
        if not self.amount < total:
            raise InputError(
                f"the target of {self.amount:.4g} {self.kind} is not below the {total:.4g} that the network has; "
                "give a smaller target"
            )
        return 100 * (1 - self.amount / total)


def parse_target(kind, text):
    """The Target of "50%", "150M", "1.2G", "3e6" or such a number.

    Raises:
        InputError: the text is none of these, or not above 0, or a share of 100 % and more.
    """
    one_of("kind", kind, KINDS)
    match = re.fullmatch(r"([0-9.]+(?:e[0-9]+)?)\s*([%KMG]?)", str(text).strip(), re.IGNORECASE)
    try:
        number, unit = float(match[1]), match[2].upper()
    except (TypeError, ValueError) as error:
        raise InputError(
            f"the target {text!r} is not understood; give what must be left as 50%, 150M or 1.2G"
        ) from error
    if unit == "%":
        if not 0 < number < 100:
            raise InputError(f"the target {text!r} must lie between 0% and 100% (both excluded)")
        return Target(kind, share=number / 100)
    if not number * FACTORS[unit] >= 1:
        raise InputError(f"the target {text!r} is less than one; give a share with a per cent sign, as in 50%")
    return Target(kind, amount=number * FACTORS[unit])
