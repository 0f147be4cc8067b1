"""Python numbers that remember where they come from: sizes read off tensors, and widths held by modules.

A size makes a node of the traced graph, and what is computed from it, too, so that the graph runs at any batch size.
A width knows the attribute that holds it (`conv.groups`, `self.c`), so that the attribute can be refreshed after a cut.
"""

import operator
from fractions import Fraction

import torch


class _Tracked:
    """What `Number` and `Real` have in common.

    Attributes:
        node: fx node that computes it, None while ids are propagated and for what is computed from widths alone.
        ids: channel ids that it counts, or None.
        widths: ((module name, attribute, index or None), ...) that it was read from.
        factor: its value over that of its one source (a dimension or an attribute); None: computed in another way.
    """

    node = ids = None
    widths = ()
    factor = Fraction(1)

    def __deepcopy__(self, memo):
        return self

    @property
    def whole(self):
        """Whether it equals the number of its ids, or the value of its attribute."""
        return self.factor == 1


class Number(_Tracked, int):
    """An `int` that remembers."""

    def __reduce__(self):
        return int, (int(self),)


class Real(_Tracked, float):
    """A `float` that remembers."""

    def __reduce__(self):
        return float, (float(self),)


def number(value, node=None, ids=None, widths=(), factor=Fraction(1)):
    """`value` as a Number or Real; booleans and everything else are left alone."""
    kind = {int: Number, float: Real}.get(type(value))
    if kind is None:
        return value
    result = kind(value)
    result.node, result.ids, result.widths, result.factor = node, ids, widths, factor
    return result


def _source(name, a, b=None):
    """(the operand from which a result is counted, factor of the result); (None, None) if it depends on both.

    A size by a width (C // self.groups), and a width divided by a width, are counted from the first: the second is taken for
    a setting that stays.
    """
    tracked = [o for o in (a, b) if isinstance(o, _Tracked)]
    if len(tracked) == 2:
        counted = [o for o in tracked if o.ids is not None]
        if len(counted) == 1 and all(o.node is None for o in tracked):
            tracked = counted
        elif not counted and name == "floordiv" and a.widths and b.widths:
            tracked = [a]
    if len(tracked) != 1 or name == "neg":
        return None, None
    source = tracked[0]
    other = b if source is a else a
    if source.factor is None or not isinstance(other, int):
        return source, None
    other = int(other)
    if name == "mul":
        return source, source.factor * other
    if name in ("floordiv", "truediv") and source is a and other and not int(a) % other:
        return source, source.factor / other
    return source, source.factor if name in ("add", "sub") and other == 0 and source is a else None


def _arithmetic(name, reflected):
    function = getattr(operator, name)

    def method(self, other=None):
        if name != "neg" and not isinstance(other, (int, float)) or isinstance(other, torch.Tensor):
            return NotImplemented
        operands = (self,) if name == "neg" else (other, self) if reflected else (self, other)
        value = function(*(_plain(o) for o in operands))
        tracked = [o for o in operands if isinstance(o, _Tracked)]
        nodes = [o.node for o in tracked if o.node is not None]
        node = None
        if nodes:
            arguments = tuple(getattr(o, "node", None) or o for o in operands)
            node = nodes[0].graph.call_function(function, arguments)
        source, factor = _source(name, *operands)
        counted = [source] if source is not None and factor is not None else tracked
        ids = [o.ids for o in counted if o.ids is not None]
        named = tracked if ids else counted  # C // self.groups follows C as long as self.groups stays
        widths = tuple(dict.fromkeys(w for o in named for w in o.widths))
        return number(value, node, torch.cat(ids) if len(ids) > 1 else ids[0] if ids else None, widths, factor)

    return method


def _plain(value):
    return int(value) if isinstance(value, int) else float(value)


for _name in ("add", "sub", "mul", "floordiv", "truediv", "mod", "pow"):
    for _kind in (Number, Real):
        setattr(_kind, f"__{_name}__", _arithmetic(_name, reflected=False))
        setattr(_kind, f"__r{_name}__", _arithmetic(_name, reflected=True))
for _kind in (Number, Real):
    _kind.__neg__ = _arithmetic("neg", reflected=False)


def plain(value):
    """`value` as an ordinary int or float."""
    return _plain(value) if isinstance(value, _Tracked) else value


def is_tracked(value):
    return isinstance(value, _Tracked)


def wrap_widths(model):
    """Replace, in place, every int that a module holds (alone or in a tuple or list) by a Number that knows it."""
    for name, module in model.named_modules():
        for attribute, value in list(vars(module).items()):
            if attribute.startswith("_") or attribute == "training":
                continue
            if type(value) is int:
                vars(module)[attribute] = number(value, widths=((name, attribute, None),))
            elif type(value) in (tuple, list) and value and all(type(v) is int for v in value):
                items = (number(v, widths=((name, attribute, i),)) for i, v in enumerate(value))
                vars(module)[attribute] = type(value)(items)
