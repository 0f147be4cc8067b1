"""Refuses networks whose copies reach back into them, because a lambda or a hook has captured the network itself."""

from contextlib import contextmanager
from copy import copy

from torch import nn

from taylor_pruning.errors import InputError
from taylor_pruning.kept_state import attributes_of, changed, containers, fill


def captured_call(name: str) -> InputError:
    """The error on a copy that calls the module `name` of the network from which it was copied."""
    return InputError(
        f"the forward calls module {name or 'of the whole network'} through a lambda or hook that has captured the network, so "
        "that a copy of it would run the layers of the original; use a bound method instead of a lambda that captures the "
        "network, and in a hook the module that it is given"
    )


@contextmanager
def untouched(model: nn.Module):
    """While open, copies of the model run; what they have written into attributes of the model itself is undone.

    Raises InputError if there was anything to undo.
    """
    before = attributes_of(model)
    contents = [(container, copy(container)) for module in model.modules() for container in containers(vars(module))]
    try:
        yield
    finally:
        if written := changed(before, attributes_of(model)):
            for container, content in contents:
                fill(container, content)
            raise InputError(
                f"a lambda or hook that has captured the network writes to its attribute {written[0]}, so that a copy of it "
                "would write into the original; use a bound method instead, and in a hook the module that it is given"
            )
