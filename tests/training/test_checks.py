"""Facts of batches: what they tell of pixels and labels, and when they are read."""

import math

import pytest
import torch

from taylor_pruning.errors import InputError
from taylor_pruning.training.checks import BatchLog, batch_facts, valid_labels


def checked(images, labels, classes=3):
    log = BatchLog(torch.device("cpu"))
    loss = torch.tensor(1.5, dtype=torch.float64)
    log.add(batch_facts(loss, images, labels), classes=classes, count=len(labels), where="batch 7")
    (batch,) = log.read()
    batch.check()
    return batch


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_every_bad_pixel_is_found(value, dtype):
    images = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert checked(images, torch.tensor([0, 1, 2, 2])).facts[0] == 1.5
    images[2, 1, 3, 4] = value
    with pytest.raises(InputError, match="batch 7 holds NaN or Inf"):
        checked(images, torch.tensor([0, 1, 2, 2]))


@pytest.mark.parametrize("label", [-1, 3, 100_000])
def test_every_bad_label_is_found_and_harmless(label):
    images, labels = torch.zeros(4, 3, 5, 5), torch.tensor([0, 1, label, 2])
    with pytest.raises(
        InputError, match=rf"batch 7 holds label {label}, but the model has 3 outputs \(labels 0 to 2\)"
    ):
        checked(images, labels)
    assert valid_labels(labels, 3).tolist() == [0, 1, min(max(label, 0), 2), 2]


def test_a_gpu_is_read_seldom_and_a_cpu_at_once():
    assert BatchLog(torch.device("cpu")).every == 1 and BatchLog(torch.device("cuda")).every == 32
    log = BatchLog(torch.device("cuda"), every=3)
    images, labels = torch.zeros(1, 3, 2, 2), torch.tensor([1])
    for index in range(3):
        assert not log.due
        log.add(batch_facts(torch.tensor(float(index)), images, labels), classes=2, count=index, where=str(index))
    assert log.due
    assert [(batch.facts[0], batch.count, batch.where) for batch in log.read()] == [
        (0, 0, "0"),
        (1, 1, "1"),
        (2, 2, "2"),
    ]
    assert not log.due and log.read() == []
