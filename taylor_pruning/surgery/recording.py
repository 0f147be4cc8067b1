"""Records the forward of a network on an example: how it is called, and in batches of which size it is traced."""

from contextlib import suppress
from functools import partial

import torch

from taylor_pruning.checks import describe
from taylor_pruning.errors import InputError
from taylor_pruning.modes import set_mode
from taylor_pruning.surgery.batch_size import LEAST, LEAST_OF_VALUES, batch_size, first_samples
from taylor_pruning.surgery.copying import copy_of
from taylor_pruning.surgery.lines import place_of
from taylor_pruning.surgery.nested import map_tensors, tensors_in
from taylor_pruning.surgery.operations import RULES
from taylor_pruning.surgery.recorder import TRACE_ERRORS
from taylor_pruning.surgery.tensor_nodes import Untraceable
from taylor_pruning.surgery.tracing import trace

MOST_BATCHES = 5  # in which a forward is recorded again


def inputs_of(example):
    """(args, kwargs) of the forward: a tensor or a list is its one argument, a tuple all of them, a dict named ones."""
    if isinstance(example, dict):
        return (), dict(example)
    return (tuple(example) if type(example) is tuple else (example,)), {}


def call(model, example):
    """The output of the model on inputs in the form of `example_input`."""
    args, kwargs = inputs_of(example)
    return model(*args, **kwargs)


def typical_tensor(model, otherwise):
    """The model's first floating-point parameter, whose type and device its inputs take; `otherwise` where it has none."""
    return next((p for p in model.parameters() if p.is_floating_point()), otherwise)


def record(model, example, training=False):
    """`Trace` of the model's forward on tensors of the example's shapes, in the type of the model's parameters.

    Raises InputError if the network cannot be traced, copied or run on the example, or returns no tensor.
    """
    args, kwargs = inputs_of(example)
    first = next(iter(tensors_in((args, kwargs))), None)
    like, given = typical_tensor(model, first), (args, kwargs)

    def batched(tensor, batch):
        if tensor.dim() and first.dim() and len(tensor) == len(first) > 0:
            tensor = tensor[:1].expand(batch, *tensor.shape[1:])
        return tensor.to(like) if tensor.is_floating_point() else tensor.to(like.device)

    def traced(least):
        rows = batch_size(model, given, max(least, LEAST))
        return trace(model, *map_tensors(given, partial(batched, batch=rows)), RULES.keys(), training, least)

    batch = batch_size(model, given)
    args, kwargs = map_tensors(given, partial(batched, batch=batch))
    try:
        found = _confirmed(traced(LEAST_OF_VALUES), traced)
    except InputError as error:
        cause = error.__cause__  # of the forward itself; else the message says already what to do
        if (
            cause is None
            or isinstance(cause, Untraceable)
            or not first.dim()
            or not _runs(model, inputs_of(example), training)
        ):
            raise
        mode = " in training mode" if training else ""
        if _runs(model, first_samples((args, kwargs), batch_size(model, (args, kwargs), LEAST_OF_VALUES)), training):
            raise InputError(
                f"{type(model).__name__} runs{mode}, but not while its calls are recorded on tensors that require gradients, "
                f"{place_of(cause)}; compute that by other functions of torch"
            ) from error
        raise InputError(
            f"{type(model).__name__} runs{mode} on {len(first)} samples, but not on {batch}, {place_of(cause)}; "
            f"{_remedy(example, first)}"
        ) from error
    if not any("shape" in node.meta for node in found.graph.output_node().args[0]):
        raise InputError(
            f"{type(model).__name__} returns {describe(found.output)} without a tensor that is seen in it; return tensors, "
            "alone or in tuples, lists, dicts or dataclasses"
        )
    return found


def _confirmed(found, traced):
    """The trace, if one in batches of another size takes the same plain numbers for multiples of the batch; else a later one.

    A size that `int()` has made a plain number may happen to be a multiple of one batch: it is none of the next.
    """
    for _ in range(MOST_BATCHES):
        if not found.multiples:
            break
        other = traced(found.batch + 1)
        if other.multiples == found.multiples:
            break
        found = other
    return found


def _remedy(example, first):
    """What to do where a network runs on the example, but not on another number of samples."""
    args, kwargs = inputs_of(example)
    for value in (*args, *kwargs.values()):
        if not tensors_in(value) and any(
            isinstance(held, torch.Tensor) for held in getattr(value, "__dict__", {}).values()
        ):
            return (
                f"give the tensors in {type(value).__name__}, which are not seen, in a tuple, list, dict or dataclass"
            )
    if len(first) == 1 and sum(t.dim() > 0 and len(t) == 1 for t in tensors_in(example)) > 1:
        return "give an example of two samples, by which inputs without a batch are told from those with one"
    return "make it take any number of samples, each by itself: no pairs of samples, no BatchNorm that splits the batch"


@torch.no_grad()
def _runs(model, inputs, training):
    """Whether a copy of the model runs on the inputs (args, kwargs)."""
    like = typical_tensor(model, torch.empty(0))
    args, kwargs = map_tensors(inputs, lambda t: t.to(like) if t.is_floating_point() else t)
    with suppress(*TRACE_ERRORS), torch.random.fork_rng(devices=[]):
        set_mode(copy_of(model), training)(*args, **kwargs)
        return True
    return False
