"""Repeatable loaders, shards, evenly spread images and calibration draws."""

import os
import signal
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from image_files import write_folder

from taylor_pruning.errors import InputError
from taylor_pruning.experiment.data import TensorImages
from taylor_pruning.experiment.embedded import embedded_data
from taylor_pruning.experiment.folders import load_image_folder
from taylor_pruning.experiment.loaders import (
    BatchLoader,
    EpochBatches,
    WorkerLoader,
    calibration_batches,
    make_loader,
)
from taylor_pruning.experiment.run import explained
from taylor_pruning.tasks.batches import spread_rows


def epoch_of(loader, epoch):
    loader.set_epoch(epoch)
    batches = list(loader)
    return torch.cat([images for images, _ in batches]), torch.cat([labels for _, labels in batches])


def numbered(count, **options):
    """Every image is filled with its own number, so that batches tell which images they hold."""
    images = torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 8, 8).contiguous()
    return TensorImages(images, torch.arange(count), mean=(0, 0, 0), std=(1, 1, 1), **options)


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    return load_image_folder(write_folder(tmp_path_factory.mktemp("large"), size=(72, 70)), image_size=16)


def loaders(data, **options):
    return make_loader(data.train, 4, shuffle=True, **options)


@pytest.mark.parametrize("kind", ["tensor", "folder"])
def test_an_epoch_depends_on_seed_and_epoch_alone(large, kind):
    data = embedded_data(20, 10) if kind == "tensor" else large
    unbroken = loaders(data, seed=5)
    assert isinstance(unbroken, BatchLoader if kind == "tensor" else WorkerLoader)
    first, second = (epoch_of(unbroken, epoch) for epoch in (0, 1))
    torch.manual_seed(123)  # whatever else a run draws must not matter
    resumed = epoch_of(loaders(data, seed=5), 1)
    assert torch.equal(resumed[0], second[0]) and torch.equal(resumed[1], second[1])
    assert not torch.equal(first[0], second[0])
    assert not torch.equal(first[0], epoch_of(loaders(data, seed=6), 0)[0])
    assert torch.equal(first[0], epoch_of(unbroken, 0)[0])


def test_persistent_workers_follow_the_epoch(large):
    here, there = loaders(large), loaders(large, workers=2)
    for epoch in (3, 4):
        for ours, theirs in zip(epoch_of(here, epoch), epoch_of(there, epoch), strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("kind", ["tensor", "folder"])
def test_loaders_leave_the_global_generator_alone(large, kind):
    loader = loaders(embedded_data(20, 10) if kind == "tensor" else large)
    before = torch.get_rng_state()
    list(loader)
    assert torch.equal(before, torch.get_rng_state())


def test_order_and_augmentation_both_change_with_epoch_and_seed():
    data = embedded_data(20, 10).train
    orders, images = [], []
    for seed, epoch in ((0, 0), (0, 1), (1, 0)):
        loader = make_loader(data, 20, shuffle=True, seed=seed)
        drawn, labels = epoch_of(loader, epoch)
        orders.append(labels.tolist())
        images.append(drawn[np.argsort(loader.plan.batches()[0])])
    assert orders[0] != orders[1] != orders[2] != orders[0]
    assert not any(torch.equal(images[i], images[j]) for i, j in ((0, 1), (0, 2), (1, 2)))


def test_augmentation_does_not_depend_on_the_batch_size():
    data = embedded_data(20, 10).train
    by_image = {}
    for batch_size in (3, 20):
        loader = make_loader(data, batch_size, shuffle=True)
        order = np.concatenate(loader.plan.batches())
        images, labels = epoch_of(loader, 0)
        assert labels.tolist() == data.targets[order].tolist()
        by_image[batch_size] = images[np.argsort(order)]
    assert torch.equal(by_image[3], by_image[20])


def test_loader_surface():
    data = numbered(10)
    loader = make_loader(data, 4)
    assert loader.dataset is data and len(loader) == 3
    assert [labels.tolist() for _, labels in loader] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    images, labels = next(iter(loader))
    assert images.dtype == torch.float32 and labels.dtype == torch.int64
    torch.testing.assert_close(images[:, 0, 0, 0] * 255, labels.float())
    assert [item[1] for item in data] == list(range(10))


def test_shuffled_batches_are_even():
    plan = EpochBatches(9, 4, shuffle=True, seed=0)
    assert [len(batch) for batch in plan.batches()] == [3, 3, 3]
    assert sorted(np.concatenate(plan.batches()).tolist()) == list(range(9))


@pytest.mark.parametrize(("length", "world"), [(23, 4), (8, 2), (3, 3)])
def test_training_shards_are_disjoint_and_equal(length, world):
    shards = [EpochBatches(length, 3, shuffle=True, seed=1, shard=(rank, world)) for rank in range(world)]
    drawn = [[batch.tolist() for batch in shard.batches()] for shard in shards]
    assert all(len(batches) == len(shards[0]) for batches in drawn)
    assert len({tuple(map(len, batches)) for batches in drawn}) == 1
    seen = [index for batches in drawn for batch in batches for index in batch]
    assert len(seen) == len(set(seen)) == length - length % world


@pytest.mark.parametrize(("length", "world"), [(23, 4), (8, 2), (2, 3)])
def test_evaluation_shards_cover_everything_once(length, world):
    shards = [EpochBatches(length, 3, shuffle=False, seed=0, shard=(rank, world)) for rank in range(world)]
    assert all(len(list(shard)) == len(shard) for shard in shards)
    seen = [index for shard in shards for batch in shard for _, index in batch]
    assert sorted(seen) == list(range(length))


@pytest.mark.parametrize("moment", ["at once", "after a batch"])
def test_ctrl_c_does_not_reach_the_workers(large, moment):
    """A terminal sends it to all processes; the one that trains ends the others."""
    patch = mock.patch("taylor_pruning.experiment.loaders._ignore_interrupts")
    with patch if moment == "at once" else nullcontext():  # before they come to ignore it
        loader = make_loader(large.val, 1, workers=2)
        batches = iter(loader)
        first = next(batches)
    for worker in loader._loader._iterator._workers:
        os.kill(worker.pid, signal.SIGINT)
    assert len([first, *batches]) == len(large.val)


def test_ctrl_c_while_workers_start_is_not_lost(large):
    """Python drops an exception that is raised in what it calls around a fork."""
    usual = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        once = [signal.SIGINT]
        os.register_at_fork(after_in_parent=lambda: once and os.kill(os.getpid(), once.pop()))
        with pytest.raises(KeyboardInterrupt):
            list(make_loader(large.val, 1, workers=2))
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        assert len(list(make_loader(large.val, 1, workers=1))) == len(large.val)
    finally:
        signal.signal(signal.SIGINT, usual)


@pytest.mark.parametrize(
    "message",
    [
        "DataLoader worker (pid 20686) is killed by signal: Killed. ",
        "DataLoader worker (pid(s) 11590, 11591) exited unexpectedly",
        "unable to allocate shared memory(shm) for file </torch_1_2_3>: Resource temporarily unavailable (11)",
        "Caught RuntimeError in DataLoader worker process 0.\nunable to write to file </torch_1_2_3>: No space left (28)",
    ],
)
def test_a_worker_that_ends_early_is_told_from_other_errors(message):
    code, text = explained(RuntimeError(message), Path("nowhere"))
    assert code == 1 and "lower --workers" in text and "\n" not in text
    assert explained(RuntimeError("shapes do not match"), Path("nowhere")) == (None, "")


def test_impossible_loaders():
    with pytest.raises(InputError, match="batch size"):
        make_loader(numbered(4), 0)
    with pytest.raises(InputError, match="0 images"):
        make_loader(numbered(0), 4)
    with pytest.raises(InputError, match="2 images cannot be spread over 3"):
        EpochBatches(2, 1, shuffle=True, seed=0, shard=(0, 3))


def test_distributed_loader_takes_its_rank_share(monkeypatch):
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 3)
    loader = make_loader(numbered(8), 2, distributed=True)
    assert epoch_of(loader, 0)[1].tolist() == [1, 4, 7]


def test_calibration_is_balanced_deterministic_and_unaugmented():
    data = embedded_data(60, 10)
    order = {}
    for batch_size in (1, 7, 25):
        batches = calibration_batches(data, 25, batch_size, seed=3)
        assert [len(labels) for _, labels in batches[:-1]] == [batch_size] * (len(batches) - 1)
        order[batch_size] = torch.cat([i for i, _ in batches]), torch.cat([t for _, t in batches])
    images, labels = order[25]
    assert torch.equal(images, order[1][0]) and torch.equal(images, order[7][0])
    assert all(sorted(labels[i : i + 10].tolist()) == list(range(10)) for i in (0, 10))
    assert labels.bincount(minlength=10).max() == 3 and labels.bincount(minlength=10).min() == 2
    plain = {image.numpy().tobytes() for image, _ in data.evaluation_train}
    drawn = {image.numpy().tobytes() for image in images}
    assert len(drawn) == 25 and drawn <= plain
    assert not torch.equal(images, calibration_batches(data, 25, 25, seed=4)[0][0])


def test_calibration_of_unequal_classes_never_repeats(large):
    data = embedded_data(60, 10)
    data.evaluation_train = numbered(12)
    data.evaluation_train.targets = torch.tensor([0] * 8 + [2] * 3 + [5])
    ((images, labels),) = calibration_batches(data, 100, 100)
    assert sorted((images[:, 0, 0, 0] * 255).round().int().tolist()) == list(range(12))
    assert set(labels[:3].tolist()) == {0, 2, 5} and set(labels[3:5].tolist()) == {0, 2}
    assert labels[-5:].tolist() == [0] * 5
    ((images, labels),) = calibration_batches(large, 2, 8)
    assert images.shape == (2, 3, 16, 16) and set(labels.tolist()) == {0, 1}


@pytest.mark.parametrize(("samples", "batch_size"), [(0, 4), (4, 0)])
def test_calibration_needs_samples(samples, batch_size):
    with pytest.raises(InputError, match="at least 1"):
        calibration_batches(embedded_data(10, 10), samples, batch_size)


@pytest.mark.parametrize("kind", ["tensor", "folder"])
@pytest.mark.parametrize("shard", [(0, 1), (1, 2)])
def test_spread_reads_its_images_alone(kind, shard):
    dataset, read = numbered(10), []

    class Reads(torch.utils.data.Dataset):
        def __len__(self):
            return len(dataset)

        def __getitem__(self, index):
            read.append(index)
            return dataset[index]

    plan = EpochBatches(10, 2, shuffle=False, seed=0, shard=shard)
    device = torch.device("cpu")
    loader = BatchLoader(dataset, plan, device) if kind == "tensor" else WorkerLoader(Reads(), plan, device, 0)
    rows = spread_rows(10, 3).tolist()[shard[0] :: shard[1]]
    batches = loader.spread(3)
    assert [len(labels) for _, labels in batches] == [2] * (len(rows) // 2)
    assert torch.cat([labels for _, labels in batches]).tolist() == dataset.targets[rows].tolist()
    expected = torch.stack([dataset[row][0] for row in rows])
    torch.testing.assert_close(torch.cat([images for images, _ in batches]), expected)
    assert kind == "tensor" or read == rows
    assert sum(len(labels) for _, labels in loader) == len(range(shard[0], 10, shard[1]))  # itself as it was


@pytest.mark.parametrize("floats", [1, 3 * 8 * 8 * 10, 2**23])
def test_batches_made_together_are_those_made_alone(monkeypatch, floats):
    images = torch.randint(256, (23, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    data = TensorImages(images, torch.arange(23), padding=2, flip=True)
    expected = list(make_loader(data, 5, shuffle=True))
    monkeypatch.setattr("taylor_pruning.experiment.loaders.FLOATS_AT_ONCE", floats)
    for (images, labels), (ours, theirs) in zip(expected, make_loader(data, 5, shuffle=True), strict=True):
        assert torch.equal(images, ours) and torch.equal(labels, theirs)
