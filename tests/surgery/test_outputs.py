"""What a network returns beside its logits: sizes, shapes, containers of its own."""

import types

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


@pytest.mark.parametrize("returned", [lambda *given: types.SimpleNamespace(logits=given[2]), lambda *_: None])
def test_outputs_without_a_tensor_are_refused(returned):
    with pytest.raises(InputError, match="without a tensor that is seen in it; return tensors, alone or in tuples"):
        ChannelGraph(returning(returned), images(1))
