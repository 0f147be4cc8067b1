"""Runs the dense and the pruned network side by side, from layer to layer, within a budget of memory."""

import math
from dataclasses import dataclass

import torch
from torch import fx, nn

from taylor_pruning.positions import STEP
from taylor_pruning.repair.batchnorm import update_statistics
from taylor_pruning.repair.plan import RepairPlan
from taylor_pruning.scoring.estimates import in_single
from taylor_pruning.surgery.execution import evaluate
from taylor_pruning.surgery.nested import map_tensors
from taylor_pruning.surgery.recording import inputs_of

STATISTICS_ROWS = 2**18  # inputs a channel, over all images, that make the statistics of a BatchNorm


@dataclass(frozen=True)
class Held:
    """From where both networks run on one batch: their states {node name: value}, and the positions of the next nodes."""

    states: tuple[dict, dict] = ({}, {})
    starts: tuple[int, int] = (0, 0)
    bytes: float = 0.0


class PairedRuns:
    """Runs both networks over all batches, layer after layer, from activations held since the last layer.

    States are held of as many batches as fit the budget together; on the others the networks run again from the last
    layer at which theirs did. The runs also sum up the inputs of BatchNorms, of as many images as give
    STATISTICS_ROWS positions. Every rerun of a batch overwrites its sums, so that they end up measured after all fits.
    """

    def __init__(self, plan, inputs, budget):
        """`inputs`: for both networks, what every batch calls it with. `budget`: bytes of states that may be held."""
        self.plan = plan
        self.inputs = [
            [network.flat(*inputs_of(batch)) for batch in given]
            for network, given in zip(plan.networks, inputs, strict=True)
        ]
        pairs = zip(plan.networks, self.inputs, strict=True)
        self.at = [[network.at_size(tensors) for tensors in given] for network, given in pairs]
        self.images = [len(tensors[0]) for tensors in self.inputs[0]]  # of every batch
        places = [node.name for node in plan.networks[0].trace.graph.nodes if node.op == "placeholder"]
        self.places = {name: index for index, name in enumerate(places)}
        self.budget = budget
        self.held = [Held() for _ in self.images]
        self.sums = {name: [None] * len(self.images) for name in plan.batchnorms}  # by batch

    def to(self, layer):
        """For every batch: (dense state with the layer's output, smaller state just before the layer).

        The dense state is held where the next layer starts, behind a pooling that may lie between.
        """
        ends, ahead, an_image = (layer.position + 1, layer.position), self._next(layer), None
        for batch, images in enumerate(self.images):
            hold, held = an_image is None or self._fits(batch, an_image * images), self.held[batch]
            copy = an_image is None or not hold
            states = [self._run(k, held.states[k], batch, held.starts[k], ends[k], copy) for k in (0, 1)]
            yield batch, *states
            if hold:
                states[0] = self._run(0, states[0], batch, ends[0], ahead, copy=False)
                if an_image is None:
                    an_image = sum(map(_bytes, states)) / max(1, images)
                if self._fits(batch, an_image * images):
                    self.held[batch] = Held(tuple(states), (ahead, ends[1]), an_image * images)
            del held, states

    def _fits(self, batch, size):
        """Whether a state of `size` bytes may be held in place of the batch's present one."""
        return sum(held.bytes for held in self.held) - self.held[batch].bytes + size <= self.budget

    def _next(self, layer):
        """Position of the next layer to fit, or just behind the last one."""
        return min((n.position for n in self.plan.layers if n.position > layer.position), default=layer.position + 1)

    def value(self, state, k, position):
        return state[self.plan.order[k][position].name]

    def update_batchnorms(self):
        """Runs on to the end, and gives every BatchNorm of one layer alone the statistics of its present inputs."""
        for batch, held in enumerate(self.held):
            self._run(1, held.states[1], batch, held.starts[1], len(self.plan.order[1]), copy=False)
        for name, sums in self.sums.items():
            update_statistics(self.plan.batchnorms[name], *(sum(parts) for parts in zip(*sums, strict=True)))

    def _run(self, k, held, batch, start, end, copy):
        """The state at `end`. Held tensors that will be needed again are copied: operations in place would change them."""
        plan, tensors = self.plan, self.plan.tensors[k]
        model = plan.networks[k].model
        state = {name: fx.node.map_aggregate(value, _copy) if copy else value for name, value in held.items()}

        def value_of(source):
            return (
                tensors[source.target] if source.target in tensors and source.op == "get_attr" else state[source.name]
            )

        for position in range(start, end):
            node = plan.order[k][position]
            if k == 1 and node.name in self.sums:
                x = in_single(self._some(value_of(node.all_input_nodes[0]), batch)).movedim(1, 0).flatten(1)
                sums = (values.sum(1, dtype=torch.float64) for values in (x, x.square()))
                self.sums[node.name][batch] = x.shape[1], *sums
            if node.op == "placeholder":
                state[node.name] = self.inputs[k][batch][self.places[node.name]].clone()
            elif node.op == "get_attr":
                if node.target not in tensors:
                    state[node.name] = plan.networks[k].constant(node.target, tensors, self.at[k][batch])
            elif node.op != "output":
                instead = plan.networks[k].with_copies(node, tensors)
                state[node.name] = evaluate(model, node, value_of, instead=instead, at=self.at[k][batch])
            for name in plan.last_use[position]:
                state.pop(name, None)
        return state

    def _some(self, x, batch):
        """The rows of x [rows, channels, ...] of the images that make statistics: the same in batches of any size."""
        several = len(x) // self.images[batch]  # rows an image, where a forward puts parts of it into the batch
        count, total = -(-STATISTICS_ROWS // math.prod(x.shape[2:])), several * sum(self.images)
        if count >= total:
            return x
        number = several * sum(self.images[:batch]) + torch.arange(len(x))
        return x[(number * STEP % total < count).nonzero().flatten().to(x.device)]


def refresh_batchnorms(model: nn.Module, inputs: list) -> None:
    """Gives the BatchNorms of a changed network the statistics of their present inputs, see batchnorm.update_statistics.

    `inputs`: what the network is called with on every batch, a tensor or several in the form of an example_input.
    """
    plan = RepairPlan(model, model, {}, map_tensors(inputs[0], lambda tensor: tensor[:1]))
    with torch.no_grad():
        PairedRuns(plan, [inputs, inputs], budget=0).update_batchnorms()


def _copy(value):
    return value.clone() if torch.is_tensor(value) else value


def _bytes(state):
    storages = {}
    for value in state.values():
        fx.node.map_aggregate(
            value, lambda t: storages.update({t.data_ptr(): t.nbytes}) if torch.is_tensor(t) else None
        )
    return sum(storages.values())
