"""The error for wrong input, which the user can correct."""


class InputError(ValueError):
    """Wrong input; the message says in one line what is wrong and what to do. The runners exit with code 2 on it."""


class OutOfReachError(InputError):
    """The layers cannot lose as much as is asked for."""


def one_of(name, value, allowed):
    """Raises InputError if the argument `name` has another value than the allowed ones."""
    if isinstance(value, bool) or value not in allowed:
        raise InputError(f"{name} must be one of {', '.join(map(str, allowed))}, not {value!r}")


def instance_of(name, value, kind):
    """Raises InputError if the argument `name` is no instance of a class."""
    if not isinstance(value, kind):
        raise InputError(f"{name} is of type {type(value).__name__}; give an instance of {kind.__name__}")
