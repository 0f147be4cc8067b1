"""Python numbers that remember where they come from: sizes read off tensors, and widths held by modules.

A size makes a node of the traced graph, and what is computed from it, too, so that the graph runs at any batch size.
A width knows the attribute that holds it (`conv.groups`, `self.c`), so that the attribute can be refreshed after a cut.
They mean something in the graph in which they arose; where a forward has kept them from another one, they are plain numbers.
"""

import math
import operator
from contextlib import contextmanager
from fractions import Fraction

import numpy as np
import torch

from taylor_pruning.held import own_values
from taylor_pruning.surgery.recorded_calls import pick
from taylor_pruning.surgery.threads import ONE_AT_A_TIME


class _Tracked:
    """What `Number` and `Real` have in common.

    Attributes:
        graph: fx graph in which it arose.
        node: fx node that computes it, None while ids are propagated and for what is computed from widths alone.
        ids: channel ids that it counts, or None.
        widths: ((module name, attribute, index or None), ...) that it was read from.
        factor: its value over that of its one source (a dimension or an attribute); None: computed in another way.
        rounded: what of the factor comes from quotients, which another number of channels may round.
        terms: ((ids, factor), ...) whose sum it is, where it adds up several numbers of channels; of what a width has more
            than such a sum, the terms that are added to the width.
    """

    graph = node = ids = None
    widths = terms = ()
    factor, rounded = Fraction(1), 0

    def __deepcopy__(self, memo):
        return self

    def __eq__(self, other):
        """Sizes of two graphs differ: what a forward has kept by them (lru_cache, as einops does) it computes anew."""
        same = (not isinstance(other, _Tracked) or other.graph is self.graph) and super().__eq__(other)
        if same is True and is_tracked(self) and is_tracked(other):
            _note_equal(self, other)
            _note_equal(other, self)
        return same

    def __ne__(self, other):
        return not self == other

    def __hash__(self):
        return super().__hash__()

    @property
    def whole(self):
        """Whether it equals the number of its ids, or the value of its attribute."""
        return self.factor == 1


def _note_equal(size, width):
    """Adds to the graph, while a forward is recorded, that a number of channels was found to be what a module holds."""
    if size.node is None or width.node is not None or not width.widths or not _of_channels(size.node):
        return
    graph = size.node.graph
    if next(iter(reversed(graph.nodes))).op != "output":  # else the forward has ended
        graph.call_function(operator.eq, (size.node, width))


class Number(_Tracked, int):
    """An `int` that remembers."""

    def __int__(self):
        """A plain number. If this was a product of sizes, or a number of channels or computed from one, a later size argument
        of its value is recorded as that."""
        value = super().__int__()
        of_sizes = is_tracked(self) and self.node is not None
        if of_sizes and (self.node.target is operator.mul or _of_channels(self.node)):
            _PRODUCTS[-1][value] = self.node
        return value

    def __reduce__(self):
        return int, (int(self),)


class Real(_Tracked, float):
    """A `float` that remembers."""

    def __int__(self):
        """A plain number. If this was a share of a number of channels, a later bound of its value is recorded as that share."""
        value = super().__int__()
        if is_tracked(self) and self.node is not None and _of_channels(self.node):
            _PRODUCTS[-1][value] = self.node.graph.call_function(math.trunc, (self.node,))
        return value

    def __reduce__(self):
        return float, (float(self),)


def _of_channels(node):
    """Whether a size is computed from one alone, that of a second dimension: other sizes are seldom those of channels."""
    while len(node.all_input_nodes) == 1 and node.target is not pick:
        (node,) = node.all_input_nodes
    return node.target is pick and node.args[1] == 1


ROUNDING = {"floor": math.floor, "ceil": math.ceil, "round": round, "trunc": math.trunc}
_GRAPHS = [None]  # the last is the one that is recorded or propagated now
_PRODUCTS = [{}]  # {plain number: node of the product of sizes, or number of channels, that it was} in each of them


@contextmanager
def numbers_of(graph):
    """While open, sizes and widths of this graph are tracked, and those that arise are its own; np.prod multiplies them.

    Another thread waits until it is closed.
    """
    with ONE_AT_A_TIME, _numbers_of(graph):
        yield


@contextmanager
def _numbers_of(graph):
    prod = np.prod

    def product(values, *args, **kwargs):
        sizes = isinstance(values, (tuple, list)) and any(map(is_tracked, values)) and not args and not kwargs
        return math.prod(values) if sizes else prod(values, *args, **kwargs)

    _GRAPHS.append(graph)
    _PRODUCTS.append({})
    np.prod = product
    try:
        yield
    finally:
        np.prod = prod
        _GRAPHS.pop()
        _PRODUCTS.pop()


def product_of(value):
    """The node of the product of sizes, or number of channels, that int() has made this number of; None if there is none."""
    return _PRODUCTS[-1].get(value)


def number(value, node=None, ids=None, widths=(), factor=Fraction(1), rounded=0):
    """`value` as a Number or Real; booleans and everything else are left alone."""
    kind = {int: Number, float: Real}.get(type(value))
    if kind is None:
        return value
    result = kind(value)
    result.graph, result.node, result.ids, result.widths = _GRAPHS[-1], node, ids, widths
    result.factor, result.rounded = factor, rounded
    return result


def _source(name, a, b=None):
    """(the operand from which a result is counted, factor of the result, `rounded`); (None, None, 0) if it depends on both.

    Shares of one number add up. A size by a width (C // self.groups), and a width divided by a width, are counted from the
    first: the second is taken for a setting that stays.
    """
    tracked = [o for o in (a, b) if is_tracked(o)]
    if len(tracked) == 2 and name in ("add", "sub") and _of_one_source(a, b):
        sign = 1 if name == "add" else -1
        total, rounded = a.factor + sign * b.factor, a.rounded + sign * b.rounded
        # k // 2 + k // 2 is k only as long as k is even, k // 2 + (k - k // 2) always
        return a, None if rounded and total.denominator < a.factor.denominator else total, rounded
    if len(tracked) == 2:
        counted = [o for o in tracked if o.ids is not None]
        if len(counted) == 1 and all(o.node is None for o in tracked):
            tracked = counted
        elif not counted and name == "floordiv" and a.widths and b.widths:
            tracked = [a]
    if len(tracked) != 1 or name == "neg":
        return None, None, 0
    source = tracked[0]
    if name in ROUNDING:
        return source, source.factor, source.rounded
    other = b if source is a else a
    if source.factor is None or not math.isfinite(other):
        return source, None, 0
    other = Fraction(_plain(other))
    if name == "mul" and other.denominator == 1:
        return source, source.factor * other, source.rounded * other
    other = 1 / other if name == "mul" and other else other
    share = name == "mul" or name in ("floordiv", "truediv") and source is a
    if share and other and not Fraction(_plain(source)) % other:
        return source, source.factor / other, source.factor / other
    same = other == 0 and (name == "add" or name == "sub" and source is a)
    return source, source.factor if same else None, source.rounded


def _of_one_source(a, b):
    """Whether both are known shares or multiples of the same number of channels."""
    if None in (a.factor, b.factor) or a.widths != b.widths or (a.ids is None) != (b.ids is None):
        return False
    return bool(a.widths) if a.ids is None else torch.equal(a.ids, b.ids)


def _terms(name, a, b=None):
    """The `terms` of a sum or difference of two numbers of channels, or of such sums; () of all else."""
    if name not in ("add", "sub"):
        return ()
    width = name == "sub" and is_tracked(a) and a.ids is None and a.whole and len(a.widths) == 1
    found = []
    for operand, sign in ((a, 1), (b, 1 if name == "add" else -1))[width:]:
        counts = is_tracked(operand) and operand.ids is not None and not operand.widths
        exact = counts and operand.factor is not None and not operand.rounded
        own = counts and (operand.terms or exact and ((operand.ids, operand.factor),))
        if not own:
            return ()
        found += [(ids, sign * factor) for ids, factor in own]
    return tuple(found)


def _arithmetic(name, reflected):
    function = ROUNDING.get(name) or getattr(operator, name)
    unary = name == "neg" or name in ROUNDING

    def method(self, other=None):
        if not unary and not isinstance(other, (int, float)):
            return NotImplemented
        if unary and other is not None:  # round(x, digits)
            return function(_plain(self), other)
        operands = (self,) if unary else (other, self) if reflected else (self, other)
        operands = tuple(o if is_tracked(o) else plain(o) for o in operands)
        value = function(*(_plain(o) for o in operands))
        tracked = [o for o in operands if is_tracked(o)]
        if not tracked:
            return value
        nodes = [o.node for o in tracked if o.node is not None]
        node = None
        if nodes:
            arguments = tuple(getattr(o, "node", None) or o for o in operands)
            node = nodes[0].graph.call_function(function, arguments)
        source, factor, rounded = _source(name, *operands)
        counted = [source] if source is not None and factor is not None else tracked
        ids = [o.ids for o in counted if o.ids is not None]
        named = tracked if ids else counted  # C // self.groups follows C as long as self.groups stays
        widths = tuple(dict.fromkeys(w for o in named for w in o.widths))
        ids = torch.cat(ids) if len(ids) > 1 else ids[0] if ids else None
        result = number(value, node, ids, widths, factor, rounded)
        if factor is None and (terms := _terms(name, *operands)):
            result.terms = terms
        return result

    return method


def _plain(value):  # int(value) would count as that of the forward
    return int.__int__(value) if isinstance(value, int) else float(value)


for _name in ("add", "sub", "mul", "floordiv", "truediv", "mod", "pow"):
    for _kind in (Number, Real):
        setattr(_kind, f"__{_name}__", _arithmetic(_name, reflected=False))
        setattr(_kind, f"__r{_name}__", _arithmetic(_name, reflected=True))
for _kind in (Number, Real):
    for _name in ("neg", *ROUNDING):
        setattr(_kind, f"__{_name}__", _arithmetic(_name, reflected=False))
    _kind.__divmod__ = lambda self, other: (self // other, self % other)
Number.__rshift__ = lambda self, bits: self // 2**bits
Number.__lshift__ = lambda self, bits: self * 2**bits


def plain(value):
    """`value` as an ordinary int or float."""
    return _plain(value) if isinstance(value, _Tracked) else value


def is_tracked(value):
    """Whether it is a size or a width of the graph that is recorded or propagated now."""
    return isinstance(value, _Tracked) and value.graph is _GRAPHS[-1]


def wrap_widths(copied, model):
    """Replace, in place, every int that a module of the copy holds (alone or in a tuple, list, dictionary or settings) by a
    Number that knows it. What a copy shares with the model, as a module may that copies itself, stays as it is."""
    shared = {id(held) for module in model.modules() for held, _ in own_values(module).values()}
    for name, module in copied.named_modules():
        for attribute, (held, key) in own_values(module).items():
            value = held[key]
            if id(held) in shared:
                continue
            if type(value) is int:
                held[key] = number(value, widths=((name, attribute, None),))
            elif type(value) in (tuple, list) and value and all(type(v) is int for v in value):
                items = (number(v, widths=((name, attribute, i),)) for i, v in enumerate(value))
                held[key] = type(value)(items)
