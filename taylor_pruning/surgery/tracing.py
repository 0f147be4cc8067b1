"""Records one forward of a network as a graph of functional operations.

The forward runs on tensors without values (device "meta") under a `TorchFunctionMode`, which sees every call of torch: a
subclass of Conv2d is then a `conv2d`, a BatchNorm that activates is a `batch_norm` and a `relu`, a hook is the
operations that it runs. Control flow on shapes simply runs; sizes are `Number`s, so that the graph holds for every batch size.
"""

import operator
import traceback
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from torch import fx, nn

from taylor_pruning.errors import InputError
from taylor_pruning.generators import seeded
from taylor_pruning.held import held_tensors
from taylor_pruning.kept_state import attributes_of, changed
from taylor_pruning.memory import raise_out_of_memory
from taylor_pruning.modes import set_mode
from taylor_pruning.surgery.batch_size import LEAST_OF_VALUES, batch_size, first_samples
from taylor_pruning.surgery.captured import untouched
from taylor_pruning.surgery.copying import copy_of, structure_of
from taylor_pruning.surgery.draws import fixed_draws, unchecked_distributions
from taylor_pruning.surgery.lines import place_of
from taylor_pruning.surgery.nested import Slot, map_tensors, tensors_in
from taylor_pruning.surgery.numbers import numbers_of, wrap_widths
from taylor_pruning.surgery.outliving import forget
from taylor_pruning.surgery.recorded_calls import pick, set_grad, writes
from taylor_pruning.surgery.recorder import TRACE_ERRORS, Recorder
from taylor_pruning.surgery.tensor_nodes import Untraceable
from taylor_pruning.surgery.unseen_calls import calls_seen, watched


@dataclass
class Trace:
    """A recorded forward.

    Attributes:
        graph: fx.Graph. Every tensor node has its `shape` and the name of the `module` that ran it in `meta`.
        constants: {name: tensor} that the forward uses and that are neither parameters nor buffers. held: {name: (module,
            attribute)} of those that modules compute anew whenever their mode is set.
        inputs: the example with a `Slot` in the place of every tensor.
        output: what the forward returned, with a `Slot` in the place of every tensor, and of every size that is read off one.
        batch: the size of the batch in the shapes of the nodes.
        training: the mode of training.
        reads_mode: whether the forward may do other steps in the other mode.
        reads_sizes: whether it may do other steps, or use other numbers, on inputs of another size.
        kept: names of the attributes of modules in which the forward leaves something.
        written: names of the parameters and buffers to which it writes. rewritten: of the constants.
        caches: containers outside of modules in which it keeps tensors.
        multiples: of the batch, for which plain numbers were taken.
        idle: graph of the layers that run although the output does not depend on them; None if there are none.
        types: of the inputs.
        at_sizes: {(shapes, types) of inputs: surgery.other_sizes.AtSize, or None where it does other steps} of those met.
    """

    graph: fx.Graph
    constants: dict = field(default_factory=dict)
    inputs: object = None
    output: object = None
    batch: int = 0
    training: bool = False
    reads_mode: bool = True
    reads_sizes: bool = True
    kept: list = field(default_factory=list)
    written: list = field(default_factory=list)
    rewritten: list = field(default_factory=list)
    caches: list = field(default_factory=list)
    multiples: list = field(default_factory=list)
    idle: fx.Graph | None = None
    held: dict = field(default_factory=dict)
    types: tuple = ()
    at_sizes: dict = field(default_factory=dict)


def trace(model, args, kwargs, rules, training=False, least=LEAST_OF_VALUES):
    """The forward of `model` on tensors of the shapes in `args` and `kwargs`, as a `Trace`.

    Args:
        rules: names of the operations that are kept whole; other Python functions of torch are recorded as what they do.
        training: the mode in which the modules are.
        least: the smallest batch in which it runs on values.

    Where the values of tensors matter, the forward runs on values; a module whose forward cannot be repeated as a graph
    is one operation. Raises InputError naming the line where the network itself cannot be traced.
    """
    opaque, failure = set(), None
    for on_values in [False, *[True] * 50]:
        if on_values:
            args, kwargs = first_samples((args, kwargs), batch_size(model, (args, kwargs), least))
        recorder = _recorder(model, rules, args, kwargs, on_values)
        recorder.opaque, found = opaque, None
        try:
            with numbers_of(recorder.graph):
                found = _record(recorder, model, args, kwargs, training)
        except InputError:
            raise
        except TRACE_ERRORS as error:
            raise_out_of_memory(error)
            traceback.clear_frames(error.__traceback__)
            failure = failure or error
            if on_values:
                failure = error
                if not recorder.failed or recorder.failed in opaque or not isinstance(error, Untraceable):
                    break
                opaque.add(recorder.failed)
        finally:
            caches = forget(recorder.nodes.released())
        if found is not None:
            found.caches = caches
            return found
    raise InputError(refusal(model, failure, (args, kwargs), training)) from failure


def refusal(model, error, example, training):
    where, mode = place_of(error), " in training mode" if training else ""
    if isinstance(error, Untraceable):
        return f"{type(model).__name__} cannot be traced{mode} {where}. {error.remedy}"
    shapes = ", ".join(str(tuple(t.shape[1:])) for t in tensors_in(example))
    return (
        f"{type(model).__name__} cannot be run{mode} on an example of shape {shapes}, {where}; pass an "
        "example_input that the network can process (a tuple of several inputs, a dict of named ones)"
    )


def _has_effect(node):
    """Whether the node does more than give its result."""
    return node.op in ("placeholder", "output", "call_module") or node.target is set_grad or writes(node)


def _recorder(model, rules, args, kwargs, on_values):
    example = next(iter(tensors_in((args, kwargs))), None)
    recorder = Recorder({}, rules, example.device, on_values)
    recorder.nodes.batch = len(example) if example.dim() else None
    return recorder


def _record(recorder, model, args, kwargs, training):
    copied = copy_of(model) if recorder.on_values else structure_of(model)
    given = _plain_tensors(copied)
    now = _plain_tensors(set_mode(copied, training)).items()
    recorder.nodes.holders = {id(tensor): (*place, tensor) for place, tensor in now if tensor is not given.get(place)}
    for module in copied.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            hooks.update((key, watched(hook, recorder)) for key, hook in list(hooks.items()))
    wrap_widths(copied, model)
    for named in (copied.named_buffers, copied.named_parameters):
        recorder.nodes.names.update((id(tensor), name) for name, tensor in named())
    single = [tensor for tensor in copied.buffers() if tensor.numel() == 1 and not tensor.is_inference()]
    recorder.nodes.settings = {id(tensor): tensor._version for tensor in single}
    slots = []

    def place(tensor):
        made = tensor.detach().clone() if recorder.on_values else torch.empty_like(tensor, device="meta")
        slots.append(made)
        recorder.nodes.add_input(made)
        return made

    inputs, before = map_tensors((args, kwargs), place), attributes_of(copied)
    recorder.nodes.read_batch_from(slots[0])
    watching = untouched(model), calls_seen(recorder, copied, model)
    settings = fixed_draws(), seeded(0, recorder.device), unchecked_distributions(), torch.enable_grad()
    uncompiled = torch.compiler.set_stance("force_eager")  # what torch.compile has made calls no function that is seen
    with ExitStack() as stack:
        for context in (*watching, *settings, uncompiled, recorder):
            stack.enter_context(context)
        output = copied(*inputs[0], **inputs[1])
    structure, found = _returned(recorder, model, output)
    recorder.graph.output(found)
    idle = _idle_layers(recorder.graph, set(recorder.nodes.names.values()))
    asked = _asked(recorder.graph)
    recorder.graph.eliminate_dead_code(lambda node: _has_effect(node) or node in asked)
    counter = iter(range(len(slots)))
    return Trace(
        recorder.graph,
        recorder.nodes.constants,
        map_tensors((args, kwargs), lambda t: Slot(next(counter))),
        structure,
        recorder.nodes.batch,
        training,
        recorder.mode_read,
        recorder.sizes_read,
        changed(before, attributes_of(copied)),
        _written(recorder, model, copied),
        recorder.nodes.written_constants(),
        multiples=recorder.nodes.multiples,
        idle=idle,
        held=recorder.nodes.held,
        types=tuple(slot.dtype for slot in slots),
    )


def _plain_tensors(model):
    """{(name of a module, attribute): tensor} of those that are neither parameters nor buffers."""
    return {
        (name, attribute): value
        for name, module in model.named_modules()
        for attribute, value in vars(module).items()
        if isinstance(value, torch.Tensor)
    }


def _returned(recorder, model, output):
    """What the forward returns with slots in the place of tensors and sizes, and the nodes that fill them.

    Raises InputError where tensors are in objects that cannot be made again, or are not looked into.
    """
    found = []

    def slot(item):
        node = recorder.nodes.output_node(item)
        if node is None:
            return item
        found.append(node)
        return Slot(len(found) - 1)

    try:
        structure = map_tensors(output, slot, (torch.Tensor, torch.Size, int, float))
    except (TypeError, ValueError, AttributeError) as error:
        raise InputError(
            f"what {type(model).__name__} returns cannot be made again with other tensors in it ({error}); return tensors in "
            "tuples, lists, dicts or dataclasses"
        ) from None
    for tensor, holder in held_tensors(structure, without=(nn.Module,)):
        if recorder.nodes.is_computed(tensor):
            raise InputError(
                f"{type(model).__name__} returns tensors in an object of type {type(holder).__name__}, in which they are not "
                "seen; return them alone or in tuples, lists, dicts or dataclasses"
            )
    return structure, tuple(found)


def _live(graph):
    """The nodes that the output depends on, and what does more than give its result."""
    live = set()
    for node in reversed(graph.nodes):
        if node in live or _has_effect(node):
            live.update((node, *node.all_input_nodes))
    return live


def _asked(graph):
    """What a forward may ask of numbers of channels of live tensors, as in an `assert`: remainders of a division, of which
    there may be none, and what equals a number that a module holds.

    Those of other sizes are left out: where how many it takes depends on a size, they would be other steps there.
    """
    found, numbers, live = set(), set(), _live(graph)
    for node in graph.nodes:
        if "shape" in node.meta or not node.all_input_nodes:
            continue
        source = node.all_input_nodes[0]
        if node.target is pick and source.target is getattr:  # a size of a tensor
            counts = node.args[1] == 1 and live.issuperset(source.all_input_nodes)
        else:
            counts = numbers.issuperset(node.all_input_nodes)
        if counts:
            numbers.add(node)
            found.update({node} if node.target in (operator.mod, operator.eq) else ())
    return found


def _idle_layers(graph, names):
    """What applies parameters or buffers of these names although the output does not depend on it, as a graph; else None.

    Such layers run in a cut network too, so that their tensors must fit, also where results of theirs meet others.
    """
    live, stored, idle, behind = _live(graph), set(), set(), set()
    for node in graph.nodes:
        read = set(node.all_input_nodes)
        if node.op == "get_attr" and node.target in names or read and read <= stored:
            stored.add(node)
        elif node not in live and not read.isdisjoint(stored | behind):
            behind.add(node)
            if len(read) > 1:
                idle.add(node)
    if not idle:
        return None
    copied, places = fx.Graph(), {}
    copied.graph_copy(graph, places)
    for node in live & places.keys():
        places[node].meta["live"] = True
    copied.output(())
    layers = {places[node] for node in idle}
    copied.eliminate_dead_code(lambda node: node in layers or node.op in ("placeholder", "output"))
    return copied


def _written(recorder, model, copied):
    """Names of the parameters and buffers to which a recorded call has written, or the forward of an opaque module."""
    named = [*copied.named_buffers(), *copied.named_parameters()]
    found = [name for name, tensor in named if recorder.nodes.is_written(tensor)]
    if recorder.opaque:
        own = {**dict(model.named_buffers()), **dict(model.named_parameters())}
        found += [name for name, tensor in named if name in own and not torch.equal(tensor, own[name])]
    return found
