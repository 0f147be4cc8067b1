"""Images that stand for a whole loader."""

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from taylor_pruning.tasks.batches import spread_rows
from taylor_pruning.training.sampling import spread_images


class Plain(list):
    """Batches that can only be read from beginning to end."""

    def __init__(self, loader):
        super().__init__(loader)
        self.dataset = loader.dataset


@pytest.mark.parametrize("labels", [torch.arange(2000) // 200, torch.arange(2000) % 10], ids=["sorted", "in turn"])
def test_every_class_is_among_the_images_as_often(labels):
    loader = DataLoader(TensorDataset(torch.arange(2000), labels), 64)
    rows, found = (torch.cat(parts) for parts in zip(*spread_images(Plain(loader), 500), strict=True))
    assert rows.tolist() == spread_rows(2000, 500).tolist() and len(rows) == 500
    assert (found.bincount(minlength=10) - 50).abs().max() <= 20


@pytest.mark.parametrize(("number", "samples"), [(10, 3), (7, 2), (5, 5), (5, 9), (1, 1)])
def test_the_rows_are_different_ones_in_order(number, samples):
    rows = spread_rows(number, samples)
    assert (rows.diff() > 0).all() and rows[0] >= 0 and rows[-1] < number and len(rows) >= min(number, samples)


def test_a_loader_of_a_small_part_of_its_data_set_gives_an_image():
    loader = DataLoader(TensorDataset(torch.arange(2000)), 8, sampler=range(40, 48))
    ((images,),) = spread_images(Plain(loader), 10)
    assert images.tolist() == [40]
