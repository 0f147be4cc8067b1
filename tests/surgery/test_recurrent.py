"""States of recurrent convolutions begin as zeros of a stored width, which follows; recurrent layers read fewer channels."""

import pytest
import torch
import torch.nn.functional as F
from conftest import randomise
from test_surgery import check_law
from torch import nn
from torch.nn.utils import parametrizations, weight_norm
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from taylor_pruning.errors import InputError
from taylor_pruning.selection.costs import CostModel
from taylor_pruning.surgery.graph import ChannelGraph
from taylor_pruning.training.profile import profile


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


class Reads(nn.Module):
    """A recurrent layer along the columns of feature maps."""

    def __init__(self, kind, **options):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 6, 3, padding=1)
        self.layer, self.fc = kind(24, 5, **options), nn.LazyLinear(4)

    def forward(self, x):
        x = F.max_pool2d(self.b(F.relu(self.a(x))), 2).permute(3, 0, 1, 2).flatten(2)
        if isinstance(self.layer, nn.RNNBase):
            return self.fc(self.layer(x)[0].mean(0))
        state = None
        for column in x:
            state = self.layer(column, state)
        return self.fc(state[0] if isinstance(state, tuple) else state)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN, nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_channels_that_a_recurrent_layer_reads_can_go(kind):
    torch.manual_seed(0)
    images = torch.randn(3, 3, 8, 8, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    options = {"num_layers": 2, "bidirectional": True} if issubclass(kind, nn.RNNBase) else {}
    model = Reads(kind, **options).double()
    model(images)
    graph = check_law(model, images, seeds=(0,))
    assert len(graph.units) == 14 and all(info.removable.all() for info in graph.layers.values())
    assert graph.remove({"b": [0, 3]}).layer.input_size == 16 and model.layer.input_size == 24


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("normed", [weight_norm, parametrizations.weight_norm])
def test_a_recurrent_layer_with_weight_norm_reads_fewer_channels(normed):
    model, images = Reads(nn.LSTM), torch.zeros(2, 3, 8, 8)
    model(images)
    model.layer = normed(model.layer, "weight_ih_l0")
    assert ChannelGraph(model, images).remove({"b": [0, 3]}).layer.input_size == 16


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN, nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_the_products_of_a_recurrent_layer_count_in_a_budget(kind):
    torch.manual_seed(0)
    images = torch.randn(1, 3, 8, 8)
    model = Reads(kind, **({"num_layers": 2, "bidirectional": True} if issubclass(kind, nn.RNNBase) else {}))
    model(images)
    graph = ChannelGraph(model, images.expand(3, -1, -1, -1))
    costs = CostModel(graph, "macs")
    assert costs.total() == profile(model, images)["macs"]
    (unit,) = (unit.index for unit in graph.units if ("b", 2) in unit.filters)
    costs.remove(unit)
    assert costs.total() == profile(graph.remove({"b": [2]}), images)["macs"]


def test_channels_along_the_time_of_a_recurrent_layer_stay():
    class Along(Reads):
        def forward(self, x):
            return self.fc(self.layer(self.a(x).flatten(2).transpose(0, 1)[..., :24])[0].mean(0))

    model = Along(nn.GRU)
    model(torch.zeros(2, 3, 8, 8))
    assert ChannelGraph(model, torch.zeros(2, 3, 8, 8)).layers["a"].reason == "passes through gru (layer)"


class Packed(nn.Module):
    """A recurrent layer that reads samples of several lengths."""

    def __init__(self, kind):
        super().__init__()
        self.a, self.b, self.layer, self.fc = nn.Conv1d(3, 8, 3), nn.Conv1d(8, 6, 1), kind(6, 5), nn.Linear(5, 4)

    def forward(self, x, lengths):
        x = self.b(F.relu(self.a(x))).permute(2, 0, 1)
        x, _ = pad_packed_sequence(self.layer(pack_padded_sequence(x, lengths, enforce_sorted=False))[0])
        return self.fc(x.mean(0))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_a_recurrent_layer_reads_fewer_channels_of_packed_samples(kind):
    torch.manual_seed(0)
    model, example = Packed(kind).double(), (torch.randn(2, 3, 10).double(), torch.tensor([8, 5]))
    graph = ChannelGraph(model, example)
    whole = None if kind is nn.LSTM else "passes through PackedSequence"  # a packed GRU is one step
    assert graph.layers["b"].reason == whole
    # every sample counts as one of the largest length; one step of which nothing is known counts nothing
    if kind is nn.LSTM:
        of_largest = profile(model, tuple(tensor[:1] for tensor in example))
        assert CostModel(graph, "macs").total() == of_largest["macs"]
    plan = {"a": [1, 4], "b": [2, 5]} if kind is nn.LSTM else {"a": [1, 4]}
    smaller, gates = graph.remove(plan), torch.ones(len(graph.units))
    gates[graph.units_of(plan)] = 0
    with graph.gated(gates):
        expected = model(*example)
    assert torch.allclose(smaller(*example), expected, rtol=1e-9)


def test_packed_samples_as_an_example_are_refused():
    packed = pack_padded_sequence(torch.zeros(10, 2, 6), [8, 5], enforce_sorted=False)
    with pytest.raises(InputError, match="holds a PackedSequence.*let the forward take the padded tensor"):
        ChannelGraph(nn.GRU(6, 5), packed)
