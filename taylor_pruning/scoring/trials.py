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
from taylor_pruning.tasks.task import Task


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

    It takes one forward of the batches for every set, and one more.

    Args:
        moments: scoring.estimates.input_moments of the model; layers without an entry are not repaired.
        batches: of the task, images that neither scored nor gave the moments.
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
    portions, count = Portions(parameter.device, memory_limit), 0
    with frozen(model):
        for number, batch in enumerate(tqdm(batches, desc="try", leave=False, disable=not progress or not is_main())):
            for part in portions.slices(samples.size(batch)):
                some = samples.select(batch, torch.arange(part.start, part.stop))
                with portions.measured(part):
                    own = task.forward(model, some)
                    task.check(own, some, f"held-out batch {number}")
                    for index in range(len(sets)):
                        with graph.gated(gates[index], estimates=estimates[index]):
                            sums[index] += _divergence(task, task.forward(model, some), own)
                count += samples.size(some)
    return (sums / count).tolist()


def _divergence(task, outputs, own) -> Tensor:
    """[] sum over the samples, in double precision: it may be tiny."""
    outputs, own = (map_tensors(x, lambda t: t.double() if t.is_floating_point() else t) for x in (outputs, own))
    return task.divergence(outputs, own).sum()
