"""Networks that branch on the size of their batch."""

import pytest
import torch
from test_surgery import check_law, images
from torch import nn

from EnhancedFilterPruner import ChannelGraph
from taylor_pruning.errors import InputError


class Branching(nn.Module):
    """A conv and a head; `change` is applied to the logits of one sample."""

    def __init__(self, change):
        super().__init__()
        self.a, self.fc, self.change = nn.Conv2d(3, 8, 3), nn.Linear(8, 4), change

    def forward(self, x):
        logits = self.fc(self.a(x).relu().mean((2, 3)))
        return self.change(logits) if len(x) == 1 else logits


def test_another_computation_for_one_sample_is_refused():
    network = Branching(lambda logits: 2 * logits).eval()
    with pytest.raises(InputError, match="Branching computes something else for one sample"):
        ChannelGraph(network, torch.zeros(2, 3, 12, 12))
    assert ChannelGraph(network, torch.zeros(2, 3, 12, 12), verify=False).units


def test_it_is_evaluation_in_which_one_sample_is_tried():
    """In training mode the norm refuses one sample, and nothing would be compared."""
    network = Branching(lambda logits: 2 * logits)
    network.fc = nn.Sequential(network.fc, nn.BatchNorm1d(4))
    with pytest.raises(InputError, match="Branching computes something else for one sample"):
        ChannelGraph(network.train(), torch.zeros(2, 3, 12, 12))


def test_a_network_that_draws_computes_the_same_for_one_sample():
    class Drawing(Branching):
        def forward(self, x):
            return super().forward(x + torch.rand_like(x))

    assert len(ChannelGraph(Drawing(lambda logits: logits).eval(), torch.zeros(2, 3, 12, 12)).units) == 8


def test_another_shape_for_one_sample_is_not():
    assert len(check_law(Branching(lambda logits: logits[0]).double().eval(), images()).units) == 8


def test_networks_that_do_not_run_on_one_sample_are_pruned():
    def fail(logits):
        raise ValueError("one sample")

    assert len(check_law(Branching(fail).double().eval(), images()).units) == 8
