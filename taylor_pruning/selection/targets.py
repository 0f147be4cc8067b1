"""What must be left of a network: "50%" of its multiply-accumulates, parameters or time, or an amount ("150M", "5ms")."""

import re
from dataclasses import dataclass

from taylor_pruning.errors import InputError, one_of

KINDS = ("params", "macs", "latency")
COUNTS = {"": 1, "K": 1e3, "M": 1e6, "G": 1e9}
FEW = 100  # parameters or multiply-accumulates: such a number is meant as a share
TIMES = {"S": 1e3, "MS": 1, "US": 1e-3}  # milliseconds


@dataclass(frozen=True)
class Target:
    """How much of the network must be left.

    Attributes:
        kind: "params", "macs" or "latency".
        share: of what the dense network has, in (0, 1); or
        amount: absolute number, multiply-accumulates of one image, or milliseconds. Exactly one of both is given.
    """

    kind: str
    share: float | None = None
    amount: float | None = None

    def percentage(self, total):
        """Per cent to remove of the `total` that the dense network has.

        Raises:
            InputError: the network has no more than the target already.
        """
        if self.share is not None:
            return 100 * (1 - self.share)
        if not self.amount < total:
            unit = "ms" if self.kind == "latency" else self.kind
            raise InputError(
                f"the target of {self.amount:.4g} {unit} is not below the {total:.4g} that the network has; "
                "give a smaller target"
            )
        return 100 * (1 - self.amount / total)


def parse_target(kind, text):
    """The Target of "50%", of counts as "150M", "1.2G", "3e6" or such a number, of times as "5ms", "0.1s" or "300us".

    Raises:
        InputError: the text is none of these, or a share of 0 or 100 % and more, or a count below 100.
    """
    one_of("kind", kind, KINDS)
    units, example = (TIMES, "5ms or 0.1s") if kind == "latency" else (COUNTS, "150M or 1.2G")
    match = re.fullmatch(r"([0-9.]+(?:e[0-9]+)?)\s*(%|[a-z]*)", str(text).strip(), re.IGNORECASE)
    try:
        number, unit = float(match[1]), match[2].upper()
        factor = 1 if unit == "%" else units[unit]
    except (TypeError, ValueError, KeyError) as error:
        raise InputError(f"the target {text!r} is not understood; give what must be left as 50%, {example}") from error
    if unit == "%":
        if not 0 < number < 100:
            raise InputError(f"the target {text!r} must lie between 0% and 100% (both excluded)")
        return Target(kind, share=number / 100)
    if not number * factor >= FEW and kind != "latency":  # of no network that is worth pruning
        raise InputError(f"the target {text!r} is less than {FEW} {kind}; for a share write a per cent sign, as in 50%")
    if not number:
        raise InputError(f"the target {text!r} must be above 0")
    return Target(kind, amount=number * factor)
