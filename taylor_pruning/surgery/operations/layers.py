"""Convolutions and fully connected layers, functional, with any weight."""

import math

from taylor_pruning.surgery.ids import Value, spread, varying
from taylor_pruning.surgery.operations.products import contract
from taylor_pruning.surgery.operations.registry import rule


@rule("conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d", linear="each")
def conv(call):
    transposed = "transpose" in call.name
    x, weight, bias = call.get("input", 0), call.get("weight", 1), call.get("bias", 2)
    groups = call.get("groups", 6, 1)
    ids, info, rank = call.ids, call.info, int(call.name[-2])
    channel_dim = len(x.shape) - rank - 1
    inputs = ids.vector(x, channel_dim)
    for layer in weight.layers:
        if set(varying(layer)) - {0, 1}:
            ids.protect(layer, f"positions of the kernel of {call.where}")
    for layer in x.layers:
        if varying(layer) != [channel_dim]:
            call.protect(layer, "is convolved over channels in")
    by_row, by_column = ids.vector(weight, 0), ids.vector(weight, 1)
    constant = call.infos[call.node.all_input_nodes[0]].constant
    info.source = True
    depthwise = int(groups) == x.shape[channel_dim] > 1
    if depthwise and inputs is not None:
        outputs = _depthwise(call, inputs, by_row, weight, groups, transposed)
    else:
        outputs = _mixing(call, x, inputs, (by_row, by_column), weight, groups, transposed)
    if bias is not None:
        ids.attach(bias, outputs, bias.reason or f"meets a tensor of fixed size in {call.where}")
    info.source = info.source or bias is not None
    call.info.constant = call.info.constant and constant
    positions = x.shape if transposed else call.shape
    call.multiplies(math.prod((*positions, *weight.shape[1:])), (inputs if transposed else outputs, by_column))
    layers = [] if outputs is None else [spread(outputs, channel_dim, call.shape)]
    return call.result(layers, None if outputs is not None else weight.reason)


def _depthwise(call, inputs, by_row, weight, groups, transposed):
    """Filter i belongs to input channel i // multiplier."""
    ids = call.ids
    multiplier = weight.shape[1] if transposed else weight.shape[0] // len(inputs)
    outputs = inputs.repeat_interleave(multiplier)
    rows = inputs if transposed else outputs
    call.info.source = False
    if by_row is None or len(by_row) != len(rows):
        ids.protect(inputs, weight.reason or f"meets a weight of fixed size in {call.where}")
    else:
        ids.unite(by_row, rows)
    ids.bind(groups, inputs, f"the number of groups is fixed in {call.where}")
    ids.depthwise.append((call.node, outputs))
    return outputs


def _mixing(call, x, inputs, weights, weight, groups, transposed):
    ids, info = call.ids, call.info
    by_row, by_column = weights
    own, outputs = (by_row, by_column) if transposed else (by_column, by_row)
    info.reads, module = True, call.node.meta["module"]
    if groups > 1 and not transposed:
        ids.grouped.add(module)
        if module in call.ways.groups and inputs is not None and outputs is not None:
            return _whole_groups(call, inputs, outputs, own, groups)
    if groups > 1:  # every group must keep as many channels as the others
        inputs = _of_one_group(ids, inputs, groups)
        if transposed:
            own = _of_one_group(ids, own, groups)
            outputs = None if outputs is None else outputs.repeat(int(groups))
        else:
            _of_one_group(ids, outputs, groups)
    if inputs is not None and own is not None:
        ids.unite(inputs, own)
    else:
        for one, other in ((inputs, weight), (own, x)):
            if one is not None:
                ids.protect(one, other.reason or f"meets a fixed number of channels in {call.where}")
    if outputs is None:
        fixed = ids.new(call.shape[len(x.shape) - int(call.name[-2]) - 1])
        of_fixed_size = weight.reason or f"meets a weight of fixed size in {call.where}"
        ids.protect(fixed, of_fixed_size if weight.shape[int(transposed)] > 1 else "has only one filter")
        ids.issue(call.node, fixed, linear=False)
    else:
        ids.issue(call.node, outputs, linear=False)
    return outputs


def _of_one_group(ids, channels, groups):
    """The channels of the first group, with which those of all others are united."""
    if channels is None:
        return None
    table = channels.view(int(groups), -1)
    ids.unite(table[:1], table)
    return table[0]


def _whole_groups(call, inputs, outputs, own, groups):
    """A group of filters goes with all input channels that it reads."""
    ids, table = call.ids, inputs.view(int(groups), -1)
    ids.unite(table[:, :1], table)
    ids.unite(table[:, :1], outputs.view(int(groups), -1))
    if own is not None:
        ids.protect(own, f"{call.where} loses whole groups")
    ids.bind(groups, table[:, 0], f"the number of groups is fixed in {call.where}")
    ids.issue(call.node, outputs, linear=False)
    return outputs


@rule("deform_conv2d")
def deform_conv(call):
    """A convolution that reads at places computed from the input (torchvision), and may weigh them."""
    x, weight, *places, bias = call.args[:5]
    ids, groups, of_places = call.ids, call.args[11], int(call.args[12])
    inputs, by_row, by_column = ids.vector(x, 1), ids.vector(weight, 0), ids.vector(weight, 1)
    for value in (x, *places):
        for layer in value.layers:
            if value is not x or varying(layer) != [1]:
                call.protect(layer, "enters")
    if inputs is not None and len(inputs) == int(groups):
        outputs = _depthwise(call, inputs, by_row, weight, groups, False)
    else:
        outputs = _mixing(call, x, inputs, (by_row, by_column), weight, groups, False)
    call.multiplies(math.prod((*call.shape, *weight.shape[1:])), (outputs, by_column))
    _of_one_group(ids, inputs, of_places)  # channels read at places of their own group
    ids.attach(bias, outputs, f"meets a tensor of fixed size in {call.where}")
    call.info.source = True
    return call.result([] if outputs is None else [spread(outputs, 1, call.shape)])


@rule("linear bilinear", linear="each")
def linear(call):
    if call.name != "linear":
        return call.unknown()
    x, weight, bias = call.get("input", 0), call.get("weight", 1), call.get("bias", 2)
    batch = [f"b{i}" for i in range(len(x.shape) - 1)]
    operands = [(x, [*batch, "in"]), (weight, ["out", "in"][-len(weight.shape) :])]
    out = [*batch, "out"] if len(weight.shape) > 1 else batch
    result = contract(call, operands, out, linear=True)
    if bias is not None:
        call.info.source = True
        ids = call.ids.vector(result, -1) if len(weight.shape) > 1 else None
        call.ids.attach(bias, ids, f"meets a tensor of fixed size in {call.where}")
    return result


@rule("_pack_padded_sequence", linear=True)
def packed(call):
    """Steps of samples of several lengths, one row each: [steps, ...] and how many samples each step has."""
    x, (rows, steps) = call.values()[0], call.node.meta["shapes"]
    kept = []
    for layer in x.layers:
        if min(varying(layer)) < 2:
            call.protect(layer, "passes through")
        else:
            kept.append(layer[0, 0].expand(rows))
    return call.ids.value(rows, kept, x.reason or call.why), Value(steps, (), f"passes through {call.where}")


@rule("lstm gru rnn_tanh rnn_relu lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell")
def recurrent(call):
    """The first layer's weights follow the channels that they read; hidden channels stay."""
    x, one_step = call.args[0], call.name.endswith("cell")
    several = not one_step and isinstance(call.args[3], (tuple, list))  # their lengths come before the weights
    given = call.args[3:] if several else call.args[2:]
    weights = given[:2] if one_step else given[0]
    steps = math.prod(x.shape[:-1])
    for weight in weights:
        if len(weight.shape) == 2:
            call.multiplies(steps * math.prod(weight.shape), weight.layers)
    if one_step:
        first = weights[:1]
    else:  # of every layer and direction
        directions = 2 if given[5] else 1
        first = weights[:: len(weights) // (int(given[2]) * directions)][:directions]
    ids, last, hidden = call.ids, len(x.shape) - 1, f"passes through {call.where}"
    call.info.reads = call.info.source = True
    inputs = ids.vector(x, last)
    for value in call.values():
        along = 1 if any(value is weight for weight in first) else last if value is x else None
        for layer in value.layers:
            if varying(layer) != [along]:
                ids.protect(layer, hidden)
    for weight in first:
        own = ids.vector(weight, 1)
        if inputs is not None and own is not None:
            ids.unite(inputs, own)
        else:
            ids.protect(inputs, weight.reason or hidden)
            ids.protect(own, x.reason or hidden)
    return call.fill(hidden)
