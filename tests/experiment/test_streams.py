"""What cannot be printed ends no run."""

import os
import sys
from pathlib import Path

import pytest
from tqdm import tqdm

from taylor_pruning.experiment.streams import lasting_streams, silent_half_made_bars


@pytest.mark.parametrize("kind", ["pipe", "full disk"])
def test_a_run_outlives_standard_output(kind, monkeypatch, capsys):
    if kind == "pipe":
        reader, writer = os.pipe()
        os.close(reader)
        place = writer
    elif not Path("/dev/full").exists():
        pytest.skip("needs Linux")
    else:
        place = "/dev/full"
    with open(place, "w") as output:  # closing would raise what was not written
        monkeypatch.setattr(sys, "stdout", output)
        with lasting_streams():
            for _ in range(3):
                print("x" * 100_000, flush=True)
            print("left in the buffer")
        assert sys.stdout is output
    error = capsys.readouterr().err
    reason = {"pipe": "Broken pipe", "full disk": "No space left on device"}[kind]
    assert error == f"standard output cannot be written ({reason}); the run goes on without it\n"


def test_what_is_left_in_the_buffer_at_the_end_raises_nothing(monkeypatch, capsys):
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as output:
        monkeypatch.setattr(sys, "stdout", output)
        with lasting_streams():
            print("short")
    assert "Broken pipe" in capsys.readouterr().err


def test_closed_streams_are_written_to_nowhere(monkeypatch):
    """Python has None for them."""
    monkeypatch.setattr(sys, "stderr", None)
    monkeypatch.setattr(sys, "stdout", None)
    with lasting_streams():
        print("result")
        print("error", file=sys.stderr)
        assert list(tqdm(range(3))) == [0, 1, 2]
        tqdm.write("epoch 1")


def test_letters_that_the_terminal_lacks_are_written_as_numbers(monkeypatch, tmp_path):
    with open(tmp_path / "out", "w", encoding="ascii") as output:
        monkeypatch.setattr(sys, "stdout", output)
        with lasting_streams():
            print("61 °C")
    assert (tmp_path / "out").read_text() == "61 \\xb0C\n"


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs Linux")
def test_no_descriptor_is_left_open(monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    before = len(os.listdir("/proc/self/fd"))
    with open(writer, "w") as output:
        monkeypatch.setattr(sys, "stdout", output)
        with lasting_streams():
            print("x" * 100_000, flush=True)
        assert len(os.listdir("/proc/self/fd")) == before


class Fails:
    def __del__(self):
        raise ValueError("of another object")


def test_a_bar_interrupted_as_it_is_made_says_nothing_more(monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    said = []

    def usual(failure):
        said.append(str(failure.exc_value))

    monkeypatch.setattr(sys, "unraisablehook", usual)
    monkeypatch.setattr(tqdm, "_get_free_pos", interrupted)
    with silent_half_made_bars():
        with pytest.raises(KeyboardInterrupt):
            tqdm(range(3))
        Fails()
    assert said == ["of another object"] and sys.unraisablehook is usual
