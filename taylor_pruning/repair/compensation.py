"""New weights for a pruned network in closed form: every layer is refitted to the dense network's outputs.

After filters are removed, each conv and linear layer whose inputs differ from the dense network's (channels are missing,
or layers before it answer differently) is fitted by ridge least squares on calibration images, in the order of the data:
inputs come from the pruned network, compensated up to there, targets are the dense network's outputs of the same layer
(He et al. 2017, arXiv:1707.06168; Luo et al. 2017, arXiv:1707.06342). For a layer with inputs x (patches, as rows),
present weights W and dense outputs y,

    min over D, b of  sum |y - x (W + D) - b|^2 + ridge * mean(diag C) * |D|^2,      C = centred Gram matrix of x,

so with nothing to repair nothing changes, and few images do little harm. The intercept b goes into the layer's bias, or
into the running mean of the BatchNorm behind it. Where a layer's output is added to a stream (y + s), the sum is
matched: the target becomes y + (s of the dense network) - (s of this network), so errors do not pile up on the stream.
"""

import math
import time
from dataclasses import asdict, dataclass, field

import torch
import torch.nn.functional as F
from torch import fx
from tqdm import tqdm

from taylor_pruning.errors import InputError
from taylor_pruning.repair.ridge import DualRidgeSolver, RidgeSolver, Rows
from taylor_pruning.surgery.execution import Execution, evaluate, record
from taylor_pruning.surgery.layers import layer_name
from taylor_pruning.surgery.recorder import operation_name

CONVS = ("conv1d", "conv2d", "conv3d")
TRANSPARENT = ("dropout", "dropout1d", "dropout2d", "dropout3d", "contiguous")  # in eval mode
RIDGES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8)  # relative to the mean of the Gram matrix's diagonal
LAST_RIDGE = 1.0  # tried where the first is of no use
HELD_OUT = 0.2  # share of the images that chooses the ridge, drawn: their order may follow the classes
AGREES = 1e-6  # largest relative deviation from the target that counts as none
ROWS_PER_COLUMN = 2
ENOUGH_ROWS = 16384  # of a layer's fit, and of a batch for the statistics of a BatchNorm
GRAM_COST = 2**34  # multiply-adds of a Gram matrix, up to which a layer gets that many
WEAK = 1e-2  # relative to the mean scale of the channels
TRIAL_OUTPUTS = 64  # of each group, on which ridges are compared
LARGEST_MATRIX = 6144  # columns; above, the dual problem is solved on at most as many rows
ACTIVATION_BUDGET = 2**28  # bytes that may be held in any case


@dataclass(frozen=True)
class LayerFit:
    """How one layer was refitted. Errors are of the held-out images, relative to the spread of the dense outputs."""

    name: str
    error_before: float
    error_after: float
    ridge: float | None  # None: no ridge was better than the weights it had
    rows: int  # output positions used, over all images
    columns: int  # input channels of a group x kernel positions
    matches: str  # "layer" or "sum"


@dataclass
class CompensationReport:
    """What `compensate` did: fits in the order of the data, and layers left alone with the reason."""

    layers: list[LayerFit] = field(default_factory=list)
    left_alone: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    def as_dict(self):
        return asdict(self)


@torch.no_grad()
def compensate(dense, smaller, batches, kept=None, *, progress=True, activation_budget=None, seed=0):
    """Refit the layers of `smaller`, in place, so that it answers as `dense` does on the calibration images.

    Args:
        dense: the network before any pruning.
        smaller: what `ChannelGraph.remove` made of it, in one round or in several, compensated in between or not.
        batches: list of (images [B, C, H, W], labels), labels are not used; a fifth of the images, drawn at
            random, chooses the ridge.
        kept: {layer name: indices of the filters of `dense` that `smaller` still has, in its order}. A layer that is not
            named has all its filters, or is depthwise.
        activation_budget: bytes of activations that may be held between two layers; where the networks need more, they
            run again from the last place that fitted (at most once for every layer). Default: what a training step on the
            largest batch would hold, but 256 MB at least.
        seed: of that draw, and of the output positions that are drawn where a layer has many: over all images 16,384,
            fewer where a wide layer makes them dear, but two for each column of its matrix.

    Conv1d-3d and Linear are fitted, with any stride, padding, dilation and groups. Transposed and depthwise convs, layers
    called more than once and layers with tied weights are left alone; the layers behind them repair what they miss.
    A layer of more than 6,144 columns is fitted on at most as many output positions, through their Gram matrix.

    Returns a CompensationReport. Raises InputError if the networks do not belong together, `kept` does not fit, or
    there are no images or NaNs in them.
    """
    start = time.perf_counter()
    report = CompensationReport()
    if not batches:
        raise InputError("compensation: there are no calibration images; give at least one batch")
    plan = _Plan(dense, smaller, kept or {}, batches[0][0][:1])
    report.left_alone.update(plan.left_alone)
    walk = _Walk(plan, [images for images, _ in batches], activation_budget)
    for layer in tqdm(plan.layers, desc="compensate", unit="layer", leave=False, disable=not progress):
        reason = _fit_layer(layer, walk, seed, report)
        if reason:
            report.left_alone[layer.name] = reason
    if report.layers:
        walk.settle_batchnorms()
    report.seconds = time.perf_counter() - start
    return report


def _settle(norm, count, total, squares):
    """Gives a BatchNorm the statistics of its present inputs, and the scale and shift with which its outputs stay.

    Fitted layers answer with other variances than those that the running statistics still hold. Training, which normalises
    by the batch, would undo at its first step what the fits have done.

    Args:
        count: inputs a channel. total, squares: [channels] float64 sums of them and of their squares.
    """
    mean = total / count
    var = (squares / count - mean.square()).clamp_min(0)
    before, now = ((v.double() + norm.eps).sqrt() for v in (norm.running_var, var))
    norm.bias.add_(norm.weight * (mean - norm.running_mean) / before)
    norm.weight.mul_(now / before)
    norm.running_mean.copy_(mean)
    norm.running_var.copy_(var)


# ------------------------------------------------------------------------------------------------- what is fitted


@dataclass
class _Norm:
    """The tensors of a BatchNorm with running statistics."""

    running_mean: torch.Tensor
    running_var: torch.Tensor
    weight: torch.Tensor | None
    bias: torch.Tensor | None
    eps: float


@dataclass
class _Layer:
    """A layer to fit: where it is in the graph and what follows it before its output meets a stream."""

    name: str
    position: int  # in the plan's order
    weight: torch.Tensor  # of the smaller network
    bias: torch.Tensor | None
    geometry: dict | None  # stride, padding (before and behind), dilation along space, groups; None: fully connected
    kept: torch.Tensor  # [filters] indices of the dense layer's filters
    batchnorm: _Norm | None  # of the smaller network
    stream: int | None  # position of the other operand of the sum

    @property
    def groups(self):
        return self.geometry["groups"] if self.geometry else 1

    @property
    def scale(self):
        """[filters] factor between this layer's output and the sum."""
        norm = self.batchnorm
        if norm is None:
            return self.weight.new_ones(len(self.kept))
        scale = (norm.running_var + norm.eps).rsqrt()
        return scale if norm.weight is None else scale * norm.weight

    @property
    def has_intercept(self):
        return self.bias is not None or self.batchnorm is not None

    def __call__(self, x):
        if self.geometry is None:
            return F.linear(x, self.weight, self.bias)
        x = F.pad(x, self.geometry["padding"])
        conv = (F.conv1d, F.conv2d, F.conv3d)[self.weight.dim() - 3]
        stride, dilation = self.geometry["stride"], self.geometry["dilation"]
        return conv(x, self.weight, self.bias, stride=stride, dilation=dilation, groups=self.groups)


def _geometry(node, weight):
    """Stride, padding, dilation and groups of a conv, along every dimension of space."""

    def value(name, position, default):
        given = node.kwargs.get(name, node.args[position] if len(node.args) > position else default)
        return given if isinstance(given, (str, fx.Node)) else given

    space = weight.dim() - 2

    def tuple_of(given):
        return tuple(map(int, given)) if isinstance(given, (tuple, list)) else (int(given),) * space

    dilation, padding = tuple_of(value("dilation", 5, 1)), value("padding", 4, 0)
    if padding == "same":
        extents = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
        sides = [(extent // 2, extent - extent // 2) for extent in extents]
    else:
        sides = [(p, p) for p in tuple_of(0 if padding == "valid" else padding)]
    padding = [side for pair in reversed(sides) for side in pair]
    return {"stride": tuple_of(value("stride", 3, 1)), "padding": padding, "dilation": dilation}


class _Plan:
    """The graphs of both networks in one common order of execution, and the layers to fit.

    The other operand of a sum that a layer is to match is computed before the layer.
    """

    def __init__(self, dense, smaller, kept, example):
        self.networks = [Execution(model, record(model, example)) for model in (dense, smaller)]
        nodes = [list(network.trace.graph.nodes) for network in self.networks]
        if [(n.op, n.name) for n in nodes[0]] != [(n.op, n.name) for n in nodes[1]]:
            raise InputError(
                "compensation: the two networks do not run the same layers; give the network that was pruned"
            )
        self.tensors = [network.tensors() for network in self.networks]
        self.left_alone = {}
        found = self._candidates(nodes[1], kept)
        order = _sorted(nodes[1], {node: stream for node, _, _, stream in found if stream is not None})
        index = {node: i for i, node in enumerate(nodes[1])}
        position = {node: i for i, node in enumerate(order)}
        self.order = [[nodes[k][index[node]] for node in order] for k in (0, 1)]
        self.layers = [
            self._layer(node, position[node], indices, norm, position.get(stream))
            for node, indices, norm, stream in found
        ]
        self.layers.sort(key=lambda layer: layer.position)
        self.batchnorms = {node.name: self._norm(node) for node in order if self._settles(node)}
        self.last_use = self._last_use(position)

    def _layer(self, node, position, indices, norm, stream):
        bias = _argument(node, "bias", 2)
        weight = self._tensor(_argument(node, "weight", 1))
        geometry = None
        if operation_name(node) in CONVS:
            channels = node.all_input_nodes[0].meta["shape"][1]
            geometry = {**_geometry(node, weight), "groups": channels // weight.shape[1]}
        name = layer_name(_argument(node, "weight", 1).target)
        return _Layer(name, position, weight, self._tensor(bias), geometry, indices, norm, stream)

    def _tensor(self, node, k=1):
        """The parameter or buffer that a node reads; None if it is none."""
        return self.tensors[k].get(node.target) if isinstance(node, fx.Node) and node.op == "get_attr" else None

    def _candidates(self, nodes, kept):
        """[(node, kept filters, BatchNorm or None, other operand or None)] of the layers that are fitted."""
        claimed, found = set(), []
        for node in nodes:
            name = operation_name(node)
            if node.op in ("placeholder", "get_attr", "output") or not (name == "linear" or name.startswith("conv")):
                continue
            weight = _argument(node, "weight", 1)
            if name not in (*CONVS, "linear") and not name.startswith("conv_transpose"):
                continue
            reason = self._unfit(node, name, weight)
            layer = layer_name(weight.target) if weight.op == "get_attr" else node.meta.get("module", node.name)
            if reason:
                self.left_alone[layer] = reason
                continue
            indices = _kept_filters(layer, self._tensor(weight), self._tensor(weight, 0), kept)
            found.append((node, indices, *self._behind(node, claimed)))
        return found

    def _unfit(self, node, name, weight):
        if self._tensor(weight) is None:
            return "its weight is computed from other tensors"
        if not node.users:
            return "nothing reads it"
        if name.startswith("conv_transpose"):
            return "a transposed conv"
        bias = _argument(node, "bias", 2)
        if bias is not None and self._tensor(bias) is None:
            return "its bias is computed from other tensors"
        if name != "linear" and self._tensor(weight).shape[1] == 1 < node.all_input_nodes[0].meta["shape"][1]:
            return "depthwise: it mixes no channels"
        return "its weights are used more than once" if len(weight.users) > 1 else None

    def _behind(self, node, claimed):
        """What follows a layer: its BatchNorm, and the stream of the sum that it is to match; each may be None."""
        norm, last = None, node
        while len(last.users) == 1:
            (user,) = last.users
            if last is node and self._folds(user):
                norm = self._norm(user)
            elif operation_name(user) not in TRANSPARENT or user.args[:1] != (last,):
                break
            last = user
        return norm, self._stream(node, last, claimed)

    @staticmethod
    def _stream(node, last, claimed):
        """The other operand of the sum that `last`, which carries the layer's output, goes into; None if there is none,
        it needs this layer, or another layer matches the sum already."""
        if len(last.users) != 1:
            return None
        (user,) = last.users
        others = [n for n in user.all_input_nodes if n is not last]
        is_sum = operation_name(user) == "add" and len(user.args) == 2 and len(others) == 1 and not user.kwargs
        if not is_sum or user in claimed or node in _ancestors(others[0]):
            return None
        if others[0].meta.get("shape") != last.meta["shape"]:
            return None
        claimed.add(user)
        return others[0]

    def _folds(self, node):
        """Whether it is a BatchNorm of one layer alone, into whose running mean an intercept can go."""
        if operation_name(node) != "batch_norm" or node.op != "call_function":
            return False
        mean = _argument(node, "running_mean", 1)
        return self._tensor(mean) is not None and len(mean.users) == 1

    def _settles(self, node):
        """Whether it is one whose scale, too, belongs to that layer alone."""
        if not self._folds(node):
            return False
        weight, bias = _argument(node, "weight", 3), _argument(node, "bias", 4)
        return all(self._tensor(t) is not None and len(t.users) == 1 for t in (weight, bias))

    def _norm(self, node):
        tensors = [
            self._tensor(_argument(node, name, i))
            for i, name in enumerate(("running_mean", "running_var", "weight", "bias"), 1)
        ]
        return _Norm(*tensors, float(_argument(node, "eps", 7, 1e-5)))

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


def _argument(node, name, position, default=None):
    return node.kwargs.get(name, node.args[position] if len(node.args) > position else default)


def _ancestors(node):
    seen, stack = set(), [node]
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            stack += node.all_input_nodes
    return seen


def _sorted(nodes, before):
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


# --------------------------------------------------------------------------------------- running both networks


class _Walk:
    """Runs both networks over all batches, layer after layer, from activations held since the last layer.

    A network's state is {node name: value}. States are held where all batches together fit the budget; else the networks
    run again from the last layer at which they did. On the way the inputs of BatchNorms are summed up (of a batch, images
    enough for 16,384 positions); what counts is the last run on every batch, when all layers before have been fitted.
    """

    def __init__(self, plan, images, budget):
        self.plan, self.images = plan, images
        self.budget = max(ACTIVATION_BUDGET, self._of_training()) if budget is None else budget
        self.starts = (0, 0)
        self.states = [({}, {}) for _ in images]
        self.sums = {name: [None] * len(images) for name in plan.batchnorms}  # by batch

    def _of_training(self):
        """Bytes of all activations of the dense network on its largest batch."""
        total = 0
        storages = {}

        def count(value):
            fx.node.map_aggregate(
                value, lambda t: storages.update({t.data_ptr(): t.nbytes}) if torch.is_tensor(t) else t
            )
            return value

        network = self.plan.networks[0]
        nodes = [n for n in network.trace.graph.nodes if n.op not in ("get_attr", "output")]
        network.run((self.images[0][:1].clone(),), change=dict.fromkeys(nodes, count))
        total = sum(storages.values())
        return total * max(map(len, self.images))

    def to(self, layer):
        """For every batch: (dense state with the layer's output, smaller state just before the layer).

        The dense state is held where the next layer starts, behind a pooling that may lie between.
        """
        ends, ahead = (layer.position + 1, layer.position), self._next(layer)
        starts, hold = self.starts, None
        for batch, images in enumerate(self.images):
            held = self.states[batch]
            states = [self._run(k, held[k], batch, starts[k], ends[k], copy=not hold) for k in (0, 1)]
            yield batch, *states
            if hold is not False:
                states[0] = self._run(0, states[0], batch, ends[0], ahead, copy=False)
            if hold is None:
                total = sum(len(x) for x in self.images)
                hold = sum(map(_bytes, states)) * total / max(1, len(images)) <= self.budget
            if hold:
                self.states[batch] = states
                del held
        if hold:
            self.starts = ahead, ends[1]

    def _next(self, layer):
        """Position of the next layer to fit, or just behind the last one."""
        return min((n.position for n in self.plan.layers if n.position > layer.position), default=layer.position + 1)

    def value(self, state, k, position):
        return state[self.plan.order[k][position].name]

    def settle_batchnorms(self):
        """Runs on to the end, and gives every BatchNorm of one layer alone the statistics of its present inputs."""
        for batch, (_, held) in enumerate(self.states):
            self._run(1, held, batch, self.starts[1], len(self.plan.order[1]), copy=False)
        for name, sums in self.sums.items():
            _settle(self.plan.batchnorms[name], *(sum(parts) for parts in zip(*sums, strict=True)))

    def _run(self, k, held, batch, start, end, copy):
        """The state at `end`. Held tensors that will be needed again are copied: operations in place would change them."""
        plan, tensors = self.plan, self.plan.tensors[k]
        model = plan.networks[k].model
        state = {name: fx.node.map_aggregate(value, _copy) if copy else value for name, value in held.items()}

        def value_of(source):
            return (
                tensors[source.target] if source.target in tensors and source.op == "get_attr" else state[source.name]
            )

        for position in range(start, end):
            node = plan.order[k][position]
            if k == 1 and node.name in self.sums:
                x = value_of(node.all_input_nodes[0])
                x = x[: -(-ENOUGH_ROWS // math.prod(x.shape[2:]))].movedim(1, 0).flatten(1)
                sums = (values.sum(1, dtype=torch.float64) for values in (x, x.square()))
                self.sums[node.name][batch] = x.shape[1], *sums
            if node.op == "placeholder":
                state[node.name] = self.images[batch].clone()
            elif node.op == "get_attr":
                if node.target not in tensors:
                    state[node.name] = plan.networks[k].constant(node.target, tensors)
            elif node.op != "output":
                state[node.name] = evaluate(model, node, value_of)
            for name in plan.last_use[position]:
                state.pop(name, None)
        return state


def _copy(value):
    return value.clone() if torch.is_tensor(value) else value


def _bytes(state):
    storages = {}
    for value in state.values():
        fx.node.map_aggregate(
            value, lambda t: storages.update({t.data_ptr(): t.nbytes}) if torch.is_tensor(t) else None
        )
    return sum(storages.values())


# ------------------------------------------------------------------------------------------------ fitting one layer


def _fit_layer(layer, walk, seed, report):
    """Collect the layer's normal equations, solve them, change its weights; returns why it was left alone, or None."""
    fit = _LayerData(layer, seed, sum(len(x) for x in walk.images))
    reason = None
    for batch, dense_state, state in walk.to(layer):
        if reason is None:
            reason = fit.add(batch, *_values(layer, walk, dense_state, state))
    if reason is None:
        report.layers.append(fit.solve())
    return reason


def _values(layer, walk, dense_state, state):
    """The layer's input, its dense output, and the two values of the stream that it is added to (None without one)."""
    node = walk.plan.order[1][layer.position]
    x = state[node.all_input_nodes[0].name]
    target = walk.value(dense_state, 0, layer.position)
    if layer.stream is None:
        return x, target, None, None
    return x, target, walk.value(dense_state, 0, layer.stream), walk.value(state, 1, layer.stream)


class _LayerData:
    """The rows of one layer, and its fit to them."""

    def __init__(self, layer, seed, images):
        weight = layer.weight
        self.layer, self.seen = layer, 0
        self.groups = layer.groups
        self.columns, self.outputs = weight[0].numel(), len(weight) // self.groups
        self.generator = torch.Generator().manual_seed(seed)
        self.is_held_out = torch.randperm(images, generator=self.generator) < int(HELD_OUT * images)
        if self.columns > LARGEST_MATRIX:
            self.solver, rows = DualRidgeSolver(layer.has_intercept), LARGEST_MATRIX
        else:
            shape = self.groups, self.columns, self.outputs
            self.solver = RidgeSolver(*shape, layer.has_intercept, weight)
            rows = max(ROWS_PER_COLUMN * self.columns, min(ENOUGH_ROWS, GRAM_COST // self.columns**2))
        self.positions = max(1, round(rows / images))
        self.held_out, self.held_out_targets = [], []
        self.weight = _as_columns(self.groups, weight)
        self.scale = layer.scale
        # A channel that all but vanishes behind its BatchNorm cannot repair the sum.
        weak = self.scale.abs() <= WEAK * self.scale.abs().mean()
        self.divisor = torch.where(weak, torch.inf, self.scale)

    def add(self, batch, x, *outputs):
        """Add one batch: the layer's input and what `_target` takes; returns why the layer needs no fit, or None."""
        layer = self.layer
        if batch == 0:
            now, target = _by_position(layer, layer(x)), self._target(..., *outputs)
            if (now - target).abs().max() <= AGREES * target.abs().max():
                return "its outputs are the dense network's"
        held_out = self.is_held_out[self.seen : self.seen + len(x)]
        self.seen += len(x)
        for chosen in (~held_out, held_out):
            images = chosen.nonzero().flatten().to(x.device)
            if not len(images):
                continue
            rows, wanted = self._rows(x, images, outputs)
            if not torch.isfinite(rows.r).all():
                raise InputError(
                    f"compensation: NaN or Inf in {layer.name} on batch {batch}; check the images and both networks' weights"
                )
            if chosen is held_out:
                self.held_out.append(rows)
                self.held_out_targets.append(wanted)
            else:
                self.solver.add(rows)
        return None

    def _target(self, at, dense_output, dense_stream, stream):
        """What the layer should answer at the given images and positions: [..., filters]."""
        layer = self.layer
        output, dense_stream, stream = (
            None if values is None else _by_position(layer, values)[at]
            for values in (dense_output, dense_stream, stream)
        )
        target = output[..., layer.kept]
        return target if stream is None else target + (dense_stream[..., layer.kept] - stream) / self.divisor

    def _rows(self, x, images, outputs):
        """The given images' rows, some positions of each image drawn anew for every image, and the targets there."""
        layer, positions = self.layer, _by_position(self.layer, outputs[0]).shape[1]
        each = min(positions, self.positions)
        if each == positions:
            drawn = torch.arange(each).expand(len(images), -1)
        else:
            drawn = torch.rand(len(images), positions, generator=self.generator).topk(each).indices
        drawn = drawn.to(x.device)
        patches = _patches(layer, x[images], drawn)
        target = self._target((images[:, None], drawn), *outputs)
        wanted = target.reshape(-1, self.groups, self.outputs).transpose(0, 1)
        present = patches @ self.weight
        if layer.bias is not None:
            present = present + layer.bias.view(self.groups, 1, -1)
        return Rows(patches, wanted - present), wanted

    def solve(self):
        """Choose the ridge on the held-out images, solve with all, change the layer."""
        layer, solver = self.layer, self.solver
        ridge, before, after = LAST_RIDGE, math.nan, math.nan
        if self.held_out and solver.rows:
            ridge, before, after = self._choose_ridge()
        for rows in self.held_out:
            solver.add(rows)
        if ridge is not None and solver.factorise(ridge):
            self._change(*solver.solve())
        matches = "layer" if layer.stream is None else "sum"
        return LayerFit(layer.name, before, after, ridge, solver.rows, self.columns, matches)

    def _choose_ridge(self):
        """(ridge, relative held-out error before, after): from the first ridge down until the error rises."""
        some = (
            torch.linspace(0, self.outputs - 1, min(self.outputs, TRIAL_OUTPUTS)).round().long().to(self.weight.device)
        )
        importance = self.scale.double().square().view(self.groups, 1, -1)[..., some]
        targets = torch.cat(self.held_out_targets, 1)[..., some].double()
        spread = (importance * (targets - targets.mean(1, keepdim=True)).square()).sum().item()

        def error(left):
            return sum((importance * rest.double().square()).sum().item() for rest in left)

        def error_with(ridge):
            if not self.solver.factorise(ridge):
                return math.inf
            solution = self.solver.solve(some)
            return error(rows.left(*solution, some) for rows in self.held_out)

        def best_of(ridges):
            best, chosen = before, None
            for ridge in ridges:
                after = error_with(ridge)
                if after >= best:
                    break
                best, chosen = after, ridge
            return best, chosen

        before = error(rows.r[..., some] for rows in self.held_out)
        best, chosen = best_of(RIDGES)
        if chosen is None:
            best, chosen = best_of([LAST_RIDGE])
        return chosen, *(math.sqrt(e / spread) if spread else math.inf for e in (before, best))

    def _change(self, change, bias):
        layer, norm = self.layer, self.layer.batchnorm
        shape = layer.weight.shape
        change = change.mT.reshape(shape[0], -1, shape[1]).mT.reshape(shape)
        layer.weight.add_(change.to(layer.weight.dtype))
        bias = bias.flatten().to(layer.weight.dtype)
        if norm is not None:
            norm.running_mean.sub_(bias)
        elif layer.bias is not None:
            layer.bias.add_(bias)


def _as_columns(groups, weight):
    """A layer's weight [filters, channels of a group, *kernel] as [groups, kernel positions x channels, filters of a group]."""
    return weight.flatten(2).mT.reshape(groups, len(weight) // groups, -1).mT if weight.dim() > 2 else weight.T[None]


def _by_position(layer, output):
    """A layer's output as [batch, positions, filters]."""
    if layer.geometry is None:
        return output.reshape(len(output), -1, output.shape[-1])
    return output.flatten(2).mT


def _patches(layer, x, drawn):
    """What the layer sees at the drawn output positions [images, each]: [groups, images x each, columns]."""
    if layer.geometry is None:
        x = x.reshape(len(x), -1, x.shape[-1])
        return x.gather(1, drawn[..., None].expand(-1, -1, x.shape[-1])).flatten(0, 1)[None]
    x = F.pad(x, layer.geometry["padding"])
    space, device = x.shape[2:], x.device
    geometry = [space, layer.weight.shape[2:], layer.geometry["stride"], layer.geometry["dilation"]]
    corner, offset = drawn.new_zeros(drawn.shape), drawn.new_zeros(1)
    outputs = [(n - d * (k - 1) - 1) // s + 1 for n, k, s, d in zip(*geometry, strict=True)]
    for axis, (length, kernel, stride, dilation) in enumerate(zip(*geometry, strict=True)):
        index = drawn // math.prod(outputs[axis + 1 :]) % outputs[axis]
        corner = corner * length + index * stride
        offset = (offset[:, None] * length + torch.arange(kernel, device=device) * dilation).flatten()
    corner = corner + torch.arange(len(x), device=device)[:, None] * math.prod(space)
    rows = x.movedim(1, -1).reshape(-1, x.shape[1])[corner.flatten()[:, None] + offset]
    channels = x.shape[1] // layer.groups
    return rows.unflatten(2, (layer.groups, channels)).permute(2, 0, 1, 3).flatten(2)
