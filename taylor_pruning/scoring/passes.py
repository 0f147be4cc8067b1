"""A pass over the calibration images: every process takes its share of the batches, in parts that fit into memory."""

import itertools
from collections.abc import Callable, Sequence

from tqdm import tqdm

from taylor_pruning.distributed import gather_objects, is_main, rank, world_size
from taylor_pruning.memory import Portions
from taylor_pruning.surgery.nested import map_tensors
from taylor_pruning.tasks.batches import size
from taylor_pruning.tasks.portions import in_portions


def over_batches(
    work: Callable, batches: Sequence, portions: Portions, *, first: int = 0, progress: bool = True
) -> list:
    """[work(part of a batch, what messages call the batch, number of samples before the part)], in the order of the samples.

    Under torch.distributed all processes get all results, as they come from the CPU where there are several.

    Args:
        work: its results are tensors in nested structures.
        first: samples that come before the batches, for random draws.
    """
    firsts = itertools.accumulate(map(size, batches), initial=first)
    mine = list(zip(itertools.count(), firsts, batches, strict=False))[rank() :: world_size()]
    bar = tqdm(mine, desc="score", leave=False, disable=not progress or not is_main())
    return _of_all_processes([(number, _of_batch(work, portions, number, *batch)) for number, *batch in bar])


def _of_batch(work, portions, number, first, batch):
    return in_portions(lambda part, before: work(part, f"calibration batch {number}", first + before), batch, portions)


def _of_all_processes(found):
    """The results of all processes from their [(batch number, results)], on the CPU where there are several."""
    if world_size() > 1:  # a tensor that is sent keeps its device, which is another one in every process
        found = map_tensors(found, lambda tensor: tensor.cpu())
    shares = sorted((part for share in gather_objects(found) for part in share), key=lambda part: part[0])
    return [result for _, results in shares for result in results]
