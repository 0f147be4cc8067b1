"""How much training signal flows back through each unit of filters: the norm of the loss gradient at its gates."""

import torch


def unit_gradient_norms(loss, gated, units, *, retain_graph=True):
    """Per sample, the L2 norm of the loss gradient that flows back through the channels of every unit.

        F[b, u] = sqrt( sum over gate sites of u, its channels c there and positions x of (d loss_b / d a[b, c, x])^2 )

    Args:
        loss: scalar, the sum over the batch of the samples' losses (so that samples do not mix; eval mode).
        gated: list of (GateSite, activation) as `ChannelGraph.gated(..., on_gate=...)` gives them. An activation is a
            tensor or better its `torch.autograd.graph.get_gradient_edge`, taken inside `on_gate`: an in-place ReLU
            behind the gate overwrites the tensor, and its gradient would be the one behind the ReLU.
        units: number of units.
        retain_graph: keep the graph for further backward passes.

    Returns:
        [B, units] tensor.
    """
    grads = torch.autograd.grad(loss, [a for _, a in gated], retain_graph=retain_graph, allow_unused=True)
    squares = None
    for (site, _), grad in zip(gated, grads):
        if grad is None:  # computed but not used for the logits
            continue
        channels = grad.square().movedim(site.dim, 1).flatten(2).sum(2)
        if squares is None:
            squares = channels.new_zeros(len(channels), units)
        has_gate = site.units >= 0
        index = site.units[has_gate].to(grad.device)
        squares.index_add_(1, index, channels[:, has_gate.to(grad.device)])
    return squares.sqrt()
