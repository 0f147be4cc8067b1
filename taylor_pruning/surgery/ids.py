"""Channel ids: one for every index of a tensor dimension that may shrink, united where they must be removed together.

A tensor is described by id layers. A layer is an integer tensor of the tensor's own shape that holds the id of every
element along one axis (stride 0 along all others, so that it costs no memory); a conv weight has one layer for its filters
and one for its input channels. After a cut an element exists if and only if all its ids do. Views, transpositions and
concatenations act on a layer as they act on data.
"""

from collections import Counter
from dataclasses import dataclass
from fractions import Fraction

import torch

from taylor_pruning.surgery.numbers import is_tracked, plain

ONE_CHANNEL = "has only one channel"  # of what is left where all channels of a tensor go together, too
LONGEST = 100_000  # a longer dimension of a parameter is a flattened weight, which is left as it is


@dataclass
class Value:
    """What is known of a tensor.

    Attributes:
        shape: its shape in the trace.
        layers: id tensors of that shape, each with at least two different ids, which vary along one dimension.
        reason: where it has no ids, why channels that meet it cannot be cut.
        tensor: its values, if they do not depend on the input, parameters or buffers.
        lost: why it lacks ids along a dimension along which what it was computed from had some.
    """

    shape: tuple
    layers: tuple = ()
    reason: str | None = None
    tensor: torch.Tensor | None = None
    lost: str | None = None


def varying(layer):
    """Dimensions along which the ids of a normal layer vary."""
    return [d for d in range(layer.dim()) if layer.shape[d] > 1 and layer.stride(d) != 0]


def squash(*layers):
    """Equally shaped layers reduced to one element along every dimension in which none of them varies."""
    for d in range(layers[0].dim()):
        if all(t.shape[d] == 1 or t.stride(d) == 0 for t in layers):
            layers = [t.narrow(d, 0, min(1, t.shape[d])) for t in layers]
    return layers


def normal(layer):
    """The layer with stride 0 along every dimension in which its ids do not vary."""
    (small,) = squash(layer)
    for d in varying(small):
        first = small.narrow(d, 0, 1)
        if bool((small == first).all()):
            small = first
    return small.expand(layer.shape)


def flat(layer):
    """The ids of a normal layer along the dimension in which they vary."""
    dims = varying(layer)
    return layer[tuple(slice(None) if d in dims else 0 for d in range(layer.dim()))].flatten()


def spread(vector, dim, shape):
    """The ids of `vector` along dimension `dim` of a layer of the given shape."""
    return vector.view([-1 if d == dim % len(shape) else 1 for d in range(len(shape))]).expand(shape)


class ChannelIds:
    """Registry of ids: which are united, which may not be cut and why, along which tensors and numbers they run."""

    def __init__(self):
        self.count = 0
        self.edges = []  # pairs of equally long id vectors
        self.reasons = []  # (ids, reason)
        self.tensors = {}  # (parameter or buffer name, dim): ids along that dimension
        self.issued = []  # (node, ids, linear): filters of a conv or fully connected layer, where it is used
        self.depthwise = []  # (node, ids of the outputs)
        self.products = []  # (node, number of its multiply-accumulates, [ids along each of their dimensions])
        self.settings = {}  # module with one setting a channel: ids of its channels
        self.widths = {}  # (module name, attribute, index): [(ids, factor)], the attribute is their number over factor
        self.heads = []  # ids of whole heads: a view splits each into a block of channels
        self.grouped = set()  # names of modules that apply grouped convs, depthwise ones excepted
        self.choices = 0  # views that could follow their channels along more than one dimension
        self.norms = {}  # name of a weight that is normalised: (name of what scales it, the dimension that is not summed over)
        self.places = {}  # {name of a buffer of whole numbers: its values}
        self.indexed = {}  # of those that index channels: {name: ids of the channels}
        self.fixed = {}  # (module name, attribute, index): why it must not change
        self.multiples = []  # [(ids, divisor, attributes that it is read from, why)]: their number stays a multiple of it
        self.sums = []  # [(ids, ((ids, factor), ...), why)]: their number stays that sum

    def new(self, number):
        self.count += number
        return torch.arange(self.count - number, self.count)

    def unite(self, a, b):
        """Unites every id of `a` with the id of `b` at the same position; both broadcast."""
        a, b = squash(*torch.broadcast_tensors(a, b))
        a, b = a.reshape(-1), b.reshape(-1)
        different = a != b
        if bool(different.any()):
            self.edges.append((a[different], b[different]))

    def protect(self, ids, reason):
        """These ids can never be cut; the first of several reasons is reported."""
        if ids is not None and ids.numel():
            self.reasons.append((squash(ids)[0].reshape(-1).unique(), reason))

    def together(self, layer, dim):
        """Unites equal positions of all slices along `dim`, so that they stay alike; the layer with their common ids."""
        if dim not in varying(layer):
            return layer
        first = layer.narrow(dim, 0, 1)
        self.unite(first, layer)
        return first.expand(layer.shape)

    def vector(self, value, dim):
        """[size] ids along `dim`, None if there are none; ids that share an index are united."""
        dim, result = dim % len(value.shape), None
        for layer in value.layers:
            if dim in varying(layer):
                ids = flat(layer)
                result = ids if result is None else result
                self.unite(result, ids)
        return result

    def value(self, shape, layers=(), reason=None, tensor=None):
        """A `Value`. A layer of one id alone is protected: its one channel cannot be removed.

        Raises ValueError where channels run along several dimensions at once.
        """
        kept = []
        for layer in layers:
            layer = normal(layer)
            if len(varying(layer)) > 1:
                raise ValueError("channels run along several dimensions at once")
            if varying(layer):
                kept.append(layer)
            elif layer.numel():
                reason = reason or ONE_CHANNEL
                self.protect(layer, reason)
        return Value(tuple(shape), tuple(kept), reason, tensor)

    def attach(self, value, ids, reason):
        """The one-dimensional `value` (a bias, a running mean) runs along `ids`."""
        if value is None or not isinstance(value, Value):
            return
        own = self.vector(value, 0) if value.shape else None
        if own is not None and ids is not None and len(own) == len(ids):
            self.unite(own, ids)
        else:
            for one in (own, ids):
                if one is not None:
                    self.protect(one, value.reason or reason)

    def bind(self, number, ids, reason):
        """After a cut `number` must be how many of `ids` are left; True if its source guarantees that."""
        if not is_tracked(number):
            self.protect(ids, reason)
            return False
        if number.ids is not None:
            if not number.widths and (torch.equal(number.ids, ids) or self.counts(number, ids)):
                return True
            if number.whole and len(number.ids) == len(ids) and not number.widths:
                self.unite(number.ids, ids)
                return True
            if number.terms and not number.widths:
                self.sums.append((ids, number.terms, reason))
                return True
            if number.terms and all(factor == -1 for _, factor in number.terms):
                # together they are as many as a width says
                along = torch.cat([*(some for some, _ in number.terms), ids])
                self.bind_width(number.widths[0], along, Fraction(1), reason)
                return True
            self.protect(number.ids, reason)
        elif len(number.widths) == 1 and number.factor is not None and number.factor > 0:
            self.bind_width(number.widths[0], ids, number.factor, reason)
            return True
        elif len(number.widths) > 1:  # it follows if one of its parts follows, which the proof of a cut decides
            return True
        self.protect(ids, reason)
        return False

    def counts(self, number, ids):
        """Whether a part or a multiple of a number of channels is that of `ids`, as every class has its share in both."""
        if number.factor is None or len(ids) != len(number.ids) * number.factor:
            return False
        classes = self.classes()
        (of_number, many), (own, few) = (classes[some].unique(return_counts=True) for some in (number.ids, ids))
        alike = torch.equal(of_number, own)
        return alike and torch.equal(many * number.factor.numerator, few * number.factor.denominator)

    def bind_width(self, width, ids, factor, reason):
        """After a cut the attribute must be how many of `ids` are left, over `factor`."""
        known = self.widths.setdefault(width, [])
        known.append((ids, factor))
        first, other = known[0]
        if known[-1] is known[0]:
            return
        short, long = (first, ids) if len(first) <= len(ids) else (ids, first)
        ratio = max(factor, other) / min(factor, other)
        if ratio.denominator == 1 and len(long) == len(short) * ratio.numerator:
            self.unite(short.expand(ratio.numerator, -1), long.view(ratio.numerator, -1))
        else:
            self.protect(first, reason)
            self.protect(ids, reason)

    def bind_places(self, name, ids, reason):
        """After a cut the buffer holds the places that its channels have among what is left of `ids`."""
        first = self.indexed.setdefault(name, ids)
        if len(first) == len(ids):
            self.unite(first, ids)
        else:
            self.protect(first, reason)
            self.protect(ids, reason)

    def keep_number(self, number, reason):
        """`number` enters a computation: the channels that it counts must stay, and its attribute must not change."""
        if is_tracked(number):
            self.protect(number.ids, reason)
            self.keep_widths(number, reason)

    def keep_widths(self, number, reason):
        """The attributes from which `number` is computed must not change."""
        for width in number.widths:
            self.fixed.setdefault(width, reason)

    def divides(self, number, divisor, reason):
        """What is left of the channels that `number` counts stays a multiple of the divisor, as forwards ask in an `assert`.

        A divisor that may change with a cut, as the groups of a depthwise convolution do, asks for nothing.
        """
        tracked = is_tracked(divisor)
        if is_tracked(number) and number.ids is not None and not (tracked and divisor.ids is not None):
            terms = () if number.widths else number.terms  # ids of a sum are those of all terms
            factors = {factor for _, factor in terms} or {number.factor}
            if len(factors) == 1 and (factor := factors.pop()):
                whole = Fraction(plain(divisor)).numerator * factor.denominator
                self.multiples.append((number.ids, whole, divisor.widths if tracked else (), reason))

    def issue(self, node, ids, linear):
        """`ids` are filters of the layer that the node applies."""
        self.issued.append((node, ids, linear))

    def parameter(self, name, shape, reason):
        """The ids of a parameter or buffer, along every dimension longer than 1."""
        layers = []
        for d, size in enumerate(shape):
            if 1 < size <= LONGEST:
                if (name, d) not in self.tensors:
                    self.tensors[name, d] = self.new(size)
                layers.append(spread(self.tensors[name, d], d, shape))
        return Value(tuple(shape), tuple(layers), reason)

    def roots(self):
        """`classes` at the end, when it is known which widths must not change."""
        for width, reason in self.fixed.items():
            for ids, _ in self.widths.get(width, ()):
                self.protect(ids, reason)
        for some in self.sums:
            self._keep_sum(*some)
        layers = {name.rpartition(".")[0] for name, _ in self.tensors}  # what they hold may change with their weights
        for some, divisor, widths, reason in self.multiples:
            if not any(name in layers for name, *_ in widths):
                self._keep_multiple(some, divisor, reason)
        return self.classes()

    def _keep_sum(self, ids, terms, reason):
        """Protects the classes without which the number of `ids` would no longer be the sum."""
        classes, left = self.classes(), Counter()
        for some, factor in ((ids, -1), *terms):
            for root, count in zip(*(t.tolist() for t in classes[some].unique(return_counts=True)), strict=True):
                left[root] += factor * count
        self.protect(torch.tensor([root for root, number in left.items() if number], dtype=torch.long), reason)

    def _keep_multiple(self, ids, divisor, reason):
        """Unites as many classes that may go as it takes for their number among `ids` to be a multiple; the rest stays."""
        classes = self.classes()
        kept = torch.cat([torch.zeros(0, dtype=torch.long), *(classes[some] for some, _ in self.reasons)])
        roots, counts = classes[ids][~torch.isin(classes[ids], kept)].unique(return_counts=True)
        open_roots, number = [], 0
        for root, count in zip(roots, counts.tolist(), strict=True):
            if count % divisor:
                open_roots.append(root[None])
                number += count
                self.unite(open_roots[0], open_roots[-1])
            if number % divisor == 0:
                open_roots, number = [], 0
        if open_roots:
            self.protect(open_roots[0], reason)

    def classes(self):
        """[count] for every id the smallest id of its class: every edge hooks the larger label on the smaller one."""
        label = torch.arange(self.count)
        if not self.edges:
            return label
        a, b = (torch.cat(ends) for ends in zip(*self.edges, strict=True))
        while not torch.equal(label[a], label[b]):
            ends = torch.cat([label[a], label[b]])
            low = torch.minimum(label[a], label[b]).repeat(2)
            label = label.scatter_reduce(0, ends, low, "amin")
            while not torch.equal(label, label[label]):
                label = label[label]
        return label
