"""A GPU gives the numbers of the CPU: scores, choice, compensated weights, in float64. Skipped where there is no GPU."""

import copy

import pytest
import torch

from EnhancedFilterPruner import EnhancedFilterPruner
from taylor_pruning.repair.compensation import compensate

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def pruned(model, images, labels, order, device):
    model, images, labels = copy.deepcopy(model).to(device), images.to(device), labels.to(device)
    batches = [(images[:7], labels[:7]), (images[7:], labels[7:])]
    pruner = EnhancedFilterPruner(model, images[:1], order, progress=False, class_probes=2)
    pruner.rank(batches, batches)
    levels, chosen = pruner.levels(), pruner.select(30)
    plan = pruner.graph.plan_of(chosen)
    smaller = pruner.graph.remove(plan)
    layers = pruner.graph.layers.items()
    kept = {name: sorted(set(range(info.filters)) - set(plan.get(name, ()))) for name, info in layers}
    compensate(model, smaller, batches, kept, progress=False)
    return levels, sorted(chosen), {name: tensor.cpu() for name, tensor in smaller.state_dict().items()}


@pytest.mark.parametrize("order", [1, 2, 3])
def test_scores_choice_and_compensation_are_those_of_the_cpu(relu_network, images, labels, order):
    (levels, chosen, weights), (on_gpu, chosen_there, weights_there) = (
        pruned(relu_network, images, labels, order, device) for device in ("cpu", "cuda")
    )
    torch.testing.assert_close(on_gpu, levels, rtol=1e-6, atol=1e-12)
    assert chosen_there == chosen
    for name, tensor in weights.items():
        torch.testing.assert_close(weights_there[name], tensor, rtol=1e-4, atol=1e-6)
