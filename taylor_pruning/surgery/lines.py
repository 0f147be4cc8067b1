"""The lines of a forward at which its calls stand, by which messages name what cannot be done."""

import linecache
import sys
import traceback
from pathlib import Path

import torch

HERE = str(Path(__file__).parent)
NO_LINES = (str(Path(torch.__file__).parent), HERE)  # of no forward
BEGIN = str(Path(HERE) / "tracing.py")  # calls the forward


def caller():
    """(file, number of the line) of the forward that calls what runs now; None if torch's own code alone does."""
    frame = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename != BEGIN:
        if not frame.f_code.co_filename.startswith(NO_LINES):
            return frame.f_code.co_filename, frame.f_lineno
        frame = frame.f_back
    return None


def note_line(error, node):
    """Notes on an error of a recorded call at which line of the forward the call stands."""
    while "line" not in node.meta and node.all_input_nodes:  # a size, or one of several results of a call
        node = node.all_input_nodes[0]
    if line := node.meta.get("line"):
        place = _place(*line, linecache.getline(*line).strip())
        error.__notes__ = [*getattr(error, "__notes__", ()), place]  # add_note is newer than Python 3.10


def place_of(error):
    """The line of the forward at which an error arose, and the error in one line."""
    noted = [note for note in getattr(error, "__notes__", ()) if note.startswith("at ")]
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(NO_LINES)]
    where = _place(frames[-1].filename, frames[-1].lineno, frames[-1].line) if frames else "at its forward"
    cause = str(error).strip().split("\n")[0] or type(error).__name__
    return f"{noted[-1] if noted else where} ({cause})"


def _place(file, number, code):
    return f'at {file}, line {number}: "{code}"'
