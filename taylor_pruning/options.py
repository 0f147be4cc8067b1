"""One source for an option: a dataclass field that carries its type, range, default and help.

    @dataclass(frozen=True)
    class Settings:
        rounds: int = option(5, "score-and-prune rounds", "More rounds follow the loss more closely.", low=1)

        def __post_init__(self):
            check(self)                     # InputError: rounds must be at least 1, not 0

The command line, its help, config.json and docs/options.md are made from such fields (experiment.arguments).
"""

import dataclasses
import math
import numbers
import types
import typing
from dataclasses import dataclass, field

from taylor_pruning.errors import InputError


@dataclass(frozen=True)
class Option:
    """Properties of an option besides its name, type and default.

    help: what it sets, for `--help`. when: when it helps, in whole sentences, for docs/options.md.
    low, high: range of a number, ends included unless `open_low` or `open_high` is set.
    infinite: whether infinity is a value. choices: the allowed values. default_text: what a default of None stands for.
    flag: name on the command line, if it is not the field's. metavar: placeholder of its value there.
    needs: what it has no effect without, as on the command line: "--compensate", "--repair layer/network"; " or " stands
        between options of which one will do. What fine-tuning needs is left out: it is off only where --fine-tune-epochs 0
        says so.
    common: one of the few that `--help` shows first. command_line: False for an option that only Python has.
    """

    help: str
    when: str
    low: float | None = None
    high: float | None = None
    open_low: bool = False
    open_high: bool = False
    infinite: bool = False
    choices: tuple | None = None
    default_text: str | None = None
    flag: str | None = None
    metavar: str | None = None
    needs: tuple[str, ...] = ()
    common: bool = False
    command_line: bool = True


def option(default, help: str, when: str, **properties):
    """A dataclass field with the metadata of an Option."""
    return field(default=default, metadata={"option": Option(help, when, **properties)})


def options(settings) -> list[dataclasses.Field]:
    """The fields of a settings dataclass, or of an instance, that are options."""
    return [f for f in dataclasses.fields(settings) if "option" in f.metadata]


def option_name(field: dataclasses.Field) -> str:
    """Name of the option in config.json and, with `-` for `_`, on the command line."""
    return field.metadata["option"].flag or field.name


def flag(field: dataclasses.Field) -> str:
    """`--name` of the field on the command line."""
    return "--" + option_name(field).replace("_", "-")


def value_type(field: dataclasses.Field) -> tuple[type, bool, bool]:
    """Type of a value, whether there are several of them (a tuple), and whether None is allowed."""
    kind, optional = field.type, False
    if isinstance(kind, types.UnionType):
        optional = type(None) in typing.get_args(kind)
        (kind,) = (t for t in typing.get_args(kind) if t is not type(None))
    several = typing.get_origin(kind) is tuple
    return (typing.get_args(kind)[0] if several else kind), several, optional


def check(settings) -> None:
    """Raises InputError at the first field of `settings` whose value has the wrong type or lies outside its range.

    Values of NumPy become Python's: a checkpoint holds no others, and numbers of few bits overflow.
    """
    for f in options(settings):
        value = getattr(settings, f.name)
        _, several, optional = value_type(f)
        if value is None and optional:
            continue
        if several and not isinstance(value, (tuple, list)):
            raise InputError(f"{f.name} must be a list, not {value!r}")
        for item in value if several else [value]:
            if found := problem(f, item, repr(item)):
                raise InputError(f"{f.name} {found}")
        plain = tuple(map(python_value, value)) if several else python_value(value)
        object.__setattr__(settings, f.name, plain)  # settings are frozen


def python_value(value):
    """A number or text of NumPy as Python's; every other value as it is."""
    if isinstance(value, str):
        return str.__str__(value)  # str() of an enumeration gives its name
    if type(value) in (bool, int, float):
        return value
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def problem(field: dataclasses.Field, value, text: str) -> str | None:
    """What is wrong with one value of a field, as "must be at least 1, not 0"; None if it is right.

    text: the value as the message shows it.
    """
    about, (kind, *_) = field.metadata["option"], value_type(field)
    if not has_type(value, kind):
        return f"must be {NAMES[kind]}, not {text}"
    if value == "":
        return "is empty; give a value or leave the option out (a variable of the shell that is not set is empty)"
    if about.choices is not None and value not in about.choices:
        return f"must be one of {', '.join(map(str, about.choices))}, not {text}"
    if kind in (int, float) and not _in_range(about, value):
        finite = "finite and " if value == math.inf else ""
        return f"must be {finite}{range_text(about)}, not {text}"
    return None


def check_argument(name: str, value, kind: type, low: float | None = None) -> None:
    """Raises InputError if an argument of a call is of the wrong type or below `low`, as `check` does for settings."""
    if not has_type(value, kind):
        raise InputError(f"{name} must be {NAMES[kind]}, not {value!r}")
    if low is not None and value < low:
        raise InputError(f"{name} must be at least {low}, not {value!r}")


NAMES = {int: "a whole number", float: "a number", bool: "True or False", str: "text"}


def has_type(value, kind: type) -> bool:
    """Whether a value is of the type that an option has: numbers of NumPy are numbers, True and False are none."""
    kind = {float: numbers.Real, int: numbers.Integral}.get(kind, kind)  # those of NumPy too
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def _in_range(about: Option, value: float) -> bool:
    above = about.low is None or value > about.low or (value == about.low and not about.open_low)
    below = about.high is None or value < about.high or (value == about.high and not about.open_high)
    finite = isinstance(value, int) or math.isfinite(value)  # a whole number may be too large for a float
    return (finite or (about.infinite and value == math.inf)) and above and below


def _exact(end: float) -> str:
    return str(end) if isinstance(end, int) else f"{end:g}"


def range_text(about: Option) -> str:
    """The range of a number in words, as "at least 1"; "" where there is none."""
    if about.low is not None and about.high is not None and about.open_low == about.open_high:
        ends = "excluded" if about.open_low else "included"
        return f"between {_exact(about.low)} and {_exact(about.high)} (both {ends})"
    low = "" if about.low is None else f"{'above' if about.open_low else 'at least'} {_exact(about.low)}"
    high = "" if about.high is None else f"{'below' if about.open_high else 'at most'} {_exact(about.high)}"
    return " and ".join(filter(None, (low, high)))
