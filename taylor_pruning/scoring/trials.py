"""What removing a set of units really does to the outputs, before anything is cut.

The set's gates close, and each layer that reads some of its channels reads in their place the best linear estimate from the
channels that stay (scoring.estimates.SetEstimate): that is the network after the cut and a least-squares fit of each of these
layers to its own former outputs. No layer is fitted to the errors of those before it, as repair.compensation does.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from tqdm import tqdm

from taylor_pruning.distributed import is_main
from taylor_pruning.memory import Portions
from taylor_pruning.modes import frozen
from taylor_pruning.scoring.estimates import InputMoments, set_estimates
from taylor_pruning.surgery.graph import ChannelGraph
from taylor_pruning.surgery.nested import map_tensors
from taylor_pruning.tasks import batches as samples
from taylor_pruning.tasks.portions import in_portions
from taylor_pruning.tasks.task import Task

FORWARDS = 2000  # of one image in all trials of one choice: about what scoring 500 images takes
LEAST = 32  # images of every trial, where there are as many


@torch.no_grad()
def trial_divergences(
    model: nn.Module,
    graph: ChannelGraph,
    moments: Mapping[str, InputMoments],
    batches: Sequence,
    task: Task,
    sets: Sequence[list[int]],
    *,
    memory_limit: int | None = None,
    progress: bool = True,
) -> list[float]:
    """The mean divergence of the outputs from the network's own when each set of units alone is removed and repaired.

    It takes one forward of the images for every set, and one more. Of many images some at equal distances are taken, so that
    all sets together take about FORWARDS forwards of one image; every set takes at least LEAST.

    Args:
        moments: scoring.estimates.input_moments of the model; layers without an entry are not repaired.
        batches: list of the task's batches, of images that neither scored nor gave the moments.
        sets: indices of units; no unit is in two sets.
        memory_limit: bytes, see memory.Portions.

    Returns:
        the task's divergence, mean over the samples, of every set; in nats where the task's is.

    Raises:
        InputError: inputs or outputs are not finite.
    """
    parameter = next(model.parameters())
    gates = parameter.new_ones(len(sets), len(graph.units), dtype=torch.promote_types(parameter.dtype, torch.float32))
    for closed, units in zip(gates, sets, strict=True):
        closed[units] = 0
    estimates, sums = set_estimates(moments, sets), parameter.new_zeros(len(sets), dtype=torch.float64)
    batches = _some_of(batches, max(LEAST, FORWARDS // max(1, len(sets))))
    count, portions = sum(map(samples.size, batches)), Portions(parameter.device, memory_limit, backward=False)

    def try_all(part, where):
        own = task.forward(model, part)
        task.check(own, part, where)
        for index in range(len(sets)):
            with graph.gated(gates[index], estimates=estimates[index]):
                sums[index] += _divergence(task, task.forward(model, part), own)

    with frozen(model):
        for number, batch in enumerate(tqdm(batches, desc="try", leave=False, disable=not progress or not is_main())):
            where = f"held-out batch {number}"
            in_portions(lambda part, _, where=where: try_all(part, where), batch, portions)
    return (sums / count).tolist()


def _some_of(batches, count):
    """`count` samples of the batches at equal distances, all of them where they are fewer."""
    sizes = [samples.size(batch) for batch in batches]
    total = sum(sizes)
    drawn = torch.arange(total) * count % total < count
    picked = zip(batches, (chosen.nonzero().flatten() for chosen in drawn.split(sizes)), strict=True)
    return [samples.select(batch, chosen) for batch, chosen in picked if len(chosen)]


def _divergence(task, outputs, own) -> Tensor:
    """[] sum over the samples, in double precision: it may be tiny."""
    outputs, own = (map_tensors(x, lambda t: t.double() if t.is_floating_point() else t) for x in (outputs, own))
    return task.divergence(outputs, own).sum()
