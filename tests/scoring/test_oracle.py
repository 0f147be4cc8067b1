"""Rank correlation, and true loss changes against really removing."""

import math

import pytest
import torch
from torch.nn import functional as F

from taylor_pruning.scoring.oracle import spearman, true_loss_changes
from taylor_pruning.surgery.graph import ChannelGraph


def test_spearman_gives_equal_values_their_mean_rank():
    assert spearman([1, 2, 2, 3], [1, 2, 2, 3]) == pytest.approx(1)
    # ranks 0, 1.5, 1.5, 3 against 0, 1, 2, 3: covariance 4.5 / sqrt(4.5 * 5)
    assert spearman([1, 2, 2, 3], [1, 2, 3, 4]) == pytest.approx(4.5 / (4.5 * 5) ** 0.5)
    assert spearman([1, 2, 2, 3], [4, 3, 2, 1]) == pytest.approx(-4.5 / (4.5 * 5) ** 0.5)


def test_a_single_pair_has_no_correlation(recwarn):
    assert math.isnan(spearman([1.0], [2.0])) and not recwarn.list


def test_true_loss_changes_are_those_of_really_removing(plain_network, images, labels, batches):
    graph = ChannelGraph(plain_network, images)
    changes = true_loss_changes(plain_network, graph, batches, [0, 7], progress=False)
    dense = F.cross_entropy(plain_network(images), labels)
    for unit, change in zip((0, 7), changes, strict=True):
        smaller = graph.remove([graph.units[unit]])
        assert change.item() == pytest.approx((F.cross_entropy(smaller(images), labels) - dense).item(), abs=1e-12)
        assert torch.isfinite(change)
