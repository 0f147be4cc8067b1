"""Networks whose lambdas and hooks have captured the network itself, so that a copy reaches back into it."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from taylor_pruning.errors import InputError
from taylor_pruning.surgery.graph import ChannelGraph

X = torch.zeros(2, 3, 8, 8)


class Body(nn.Module):
    """Two convs of which the second runs in `body`."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.norm = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 4)
        self.body = self.run

    def run(self, x):
        return F.relu(self.norm(self.second(x)))

    def forward(self, x):
        return self.head(self.body(F.relu(self.first(x))).mean((2, 3)))


class Captured(Body):
    def __init__(self):
        super().__init__()
        self.body = lambda x: self.run(x)


class Hooked(Body):
    """The head reads what a hook has left in an attribute, a list or a dictionary in one."""

    def __init__(self, leave, read):
        super().__init__()
        self.seen, self.last, self.read = {"layers": [None]}, None, read
        self.second.register_forward_hook(lambda module, inputs, output: leave(self, output))

    def forward(self, x):
        self.second(F.relu(self.first(x)))
        return self.head(F.relu(self.read(self)).mean((2, 3)))


HOOKS = {
    "attribute": (lambda network, x: setattr(network, "last", x), lambda network: network.last),
    "dictionary": (lambda network, x: network.seen.update(x=x), lambda network: network.seen["x"]),
    "nested": (
        lambda network, x: network.seen["layers"].__setitem__(0, x),
        lambda network: network.seen["layers"][0],
    ),
}


def state_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}, [
        dict(vars(module)) for module in model.modules()
    ]


def test_a_bound_method_is_copied_with_the_network():
    assert len(ChannelGraph(Body(), X).units) == 12


def test_layers_of_the_original_do_not_run():
    model = Captured().train()
    before = state_of(model)
    with pytest.raises(InputError, match="calls module second through a lambda .*; use a bound method instead"):
        ChannelGraph(model, X)
    after = state_of(model)
    assert all(torch.equal(after[0][name], tensor) for name, tensor in before[0].items()) and before[1] == after[1]


@pytest.mark.parametrize("ran", [False, True])
@pytest.mark.parametrize("name", HOOKS)
def test_attributes_of_the_original_come_back(name, ran):
    model = Hooked(*HOOKS[name])
    if ran:
        model(X)
    seen, last, layers = dict(model.seen), model.last, list(model.seen["layers"])
    attribute = "last" if name == "attribute" else "seen"
    with pytest.raises(InputError, match=f"captured the network writes to its attribute {attribute}, so that a copy"):
        ChannelGraph(model, X)
    assert model.last is last and model.seen.keys() == seen.keys() and model.seen.get("x") is seen.get("x")
    assert model.seen["layers"][0] is layers[0]
