"""Gates on the channels of units, and estimates in the place of closed channels, as changes of a run of the graph."""

import inspect
from collections import defaultdict

import torch
import torch.nn.functional as F
from torch.utils.weak import WeakTensorKeyDictionary


def gated_run(sites, readers, gates, watched=(), estimates=None, outputs=None, once=False):
    """`change`, `read` and `calls` of `Execution.run` that multiply every unit's channels by its gate.

    Args:
        sites: `GateSite`s of the graph that runs. readers: `Reader`s of the network.
        watched: [(node, function)], called with the node's result, gated where it is, of which gradients can be taken.
        gates and all others: see `ChannelGraph.gated`.
    """
    open_gates = torch.cat([gates, gates.new_ones(*gates.shape[:-1], 1)], -1)  # index -1: no gate
    outputs, of_node, watchers = outputs or {}, defaultdict(list), defaultdict(list)
    for site in sites:
        of_node[site.node].append(site)
    for node, function in watched:
        watchers[node].append(function)
    calls = {}
    if once and not watched:
        calls = {
            node: _gated_norm(open_gates, own[0])
            for node, own in of_node.items()
            if node.target is F.batch_norm and len(own) == 1 and node not in outputs
        }
    change = {
        node: _changed(open_gates, of_node[node], outputs.get(node), watchers[node])
        for node in {**of_node, **watchers}
        if node not in calls
    }
    return {**outputs, **change}, _estimated(open_gates, readers, estimates or {}), calls


def _changed(open_gates, sites, first, watchers):
    def change(output):
        output = output if first is None else first(output)
        for site in sites:
            output = _gate(open_gates, site, output)
        if watchers and not output.requires_grad:  # no gate is before it
            output = output * output.new_ones(()).requires_grad_()
        for watch in watchers:
            watch(output)
        return output

    return change


def _estimated(open_gates, readers, estimates):
    any_closed = bool(estimates) and bool((open_gates != 1).any())
    return {
        node: _blended(estimates[reader.layer], node, open_gates, any_closed)
        for reader in readers
        if reader.layer in estimates
        for node in reader.nodes
    }


def _gate(factor, site, output):
    """`output` with its channels multiplied by their gates.

    Args:
        factor: [units + 1] or [batch, units + 1] gates, the last is 1. site: surgery.units.GateSite.
    """
    factor, dim, batch_dim = _of_units(factor, site.units), site.dim, site.batch_dim
    shape = [1] * output.dim()
    shape[dim] = factor.shape[-1]
    if factor.dim() > 1:
        shape[batch_dim] = output.shape[batch_dim]
        if len(factor) > 1:
            factor = _of_rows(factor, output.shape[batch_dim], site.blocks)
        else:
            shape[batch_dim] = 1
        factor = factor if batch_dim < dim else factor.mT
    return output * factor.reshape(shape).to(output.dtype)


def _of_rows(factor, rows, blocks):
    """[rows, ...] of [batch, ...]: what belongs to the sample of every row; see surgery.units.GateSite for `blocks`."""
    several = rows // len(factor)
    if several == 1:
        return factor
    return factor.repeat_interleave(several // blocks, 0).repeat(blocks, *(1,) * (factor.dim() - 1))


_MOVED = WeakTensorKeyDictionary()  # index tensors of graphs: {the tensor on the CPU: {device: the same there}}


def moved(indices, device):
    """The index tensor on the device, copied there once."""
    places = _MOVED.setdefault(indices, {})
    if device not in places:
        places[device] = indices.to(device)
    return places[device]


def _of_units(factor, units):
    """The entries of `factor` [..., units + 1] at the units; index -1 is the last entry."""
    places = _MOVED.setdefault(units, {})
    if ("wrapped", factor.device) not in places:
        places["wrapped", factor.device] = (units % factor.shape[-1]).to(factor.device)
    return factor.index_select(-1, places["wrapped", factor.device])


def _blended(estimate, node, open_gates, any_closed):
    """A function for `Execution.run`'s `read`: closed channels of the reader's input at `node` become what others say."""
    reader = estimate.reader

    def function(args):
        x = reader.samples_first(node, args[0])
        closed = 1 - _of_units(open_gates, reader.units)
        space = x.dim() - 2
        shape = (*(1,) * space, len(reader.units)) if reader.is_linear else (len(reader.units), *(1,) * space)
        closed = closed.reshape(-1, *shape).to(x.dtype)
        if len(closed) > 1:
            closed = _of_rows(closed, len(x), reader.blocks.get(node, 1))
        blended = _Blend.apply(x, closed, estimate, any_closed)
        return (blended.movedim(0, reader.batch_dims.get(node, 0)), *args[1:])

    return function


class _Blend(torch.autograd.Function):
    """x + closed * estimate(x). The estimate is computed when it is needed: at closed channels, and in backward passes.

    Until then x alone is kept, which the operation before or after it keeps anyway.
    """

    @staticmethod
    def forward(ctx, x, closed, estimate, any_closed):
        ctx.save_for_backward(x)
        ctx.shape, ctx.estimate, ctx.found = closed.shape, estimate, None
        return x + closed * estimate(x) if any_closed else x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        if ctx.found is None:
            with torch.no_grad():
                ctx.found = ctx.estimate(ctx.saved_tensors[0])
        return gradient, (gradient * ctx.found).sum_to_size(ctx.shape), None, None


_BATCH_NORM = inspect.signature(F.batch_norm)


class _OpenGatedNorm(torch.autograd.Function):
    """A batch_norm with fixed statistics whose channels are multiplied by gates of 1, differentiable once.

    Nothing is multiplied, and nothing is kept but the input: the gates' derivatives follow from sums over it.
    """

    @staticmethod
    def forward(ctx, x, factor, scale, shift, norm):
        ctx.save_for_backward(x, factor, scale, shift)
        return norm(x)

    @staticmethod
    def backward(ctx, gradient):
        if torch.is_grad_enabled():  # create_graph
            raise RuntimeError("gates that are differentiated once have no second derivative; leave `once` out")
        x, factor, scale, shift = ctx.saved_tensors
        # Of vectors, as behind a linear layer, there is one position.
        rows, inputs = (values.reshape(*values.shape[:2], -1) for values in (gradient, x))
        along, of_channels = (rows * inputs).sum(2) * scale + rows.sum(2) * shift, (-1, *(1,) * (x.dim() - 2))
        return gradient * scale.view(of_channels), along.to(factor.dtype), None, None, None


def _gated_norm(open_gates, site):
    """A function for `Execution.run`'s `calls`: torch.nn.functional.batch_norm under gates of 1, differentiable once.

    Args:
        open_gates: [batch, units + 1] ones. site: surgery.units.GateSite.
    """

    def call(args, kwargs):
        given = _BATCH_NORM.bind(*args, **kwargs)
        given.apply_defaults()
        x, mean, var, weight, bias, training, _, eps = given.args
        if training or site.dim != 1 or site.batch_dim != 0 or len(x) != len(open_gates):
            return _gate(open_gates, site, F.batch_norm(*args, **kwargs))
        scale = (var + eps).rsqrt() if weight is None else (var + eps).rsqrt() * weight
        shift = -mean * scale if bias is None else bias - mean * scale
        factor = _of_units(open_gates, site.units)
        return _OpenGatedNorm.apply(x, factor, scale, shift, lambda x: F.batch_norm(x, *args[1:], **kwargs))

    return call
