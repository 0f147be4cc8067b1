"""Image folders, corrupt and odd images, repeatable loaders, shards and calibration draws."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.models import EfficientNet_B1_Weights, VGG16_Weights
from torchvision.transforms import v2

from taylor_pruning.errors import InputError
from taylor_pruning.experiment import data as ExperimentData
from taylor_pruning.experiment.data import (
    BatchLoader,
    EpochBatches,
    TensorImages,
    WorkerLoader,
    calibration_batches,
    load_image_folder,
    make_loader,
    read_image,
)
from taylor_pruning.experiment.embedded import embedded_data

SYNSETS = ["n01440764", "n01443537", "n03028079"]  # ImageNet's labels 0, 1 and 497


def write_image(path, size=(32, 32), colour=None, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    if colour is None:
        pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
        Image.fromarray(pixels).save(path)
    else:
        Image.new("RGB", size, colour).save(path)


def write_folder(root, classes=("cat", "dog"), per_class=3, size=(32, 32), splits=("train", "val")):
    for split in splits:
        for c, name in enumerate(classes):
            for i in range(per_class):
                write_image(root / split / name / f"{i}.png", size, seed=[c, i, split == "train"])
    return root


def break_image(path, kind):
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("this is no image")
    else:
        write_image(path, (48, 48))
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


def normalised(pixels, mean=ExperimentData.IMAGENET_MEAN, std=ExperimentData.IMAGENET_STD):
    """Reference: float64 [3, H, W] from uint8 [H, W, 3]."""
    return torch.from_numpy(((np.asarray(pixels, np.float64) / 255 - mean) / std).transpose(2, 0, 1))


def epoch_of(loader, epoch):
    loader.set_epoch(epoch)
    batches = list(loader)
    return torch.cat([images for images, _ in batches]), torch.cat([labels for _, labels in batches])


def numbered(count, **options):
    """Every image is filled with its own number, so that batches tell which images they hold."""
    images = torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 8, 8).contiguous()
    return TensorImages(images, torch.arange(count), mean=(0, 0, 0), std=(1, 1, 1), **options)


# ------------------------------------------------------------------------------------------------ layout, labels


def test_small_images_keep_their_size_and_values(tmp_path):
    root = write_folder(tmp_path / "tiny", splits=("train", "test"))
    data = load_image_folder(root)
    assert (data.name, data.image_size, data.classes, data.num_classes) == ("tiny", 32, ["cat", "dog"], 2)
    assert not data.imagenet_labels and data.skipped == []
    assert len(data.train) == len(data.val) == len(data.evaluation_train) == 6
    image, label = data.val[4]
    expected = normalised(Image.open(root / "test" / "dog" / "1.png"))
    assert label == 1 and image.dtype == torch.float32
    torch.testing.assert_close(image.double(), expected, rtol=0, atol=1e-5)
    assert (data.train.padding, data.train.flip) == (4, True)
    assert (data.evaluation_train.padding, data.evaluation_train.flip) == (0, False)
    assert data.train.images is data.evaluation_train.images


def test_odd_sizes_in_a_small_set_are_resized(tmp_path):
    root = write_folder(tmp_path, per_class=4)
    write_image(root / "train" / "cat" / "x.png", (90, 45), "red")
    write_image(root / "val" / "cat" / "x.png", (1, 1), "blue")
    data = load_image_folder(root)
    assert data.image_size == 32
    assert data.train.images[4].flatten(1).T.unique(dim=0).tolist() == [[255, 0, 0]]
    assert data.val.images[4].flatten(1).T.unique(dim=0).tolist() == [[0, 0, 255]]
    assert load_image_folder(root, image_size=24).train.images.shape[2:] == (24, 24)


def test_small_set_beyond_the_memory_limit_gives_the_same_evaluation_images(tmp_path, monkeypatch):
    root = write_folder(tmp_path)
    write_image(root / "val" / "cat" / "x.png", (50, 40))
    decoded = load_image_folder(root)
    monkeypatch.setattr(ExperimentData, "MEMORY_LIMIT", 0)
    lazy = load_image_folder(root)
    assert isinstance(decoded.val, TensorImages) and not isinstance(lazy.val, TensorImages)
    for i in range(len(decoded.val)):
        torch.testing.assert_close(lazy.val[i][0], decoded.val[i][0])
    assert lazy.train[0][0].shape == (3, 32, 32)


def test_large_images_follow_the_weights_preset(tmp_path):
    root = write_folder(tmp_path, per_class=1, size=(300, 280))
    image = Image.open(root / "val" / "cat" / "0.png")
    for weights, size in ((VGG16_Weights.DEFAULT, 224), (EfficientNet_B1_Weights.IMAGENET1K_V2, 240)):
        data = load_image_folder(root, weights=weights)
        assert data.image_size == size
        torch.testing.assert_close(data.val[0][0], weights.transforms()(image))
        assert data.train[0][0].shape == data.evaluation_train[0][0].shape == (3, size, size)
    data = load_image_folder(root, image_size=112)
    expected = normalised(v2.CenterCrop(112)(v2.Resize(128, antialias=True)(image)))
    torch.testing.assert_close(data.val[0][0].double(), expected, rtol=0, atol=1e-5)
    assert load_image_folder(root).image_size == 224


def test_weights_do_not_blow_small_images_up_but_an_image_size_does(tmp_path):
    root = write_folder(tmp_path)
    data = load_image_folder(root, weights=VGG16_Weights.IMAGENET1K_FEATURES)
    assert data.image_size == 32
    preset = VGG16_Weights.IMAGENET1K_FEATURES.transforms()
    assert data.val.std == tuple(preset.std) != ExperimentData.IMAGENET_STD
    assert load_image_folder(root, image_size=96).val[0][0].shape == (3, 96, 96)


def test_synset_labels_follow_imagenet_when_classes_are_missing(tmp_path):
    root = write_folder(tmp_path, [SYNSETS[2], SYNSETS[0]], per_class=2)
    data = load_image_folder(root)
    assert data.imagenet_labels and data.num_classes == len(data.classes) == 1000
    assert data.val.targets.tolist() == [0, 0, 497, 497]
    assert [data.classes[label] for label in (0, 1, 497)] == SYNSETS
    write_image(root / "train" / "cat" / "0.png")
    assert load_image_folder(root).num_classes == 3


@pytest.mark.parametrize(
    "hidden",
    [
        "train/.ipynb_checkpoints/0-checkpoint.png",
        "val/.ipynb_checkpoints/0-checkpoint.png",
        "train/cat/.ipynb_checkpoints/0-checkpoint.png",
        "train/cat/._0.png",
        ".cache/0.png",
    ],
)
def test_hidden_files_and_folders_are_passed_over(tmp_path, hidden):
    root = write_folder(tmp_path / ".data")
    write_image(root / hidden)
    (root / "val" / ".empty").mkdir()
    data = load_image_folder(root)
    assert data.classes == ["cat", "dog"] and (len(data.train), len(data.val)) == (6, 6)


def test_validation_may_lack_classes(tmp_path):
    root = write_folder(tmp_path, ["a", "b", "c"])
    for file in (root / "val" / "b").iterdir():
        file.unlink()
    (root / "val" / "b").rmdir()
    assert sorted(set(load_image_folder(root).val.targets.tolist())) == [0, 2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda root: (root / "train").rename(root / "training"), r"no folder train/; expected PATH/train/CLASS"),
        (lambda root: (root / "val").rename(root / "valid"), r"no folder val/ or test/; expected PATH/train/CLASS"),
        (lambda root: (root / "train" / "dog").rename(root / "dog"), r"class folders that .*train lacks: dog;"),
        (lambda root: (root / "val" / "emu").mkdir(), r"class folders that .*train lacks: emu;"),
        (lambda root: (root / "train" / "emu").mkdir(), r"train has class folders without any image: emu;"),
        (lambda root: [f.unlink() for f in (root / "val" / "cat").iterdir()], r"val has .* without any image: cat;"),
        (lambda root: [(root / s / "dog").rename(root / s[:1]) for s in ("train", "val")], r"only the class cat;"),
        (lambda root: [(root / "val" / c).rename(root / c) for c in ("cat", "dog")], r"val has no class folders;"),
    ],
)
def test_wrong_layouts_are_named(tmp_path, change, message):
    change(write_folder(tmp_path, per_class=1))
    with pytest.raises(InputError, match=message):
        load_image_folder(tmp_path)


def test_missing_path_and_impossible_size(tmp_path):
    with pytest.raises(InputError, match="no data folder .*nowhere; expected PATH/train/CLASS"):
        load_image_folder(tmp_path / "nowhere")
    with pytest.raises(InputError, match="at least 1 pixel"):
        load_image_folder(write_folder(tmp_path), image_size=0)


# ------------------------------------------------------------------------------------------------ difficult files


@pytest.mark.parametrize("kind", ["truncated", "empty", "text"])
def test_corrupt_file_is_named_or_skipped(tmp_path, kind):
    root = write_folder(tmp_path)
    bad = break_image(root / "train" / "cat" / "bad.jpg", kind)
    with pytest.raises(InputError, match=r"cannot decode .*bad\.jpg: .*--skip-corrupt"):
        load_image_folder(root)
    data = load_image_folder(root, skip_corrupt=True)
    assert data.skipped == [bad] and len(data.train) == 6 and data.train.targets.tolist() == [0, 0, 0, 1, 1, 1]


def test_broken_png_is_named(tmp_path):
    write_image(tmp_path / "a.png")
    content = bytearray((tmp_path / "a.png").read_bytes())
    content[60:90] = bytes(30)
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(InputError, match=r"cannot decode .*a\.png"):
        read_image(tmp_path / "a.png")


def test_unreadable_file_is_an_error_even_when_corrupt_ones_are_skipped(tmp_path):
    root = write_folder(tmp_path)
    (root / "val" / "cat" / "dangling.png").symlink_to(root / "gone.png")
    with pytest.raises(InputError, match=r"cannot read .*dangling\.png"):
        load_image_folder(root, skip_corrupt=True)


def test_class_that_loses_all_its_images_is_named(tmp_path):
    root = write_folder(tmp_path)
    break_image(root / "train" / "emu" / "bad.jpg", "text")
    with pytest.raises(InputError, match="without any image: emu"):
        load_image_folder(root, skip_corrupt=True)


def test_nothing_but_corrupt_files(tmp_path):
    for split in ("train", "val"):
        for name in ("a", "b"):
            break_image(tmp_path / split / name / "bad.jpg", "text")
    with pytest.raises(InputError, match="cannot decode"):
        load_image_folder(tmp_path)


@pytest.mark.parametrize("workers", [0, 1])
def test_corrupt_large_image_reaches_the_user_as_it_is(tmp_path, workers):
    root = write_folder(tmp_path, per_class=2, size=(80, 80))
    bad = break_image(root / "val" / "dog" / "bad.jpg", "truncated")
    data = load_image_folder(root)
    with pytest.raises(InputError) as caught:
        list(make_loader(data.val, 2, workers=workers))
    assert str(bad) in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(InputError, match="bad.jpg"):
        data.val[4]
    data = load_image_folder(root, skip_corrupt=True)
    assert data.skipped == [bad] and len(data.val) == len(data.val.targets) == 4


def gray_levels(path, pixels, **options):
    Image.fromarray(pixels).save(path, **options)
    return np.asarray(read_image(path))


def test_sixteen_bit_gray_is_scaled(tmp_path):
    levels = np.array([[0, 128, 129, 257, 32768, 65535]], np.uint16)
    expected = [0, 0, 1, 1, 128, 255]
    for name in ("a.png", "a.tif"):
        assert gray_levels(tmp_path / name, levels)[0].tolist() == [[v] * 3 for v in expected]
    assert gray_levels(tmp_path / "i.tif", levels.astype(np.int32))[0, :, 0].tolist() == expected


@pytest.mark.parametrize("levels", [np.full((2, 2), 70000, np.int32), np.full((2, 2), 0.5, np.float32)])
def test_gray_levels_without_a_defined_white_are_refused(tmp_path, levels):
    with pytest.raises(InputError, match=r"cannot decode .*gray values"):
        gray_levels(tmp_path / "a.tif", levels)


@pytest.mark.parametrize("mode", ["CMYK", "P", "L", "1", "RGBA", "LA"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    path = tmp_path / ("grün 猫.jpg" if mode == "CMYK" else "grün 猫.png")
    source = Image.new("RGB", (8, 8), (255, 255, 255)).convert(mode)
    source.save(path)
    image = read_image(path)
    assert image.mode == "RGB" and np.asarray(image).min() > 250


@pytest.mark.filterwarnings("error")
def test_transparent_palette_needs_no_warning(tmp_path):
    source = Image.new("P", (4, 4), 1)
    source.putpalette([0, 0, 0, 10, 20, 30])
    source.save(tmp_path / "a.png", transparency=bytes([0, 128]))
    assert np.asarray(read_image(tmp_path / "a.png"))[0, 0].tolist() == [10, 20, 30]


def test_one_pixel_images_load(tmp_path):
    data = load_image_folder(write_folder(tmp_path, size=(1, 1)))
    images, _ = next(iter(make_loader(data.train, 6, shuffle=True)))
    assert images.shape == (6, 3, 1, 1)


# --------------------------------------------------------------------------------------------- batches and epochs


def test_take_equals_pad_crop_flip():
    images = torch.randint(256, (5, 3, 8, 6), dtype=torch.uint8)
    data = TensorImages(images, torch.zeros(5, dtype=torch.long), padding=2, flip=True)
    index = torch.tensor([4, 0, 0, 2])
    shifts, flips = torch.tensor([[0, 4], [1, 2], [4, 0], [2, 2]]), torch.tensor([True, False, True, False])
    batch = data.take(index, shifts, flips)
    padded = torch.nn.functional.pad(images.double(), (2, 2, 2, 2), mode="reflect")
    for row, (i, (top, left), flip) in enumerate(zip(index, shifts, flips, strict=True)):
        crop = padded[i, :, top : top + 8, left : left + 6]
        expected = normalised((crop.flip(2) if flip else crop).permute(1, 2, 0).numpy())
        torch.testing.assert_close(batch[row].double(), expected, rtol=0, atol=1e-5)


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


# --------------------------------------------------------------------------------------------------- calibration


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


# ------------------------------------------------------------------------------------------------ evenly spread


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
    rows = [0, 3, 6, 9][shard[0] :: shard[1]]
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
    monkeypatch.setattr("taylor_pruning.experiment.data.FLOATS_AT_ONCE", floats)
    for (images, labels), (ours, theirs) in zip(expected, make_loader(data, 5, shuffle=True), strict=True):
        assert torch.equal(images, ours) and torch.equal(labels, theirs)
