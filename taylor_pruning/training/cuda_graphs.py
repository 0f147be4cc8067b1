"""Forward and backward of a training step as a CUDA graph: one launch instead of hundreds.

A small network's kernels take less time than the host needs to launch them one by one: eager steps of a VGG-16 with 5 % of
its multiply-accumulates take as long as those of one with 30 %. A graph is recorded once a batch shape, and replayed on
copies of later batches (https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs).
"""

import random
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from taylor_pruning.memory import free_bytes

EAGER_PASSES = 3  # of every batch shape before its graph is recorded; the last of them is watched
SHAPES = 2  # an epoch has two batch sizes at most, where its images are spread evenly
MEMORY_SHARE = 0.25  # of the free memory, above which a pass is not recorded: its graph would hold on to all of it


class GraphedPass:
    """`run(images, labels, where) -> facts`, which adds to the gradients of `model`; replayed where that gives the same.

    A batch shape begins with eager passes, which train as all others do. Its graph is recorded unless the last of them
    waited for the device, changed a plain attribute of a module, drew random numbers on the host (all of which a replay
    would not do again), or needs more than a quarter of the free memory; and never where a module has hooks, which
    may do anything. `refusal` says which of these it was, and all passes are eager from then on.

    Args:
        teacher: another network that `run` calls, without gradients.
    """

    def __init__(
        self, model: nn.Module, run: Callable[[Tensor, Tensor, str], Tensor], teacher: nn.Module | None = None
    ):
        self.model, self.run = model, run
        self.networks = [network for network in (model, teacher) if network is not None]
        self.device = next(model.parameters()).device
        self.stream = torch.cuda.Stream(self.device)
        self.refusal = "a module has hooks" if any(map(_has_hooks, self.networks)) else None
        self._passes: Counter = Counter()
        self._graphs: dict[tuple, _Graph] = {}

    def __call__(self, images: Tensor, labels: Tensor, where: str) -> Tensor:
        shape = (images.shape, images.dtype, labels.shape, labels.dtype)
        if shape in self._graphs:
            return self._graphs[shape].replay(images, labels)
        if self.refusal or len(self._graphs) == SHAPES:
            return self.run(images, labels, where)
        self._passes[shape] += 1
        if self._passes[shape] < EAGER_PASSES:
            return self.run(images, labels, where)
        if self._passes[shape] == EAGER_PASSES:
            return self._watched(images, labels, where)
        self._graphs[shape] = _Graph(self.model, self.run, images, labels, self.stream)
        return self._graphs[shape].replay(images, labels)

    def _watched(self, images: Tensor, labels: Tensor, where: str) -> Tensor:
        """An eager pass on the stream of the recording, as that needs; sets `refusal` if it could not be replayed."""
        current, before = torch.cuda.current_stream(self.device), [*map(_host_state, self.networks)]
        allocated = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream), _synchronisations() as found:
            facts = self.run(images, labels, where)
        current.wait_stream(self.stream)
        needed = torch.cuda.max_memory_allocated(self.device) - allocated
        if found:
            self.refusal = "it waits for the device"
        elif [*map(_host_state, self.networks)] != before:
            self.refusal = "it changes attributes of modules or draws random numbers on the host"
        elif needed > MEMORY_SHARE * free_bytes(self.device):
            self.refusal = "its graph would need too much memory"
        return facts


class _Graph:
    """One recorded pass, for batches of the shape of `images` and `labels`."""

    def __init__(self, model: nn.Module, run: Callable, images: Tensor, labels: Tensor, stream: torch.cuda.Stream):
        self.images, self.labels = images.clone(), labels.clone()
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for parameter in self.parameters:
            parameter.grad = None  # so that the recorded backward writes gradients instead of adding to them
        self.graph = torch.cuda.CUDAGraph()
        # thread_local: a DataLoader's thread may pin memory meanwhile.
        with torch.cuda.graph(self.graph, stream=stream, capture_error_mode="thread_local"):
            self.facts = run(self.images, self.labels, "the recorded batch")
        self.gradients = [parameter.grad for parameter in self.parameters]

    def replay(self, images: Tensor, labels: Tensor) -> Tensor:
        """The pass on another batch: sets every parameter's gradient and returns the facts, a copy."""
        self.images.copy_(images, non_blocking=True)
        self.labels.copy_(labels, non_blocking=True)
        self.graph.replay()
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            parameter.grad = gradient
        return self.facts.clone()


@contextmanager
def _synchronisations() -> Iterator[list[str]]:
    """Collects the messages of operations inside that make the host wait for the device."""
    found, mode = [], torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield found
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    found += [text for text in (str(warning.message) for warning in caught) if "synchronizing CUDA operation" in text]


def _host_state(model: nn.Module) -> tuple:
    """What a pass may change on the host: plain attributes of modules, random generators."""
    plain = (bool, int, float, str, type(None))
    attributes = {
        (name, key): repr(value)
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, plain)
    }
    numpy_state = np.random.get_state()
    return attributes, random.getstate(), numpy_state[1].tolist(), numpy_state[2:], torch.get_rng_state().tolist()


def _has_hooks(model: nn.Module) -> bool:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, kind) for module in model.modules() for kind in kinds)
