"""Several processes on one experiment: the few lines of torch.distributed that the toolkit needs.

    torchrun --nproc-per-node 4 run_single_experiment.py --model vgg16 ...

Without torchrun every function gives the answer of one process, so that callers need no second code path.
"""

import os
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist

from taylor_pruning.errors import InputError
from taylor_pruning.stored import stored

T = TypeVar("T")


def _number(name):
    text = os.environ.get(name, "1")
    if not text.isdecimal():
        raise InputError(f"{name} is {text!r}, which is no number; unset it, or start several processes with torchrun")
    return int(text)


def init_distributed(device: torch.device) -> torch.device:
    """Join the process group that torchrun's environment describes; return the device of this process.

    nccl on CUDA (the returned device is `cuda:LOCAL_RANK`, also made current), gloo elsewhere. Does nothing outside
    torchrun and with one process. Raises InputError if the environment is incomplete or wrong, or has more processes than GPUs.
    """
    if _number("WORLD_SIZE") < 2 or dist.is_initialized():
        return device
    missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise InputError(f"WORLD_SIZE is set but {', '.join(missing)} not; start several processes with torchrun")
    _number("RANK")
    local_rank = _number("LOCAL_RANK")
    if device.type != "cuda":
        dist.init_process_group("gloo")
        return device
    if local_rank >= torch.cuda.device_count():
        gpus = torch.cuda.device_count()
        raise InputError(f"process {local_rank} has no GPU of its own; start at most {gpus} processes per machine")
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    return device


def end_distributed() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """Index of this process, 0 without torch.distributed."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes, 1 without torch.distributed."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """True in the one process that writes files and prints."""
    return rank() == 0


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sum `tensor` over all processes, in place; returns it."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def gather_objects(value) -> list:
    """The `value` of every process, in order of rank."""
    values = [value]
    if world_size() > 1:
        values = [None] * world_size()
        dist.all_gather_object(values, value)
    return values


def barrier() -> None:
    """Wait until every process is here, so that what rank 0 has written is there for all."""
    if world_size() > 1:
        dist.barrier()


def broadcast_buffers(module: torch.nn.Module) -> None:
    """Give every process the buffers (BatchNorm statistics) of rank 0, in place."""
    if world_size() > 1:
        for buffer in module.buffers():
            dist.broadcast(buffer, src=0)


def broadcast_object(value):
    """The `value` of rank 0, in every process; tensors in it should be on the CPU."""
    values = [value]
    if world_size() > 1:
        dist.broadcast_object_list(values, src=0)
    return values[0]


def on_main(call: Callable[[], T]) -> T:
    """What rank 0 gets from `call`, in every process; the others wait, so that they do not disturb what it measures."""
    return broadcast_object(call() if is_main() else None)


def broadcast_state(module: torch.nn.Module) -> None:
    """Give every process the parameters and buffers of rank 0, in place. Raises InputError if their shapes differ."""
    if world_size() == 1:
        return
    check_equal_shapes(module)
    for tensor in stored(module).values():
        dist.broadcast(tensor, src=0)


def check_equal_shapes(module: torch.nn.Module) -> None:
    """Raise InputError, in every process, unless the parameters and buffers of `module` have the same shapes in all."""
    first, *others = gather_objects({name: tuple(tensor.shape) for name, tensor in stored(module).items()})
    for number, shapes in enumerate(others, 1):
        for name in sorted(first.keys() | shapes.keys()):
            if first.get(name) != shapes.get(name):
                raise InputError(
                    f"{name} has the shape {first.get(name)} in process 0 and {shapes.get(name)} in process {number}; "
                    "start all processes with the same network, data and settings"
                )
