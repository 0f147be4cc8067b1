"""No size of a network is taken for the batch of its trace, and what needs batches of a certain size is told so."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import randomise
from test_surgery import check_law
from torch import nn

from taylor_pruning.errors import InputError
from taylor_pruning.surgery.batch_size import batch_size
from taylor_pruning.surgery.graph import ChannelGraph


class Literal(nn.Module):
    """A number in the code is the width of the last conv; `decides`: values choose the way of a part."""

    def __init__(self, width, decides=False):
        super().__init__()
        self.a, self.b, self.fc = nn.Conv2d(3, 8, 3), nn.Conv2d(8, width, 3), nn.Linear(width, 4)
        self.width, self.part = str(width), Decides() if decides else nn.Identity()

    def forward(self, x):
        x = F.relu(self.b(F.relu(self.part(self.a(x)))))
        return self.fc(x.mean((2, 3)).view(-1, int(self.width)))


class Decides(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else 2 * x


def images(number=3):
    return torch.randn(number, 3, 9, 9, dtype=torch.double, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("width", "decides"), [(41, False), (82, False), (10, True)])
def test_a_literal_size_is_no_batch(width, decides):
    torch.manual_seed(0)
    graph = check_law(randomise(Literal(width, decides)), images(), seeds=(0,))
    assert graph.layers["b"].reason == "is viewed at a fixed size in view"
    assert len(graph.units) == (0 if decides else 8)


class Positions(nn.Module):
    """10 x 10 positions, by a number in the code; values choose the way of a part."""

    def __init__(self):
        super().__init__()
        self.part, self.a, self.fc = Decides(), nn.Conv2d(3, 6, 3), nn.Linear(6, 4)

    def forward(self, x):
        return self.fc(F.relu(self.a(self.part(x))).reshape(x.size(0), -1, 100).amax(2))


def test_a_number_in_the_code_is_no_batch_on_values():
    torch.manual_seed(0)
    x = torch.randn(3, 3, 12, 12, dtype=torch.double)
    assert len(check_law(randomise(Positions()), x, seeds=(0,)).units) == 6


class FixedBatch(nn.Module):
    """The number of samples of the trace, as a number."""

    def __init__(self):
        super().__init__()
        self.a, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)

    def forward(self, x):
        x = F.relu(self.a(x)).mean((2, 3))
        return self.fc(x) + x.new_tensor([[i] for i in range(len(x))])


def test_a_graph_that_holds_a_number_of_samples_is_no_matter_of_verification():
    with pytest.raises(InputError, match="itself runs, at .*new_tensor.* from the shapes of tensors") as refused:
        ChannelGraph(FixedBatch(), torch.randn(3, 3, 9, 9))
    assert "verify=False" not in str(refused.value)


class UnseenTensor(FixedBatch):
    def forward(self, x):
        return self.fc(F.relu(self.a(x)).mean((2, 3))) + torch.DoubleTensor(x.size(0), 4).fill_(1.0)


def test_a_tensor_of_the_number_of_samples_that_no_function_makes_is_named():
    line = r'itself runs, at .*batch_size.py, line \d+: "return self.fc.*fill_\(1.0\)" .* torch.FloatTensor\(size\) and'
    with pytest.raises(InputError, match=line):
        ChannelGraph(UnseenTensor(), torch.randn(3, 3, 9, 9))


class Rows(nn.Module):
    """Each sample of a map [N, h, w, channels] at a row of its own, by a list or a range of all samples."""

    def __init__(self, at):
        super().__init__()
        self.a, self.b, self.fc, self.at = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 1), nn.Linear(6, 4), at

    def forward(self, x):
        y = F.relu(self.a(x))
        return self.fc(self.at(self.b(y).permute(0, 2, 3, 1), y.sum((1, 3)).argmax(1)).mean(1))


def assigned(y, rows):
    y = y.clone()
    y[range(len(y)), rows] = 0.5
    return y.sum(1)


def of_two_joined(y, rows):
    y = torch.cat([y, y + 1])
    y = y[range(len(y)), rows.repeat(2)]
    return y[: len(rows)] - y[len(rows) :].square()


ROWS = [  # with the filters that may go
    (lambda y, rows: y[list(range(len(y))), rows], 6),
    (lambda y, rows: y[range(y.shape[0]), rows], 6),
    (lambda y, rows: y[list(range(len(rows)))][:, 0], 6),
    (assigned, 0),
    (of_two_joined, 6),
]


@pytest.mark.parametrize(("at", "free"), ROWS)
def test_a_list_of_all_samples_is_one_of_as_many_as_there_are(at, free):
    torch.manual_seed(0)
    graph = check_law(randomise(Rows(at)), images(3), seeds=(0,))
    assert int(graph.layers["b"].removable.sum()) == free


class UnseenRows(FixedBatch):
    def forward(self, x):
        y = torch.sigmoid(self.a(x)).flatten(2).transpose(1, 2)
        rows = torch.sigmoid(y.reshape(-1, y.shape[2]))
        rows = rows * torch.from_numpy(np.ones((int(x.shape[0]) * 49, 1)))
        return self.fc(rows.view(len(x), -1, y.shape[2]).mean(1))


def test_rows_of_samples_that_no_function_makes_are_named():
    with pytest.raises(InputError, match="itself runs, at .*rows = rows .* and NumPy are not seen"):
        ChannelGraph(UnseenRows().double(), images())


def test_the_batch_divides_no_size_of_network_and_inputs():
    model = nn.Sequential(nn.Conv2d(3, 82, 3), nn.BatchNorm2d(86))
    model.groups = [47, 3]
    assert batch_size(model, ((torch.zeros(41, 3, 53, 8), torch.zeros(59)), {})) == 61
    model._heads, model.settings = 61, {"dim": 67}
    assert batch_size(model, torch.zeros(41, 3, 53, 8)) == 59
    assert batch_size(model, torch.zeros(41, 3, 53, 59)) == 71
    assert batch_size(nn.ReLU(), torch.zeros(41, 3), least=5) == 5


class Pairs(nn.Module):
    """The halves of a batch are two views of the same samples."""

    def __init__(self, in_training):
        super().__init__()
        self.a, self.fc, self.in_training = nn.Conv2d(3, 8, 3), nn.Linear(16, 4), in_training

    def forward(self, x):
        x = F.relu(self.a(x)).mean((2, 3))
        if self.in_training and not self.training:
            return self.fc(x.repeat(1, 2))
        return self.fc(torch.cat(x.chunk(2), 1))


@pytest.mark.parametrize(("in_training", "mode"), [(False, "runs on 4"), (True, "runs in training mode on 4")])
def test_a_network_of_even_batches_is_told_so(in_training, mode):
    with pytest.raises(
        InputError, match=rf"Pairs {mode} samples, but not on 41, at .*Sizes of .* any number of samples"
    ):
        ChannelGraph(Pairs(in_training), images(4))
    with pytest.raises(InputError, match="pass an example_input"):
        ChannelGraph(Pairs(False), images(4)[:, :2])


def test_what_fails_in_the_recording_alone_is_not_laid_to_the_number_of_samples():
    def scores(x):
        if torch.is_grad_enabled():
            raise RuntimeError("no backward")
        return x

    class Forward(FixedBatch):
        def forward(self, x):
            return self.fc(scores(F.relu(self.a(x))).mean((2, 3)))

    with pytest.raises(InputError, match=r"Forward runs, but not while .* gradients, at .*\(no backward\)"):
        ChannelGraph(Forward(), images(1))


class Spread(nn.Module):
    """int() makes a plain number of the number of positions along one side, by which it views; `len` of the batch too."""

    def __init__(self, decides):
        super().__init__()
        self.part = Decides() if decides else nn.Identity()
        self.a, self.fc = nn.Conv2d(3, 6, 3, padding=1), nn.Linear(6, 4)

    def forward(self, x):
        x = F.relu(self.a(self.part(F.pad(x, (1, 1, 1, 1)))))
        side = int(x.shape[2])
        return self.fc(x.view(len(x), x.shape[1], side, side).amax((2, 3)))


@pytest.mark.parametrize(("decides", "side"), [(False, 41), (False, 82), (True, 5), (True, 35)])
def test_a_computed_size_is_no_batch(decides, side):
    torch.manual_seed(0)
    x = torch.randn(3, 3, side - 2, side - 2, dtype=torch.double)
    assert len(check_law(randomise(Spread(decides)), x, seeds=(0,)).units) == 6
