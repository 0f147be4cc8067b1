"""Files whose content is not what was written."""

import pytest
import torch

from taylor_pruning.errors import InputError
from taylor_pruning.experiment.arguments import parse
from taylor_pruning.experiment.command import ExperimentTask
from taylor_pruning.experiment.models import weights_file
from taylor_pruning.experiment.run import results_folder
from taylor_pruning.files import atomic_file, cache_folder, is_whole_archive, user_path
from taylor_pruning.selection.latency_table import LatencyTable


def test_a_tilde_that_the_shell_leaves_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_path("~/x") == tmp_path / "x" and str(user_path("a~/x")) == "a~/x"
    assert results_folder(parse(ExperimentTask, "", ["--output-dir=~/runs"])) == tmp_path / "runs"
    assert weights_file("~/w.pt") == tmp_path / "w.pt"
    assert LatencyTable("~/times.json", "cpu", "1").path == tmp_path / "times.json"
    with pytest.raises(InputError, match="no home folder for ~; write ./~nobody-of-that-name"):
        user_path("~nobody-of-that-name")
    with pytest.raises(InputError, match="is no path: it holds a zero byte"):
        user_path("a\0b")


def test_ctrl_c_while_a_file_is_written_stays_ctrl_c(tmp_path):
    """torch.save raises RuntimeError, because it cannot end its archive."""
    (tmp_path / "kept.pt").write_text("as it was")

    class Interrupting:
        def __init__(self, file):
            self.file = file

        def write(self, content):
            if len(content) == 4000:
                raise KeyboardInterrupt
            return self.file.write(content)

    with pytest.raises(KeyboardInterrupt), atomic_file(tmp_path / "kept.pt") as file:
        torch.save(torch.zeros(1000), Interrupting(file))
    assert [path.name for path in tmp_path.iterdir()] == ["kept.pt"]
    assert (tmp_path / "kept.pt").read_text() == "as it was"


def test_an_error_that_is_none_of_the_disk_stays_what_it_is(tmp_path):
    with pytest.raises(RuntimeError, match="of another kind"), atomic_file(tmp_path / "file"):
        raise RuntimeError("of another kind")
    assert not list(tmp_path.iterdir())
    with pytest.raises(FileNotFoundError):
        is_whole_archive(tmp_path / "file")


def test_without_a_home_folder_there_is_no_cache(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", "cache")
    assert cache_folder() is None and not list(tmp_path.iterdir())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "enhanced-taylor-pruning"


@pytest.mark.parametrize("bit", (1, 128))
def test_a_flipped_bit_anywhere_changes_nothing_or_is_seen(tmp_path, bit):
    weight = torch.randn(16, 3)
    torch.save({"weight": weight, "count": 5}, tmp_path / "whole.pt")
    content, file, seen = (tmp_path / "whole.pt").read_bytes(), tmp_path / "flipped.pt", 0
    assert is_whole_archive(tmp_path / "whole.pt")
    for position in range(bit % 2, len(content), 2):
        file.write_bytes(content[:position] + bytes([content[position] ^ bit]) + content[position + 1 :])
        if is_whole_archive(file):  # padding, or what torch.load refuses
            try:
                state = torch.load(file, weights_only=True)
            except RuntimeError:
                continue
            assert torch.equal(state["weight"], weight) and state["count"] == 5
        else:
            seen += 1
    assert seen > weight.nbytes / 2
