"""Functions of single elements, sums and products of tensors."""

from taylor_pruning.surgery.ids import varying
from taylor_pruning.surgery.operations.registry import rule
from taylor_pruning.surgery.recorded_calls import operation_name


class Axis:
    """One axis of the result of an elementwise operation: its ids and the operands that have it."""

    def __init__(self, layer, operand):
        self.layer, self.carriers = layer, {operand}


def align(ids, values, shape, where):
    """The axes of an elementwise result of `shape` of several operands, and a reason where some axis is protected.

    Layers that run along the same dimension are united. An operand that has several elements along an axis but no ids
    there protects it; one that is broadcast along it does not.
    """
    axes, reason = [], None
    for i, value in enumerate(values):
        for layer in value.layers:
            layer = layer[(None,) * (len(shape) - layer.dim())].expand(shape)
            axis = next((axis for axis in axes if varying(axis.layer) == varying(layer)), None)
            if axis is None:
                axes.append(Axis(layer, i))
            else:
                ids.unite(axis.layer, layer)
                axis.carriers.add(i)
    for axis in list(axes):
        for i, value in enumerate(values):
            if i in axis.carriers:
                continue
            shift = len(shape) - len(value.shape)
            if any(d >= shift and value.shape[d - shift] > 1 for d in varying(axis.layer)):
                known = (
                    value.lost if value.layers else value.reason
                )  # one with channels elsewhere has a fixed size here
                reason = known or f"meets a tensor of fixed size in {where}"
                ids.protect(axis.layer, reason)
                axes.remove(axis)
                break
    return axes, reason


def finish(call, axes, reason, shape=None):
    return call.result([axis.layer for axis in axes], reason, shape)


@rule("add sub rsub radd maximum minimum where fmax fmin masked_fill", linear=True)
@rule("complex", linear=True)
@rule("addcmul addcdiv lerp")
def total(call):
    """x + y: zero where both operands are."""
    values = call.values()
    axes, reason = align(call.ids, values, call.shape, call.where)
    numbers = [a for a in call.args if isinstance(a, (int, float))]
    if call.name not in ("masked_fill",) and all(n == 0 for n in numbers):
        numbers = []
    broadcast = any(len(axis.carriers) < len(values) for axis in axes)
    constant = any(call.is_constant(i) for i in range(len(values))) and len(values) > 1
    call.info.source = broadcast or constant or bool(numbers)
    call.keep_numbers()
    if call.name in ("where", "masked_fill"):  # zeros of the condition make no zeros
        call.info.mains = tuple(node for node, _ in call.operands if node.meta.get("real"))
    return finish(call, axes, reason)


@rule("copy", linear=True)
def copies(call):
    """What is written over another tensor."""
    axes, reason = align(call.ids, call.values(), call.shape, call.where)
    call.info.source = call.is_constant(1) or any(1 not in axis.carriers for axis in axes)
    call.info.mains = (call.operands[1][0],)
    return finish(call, axes, reason)


@rule("mul multiply div true_divide divide rdiv truediv rtruediv rmul", linear="each")
def product(call):
    """x * y: zero where one of the operands is; x / y where x is."""
    call.keep_numbers()
    values, divides = call.values(), call.name not in ("mul", "multiply", "rmul")
    if len(values) == 1:
        if divides and not hasattr(call.args[0], "layers") or call.name in ("rdiv", "rtruediv"):
            call.info.source, call.info.nonlinear = True, None if call.info.constant else call.name
        return call.result(values[0].layers)
    axes, reason = align(call.ids, values, call.shape, call.where)
    find_zero_operands(call, axes, numerator_only=divides)
    if any(len(axis.carriers) > 1 for axis in axes) and _is_zero_by_zero(call, divides):
        call.info.source = True  # the gate is set behind the division
    if divides and not call.is_constant(1):
        call.info.nonlinear = call.name
    return finish(call, axes, reason)


def _is_zero_by_zero(call, divides):
    """Whether an operand divides by what is zero where the other one is: x / x.sum() and x * x.square().mean().rsqrt()."""
    nodes = [node for node, _ in call.operands[:2]]
    for numerator, other in ((0, 1),) if divides else ((0, 1), (1, 0)):
        behind = _vanishing(call, nodes[other])
        if (divides or any(map(_has_pole, behind))) and behind & _vanishing(call, nodes[numerator]):
            return True
    return False


def _vanishing(call, node):
    """The nodes whose zeros make those of the node, or its poles."""
    found, front = set(), [node]
    while front:
        node = front.pop()
        info = call.infos[node]
        if node not in found and "shape" in node.meta and not info.constant:
            found.add(node)
            if not info.source or _has_pole(node):
                front.extend(node.all_input_nodes if info.mains is None else info.mains)
    return found


def _has_pole(node):
    """Whether its result is infinite where what it reads is zero."""
    name, exponent = operation_name(node), node.args[1] if len(node.args) > 1 else None
    negative = isinstance(exponent, (int, float)) and exponent < 0
    return name in ("rsqrt", "reciprocal", "rdiv", "rtruediv") or name in ("pow", "float_power") and negative


def find_zero_operands(call, axes, numerator_only=False):
    """Finds the operands whose zeros are the product's zeros; it is a source where some axis has no such operand."""
    operands = range(1) if numerator_only else range(len(call.operands))
    usable = [i for i in operands if not call.is_constant(i)]
    open_axes, mains = list(axes), []
    while open_axes and usable:
        best = max(
            usable, key=lambda i: (sum(i in a.carriers for a in open_axes), not call.infos[call.operands[i][0]].source)
        )
        left = [a for a in open_axes if best not in a.carriers]
        if len(left) == len(open_axes):
            break
        mains.append(call.operands[best][0])
        open_axes = left
    call.info.source = bool(open_axes)
    call.info.mains = tuple(mains)


@rule("normal")
def drawn(call):
    """Noise around means, or in the place of a tensor, is nowhere zero."""
    call.keep_numbers()
    axes, reason = align(call.ids, call.values(), call.shape, call.where)
    call.info.source = True
    return finish(call, axes, reason)


KEEP_ZERO_LINEAR = """relu relu6 leaky_relu rrelu dropout dropout1d dropout2d dropout3d feature_dropout alpha_dropout clone
    contiguous detach to type float double half bfloat16 long int abs neg positive type_as floor ceil round trunc sign cpu cuda
    stochastic_depth data real imag conj resolve_conj resolve_neg hardshrink softshrink _data requires_grad"""
KEEP_ZERO = """elu selu celu gelu silu mish hardswish tanh tanhshrink softsign square sqrt sin tan asin atan
    sinh expm1 log1p erf nan_to_num feature_alpha_dropout poisson rad2deg deg2rad"""
# functions of single elements, often smooth
CURVED = {*KEEP_ZERO.split(), *"pow float_power mul multiply div divide true_divide".split()}
BREAK_ZERO = """sigmoid hardsigmoid softplus log_sigmoid exp cos rsqrt reciprocal log log2 log10 exp2 erfc cosh bernoulli
    uniform exponential cauchy log_normal geometric fill zero dropout_ angle"""


@rule(KEEP_ZERO_LINEAR, linear=True)
@rule(KEEP_ZERO)
def keeps_zero(call):
    call.keep_numbers()
    if call.name == "abs" and not call.operands[0][0].meta["real"]:  # of complex numbers: the length of two
        call.info.nonlinear = call.name
    return call.result(call.args[0].layers if hasattr(call.args[0], "layers") else call.values()[0].layers)


@rule(BREAK_ZERO)
def breaks_zero(call):
    call.keep_numbers()
    call.info.source = True
    return call.result(call.values()[0].layers)


@rule("threshold clamp clip hardtanh clamp_min clamp_max", linear=True)
def clamps(call):
    """Zero stays zero if it lies between the bounds."""
    call.keep_numbers()
    if len(call.operands) > 1:
        return total(call)
    bounds = [*call.args[1:3], *(call.kwargs.get(n) for n in ("min", "max", "min_val", "max_val"))]
    bounds = [b for b in bounds if isinstance(b, (int, float)) and not isinstance(b, bool)]
    inside = {"clamp_min": (None, 0), "clamp_max": (0, None)}
    if call.name == "hardtanh":
        low, high = call.get("min_val", 1, -1.0), call.get("max_val", 2, 1.0)
    elif call.name in inside:
        low, high = (call.get("min", 1), None) if call.name == "clamp_min" else (None, call.get("max", 1))
    else:
        low, high = call.get("min", 1), call.get("max", 2)
    call.info.source = call.name == "threshold" or (low is not None and low > 0) or (high is not None and high < 0)
    return call.result(call.values()[0].layers)


@rule("fake_quantize_per_tensor_affine fake_quantize_per_channel_affine")
def fake_quantised(call):
    """Values on a grid, of which zero is a point; one grid a channel goes with its channel."""
    x = call.values()[0]
    if call.name == "fake_quantize_per_channel_affine":
        ids = call.ids.vector(x, int(call.get("axis", 3)))
        for name, position in {"scale": 1, "zero_point": 2}.items():
            call.ids.attach(call.get(name, position), ids, f"meets a tensor of fixed size in {call.where}")
    call.info.mains = (call.operands[0][0],)
    return call.result(x.layers)


@rule("pow rpow float_power")
def power(call):
    call.keep_numbers()
    values = call.values()
    exponent = call.get("exponent", 1)
    if len(values) > 1:
        axes, reason = align(call.ids, values, call.shape, call.where)
        call.info.source = True
        return finish(call, axes, reason)
    call.info.source = call.name == "rpow" or not (isinstance(exponent, (int, float)) and exponent >= 1)
    return call.result(values[0].layers)


@rule("prelu", linear="each")
def prelu(call):
    x, weight = call.values()[:2]
    if weight.shape and weight.shape[0] > 1:
        ids = call.ids.vector(x, 1)
        call.ids.attach(weight, ids, call.where)
        if ids is not None:
            call.ids.settings.setdefault(call.node.meta["module"], ids)
    call.info.mains = (call.operands[0][0],)
    return call.result(x.layers)


@rule("eq ne lt le gt ge isnan isfinite isinf logical_not logical_and logical_or logical_xor bitwise_and bitwise_or "
      "bitwise_not and or xor invert fmod remainder mod floordiv floor_divide atan2")  # fmt: skip
def compares(call):
    call.keep_numbers()
    axes, reason = align(call.ids, call.values(), call.shape, call.where)
    call.info.source = True
    return finish(call, axes, reason)


@rule("zeros_like ones_like full_like rand_like randn_like empty_like randint_like")
def like(call):
    """A new tensor of the same shape: the same channels, never closed."""
    call.info.source = call.name != "zeros_like"
    call.info.mains = ()
    return call.result(call.values()[0].layers)
