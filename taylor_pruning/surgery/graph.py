"""Units of filters that must go together, gates that switch them off, and the cut that really removes them."""

import copy
from collections import OrderedDict
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch

from taylor_pruning.checks import check_default_device, check_weights
from taylor_pruning.errors import InputError
from taylor_pruning.options import check_argument
from taylor_pruning.surgery.analysis import Analysis, steps
from taylor_pruning.surgery.copying import copy_of
from taylor_pruning.surgery.cut import cut
from taylor_pruning.surgery.execution import Execution
from taylor_pruning.surgery.gating import gated_run
from taylor_pruning.surgery.nested import tensors_in
from taylor_pruning.surgery.numbering import Numbering
from taylor_pruning.surgery.one_sample import check_one_sample
from taylor_pruning.surgery.other_sizes import REPLACED
from taylor_pruning.surgery.outliving import unchanged
from taylor_pruning.surgery.plans import exclude_filters, plan_of, units_of
from taylor_pruning.surgery.proof import CutProof
from taylor_pruning.surgery.recording import call, record
from taylor_pruning.surgery.second_call import check_calls
from taylor_pruning.surgery.trial_inputs import trial_examples
from taylor_pruning.surgery.units import by_filter, check_gates, cost_terms, gate_sites, readers_of
from taylor_pruning.surgery.ways import Ways
from taylor_pruning.surgery.wrappers import check_example, unwrapped


class ChannelGraph:
    """Which channels of `model` belong together.

    Args:
        model: any `nn.Module` whose forward a graph can repeat (surgery.tracing). It is not changed.
        example_input: tensor [N, C, H, W] of the shape that the network is used at, a tuple of several arguments or a dict
            of named ones.
        exclude: patterns (`fnmatch`) of layer names whose filters are never removed.
        prune_linear: also make units of the outputs of hidden fully connected layers, whole heads excepted. Outputs that must
            go with filters of a conv (squeeze-and-excitation) are in their units in any case.
        verify: run the network with half of all gates closed and without those units, on random inputs, and protect
            units whose removal gives other outputs.
        prune_heads: where a view splits channels into heads, whole heads are units, also those of fully connected layers; else
            the channels inside all heads.

    Attributes:
        model: the network without wrappers such as DataParallel or torch.compile, on the same parameters.
        notes: one line on each kind of wrapper that was taken off, () if there was none.
        units: tuple of the removable `Unit`s.
        layers: {name: LayerInfo} of every conv layer, and of linear layers with filters in units (with `prune_linear` or
            `prune_heads` of every linear one), in order of execution.
            Depthwise convs have no entry: their filters go with the channels that they read.
        sites: tuple of `GateSite`. Closing the gates of units there gives the output of removing them.
        activations: the same of what activation functions read, also where gates stand behind them.
        readers: tuple of `Reader`s. Depthwise and transposed convs, functional ones and layers without units are none.
        tensors: {(parameter or buffer name, dim): [length] unit index or -1}, every tensor dimension that can shrink.
        products: [(multiply-accumulates of one sample, [[n] unit index or -1 along each of their dimensions])] of every
            operation.
        smooth_operations: names of operations that are not piecewise linear, () if the network is.
        left_whole: {} (surgery.parts.PartsGraph: {part: why it cannot be pruned}).

    Raises:
        InputError: the network cannot be traced, copied, or run on the example, its outputs depend on the call before, it
            computes something else for one sample, or a pattern matches no layer.
    """

    def __init__(self, model, example_input, exclude=(), prune_linear=False, verify=True, prune_heads=False):
        check_example(example_input)
        for name, value in {"prune_linear": prune_linear, "verify": verify, "prune_heads": prune_heads}.items():
            check_argument(name, value, bool)
        check_default_device()
        model, self.notes = unwrapped(model)
        check_weights(model)
        self.model, self.left_whole = model, {}
        traces = {False: record(model, example_input)}
        if traces[False].reads_mode or traces[False].held:
            training = record(model, example_input, training=True)
            if steps(training) != steps(traces[False]):
                traces[True] = training
        self.executions = {mode: Execution(model, trace) for mode, trace in traces.items()}
        self._example = example_input
        self._trials = trial_examples(example_input, traces[False].graph)
        self._asked = prune_linear, prune_heads
        self._caches = [cache for trace in traces.values() for cache in trace.caches]
        with unchanged(self._caches):
            check_calls(model, self._trials[-1], {mode: trace.kept for mode, trace in traces.items()})
        analysis = self._analysed(traces, exclude, Ways(heads=prune_heads))
        if verify:
            self._protect_faults(analysis)
            with unchanged(self._caches):
                check_one_sample(self, self._trials)

    def _analysed(self, traces, exclude, ways):
        """The analysis by which the most filters may go, of every way to cut that keeps the network exact."""

        def analysed(ways):
            analysis = Analysis(self.model, traces, self._trials, ways)
            exclude_filters(analysis.ids, analysis.layers, exclude)
            return analysis, Numbering(analysis.ids, analysis.layers, *self._asked)

        best = analysed(ways)
        if best[0].chose and not ways.heads:
            ways = replace(ways, heads=True)
            best = max(best, analysed(ways), key=lambda found: found[1].filters)
        if groups := frozenset(best[1].stuck & best[0].ids.grouped):
            ways = replace(best[0].ways, groups=groups)
            best = max(best, analysed(ways), key=lambda found: found[1].filters)
        self._build(*best)
        return best[0]

    def _build(self, analysis, numbering=None):
        numbering = numbering or Numbering(analysis.ids, analysis.layers, *self._asked)
        self._weights = analysis.layers.weights
        self.smooth_operations = tuple(sorted(analysis.nonlinear))
        self.units, self.layers, self.tensors = numbering.units, numbering.layers, numbering.tensors
        self._followed = numbering.widths, numbering.settings, analysis.ids.norms, numbering.places
        self.products = [(n, [numbering.unit_of_id[ids] for ids in dims]) for n, dims in analysis.layers.products]
        self.gate_sites, self.activation_sites = (
            {mode: gate_sites(of_mode, numbering.unit_of_id) for mode, of_mode in places.items()}
            for places in (analysis.places, analysis.activations)
        )
        self.readers = tuple(readers_of(analysis.layers, self.tensors, analysis.blocks[False]))

    @property
    def sites(self):
        return self.gate_sites[False]

    @property
    def activations(self):
        return self.activation_sites[False]

    @property
    def written(self):
        """Names of the parameters and buffers to which a forward in evaluation mode writes."""
        return set(self.executions[False].trace.written)

    def on(self, model):
        """The same graph for another module of the same shapes."""
        graph = copy.copy(self)
        graph.model = model
        graph.executions = {mode: Execution(model, of_mode.trace) for mode, of_mode in self.executions.items()}
        return graph

    def __deepcopy__(self, memo):
        if id(self.model) not in memo:
            memo[id(self.model)] = copy_of(self.model, memo)
        return self.on(memo[id(self.model)])

    def _protect_faults(self, analysis):
        """Protects the units of which a trial shows that they cannot be removed, also among those that come in their place."""
        tried = set()
        while units := [unit for unit in self.units if not tried.issuperset(unit.filters)]:
            tried.update(*(unit.filters for unit in units))
            filters = {name: info.filters for name, info in self.layers.items()}
            with unchanged(self._caches):
                faults = self._proof().faults(units, share=0.5, filters=filters)
            for unit, reason in faults.items():
                for name, index in unit.filters:
                    analysis.ids.protect(analysis.layers.filters[name][index : index + 1], reason)
            if faults:
                self._build(analysis)

    def _proof(self):
        def run_gated(model, units, x):
            gates = torch.ones(len(self.units), dtype=torch.float64, device=next(iter(tensors_in(x))).device)
            gates[[unit.index for unit in units]] = 0
            with self.on(model).gated(gates):
                return call(model, x)

        def cut_of(model, units):
            return self.on(model)._cut(units)

        return CutProof(self.model, self._trials, run_gated, cut_of, [*self.executions])

    def cost_terms(self):
        """Every parameter of the network and every product of its forward as a `CostTerm`."""
        return cost_terms(self.model.named_parameters(), self.tensors, self.products)

    def filter_weights(self):
        """{layer: its weight [filters, ...] as the forward computes it} of the layers with filters that may be removed.

        None in the place of a weight that depends on the network's inputs, or that has no dimension for filters.
        """
        wanted = {name: self._weights[name] for name, info in self.layers.items() if info.removable.any()}
        values = self.executions[False].without_inputs([node for node, _ in wanted.values()])
        return {
            name: None if dim is None or node not in values else by_filter(values[node], dim, self.layers[name].filters)
            for name, (node, dim) in wanted.items()
        }

    @contextmanager
    def gated(self, gates, on_activation=None, estimates=None, outputs=None, once=False):
        """While open, forwards of the model run its graph, in which every unit's channels are multiplied by its gate.

        Where the forward differs in training mode, the graph is that of the mode in which the model is. What it writes to
        parameters and buffers, it writes to copies of them.

        Args:
            gates: [units] or [batch, units] tensor, one value a unit (and sample).
            on_activation: called as on_activation(site, output) with what is gated, or, where that is a result of a smooth
                function, with what the function reads.
            estimates: {layer name: scoring.estimates.ChannelEstimate}; there the layer reads, in place of a channel whose
                gate is closed, what its other channels say of it.
            outputs: {node: function}, called with the node's result before any gate; its result takes the place.
            once: all gates are 1, [batch, units], and the outputs are differentiated along them alone, once. That takes less
                time and memory.
        """
        check_gates(gates, len(self.units))
        sites, seen = self.gate_sites[self._mode()], self.activation_sites[self._mode()]
        watched = [] if on_activation is None else [(site.node, partial(on_activation, site)) for site in seen]
        with self.executed(*gated_run(sites, self.readers, gates, watched, estimates, outputs, once)):
            yield self

    def _mode(self):
        return self.model.training and True in self.executions

    @contextmanager
    def executed(self, change=None, read=None, calls=None):
        """While open, forwards of the model run its graph; see `Execution.run` for `change`, `read` and `calls`."""

        def forward(*args, **kwargs):
            return self.executions[self._mode()].run(args, kwargs, change, read, calls, before)

        before = dict(vars(self.model))
        try:  # hooks of the network itself are a part of its graph
            vars(self.model).update(forward=forward, _forward_hooks=OrderedDict(), _forward_pre_hooks=OrderedDict())
            yield self
        finally:
            for name in REPLACED:
                vars(self.model).pop(name)
                if name in before:
                    vars(self.model)[name] = before[name]

    def units_of(self, plan):
        """The units that a plan {layer name: filter indices} (or an iterable of units) removes, as sorted indices.

        Raises InputError if the plan names an unknown layer, a protected filter, or a part of a unit.
        """
        return units_of(plan, self.units, self.layers)

    def plan_of(self, units):
        """The plan {layer name: sorted filter indices} that removes the units of the given indices."""
        return plan_of(units, self.units, self.layers)

    def remove(self, plan, verify=True):
        """A copy of the model without the plan's filters: smaller tensors, same class, same forward.

        Args:
            plan: {layer name: filter indices} or an iterable of `Unit`s.
            verify: compare it on random inputs to the model with closed gates (`CutProof`).

        Raises:
            InputError: see `units_of`; a layer would lose its last filter; or the two differ.
        """
        units = [self.units[index] for index in self.units_of(plan)]
        smaller = self._cut(units)
        if verify and units:
            proof = self._proof()
            with unchanged(self._caches):
                reason = proof.failure(units)
                faults = proof.faults(units) if reason else {}
            if reason:
                self._refuse(units, faults, reason)
        return smaller

    @staticmethod
    def _refuse(units, faults, reason):
        """Raises the InputError on units that cannot be removed for a reason, of which `faults` {unit: reason} are at fault."""
        layers = ", ".join(sorted({name for unit in faults or units for name, _ in unit.filters}))
        if faults:
            reason, remedy = next(iter(faults.values())), "exclude these layers"
        else:
            reason = f"{reason} in one comparison, and not in the next, so that the forward differs from run to run"
            remedy = "draw by torch, NumPy or random alone and keep no state in it, or pass verify=False"
        raise InputError(f"filters of {layers} cannot be removed: {reason}; {remedy}")

    def _cut(self, units):
        stays = torch.ones(len(self.units) + 1, dtype=torch.bool)  # the last entry stands for index -1
        stays[[unit.index for unit in units]] = False
        return cut(self.model, self.tensors, *self._followed, stays)


def checked_graph(graph, model):
    """A graph that was given beside a model, or None. Raises InputError if it is not the model's."""
    if graph is None:
        return None
    own = set(map(id, unwrapped(model)[0].parameters()))  # a network with wrapped parts is rebuilt around them
    if not hasattr(graph, "model") or own != set(map(id, graph.model.parameters())):
        raise InputError("graph is not the ChannelGraph of this model; make it anew, or leave it out")
    return graph
