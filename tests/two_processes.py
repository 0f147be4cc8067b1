"""A function in two processes of one gloo group, as torchrun starts them."""

import os
import pickle
import socket
from pathlib import Path

import torch
from killed_runs import PROCESSES, into_log

from taylor_pruning.distributed import end_distributed, init_distributed


def in_two_processes(function, folder):
    """What `function(folder)` returns in both of them. It is found by its name: it must be at the top of its file."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    variables = [{**group, "RANK": str(r), "LOCAL_RANK": str(r)} for r in range(2)]
    logs, found = ([Path(folder, f"{r}.{kind}") for r in range(2)] for kind in ("log", "pickle"))
    processes = [
        PROCESSES.Process(target=_body, args=(function, folder, *own))
        for own in zip(variables, logs, found, strict=True)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
        process.kill()  # one that waits for ever
        process.join()
    assert [p.exitcode for p in processes] == [0, 0], "\n".join(log.read_text(errors="replace") for log in logs)
    return [pickle.loads(file.read_bytes()) for file in found]


def _body(function, folder, variables, log, found):
    into_log(log)
    os.environ.update(variables)
    init_distributed(torch.device("cpu"))
    found.write_bytes(pickle.dumps(function(folder)))
    end_distributed()
