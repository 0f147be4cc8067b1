import pytest
import torch
from conftest import plain, randomise
from torch import nn

from EnhancedFilterPruner import ChannelGraph
from taylor_pruning.scoring.behind_repair import collect_behind_repair
from taylor_pruning.scoring.folds import FOLDS, by_fold, folds_of
from taylor_pruning.tasks.task import Task


class Named(Task):
    """Reads one field of a dictionary; regression."""

    def inputs(self, batch):
        return batch["image"]

    def loss(self, outputs, batch):
        return outputs.square().mean(1)

    def divergence(self, outputs, dense_outputs):
        return (outputs - dense_outputs).square().mean(1)


FIRST = {
    "names": lambda first, count: [f"{first + i}.png" for i in range(count)],
    "numbers": lambda first, count: torch.arange(first, first + count),
    "a mask": lambda first, count: torch.ones(count, 1, 8, 8),
}


@pytest.mark.parametrize("first", FIRST)
def test_folds_go_by_what_the_network_reads(first):
    """Whatever a batch begins with."""
    images = torch.randn(40, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    batches = [{"first": FIRST[first](10 * i, 10), "image": x} for i, x in enumerate(images.split(10))]
    folds = folds_of(batches, Named())
    assert torch.equal(folds, folds_of([(images, None)])) and folds.bincount(minlength=FOLDS).min() > 3
    seen = [x for fold, parts in by_fold(batches, Named()) for x in torch.cat([part["image"] for part in parts])]
    assert torch.equal(torch.stack(seen), images[folds.argsort(stable=True)])


@pytest.mark.parametrize("first", FIRST)
def test_scores_behind_repair_do_not_depend_on_what_a_batch_begins_with(first):
    torch.manual_seed(0)
    model, images = randomise(plain(nn.ReLU)), torch.randn(24, 3, 8, 8, dtype=torch.float64)
    graph = ChannelGraph(model, images[:1])
    scores = []
    for more in ({}, {"first": FIRST[first](0, 24)}):
        batches = [more | {"image": images}]
        found = collect_behind_repair(model, graph, batches, batches, 2, task=Named(), progress=False)
        scores.append(found.probed.h)
    torch.testing.assert_close(*scores)


def test_all_that_a_network_reads_of_a_sample_decides():
    """Two inputs, one of which is the same for all samples; a list has one image a sample, of any size."""

    class Rest(Task):
        """Reads all but the first field, or the one that is left."""

        def inputs(self, batch):
            return batch[1:] if len(batch) > 2 else batch[1]

    images = torch.randn(30, 3, 4, 4)
    flat = folds_of([(images, None)])
    for inputs in ((torch.zeros(30, 2), images), ({"scale": torch.tensor(2.0), "image": images},), ([*images],)):
        folds = folds_of([(list(range(30)), *inputs)], Rest())
        assert folds.bincount(minlength=FOLDS).min() > 0
    halves = [(list(range(15)), [*half]) for half in images.split(15)]
    assert torch.equal(folds, folds_of(halves, Rest())) and torch.equal(folds, flat)
