"""States of recurrent convolutions begin as zeros of a stored width, which follows."""

import torch
from conftest import randomise
from test_surgery import check_law
from torch import nn


class Recurrent(nn.Module):
    """A ConvLSTM over the frames of a clip; `computes`: its forward computes with the stored width too."""

    def __init__(self, begin, computes=False):
        super().__init__()
        self.hidden, self.begin, self.computes = 8, begin, computes
        self.a, self.cell, self.fc = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(14, 32, 3, padding=1), nn.Linear(8, 4)

    def forward(self, x):
        state = memory = self.begin(self, x)
        for i in range(x.shape[1]):
            gates = self.cell(torch.cat([self.a(x[:, i]).relu(), state], 1))
            enter, keep, leave, new = gates.split(self.hidden, 1)
            memory = keep.sigmoid() * memory + enter.sigmoid() * new.tanh()
            state = leave.sigmoid() * memory.tanh()
        return self.fc(state.mean((2, 3)) / (self.hidden if self.computes else 1))


def zeros(network, x):
    return torch.zeros(x.shape[0], network.hidden, *x.shape[3:], dtype=x.dtype)


def ones(network, x):
    return x.new_ones((x.shape[0], network.hidden, *x.shape[3:]))


def ordered(network, x):
    return torch.arange(network.hidden).view(1, -1, 1, 1).expand(x.shape[0], -1, *x.shape[3:]).to(x)


def law(*options):
    torch.manual_seed(0)
    clips = torch.randn(2, 3, 3, 8, 8, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    graph = check_law(randomise(Recurrent(*options)), clips, seeds=(0,), example=clips)
    assert graph.layers["a"].reason is None
    return graph


def test_a_state_of_a_stored_width_follows():
    graph = law(zeros)
    assert graph.layers["cell"].reason is None and len(graph.units) == 14
    smaller = graph.remove({"cell": [1, 9, 17, 25]})
    assert smaller.hidden == 7 and smaller.cell.in_channels == 13


def test_a_state_of_a_width_that_must_not_change_is_protected():
    for options in ((ones,), (ordered,), (zeros, True)):
        graph = law(*options)
        assert graph.layers["cell"].reason and len(graph.units) == 6
