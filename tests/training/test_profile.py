"""The multiply-accumulates that are reported are those of the formulas, also where PyTorch runs several layers as one call."""

import pytest
import torch
from torch import nn

from taylor_pruning.training.profile import FUSED, profile

PATCHES, DIM, INNER = 16, 16, 32


class Sequence(nn.Module):
    """A layer of patches, and a layer behind it."""

    def __init__(self, layer):
        super().__init__()
        self.patches, self.layer = nn.Conv2d(3, DIM, 4, 4), layer

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = self.layer(x, x, x) if isinstance(self.layer, nn.MultiheadAttention) else self.layer(x)
        return (x[0] if isinstance(x, tuple) else x).mean(1)


ATTENTION = 4 * PATCHES * DIM**2 + 2 * PATCHES**2 * DIM  # four projections; scores and their sums over the values
LAYERS = {
    "attention": (nn.MultiheadAttention(DIM, 4, batch_first=True), ATTENTION),
    "encoder": (nn.TransformerEncoderLayer(DIM, 4, INNER, batch_first=True), ATTENTION + 2 * PATCHES * DIM * INNER),
    "lstm": (nn.LSTM(DIM, DIM, batch_first=True), PATCHES * 4 * 2 * DIM**2),
    "two-way lstm": (nn.LSTM(DIM, INNER, bidirectional=True), PATCHES * 2 * 4 * INNER * (DIM + INNER)),
    "gru": (nn.GRU(DIM, DIM, batch_first=True), PATCHES * 3 * 2 * DIM**2),
}


@pytest.mark.parametrize("name", LAYERS)
def test_fused_layers_are_counted(name):
    layer, expected = LAYERS[name]
    before = torch.backends.mha.get_fastpath_enabled()
    macs = profile(Sequence(layer), torch.randn(1, 3, 16, 16))["macs"]
    assert macs == PATCHES * DIM * 3 * 4 * 4 + expected
    assert torch.backends.mha.get_fastpath_enabled() == before


def test_the_recurrent_call_of_a_gpu_is_counted_from_shapes():
    count = FUSED[torch.ops.aten._cudnn_rnn]
    weights = [tensor.shape for tensor in nn.LSTM(DIM, INNER, num_layers=2).parameters()]
    assert count((5, 3, DIM), weights, 4) == 2 * 15 * 4 * INNER * (DIM + INNER + 2 * INNER)


def test_products_with_vectors_are_counted():
    class Vectors(nn.Module):
        def forward(self, x):
            x = x.flatten(2)[0]
            return (x @ x[0]).sum() + torch.addmv(x[:, 0], x, x[1]).sum() + torch.dot(x[0], x[1])

    assert profile(Vectors(), torch.randn(1, 3, 4, 4))["macs"] == 2 * 3 * 16 + 16
