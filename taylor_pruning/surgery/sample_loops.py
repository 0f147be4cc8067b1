"""Notices calls that take a batch apart, sample by sample: their graph would hold for batches of the trace's size alone."""

from taylor_pruning.surgery.numbers import is_tracked

PARTS = set("unbind split chunk tensor_split split_with_sizes unsafe_split unsafe_chunk".split())


def takes_samples_apart(name, args, kwargs, result, batch):
    """Whether a call gives as many tensors as there are samples, or a last sample that was counted.

    Args:
        name: of the function of torch, args and kwargs what it was called with, result what it gave.
        batch: number of samples of the trace, a prime that divides no size of the network.
    """
    x = args[0] if args else None
    rows = x.shape[0] if getattr(x, "ndim", 0) else 0
    if not batch or not rows or rows % batch:
        return False
    if name == "__getitem__":
        first = args[1][0] if isinstance(args[1], tuple) and args[1] else args[1]
        return _is_last(first, rows)
    if name not in PARTS:
        return False
    more = [*args[1:], *kwargs.values()]
    dim = kwargs.get("dim", more[-1] if name == "unbind" and more else args[2] if len(args) > 2 else 0)
    by_literal = (
        "split" in name and more and isinstance(more[0], int) and not is_tracked(more[0]) and name != "tensor_split"
    )
    return int(dim) % x.ndim == 0 and (by_literal or len(result) >= batch)


def _is_last(index, rows):
    """Whether it is the last of the rows, by a number that range() or enumerate() may have given."""
    if isinstance(index, slice):
        bounds = index.start, index.stop
        return all(type(b) is int for b in bounds) and bounds[0] > 0 and bounds[1] == rows
    return type(index) is int and index == rows - 1 > 0
