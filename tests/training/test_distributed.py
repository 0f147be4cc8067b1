"""Two processes against one."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from toys import ListLoader, states_equal, toy_data, toy_model, without_seconds

from taylor_pruning.training.evaluation import evaluate
from taylor_pruning.training.fine_tuning import fine_tune
from taylor_pruning.training.recipe import Recipe

ROOT = Path(__file__).parents[2]


def distributed_worker(folder):
    """Body of one gloo process: one shard of the data in evaluate and in one training step."""
    from taylor_pruning.distributed import end_distributed, init_distributed, is_main, rank, world_size

    init_distributed(torch.device("cpu"))
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
    torch.save(
        {"accuracy": vars(accuracy), "history": history.epochs, "state": model.state_dict()}, f"{folder}/{rank()}.pt"
    )
    end_distributed()


def test_two_processes_equal_one(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = (
        f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests' / 'training')!r}]\n"
        f"from test_distributed import distributed_worker; distributed_worker({str(tmp_path)!r})"
    )
    base = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env={**base, "RANK": str(r), "LOCAL_RANK": str(r), "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for r in range(2)
    ]
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(errors)
    first, second = (torch.load(tmp_path / f"{r}.pt", weights_only=True) for r in range(2))

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
