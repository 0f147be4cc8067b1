"""Torch-Pruning's criteria as scores of our units, and its sparse learning as a hook of an optimiser."""

import torch
import torch.nn.functional as F

PEERS = {  # name: class of torch_pruning.importance and its arguments
    "TP magnitude": ("GroupMagnitudeImportance", {}),
    "TP LAMP": ("LAMPImportance", {}),
    "TP FPGM": ("FPGMImportance", {}),
    "TP BN scale": ("BNScaleImportance", {}),
    "TP Taylor": ("GroupTaylorImportance", {}),
    "TP Hessian": ("GroupHessianImportance", {}),
}
# Pruner and importance of sparse learning, as in Torch-Pruning's own CIFAR recipes.
SPARSE = {
    "TP magnitude": ("GroupNormPruner", "GroupMagnitudeImportance", {"normalizer": "max"}),
    "TP growing": ("GrowingRegPruner", "GroupMagnitudeImportance", {}),
    "TP BN scale": ("BNScalePruner", "BNScaleImportance", {}),
}
# Those recipes: 100 epochs of 391 steps at learning rate 0.01, strength 5e-4 or growing by 1e-4 an epoch.
RECIPE_STEPS, RECIPE_EPOCHS, RECIPE_LR, STRENGTH, GROWTH = 39100, 100, 0.01, 5e-4, 1e-4


def peer_scores(name, graph, batches):
    """[units] importance by Torch-Pruning, from its own dependency groups: the sum over the filters of a unit."""
    import torch_pruning as tp

    model = graph.model
    kind, arguments = PEERS[name] if name in PEERS else SPARSE[name][1:]
    importance = getattr(tp.importance, kind)(**arguments)
    model.requires_grad_(True).zero_grad()
    for images, labels in batches if kind == "GroupTaylorImportance" else ():
        (F.cross_entropy(model(images), labels, reduction="sum") / sum(len(y) for _, y in batches)).backward()
    for images, labels in batches[:1] if kind == "GroupHessianImportance" else ():
        for image, label in zip(images.split(1), labels.split(1), strict=True):
            model.zero_grad()  # the Hessian's diagonal from squared per-sample gradients, as its documentation says
            F.cross_entropy(model(image), label).backward()
            importance.accumulate_grad(model)
    dependencies = tp.DependencyGraph().build_dependency(model, example_inputs=batches[0][0][:1])
    scores = torch.zeros(len(graph.units), dtype=torch.float64)
    modules = dict(model.named_modules())
    shifted = {layer for u in graph.units if len({i for _, i in u.filters}) > 1 for layer, _ in u.filters}
    for layer, info in graph.layers.items():
        if not info.removable.any():
            continue
        group = dependencies.get_pruning_group(modules[layer], tp.prune_conv_out_channels, list(range(info.filters)))
        if layer in shifted:  # padding moves channels to other indices, which Torch-Pruning does not follow
            group._group = [item for item in group._group[:2] if item.root_idxs == list(range(info.filters))]
        values = importance(group).double()
        scores.index_add_(0, info.unit_of[info.removable], values[info.removable])
    model.zero_grad(set_to_none=True)
    return scores


def learn_sparsely(name, model, example, optimizer, steps, share=1.0):
    """Before every step of `optimizer`, adds the gradient of Torch-Pruning's regulariser of `model`.

    Args:
        name: of SPARSE.
        example: an input of one image, to trace.
        steps: that will be made; the regulariser that grows does so before each.
        share: of the shrinkage (sum of learning rate times strength) of the published recipe. The published strength itself is
            a share of 1/315 in 62 steps at learning rate 0.02.
    """
    import torch_pruning as tp

    pruner_name, kind, arguments = SPARSE[name]
    lr = optimizer.param_groups[0]["lr"]
    strength = share * STRENGTH * RECIPE_STEPS * RECIPE_LR / (steps * lr)
    growing = pruner_name == "GrowingRegPruner"
    grown = GROWTH * (RECIPE_EPOCHS + 1) / 2  # mean over the recipe
    given = {"reg": 0.0, "delta_reg": 2 * strength / STRENGTH * grown / (steps + 1)} if growing else {"reg": strength}
    pruner = getattr(tp.pruner, pruner_name)(model, example, getattr(tp.importance, kind)(**arguments), **given)

    def regularise(*_):
        if growing:
            pruner.update_reg()
        pruner.regularize(model)

    optimizer.register_step_pre_hook(regularise)
