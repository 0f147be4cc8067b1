"""The registry of rules, and what a rule is given."""

from dataclasses import dataclass, field

from torch import fx

from taylor_pruning.surgery.ids import ChannelIds, Value, flat
from taylor_pruning.surgery.numbers import is_tracked
from taylor_pruning.surgery.ways import Ways

RULES = {}  # operation name: rule
PIECEWISE_LINEAR = {}  # name of an operation that is piecewise linear: True or "each", see `rule`


def rule(names, linear=False):
    """Registers a rule for the operations of these names.

    Args:
        linear: True: piecewise linear in all their tensors together, as a sum is; "each": in each of them while the others
            are constant, as a product is. Exact derivatives apply to what is piecewise linear.
    """

    def register(function):
        for name in names.split():
            RULES[name] = function
            if linear:
                PIECEWISE_LINEAR[name] = linear
        return function

    return register


@dataclass
class Info:
    """What the propagation of ids found out about one node.

    Attributes:
        source: zeros in the operands do not make zeros in the result; where gates are needed, one is needed here.
        reads: it sums over channels, or is unknown: closed channels must be zero before it.
        mains: operands whose zeros make the result's zeros; None: each operand by itself.
        constant: it depends on parameters, buffers and constants alone.
        nonlinear: name of an operation that is not piecewise linear, or None.
        value: of a node with one tensor as its result.
    """

    source: bool = False
    reads: bool = False
    mains: tuple | None = None
    constant: bool = False
    nonlinear: str | None = None
    value: Value | None = None


@dataclass
class Call:
    """One operation of the graph, with values in the place of tensors and `Number`s in the place of sizes.

    Attributes:
        infos: {node: Info} of all nodes so far.
        ways: how it is cut where several ways keep the network exact.
        operands: [(node, value)] of the tensors among the arguments, in order.
        why: the first reason for which something was protected here.
    """

    node: fx.Node
    name: str
    args: tuple
    kwargs: dict
    ids: ChannelIds
    info: Info
    infos: dict
    ways: Ways = Ways()
    operands: list = field(default_factory=list)
    why: str | None = None

    @property
    def shape(self):
        return self.node.meta["shape"]

    @property
    def where(self):
        module = self.node.meta.get("module")
        if self.node.op == "call_module":
            return f"{self.node.target}, whose forward no graph can repeat"
        if self.name == "pick":
            return module or "the network"
        return f"{self.name} ({module})" if module else self.name

    def get(self, name, position, default=None):
        """An argument by name or position (that of the tensor is 0)."""
        return self.kwargs.get(name, self.args[position] if len(self.args) > position else default)

    def rest(self, position):
        """Arguments from a position on that are given one by one or as one tuple."""
        given = self.args[position:]
        if len(given) == 1 and isinstance(given[0], (tuple, list)):
            given = given[0]
        return list(given)

    def values(self):
        return [value for _, value in self.operands]

    def is_constant(self, position):
        """Whether the operand of that position (among the tensors) depends on no input."""
        return self.infos[self.operands[position][0]].constant

    def is_piecewise_linear(self):
        """Whether the operation is piecewise linear in those of its tensors that depend on the input."""
        inputs = sum(not self.is_constant(i) for i in range(len(self.operands)))
        return not inputs or (self.name in PIECEWISE_LINEAR and (inputs == 1 or PIECEWISE_LINEAR[self.name] is True))

    def protect(self, ids, reason):
        """`ids` cannot be cut because of this operation."""
        reason = f"{reason} {self.where}"
        self.why = self.why or reason
        self.ids.protect(ids, reason)

    def multiplies(self, number, layers):
        """Notes the number of multiply-accumulates; `layers`: ids, or None, along the dimensions of what is multiplied."""
        self.ids.products.append((self.node, number, [flat(layer) for layer in layers if layer is not None]))

    def keep_numbers(self):
        """Protects channels whose number is among the arguments, because it changes the result."""

        def visit(item):
            if is_tracked(item):
                self.ids.keep_number(item, f"their number enters {self.where}")
            return item

        fx.node.map_aggregate((self.args, self.kwargs), visit)

    def result(self, layers=(), reason=None, shape=None):
        values = self.values()
        inherited = self.reason_of(values) if not layers or len(values) == 1 else None
        made = self.ids.value(self.shape if shape is None else shape, layers, reason or self.why or inherited)
        made.lost = self.why or (values[0].lost if len(values) == 1 else None)
        return made

    @staticmethod
    def reason_of(values):
        return next((v.reason for v in values if v.reason), None)

    def unknown(self, reason=None):
        """The rule of an unknown operation: no channel of its operands may be cut."""
        reason = reason or f"passes through {self.where}"
        self.info.reads = self.info.source = True
        self.keep_numbers()
        for value in self.values():
            for layer in value.layers:
                self.ids.protect(layer, reason)
        return self.fill(reason)

    def fill(self, reason):
        """A result without ids, in the structure that the trace saw."""

        def made(shape):
            if not isinstance(shape, (tuple, list)):
                return shape
            if shape and isinstance(shape[0], (tuple, list)):
                return tuple(made(s) for s in shape)
            return Value(tuple(shape), (), reason)

        if "shapes" in self.node.meta:
            return tuple(map(made, self.node.meta["shapes"]))
        return Value(self.shape, (), reason) if "shape" in self.node.meta else None
