"""Options: one check of types and ranges, whoever asks."""

from dataclasses import dataclass

import pytest

from taylor_pruning.errors import InputError
from taylor_pruning.options import Option, check, flag, option, options, range_text, value_type


@dataclass(frozen=True)
class Example:
    rounds: int = option(5, "rounds", "more rounds", low=1)
    share: float = option(30.0, "share", "a larger share", low=0, high=100, open_low=True, open_high=True)
    momentum: float = option(0.9, "momentum", "more", low=0, high=1, open_high=True)
    size: int | None = option(None, "size", "smaller", low=1, default_text="native")
    kinds: tuple[str, ...] = option((), "kinds", "several", choices=("a", "b"))
    quiet: bool = option(False, "quiet", "for logs")
    layer_bound: float = option(1.03, "bound", "looser", low=1, flag="bound")
    apart: int = 0

    def __post_init__(self):
        check(self)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("rounds", 0, "rounds must be at least 1, not 0"),
        ("rounds", 2.5, "rounds must be a whole number, not 2.5"),
        ("rounds", True, "rounds must be a whole number, not True"),
        ("rounds", None, "rounds must be a whole number, not None"),
        ("share", 0, r"share must be between 0 and 100 \(both excluded\), not 0"),
        ("share", float("nan"), "share must be between"),
        ("share", "30", "share must be a number, not '30'"),
        ("momentum", 1, "momentum must be at least 0 and below 1, not 1"),
        ("size", 0, "size must be at least 1, not 0"),
        ("kinds", ("a", "c"), "kinds must be one of a, b, not 'c'"),
        ("kinds", "a", "kinds must be a list, not 'a'"),
        ("quiet", 1, "quiet must be True or False, not 1"),
        ("layer_bound", float("inf"), "layer_bound must be finite and at least 1, not inf"),
    ],
)
def test_values_outside_are_named(name, value, message):
    with pytest.raises(InputError, match=message):
        Example(**{name: value})


def test_values_inside_pass():
    Example(rounds=1, share=99, momentum=0, size=None, kinds=["a", "b"], quiet=True, layer_bound=1)


def test_fields_say_their_type_and_flag():
    fields = {f.name: f for f in options(Example)}
    assert "apart" not in fields and flag(fields["layer_bound"]) == "--bound" and flag(fields["size"]) == "--size"
    assert value_type(fields["size"]) == (int, False, True) and value_type(fields["kinds"]) == (str, True, False)
    texts = [range_text(Option("", "", **limits)) for limits in ({}, {"high": 2}, {"low": 0, "open_low": True})]
    assert texts == ["", "at most 2", "above 0"]
