"""Units of filters that must go together, gates that switch them off, and the cut that really removes them."""

import copy
from collections import OrderedDict, defaultdict
from contextlib import contextmanager

import torch

from taylor_pruning.checks import check_weights
from taylor_pruning.errors import InputError
from taylor_pruning.surgery.analysis import Analysis, steps
from taylor_pruning.surgery.cut import cut
from taylor_pruning.surgery.execution import Execution, blended, call, gate, record
from taylor_pruning.surgery.layers import kept_linear
from taylor_pruning.surgery.nested import tensors_in
from taylor_pruning.surgery.plans import exclude_filters, plan_of, units_of
from taylor_pruning.surgery.proof import CutProof
from taylor_pruning.surgery.trial_inputs import trial_examples
from taylor_pruning.surgery.units import LayerInfo, Unit, cost_terms, gate_sites, group, readers_of
from taylor_pruning.surgery.wrappers import check_example, unwrapped


class ChannelGraph:
    """Which channels of `model` belong together.

    Args:
        model: any `nn.Module` whose forward a graph can repeat (surgery.tracing). It is not changed.
        example_input: tensor [N, C, H, W] of the shape that the network is used at, a tuple of several arguments or a dict
            of named ones.
        exclude: patterns (`fnmatch`) of layer names whose filters are never removed.
        prune_linear: also make units of the outputs of hidden fully connected layers, whole heads excepted.
        verify: run the network with half of all gates closed and without those units, on random inputs, and protect
            units whose removal gives other outputs.
        prune_heads: where a view splits channels into heads, whole heads are units, also those of fully connected layers; else
            the channels inside all heads.

    Attributes:
        model: the network without wrappers such as DataParallel or torch.compile, on the same parameters.
        notes: one line on each kind of wrapper that was taken off, () if there was none.
        units: tuple of the removable `Unit`s.
        layers: {name: LayerInfo} of every conv layer (with `prune_linear` or `prune_heads` of every linear one), in order of
            execution.
            Depthwise convs have no entry: their filters go with the channels that they read.
        sites: tuple of `GateSite`. Closing the gates of units there gives the output of removing them.
        readers: tuple of `Reader`s. Depthwise and transposed convs, functional ones and layers without units are none.
        tensors: {(parameter or buffer name, dim): [length] unit index or -1}, every tensor dimension that can shrink.
        smooth_operations: names of operations that are not piecewise linear, () if the network is.

    Raises:
        InputError: the network cannot be traced, copied, or run on the example, or a pattern matches no layer.
    """

    def __init__(self, model, example_input, exclude=(), prune_linear=False, verify=True, prune_heads=False):
        check_example(example_input)
        model, self.notes = unwrapped(model)
        check_weights(model)
        self.model = model
        traces = {mode: record(model, example_input, training=mode) for mode in (False, True)}
        if steps(traces[True].graph) == steps(traces[False].graph):
            del traces[True]
        self.executions = {mode: Execution(model, trace) for mode, trace in traces.items()}
        self._example = example_input
        self._trials = trial_examples(example_input, traces[False].graph)
        self._prune_linear, self._prune_heads = prune_linear, prune_heads
        analysis = self._analysed(traces, exclude, prune_heads)
        if analysis.chose and not prune_heads:  # whole heads where only they can go
            found = sum(len(unit.filters) for unit in self.units)
            analysis = self._better(analysis, found, traces, exclude)
        if verify and self._protect_faults(analysis):
            self._build(analysis)

    def _analysed(self, traces, exclude, prefer_heads):
        analysis = Analysis(self.model, traces, self._example, prefer_heads)
        exclude_filters(analysis.ids, analysis.layers, exclude)
        self._build(analysis)
        return analysis

    def _better(self, first, found, traces, exclude):
        """Of the two ways to split channels into heads the one with more filters that may go."""
        second = self._analysed(traces, exclude, prefer_heads=True)
        if sum(len(unit.filters) for unit in self.units) > found:
            return second
        self._build(first)
        return first

    def _build(self, analysis):
        ids, layers = analysis.ids, analysis.layers
        self.positions = layers.positions
        self.smooth_operations = tuple(sorted(analysis.nonlinear))
        self._build_units(ids, layers)
        self.gate_sites = {mode: gate_sites(of_mode, self._unit_of_id) for mode, of_mode in analysis.places.items()}
        self.readers = tuple(readers_of(layers, self.tensors))

    @property
    def sites(self):
        return self.gate_sites[False]

    def on(self, model):
        """The same graph for another module of the same shapes."""
        graph = copy.copy(self)
        graph.model = model
        graph.executions = {mode: Execution(model, of_mode.trace) for mode, of_mode in self.executions.items()}
        return graph

    def __deepcopy__(self, memo):
        return self.on(copy.deepcopy(self.model, memo))

    def _protect_faults(self, analysis):
        """Protects the units of which a trial shows that they cannot be removed; whether there are any."""
        faults = self._proof().faults(self.units, share=0.5)
        for unit, reason in faults.items():
            for name, index in unit.filters:
                analysis.ids.protect(analysis.layers.filters[name][index : index + 1], reason)
        return bool(faults)

    def _proof(self):
        def run_gated(model, units, x):
            gates = torch.ones(len(self.units), dtype=torch.float64, device=next(iter(tensors_in(x))).device)
            gates[[unit.index for unit in units]] = 0
            with self.on(model).gated(gates):
                return call(model, x)

        def cut_of(model, units):
            return self.on(model)._cut(units)

        return CutProof(self.model, self._trials, run_gated, cut_of, [*self.executions])

    def _build_units(self, ids, layers):
        roots = ids.roots()
        reason_of = {}
        for some, reason in ids.reasons:
            for root in roots[some].unique().tolist():
                reason_of.setdefault(root, reason)
        for root, reason in kept_linear(ids, layers, roots, self._prune_linear, self._prune_heads):
            reason_of.setdefault(root, reason)
        with_linear = self._prune_linear or self._prune_heads
        names = [name for name in layers.filters if with_linear or name not in layers.linear]
        classes = {name: roots[layers.filters[name]] for name in names}
        for name, of_filter in classes.items():
            if (of_filter == of_filter[0]).all():
                reason_of.setdefault(int(of_filter[0]), f"all filters of {name} go together")
        filters = [(name, index) for name, of_filter in classes.items() for index in range(len(of_filter))]
        members = group(filters, torch.cat([torch.zeros(0, dtype=torch.long), *classes.values()]))
        removable = [root for root in members if root not in reason_of]
        self.units = tuple(Unit(index, members[root]) for index, root in enumerate(removable))
        unit_of_root = torch.full((ids.count,), -1, dtype=torch.long)
        unit_of_root[torch.tensor(removable, dtype=torch.long)] = torch.arange(len(removable))
        self._unit_of_id = unit_of_root[roots]
        self.tensors = {}
        for (name, dim), along in ids.tensors.items():
            units = self._unit_of_id[along]
            if dim < 2 or bool((units >= 0).any()):
                self.tensors[name, dim] = units
        self.widths = {
            width: (self._unit_of_id[uses[0][0]], uses[0][1])
            for width, uses in ids.widths.items()
            if bool((self._unit_of_id[uses[0][0]] >= 0).any())
        }
        self.settings = {name: self._unit_of_id[along] for name, along in layers.settings.items()}
        self.layers = {}
        for name in names:
            units = self._unit_of_id[layers.filters[name]]
            protected = classes[name][units < 0].tolist()
            self.layers[name] = LayerInfo(len(units), units, reason_of[protected[0]] if protected else None)

    def cost_terms(self):
        """Every parameter as a `CostTerm`; a layer's multiply-accumulates are counted at its weight."""
        return cost_terms(self.model, self.tensors, self.positions)

    @contextmanager
    def gated(self, gates, on_gate=None, estimates=None, outputs=None):
        """While open, forwards of the model run its graph, in which every unit's channels are multiplied by its gate.

        Where the forward differs in training mode, the graph is that of the mode in which the model is.

        Args:
            gates: [units] or [batch, units] tensor, one value a unit (and sample).
            on_gate: called as on_gate(site, output) with every gated activation.
            estimates: {layer name: scoring.estimates.ChannelEstimate}; there the layer reads, in place of a channel whose
                gate is closed, what its other channels say of it.
            outputs: {node: function}, called with the node's result before any gate; its result takes the place.
        """
        open_gates = torch.cat([gates, gates.new_ones(*gates.shape[:-1], 1)], -1)  # index -1: no gate
        changes = defaultdict(list)
        for site in self.gate_sites[self._mode()]:
            changes[site.node].append(site)

        def change_of(node, sites):
            first = (outputs or {}).get(node)

            def change(output):
                output = output if first is None else first(output)
                for site in sites:
                    output = gate(open_gates, site.dim, site.batch_dim, site.units, output)
                    if on_gate is not None:
                        on_gate(site, output)
                return output

            return change

        reads, any_closed = {}, bool(estimates) and bool((gates != 1).any())
        for reader in self.readers:
            if reader.layer in (estimates or {}):
                reads.update(
                    (node, blended(estimates[reader.layer], open_gates, any_closed, 0)) for node in reader.nodes
                )
        change = {**(outputs or {}), **{node: change_of(node, sites) for node, sites in changes.items()}}
        with self.executed(change, reads):
            yield self

    def _mode(self):
        return self.model.training and True in self.executions

    @contextmanager
    def executed(self, change=None, read=None):
        """While open, forwards of the model run its graph; see `Execution.run` for `change` and `read`."""

        def forward(*args, **kwargs):
            return self.executions[self._mode()].run(args, kwargs, change, read)

        before = dict(vars(self.model))
        try:  # hooks of the network itself are a part of its graph
            vars(self.model).update(forward=forward, _forward_hooks=OrderedDict(), _forward_pre_hooks=OrderedDict())
            yield self
        finally:
            for name in ("forward", "_forward_hooks", "_forward_pre_hooks"):
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
            if reason := proof.failure(units):
                faults = proof.faults(units)
                layers = sorted({name for unit in faults for name, _ in unit.filters})
                reason = next(iter(faults.values()), reason)
                raise InputError(f"filters of {', '.join(layers)} cannot be removed: {reason}; exclude these layers")
        return smaller

    def _cut(self, units):
        stays = torch.ones(len(self.units) + 1, dtype=torch.bool)  # the last entry stands for index -1
        stays[[unit.index for unit in units]] = False
        return cut(self.model, self.tensors, self.widths, self.settings, stays)
