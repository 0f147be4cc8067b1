"""What a network returns beside its logits: sizes, shapes, containers of its own."""

import types
from collections import deque

import pytest
import torch
from test_surgery import Net, Plain, images, randomise

from taylor_pruning.errors import InputError
from taylor_pruning.surgery.graph import ChannelGraph


class Returning(Net):
    """A network whose `returned` makes its output of the input, the features and the logits."""

    def __init__(self, returned):
        super().__init__([Plain])
        self.returned = returned

    def forward(self, x):
        features = self.stem(x)
        return self.returned(x, features, super().forward(x))


def returning(returned):
    return randomise(Returning(returned).double().eval())


SIZES = {
    "size": lambda x, _, logits: {"logits": logits, "images": x.size(0), "pixels": x.shape[0] * x.shape[2]},
    "shape": lambda x, _, logits: (logits, x.shape),
    "length": lambda x, _, logits: [logits, len(x), 5, True],
}


@pytest.mark.parametrize("name", SIZES)
def test_sizes_in_the_output_are_those_of_the_input(name):
    torch.manual_seed(0)
    model, x = returning(SIZES[name]), images(3)
    graph = ChannelGraph(model, images(1))
    assert all(info.reason is None for info in graph.layers.values())
    plain = model(x)
    with graph.gated(torch.ones(len(graph.units))):
        gated = model(x)
    found, wanted = ([*output.values()] if name == "size" else [*output] for output in (gated, plain))
    torch.testing.assert_close(found.pop(0), wanted.pop(0))
    assert found == wanted and [type(item) for item in found] == [type(item) for item in wanted]


def test_channels_that_the_output_counts_stay():
    graph = ChannelGraph(returning(lambda x, features, logits: (logits, features.shape)), images(1))
    assert graph.layers["stem.0"].reason == "their number is an output of the network"
    assert graph.layers["tail.0"].reason is None


def test_outputs_without_a_tensor_are_refused():
    with pytest.raises(InputError, match="without a tensor that is seen in it; return tensors, alone or in tuples"):
        ChannelGraph(returning(lambda *_: None), images(1))


class Own:
    def __init__(self, features):
        self.features = [features]


HOLDERS = {
    "SimpleNamespace": lambda features: types.SimpleNamespace(features=features),
    "Own": Own,
    "deque": lambda features: deque([features]),
    "dict_values": lambda features: {"features": features}.values(),
    "generator": lambda features: (item for item in [features]),
    "Normal": lambda features: torch.distributions.Normal(features, 1.0, validate_args=False),
}


@pytest.mark.parametrize("kind", HOLDERS)
def test_tensors_in_objects_that_are_not_looked_into_are_refused(kind):
    model = returning(lambda _, features, logits: (logits, {"more": HOLDERS[kind](features)}))
    with pytest.raises(
        InputError, match=f"tensors in an object of type {kind}, in which they are not seen; return them"
    ):
        ChannelGraph(model, images(1))


def test_objects_without_tensors_are_returned():
    labels = types.SimpleNamespace(names=["a", "b"])
    graph = ChannelGraph(returning(lambda _, features, logits: (logits, labels)), images(1))
    assert all(info.reason is None for info in graph.layers.values())
