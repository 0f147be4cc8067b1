"""Which layers are fitted, what follows each, and one order of execution for both networks."""

import torch
from torch import fx

from taylor_pruning.errors import InputError
from taylor_pruning.repair.batchnorm import BatchNorm
from taylor_pruning.repair.fitted_layer import FittedLayer, argument, conv_geometry
from taylor_pruning.surgery.execution import Execution, input_dependent
from taylor_pruning.surgery.layers import layer_name
from taylor_pruning.surgery.recorded_calls import operation_name, writes
from taylor_pruning.surgery.recording import record
from taylor_pruning.surgery.units import sample_dim

CONVS = ("conv1d", "conv2d", "conv3d")
NEW = set(  # operations whose result shares no memory with what they read
    """linear batch_norm group_norm layer_norm instance_norm add sub mul div truediv neg cat stack matmul bmm einsum clone relu
    relu6 silu gelu elu hardswish hardsigmoid leaky_relu sigmoid tanh softmax max_pool2d avg_pool2d adaptive_avg_pool2d
    upsample_nearest2d upsample_bilinear2d""".split()
)
TRANSPARENT = ("dropout", "dropout1d", "dropout2d", "dropout3d", "contiguous")  # in eval mode


class RepairPlan:
    """The graphs of both networks in one common order of execution, and the layers to fit.

    The other operand of a sum that a layer is to match is computed before the layer.
    """

    def __init__(self, dense, smaller, kept, example, recorded=None):
        """`recorded`: the dense network's Execution on inputs like the example, where there is one."""
        recorded = recorded or Execution(dense, record(dense, example))
        self.networks = [recorded, Execution(smaller, record(smaller, example))]
        nodes = [list(network.trace.graph.nodes) for network in self.networks]
        if [(n.op, n.name) for n in nodes[0]] != [(n.op, n.name) for n in nodes[1]]:
            raise InputError(
                "compensation: the two networks do not run the same layers; give the network that was pruned"
            )
        self.tensors = [self.networks[0].tensors_of_a_run(), self.networks[1].tensors()]
        self.left_alone = {}
        found = self._candidates(*nodes, kept)
        order = _execution_order(nodes[1], {node: stream for node, _, _, stream, _ in found if stream is not None})
        index = {node: i for i, node in enumerate(nodes[1])}
        position = {node: i for i, node in enumerate(order)}
        self.order = [[nodes[k][index[node]] for node in order] for k in (0, 1)]
        self.layers = [
            self._layer(node, position[node], indices, norm, position.get(stream), returned)
            for node, indices, norm, stream, returned in found
        ]
        self.layers.sort(key=lambda layer: layer.position)
        self.batchnorms = {node.name: self._norm(node) for node in order if self._is_updated(node)}
        self.last_use = self._last_use(position)

    def _layer(self, node, position, indices, norm, stream, returned):
        bias = argument(node, "bias", 2)
        weight = self._tensor(argument(node, "weight", 1))
        geometry = None
        if operation_name(node) in CONVS:
            channels = node.all_input_nodes[0].meta["shape"][1]
            geometry = {**conv_geometry(node, weight), "groups": channels // weight.shape[1]}
        name = layer_name(argument(node, "weight", 1).target)
        is_own = bias is not None and len(bias.users) == 1
        samples = 0 if geometry else sample_dim(node.meta["shape"], self.networks[1].trace.batch)
        return FittedLayer(
            name, position, weight, self._tensor(bias), geometry, indices, norm, stream, returned, is_own, samples
        )

    def _tensor(self, node, k=1):
        """The parameter or buffer that a node reads; None if it is none."""
        return self.tensors[k].get(node.target) if isinstance(node, fx.Node) and node.op == "get_attr" else None

    def _candidates(self, dense_nodes, nodes, kept):
        """[(node, kept filters, and what `_behind` says)] of the layers that are fitted."""
        claimed, found, varying = set(), [], input_dependent(nodes)
        for dense_node, node in zip(dense_nodes, nodes, strict=True):
            name = operation_name(node)
            if node.op in ("placeholder", "get_attr", "output"):
                continue
            if name not in (*CONVS, "linear") and not name.startswith("conv_transpose"):
                continue
            weight = argument(node, "weight", 1)
            reason = self._unfit(node, name, weight)
            if reason is None and node.all_input_nodes[0] not in varying:
                reason = "its input does not depend on the images"
            if reason is None and not self._runs_along_the_same(dense_node, node):
                reason = "it is applied along channels that were removed"
            layer = layer_name(weight.target) if weight.op == "get_attr" else node.meta.get("module", node.name)
            if reason:
                self.left_alone[layer] = reason
                continue
            indices = _kept_filters(layer, self._tensor(weight), self._tensor(weight, 0), kept)
            found.append((node, indices, *self._behind(node, claimed)))
        return found

    def _runs_along_the_same(self, *layer):
        """Whether a layer's outputs in both networks have the same lengths, but for the filters and the traces' batches."""
        lengths, batches = [list(node.meta["shape"]) for node in layer], [net.trace.batch for net in self.networks]
        for shape in lengths:
            del shape[-1 if operation_name(layer[0]) == "linear" else 1]
        return all(a == b or a * batches[1] == b * batches[0] for a, b in zip(*lengths, strict=True))

    def _unfit(self, node, name, weight):
        if self._tensor(weight) is None:
            return "its weight is computed from other tensors"
        if name.startswith("conv_transpose"):
            return "a transposed conv"
        bias = argument(node, "bias", 2)
        if bias is not None and self._tensor(bias) is None:
            return "its bias is computed from other tensors"
        if name != "linear" and self._tensor(weight).shape[1] == 1 < node.all_input_nodes[0].meta["shape"][1]:
            return "depthwise: it mixes no channels"
        return "its weights are used more than once" if len(weight.users) > 1 else None

    def _behind(self, node, claimed):
        """What follows a layer: its BatchNorm, the stream of the sum that it is to match (each may be None), and whether the
        network returns what it gives."""
        norm, last = None, node
        while len(last.users) == 1:
            (user,) = last.users
            if last is node and self._folds(user) and (operation_name(node) in CONVS or len(node.meta["shape"]) == 2):
                norm = self._norm(user)
            elif operation_name(user) not in TRANSPARENT:
                break
            last = user
        return norm, self._stream(node, last, claimed), norm is None and _is_output(last)

    @staticmethod
    def _stream(node, last, claimed):
        """The other operand of the sum that `last`, which carries the layer's output, goes into; None if there is none,
        it cannot be computed before the layer, or another layer matches the sum already."""
        if len(last.users) != 1:
            return None
        (user,) = last.users
        others = [n for n in user.all_input_nodes if n is not last]
        is_sum = operation_name(user) == "add" and len(user.args) == 2 and len(others) == 1 and not user.kwargs
        if not is_sum or user in claimed:
            return None
        if others[0].meta.get("shape") != last.meta["shape"] or not _may_precede(others[0], node):
            return None
        claimed.add(user)
        return others[0]

    def _folds(self, node):
        """Whether it is a BatchNorm of one layer alone, into whose running mean an intercept can go."""
        if operation_name(node) != "batch_norm" or node.op != "call_function":
            return False
        mean = argument(node, "running_mean", 1)
        fixed = not argument(node, "training", 5)
        return fixed and self._tensor(mean) is not None and len(mean.users) == 1

    def _is_updated(self, node):
        """Whether it is a BatchNorm whose scale and shift, too, belong to one layer alone."""
        if not self._folds(node):
            return False
        weight, bias = argument(node, "weight", 3), argument(node, "bias", 4)
        return all(self._tensor(t) is not None and len(t.users) == 1 for t in (weight, bias))

    def _norm(self, node):
        tensors = [
            self._tensor(argument(node, name, i))
            for i, name in enumerate(("running_mean", "running_var", "weight", "bias"), 1)
        ]
        return BatchNorm(*tensors, float(argument(node, "eps", 7)))

    def _last_use(self, position):
        """[nodes] names of the values that nothing needs after the node."""
        last = {}
        for i, node in enumerate(self.order[1]):
            last[node.name] = i
            for source in node.all_input_nodes:
                last[source.name] = i
        dead = [[] for _ in position]
        for name, i in last.items():
            dead[i].append(name)
        return dead


def _is_output(node):
    """Whether the node's matrix is what the network returns."""
    users = list(node.users)
    returned = len(users) == 1 and users[0].op == "output" and len(users[0].all_input_nodes) == 1
    return returned and len(node.meta["shape"]) == 2


def _ancestors(node):
    seen, stack = set(), [node]
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            stack += node.all_input_nodes
    return seen


def _may_precede(other, node):
    """Whether a node can run before another that it does not need: no operation in place then changes what others read."""
    earlier, nodes = _ancestors(other), list(node.graph.nodes)
    passed = nodes[nodes.index(node) : nodes.index(other) + 1]
    return all(_on_its_own(n, earlier) for n in passed if writes(n))


def _on_its_own(writing, earlier):
    """Whether what a node writes to has been read on its side alone: by nodes in `earlier`, or by others."""
    target = writing
    while isinstance(target, fx.Node) and writes(target):
        target = next(iter(target.args), None)
    if not isinstance(target, fx.Node) or not _is_new(target):
        return False
    return all((reader in earlier) == (writing in earlier) for reader in _readers(target, writing))


def _readers(node, end):
    """The nodes before `end` that read what a node gives, or a view of it."""
    for user in node.users:
        if user < end:
            yield user
            if not _is_new(user):
                yield from _readers(user, end)


def _is_new(node):
    """Whether the result of a node shares no memory with what it reads."""
    return not writes(node) and (operation_name(node).startswith("conv") or operation_name(node) in NEW)


def _execution_order(nodes, before):
    """The nodes in an order in which also `before[node]` precedes `node`; otherwise as given."""
    order, seen = [], set()
    for start in nodes:
        stack = [(start, False)]
        while stack:
            node, ready = stack.pop()
            if ready:
                order.append(node)
            elif node not in seen:
                seen.add(node)
                sources = node.all_input_nodes + ([before[node]] if node in before else [])
                stack.append((node, True))
                stack += [(source, False) for source in reversed(sources)]
    return order


def _kept_filters(name, weight, dense_weight, kept):
    filters, now = len(dense_weight), len(weight)
    indices = torch.as_tensor(kept.get(name, range(filters)), dtype=torch.long, device=weight.device)
    if len(indices) != now or (now and not 0 <= int(indices.min()) <= int(indices.max()) < filters):
        raise InputError(
            f"compensation: {name} has {now} of {filters} filters, but `kept` names {len(indices)}; give the indices of "
            "the filters that it kept"
        )
    return indices
