"""A training that was broken off goes on with the same bits."""

import copy
import os
import signal

import pytest
import torch
from killed_runs import PROCESSES
from toys import RICH, raise_at, rich_run, states_equal, toy_model, without_seconds
from watching import with_flipped_bit

from taylor_pruning.errors import InputError
from taylor_pruning.training.checkpoint import check_same_loss, read_checkpoint
from taylor_pruning.training.epochs import Interrupted
from taylor_pruning.training.recipe import Recipe


@pytest.mark.parametrize("epoch", [1, 3])
def test_resume_after_an_exception_has_the_same_bits(tmp_path, epoch):
    unbroken, expected = rich_run()
    with pytest.raises(OSError):
        rich_run(tmp_path / "c.pt", on_batch=raise_at(epoch, 2, OSError("disk")))
    torch.manual_seed(99)  # the checkpoint, not the new process, decides the random numbers
    model, history = rich_run(tmp_path / "c.pt", resume=True, model=toy_model(seed=7))
    assert states_equal(model, unbroken)
    assert without_seconds(history) == without_seconds(expected)
    assert history.best_epoch == expected.best_epoch


def test_resume_of_a_finished_run_trains_nothing(tmp_path):
    model, expected = rich_run(tmp_path / "c.pt")
    again, history = rich_run(tmp_path / "c.pt", resume=True, model=toy_model(seed=7), on_batch=raise_at(1, 0, OSError))
    assert states_equal(model, again) and history == expected


def test_resume_without_a_file_starts_anew(tmp_path):
    unbroken, _ = rich_run()
    model, _ = rich_run(tmp_path / "c.pt", resume=True)
    assert states_equal(model, unbroken)


def killed_in_epoch_3(checkpoint):
    def kill(epoch, batch):
        if (epoch, batch) == (3, 2):
            os.kill(os.getpid(), signal.SIGKILL)

    rich_run(checkpoint, on_batch=kill)


def test_resume_after_sigkill_has_the_same_bits(tmp_path):
    process = PROCESSES.Process(target=killed_in_epoch_3, args=(tmp_path / "c.pt",))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    assert len(torch.load(tmp_path / "c.pt", weights_only=True)["history"]) == 3
    unbroken, expected = rich_run()
    model, history = rich_run(tmp_path / "c.pt", resume=True)
    assert states_equal(model, unbroken)
    assert without_seconds(history) == without_seconds(expected)


def test_another_recipe_or_network_is_refused(tmp_path):
    rich_run(tmp_path / "c.pt")
    with pytest.raises(InputError, match=r"lr \(0.05 there, 0.01 here\), temperature \(4.0 there, 2.0 here\)"):
        rich_run(tmp_path / "c.pt", resume=True, recipe=Recipe(**{**vars(RICH), "lr": 0.01, "temperature": 2.0}))
    model = toy_model(batchnorm=False)
    before = copy.deepcopy(model)
    with pytest.raises(InputError, match="shapes of the network"):
        rich_run(tmp_path / "c.pt", resume=True, model=model)
    assert states_equal(model, before)
    (tmp_path / "c.pt").write_bytes(b"something else")
    with pytest.raises(InputError, match="no training checkpoint"):
        rich_run(tmp_path / "c.pt", resume=True)


def test_interrupt_names_a_usable_checkpoint(tmp_path):
    unbroken, _ = rich_run()
    with pytest.raises(Interrupted, match=r"c\.pt holds epoch 2 of 4.*resume") as interrupted:
        rich_run(tmp_path / "c.pt", on_batch=raise_at(3, 1, KeyboardInterrupt))
    assert isinstance(interrupted.value, KeyboardInterrupt)
    model, _ = rich_run(interrupted.value.checkpoint, resume=True)
    assert states_equal(model, unbroken)
    with pytest.raises(Interrupted, match="no checkpoint") as interrupted:
        rich_run(on_batch=raise_at(3, 1, KeyboardInterrupt))
    assert interrupted.value.checkpoint is None


def test_interrupt_while_writing_leaves_the_previous_checkpoint(tmp_path, monkeypatch):
    unbroken, _ = rich_run()
    save, calls = torch.save, []

    def interrupted_save(state, file):
        calls.append(file)
        if len(calls) == 4:  # epochs 0, 1, 2 are written, 3 breaks off half-way
            file.write(b"half a file")
            raise KeyboardInterrupt
        save(state, file)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", interrupted_save)
        with pytest.raises(Interrupted, match="holds epoch 2 of 4"):
            rich_run(tmp_path / "c.pt")
    assert [path.name for path in tmp_path.iterdir()] == ["c.pt"]
    model, _ = rich_run(tmp_path / "c.pt", resume=True)
    assert states_equal(model, unbroken)


def test_a_flipped_bit_is_seen(tmp_path):
    """torch.load reads a damaged weight as another number."""
    file = tmp_path / "c.pt"
    rich_run(file)
    file.write_bytes(with_flipped_bit(file))
    with pytest.raises(InputError, match="damaged"):
        rich_run(file, resume=True)


class Marker:
    """Its unpickling would run code."""

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def test_a_file_of_something_else_is_refused_and_runs_no_code(tmp_path):
    file, hostile = tmp_path / "c.pt", Marker()
    hostile.folder = tmp_path / "made"
    for content in (torch.zeros(2), [1], {"model": {}}, {"identity": {}, "model": {}, "more": hostile}):
        torch.save(content, file)
        with pytest.raises(InputError, match="is no training checkpoint, or is damaged"):
            read_checkpoint(file, {}, {})
    assert not hostile.folder.exists()


def test_a_setting_that_older_files_lack_may_be_missing_and_not_differ(tmp_path):
    file = tmp_path / "c.pt"

    def read(**there):
        torch.save({"identity": there, "model": {}}, file)
        return read_checkpoint(file, {"lr": 0.1, "start": "a"}, {}, newer=["start"])

    assert read(lr=0.1)["identity"] == {"lr": 0.1}
    for there, named in (({"start": "a"}, "lr"), ({"lr": 0.1, "start": "b"}, "start")):
        with pytest.raises(InputError, match=f"another fine-tuning: {named} "):
            read(**there)


@pytest.mark.parametrize(("then", "now"), [(1.0, 1.005), (1e-6, 5e-6), (float("nan"), float("nan"))])
def test_losses_that_rounding_tells_apart_are_the_same(then, now):
    check_same_loss("the network", then, now)
    with pytest.raises(InputError, match="its forward or the data have changed"):
        check_same_loss("the network", then, 2.0)
