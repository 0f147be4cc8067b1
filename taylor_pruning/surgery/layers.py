"""Which conv and linear layers a graph applies: their names, filters, and where they are used."""

from fractions import Fraction

import torch

from taylor_pruning.surgery.ids import varying
from taylor_pruning.surgery.recorded_calls import operation_name, sources_of

# The dimension of a weight, by the attribute that counts the channels along it.
DIMS = {"out_channels": 0, "out_features": 0, "in_channels": 1, "in_features": 1}
APPLIED = ("linear", "conv", "deform_conv")  # how operations begin that apply the weight that they are given second


def owner(tensor):
    """Name of the module that applies a parameter or buffer, which may be an original of a parametrisation."""
    return f".{tensor.rpartition('.')[0]}".partition(".parametrizations.")[0][1:]


def layer_name(parameter):
    """The layer to which a weight belongs: its module, or itself where a forward uses a parameter of another name."""
    computed = ".parametrizations." in f".{parameter}"
    known = parameter.rpartition(".")[2] in ("weight", "weight_v", "weight_g", "weight_orig")
    return owner(parameter) if computed or known else parameter


class Layers:
    """The layers that the propagation met, by name.

    Attributes:
        filters: {layer: ids of its filters}, in order of execution. linear: those that are fully connected wherever they are
            used (a conv's kernel may be mixed of several by a matrix product).
        settings: {module: ids of its channels} of norms and depthwise convs.
        products: [(multiply-accumulates of one sample, [ids along each of their dimensions])] of every operation that has some.
        readers: {layer: (nodes, groups, linear)} of those with a parameter for a weight.
        idle: names of those whose results the outputs do not depend on.
        weights: {layer: (node of its weight, the weight's dimension along which its filters run, or None)}.
    """

    def __init__(self, ids, values, parameters, batch):
        """Args: ids and values {node: ids.Value} of the propagation; parameters and buffers by name; samples of the trace."""
        self.batch = batch
        self.ids, self.filters, self.linear, self.readers = ids, {}, set(), {}
        own = (product for product in ids.products if not product[0].meta.get("live"))  # else counted in another graph
        self.products = [(_of_a_sample(number, batch), dims) for _, number, dims in own]
        self.weights, self.idle, convs = {}, set(), set()
        self.settings = dict(ids.settings)
        for node, along, linear in ids.issued:
            parameter = _parameter_of(_weight_of(node), parameters)
            if parameter is None:
                continue
            name = layer_name(parameter.target)
            if len(along) % batch == 0:  # the same filters for every sample, as modulated kernels have them
                along = along[: len(along) // batch]
            if name in self.filters and len(self.filters[name]) != len(along):
                name = parameter.target
            if name not in self.filters:
                self.filters[name], weight = along, _weight_of(node)
                self.weights[name] = weight, _dimension_of(along, values[weight])
            (self.linear if linear else convs).add(name)
            self._use(node, name, parameter, linear)
        self.linear -= convs
        for node, along in ids.depthwise:
            weight = _weight_of(node)
            if weight.op == "get_attr" and weight.target in parameters:
                self.settings[layer_name(weight.target)] = along

    def add_training(self, other):
        """Layers that only the forward in training mode uses: their inputs may shrink, their filters all stay."""
        for name, along in other.filters.items():
            if name not in self.filters:
                self.filters[name] = along
                self.ids.protect(along, "used in training only")
        self._join(other)

    def add_idle(self, other, training):
        """Layers that run although the outputs do not depend on them: their tensors must fit, but nothing is scored there."""
        idle = {name: along for name, along in other.filters.items() if name not in self.filters}
        self.products += [] if training else other.products
        self.idle.update(idle)
        self.filters |= idle
        self._join(other)

    def _join(self, other):
        self.linear |= other.linear
        self.settings = other.settings | self.settings

    def follow_widths(self, model):
        """Channels counted by a number that a layer holds are as many as its own, or stay where the number must not change."""
        for width in self.ids.widths:
            if (along := self._counted_by(model, width)) is not None:
                self.ids.bind_width(width, along, Fraction(1), f"are counted by {width[1]} of {width[0]}")
        for width, reason in self.ids.fixed.items():
            if (along := self._counted_by(model, width)) is not None:
                self.ids.protect(along, reason)

    def _counted_by(self, model, width):
        """The channels that a layer's number counts, which a cut makes agree with its weight; None for any other number."""
        name, attribute, _ = width
        if attribute in ("num_features", "num_channels"):
            return self.settings.get(name)
        if attribute not in DIMS:
            return None
        module = model.get_submodule(name)
        dim = 1 - DIMS[attribute] if getattr(module, "transposed", False) else DIMS[attribute]
        along = self.ids.tensors.get((f"{name}.weight" if name else "weight", dim))
        if along is None:  # of a depthwise conv
            along = self.settings.get(name)
        elif dim == 1:
            along = along.repeat(int(getattr(module, "groups", 1)))
        counted = along is not None and len(along) == int(getattr(module, attribute))  # no expert of several, say
        return along if counted else None

    def _use(self, node, name, parameter, linear):
        transposed = "transpose" in str(node.target)
        plain = linear and "linear" in str(node.target) or operation_name(node).startswith("conv") and not transposed
        if _weight_of(node) is parameter and plain and parameter.target == (f"{name}.weight" if name else "weight"):
            columns = parameter.meta["shape"][1]
            inputs = node.all_input_nodes[0].meta["shape"]
            groups = 1 if linear else inputs[1] // columns
            self.readers.setdefault(name, ([], groups, linear))[0].append(node)


def _of_a_sample(number, batch):
    """What one sample has of a number that a batch has; what is computed of parameters alone has no samples."""
    return number if number % batch else number // batch


def kept_classes(ids, layers, roots, prune_linear, prune_heads):
    """Yields (class, reason) of the classes of filters that could go, of fully connected or idle layers alone.

    Those of fully connected layers stay where nobody asked to remove them. Where filters of a conv are in a class
    (squeeze-and-excitation), those of fully connected layers go with them.

    Args:
        roots: [ids] class of every id.
    """
    none = roots.new_zeros(0)
    used = torch.cat([none, *(roots[some] for name, some in layers.filters.items() if name not in layers.idle)])
    for name in sorted(layers.idle):
        classes = roots[layers.filters[name]].unique()
        yield from ((root, "its result is not used") for root in classes[~torch.isin(classes, used)].tolist())
    heads = torch.cat([none, *(roots[some] for some in ids.heads)])
    of_convs = torch.cat([none, *(roots[some] for name, some in layers.filters.items() if name not in layers.linear)])
    for name in layers.linear:
        classes = roots[layers.filters[name]].unique()
        classes = classes[~torch.isin(classes, of_convs)]
        whole = torch.isin(classes, heads)
        kept = {"whole heads of a fully connected layer (see prune_heads)": whole & (not prune_heads),
                "fully connected (see prune_linear)": ~whole & (not prune_linear)}  # fmt: skip
        for reason, which in kept.items():
            yield from ((root, reason) for root in classes[which].tolist())


def _weight_of(node):
    """The node of the weight that a conv or linear operation applies, of a matrix product its constant operand."""
    name = operation_name(node)
    if name.startswith(APPLIED):
        return node.args[1] if len(node.args) > 1 else node.kwargs["weight"]
    factors = node.all_input_nodes[1:] if name in ("addmm", "baddbmm") else node.all_input_nodes
    return next((n for n in factors if _is_weight(n)), factors[-1])


def _dimension_of(along, weight):
    """The dimension of a weight (ids.Value) whose ids are those of the filters `along`; None if there is none.

    The weight of a transposed conv in groups has one dimension for the filters of all groups: their ids repeat.
    """
    for layer in weight.layers:
        for d in varying(layer):
            ids = layer[tuple(slice(None) if d == other else 0 for other in range(layer.dim()))]
            if len(along) % len(ids) == 0 and torch.equal(ids.repeat(len(along) // len(ids)), along):
                return d
    return None


def _is_weight(node):
    return node.op == "get_attr" or bool(node.meta.get("weight"))


def _parameter_of(node, parameters):
    """The parameter nearest to a weight among those from which it is computed; None where another layer computes it."""
    seen, front = set(), [node]
    while front:
        for found in front:
            if found.op == "get_attr" and found.target in parameters and len(found.meta["shape"]) > 1:
                return found
        seen.update(front)
        front = [source for n in front for source in _sources(n) if source not in seen]
    return None


def _sources(node):
    """The nodes from which a node that is no layer is computed."""
    if operation_name(node).startswith(APPLIED):
        return []
    return sources_of(node)
