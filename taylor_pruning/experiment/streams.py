"""Standard output and error that a run outlives: closed ones, a pipe whose reader has gone, a full disk; what Python adds.

with lasting_streams(), silent_half_made_bars():
    print("...")            # never raises OSError
"""

import contextlib
import io
import os
import sys
from collections.abc import Callable
from typing import TextIO

from tqdm import tqdm


@contextlib.contextmanager
def lasting_streams():
    """Within the block, what cannot be printed is dropped; where standard output fails, standard error says so once.

    The results of hours are in files. They must not depend on whether a terminal or `head` still reads along.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass  # it takes the place of a closed one, or the next file of the run would get what is printed
    os.close(descriptor)

    def tell(error: OSError):
        print(f"standard output cannot be written ({error.strerror}); the run goes on without it", file=sys.stderr)

    with (
        contextlib.redirect_stderr(LastingStream(sys.stderr)),
        contextlib.redirect_stdout(LastingStream(sys.stdout, tell)) as output,
    ):
        try:
            yield
        finally:
            output.flush()  # what is left would otherwise fail at the end of the process


@contextlib.contextmanager
def silent_half_made_bars():
    """Within the block, a bar whose making was interrupted is deleted without the traceback that Python prints then."""
    usual = sys.unraisablehook

    def unless_of_a_bar(failure):
        if failure.object is not tqdm.__del__:
            usual(failure)

    sys.unraisablehook = unless_of_a_bar
    try:
        yield
    finally:
        sys.unraisablehook = usual


class LastingStream:
    """A text stream in which failed writes end nothing: from the first one on, what is written is dropped.

    Args:
        stream: to write to; None, as Python has for a closed one: nothing is written.
        failed: called once, with the first error.
    """

    def __init__(self, stream: TextIO | None, failed: Callable[[OSError], None] = lambda error: None):
        self._stream, self._failed = stream or open(os.devnull, "w"), failed  # noqa: SIM115, it lasts as the process does
        if isinstance(stream, io.TextIOWrapper):  # a character that the terminal cannot encode must not end a run
            stream.reconfigure(errors="backslashreplace")

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
        except OSError as error:
            self._drop(error)
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._drop(error)

    def _drop(self, error: OSError) -> None:
        """Leads the descriptor to nowhere, for the stream keeps what it could not write and tries again later."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)
        self._failed(error)

    def __getattr__(self, name: str):
        return getattr(self._stream, name)
