"""Two processes against one."""

from pathlib import Path

import pytest
import torch
from toys import ListLoader, states_equal, toy_data, toy_model, without_seconds
from two_processes import in_two_processes

from taylor_pruning.distributed import init_distributed, is_main, rank, world_size
from taylor_pruning.errors import InputError
from taylor_pruning.training.evaluation import evaluate
from taylor_pruning.training.fine_tuning import fine_tune
from taylor_pruning.training.recipe import Recipe


def distributed_worker(folder):
    """Body of each process: one shard of the data in evaluate and in one training step."""
    assert world_size() == 2 and is_main() == (rank() == 0)
    images, labels = toy_data(images=24, dtype=torch.float64)
    model = toy_model(batchnorm=False, seed=rank()).double()  # rank 1 starts elsewhere and must be brought in line
    odd = slice(rank(), 23, 2)  # 12 and 11 images
    accuracy = evaluate(toy_model(batchnorm=False).double(), ListLoader(images[odd], labels[odd], 5), progress=False)
    shard = slice(rank(), None, 2)
    train = ListLoader(images[shard], labels[shard], 6)
    train.set_epoch = lambda epoch: None
    val = ListLoader(images[shard], labels[shard], 6)
    recipe = Recipe(epochs=1, lr=0.1, accumulate=2)
    history = fine_tune(model, train, val, recipe, checkpoint=Path(folder, "c.pt"), progress=False)
    resumed = toy_model(batchnorm=False, seed=9).double()
    again = fine_tune(resumed, train, val, recipe, checkpoint=Path(folder, "c.pt"), resume=True, progress=False)
    assert without_seconds(again) == without_seconds(history) and states_equal(model, resumed)
    return {"accuracy": vars(accuracy), "history": history.epochs, "state": model.state_dict()}


@pytest.mark.parametrize("name", ["WORLD_SIZE", "RANK", "LOCAL_RANK"])
def test_an_environment_that_is_no_number_is_named(name, monkeypatch):
    for variable in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(variable, "2")
    monkeypatch.setenv(name, "two")
    with pytest.raises(InputError, match=f"{name} is 'two', which is no number; unset it"):
        init_distributed(torch.device("cpu"))


def test_what_an_environment_of_one_process_says_is_not_read(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "-1")  # as training scripts set it
    assert init_distributed(torch.device("cpu")) == torch.device("cpu")


def test_two_processes_equal_one(tmp_path):
    first, second = in_two_processes(distributed_worker, tmp_path)
    images, labels = toy_data(images=24, dtype=torch.float64)
    model = toy_model(batchnorm=False).double()
    whole = evaluate(model, ListLoader(images[:23], labels[:23], 23), progress=False)
    assert first["accuracy"] == second["accuracy"] == pytest.approx(vars(whole), rel=1e-12)
    loader = ListLoader(images, labels, 24)
    history = fine_tune(model, loader, loader, Recipe(epochs=1, lr=0.1), progress=False)
    assert history.best_epoch == 1
    assert first["history"][1]["train_loss"] == pytest.approx(history.epochs[1]["train_loss"], rel=1e-12)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(first["state"][name], tensor, rtol=1e-10, atol=1e-12)
        assert torch.equal(first["state"][name], second["state"][name])
