"""Products of which the lower triangle alone is computed."""

import pytest
import torch

from EnhancedFilterPruner import EnhancedFilterPruner
from taylor_pruning import gram
from taylor_pruning.scoring import estimates


@pytest.mark.parametrize("block", [1, 3, 7, 256])
def test_lower_triangles_add_up_to_the_symmetric_products(monkeypatch, block):
    monkeypatch.setattr(gram, "BLOCK", block)
    rows = torch.randn(2, 2, 7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    total = torch.zeros(2, 7, 7, dtype=torch.float64)
    for part in rows:
        gram.add_gram(total, part)
    assert torch.allclose(gram.symmetric(total), (rows @ rows.mT).sum(0))


@pytest.mark.parametrize("block,few", [(2, 0), (256, 10**6)])
def test_scores_do_not_depend_on_how_products_are_computed(relu_network, images, batches, monkeypatch, block, few):
    levels = []
    for values in ((gram.BLOCK, estimates.FEW_POSITIONS), (block, few)):
        monkeypatch.setattr(gram, "BLOCK", values[0])
        monkeypatch.setattr(estimates, "FEW_POSITIONS", values[1])
        pruner = EnhancedFilterPruner(relu_network, images, 2, progress=False).rank(batches, batches)
        levels.append(pruner.levels())
    torch.testing.assert_close(*levels, rtol=1e-8, atol=1e-12)
