"""Image folders: layout, labels, transforms, corrupt and odd images."""

import errno
import os
import shutil
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from image_files import break_image, normalised, write_folder, write_image
from PIL import Image, features
from torchvision.models import EfficientNet_B1_Weights, VGG16_Weights
from torchvision.transforms import v2

from taylor_pruning.errors import InputError
from taylor_pruning.experiment import folders, listing
from taylor_pruning.experiment.command import DataSettings
from taylor_pruning.experiment.data import IMAGENET_STD, TensorImages
from taylor_pruning.experiment.folders import load_image_folder, read_image
from taylor_pruning.experiment.loaders import make_loader
from taylor_pruning.experiment.setup import load_data

SYNSETS = ["n01440764", "n01443537", "n03028079"]  # ImageNet's labels 0, 1 and 497


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
    monkeypatch.setattr(folders, "MEMORY_LIMIT", 0)
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
    assert data.val.std == tuple(preset.std) != IMAGENET_STD
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


@pytest.mark.parametrize("link", ["train/bird", "val/bird", "train/cat/more", "train/cat/9.png"])
def test_a_link_that_leads_nowhere_is_no_class_less(tmp_path, link):
    root = write_folder(tmp_path)
    (root / link).symlink_to("/no/such/disk")
    with pytest.raises(InputError, match=f"{link.rpartition('/')[2]}.*(mount what they lead to|No such file)"):
        load_image_folder(root)


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
    with pytest.raises(InputError, match="cannot read .*gone.png: No such file or directory; check the file and its"):
        read_image(tmp_path / "gone.png")


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow cannot write AVIF")
def test_a_broken_avif_is_named_or_skipped(tmp_path):
    """Its decoder raises another error than the others."""
    root = write_folder(tmp_path)
    bad = root / "val" / "dog" / "bad.avif"
    write_image(bad)
    bad.write_bytes(bad.read_bytes()[:-40])
    with pytest.raises(InputError, match=r"cannot decode .*bad\.avif: .*--skip-corrupt"):
        load_image_folder(root)
    assert load_image_folder(root, skip_corrupt=True).skipped == [bad]


def test_unreadable_file_is_an_error_even_when_corrupt_ones_are_skipped(tmp_path):
    root = write_folder(tmp_path)
    (root / "val" / "cat" / "dangling.png").symlink_to(root / "gone.png")
    with pytest.raises(InputError, match=r"cannot read .*dangling\.png"):
        load_image_folder(root, skip_corrupt=True)


def test_a_header_of_a_huge_image_is_named_or_skipped(tmp_path):
    root = write_folder(tmp_path)
    bad = root / "train" / "cat" / "bad.png"
    content = bytearray((root / "train" / "cat" / "0.png").read_bytes())
    content[16:24] = (60_000).to_bytes(4, "big") * 2  # width and height
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    bad.write_bytes(content)
    with pytest.raises(InputError, match=r"cannot decode .*bad\.png: .*--skip-corrupt"):
        load_image_folder(root)
    assert load_image_folder(root, skip_corrupt=True).skipped == [bad]


def test_a_pipe_is_refused_and_never_opened(tmp_path):
    """Opening it would wait for a writer."""
    root = write_folder(tmp_path)
    os.mkfifo(root / "train" / "cat" / "x.jpg")
    with pytest.raises(InputError, match=r"x\.jpg: it is a pipe"):
        load_image_folder(root)


def test_symbolic_links_that_lead_in_circles_add_no_images(tmp_path):
    root = write_folder(tmp_path / "data")
    write_image(root / "train" / "cat" / "more" / "3.png")
    (root / "train" / "cat" / "loop").symlink_to(root / "train" / "cat")
    (root / "train" / "cat" / "more" / "again").symlink_to(root / "train" / "cat" / "more")
    elsewhere = tmp_path / "elsewhere"
    write_image(elsewhere / "4.png")
    (root / "train" / "dog" / "linked").symlink_to(elsewhere)
    assert load_image_folder(root).train.targets.tolist() == [0] * 4 + [1] * 4


@pytest.mark.parametrize("place", ["train/cat/more", "train/cat", "val", "."])
def test_a_folder_that_cannot_be_listed_is_named(tmp_path, place, monkeypatch):
    root = write_folder(tmp_path)
    write_image(root / "train" / "cat" / "more" / "3.png")
    locked, scandir, listdir = str((root / place).resolve()), os.scandir, os.listdir

    def refusing(call):
        def listed(path):  # as the system does for users without rights; root has them
            if str(Path(path).resolve()) == locked and place != ".":
                raise PermissionError(errno.EACCES, "Permission denied", str(path))
            return call(path)

        return listed

    monkeypatch.setattr(os, "scandir", refusing(scandir))
    monkeypatch.setattr(os, "listdir", refusing(listdir))
    if place == ".":
        monkeypatch.setattr(
            Path, "is_dir", lambda path: (_ for _ in ()).throw(PermissionError(errno.EACCES, "no", path))
        )
    with pytest.raises(InputError, match=r"cannot (list|read) .*; check --data-path and its permissions"):
        load_image_folder(root)


def test_class_that_loses_all_its_images_is_named(tmp_path):
    root = write_folder(tmp_path)
    break_image(root / "train" / "emu" / "bad.jpg", "text")
    with pytest.raises(InputError, match="without any image: emu"):
        load_image_folder(root, skip_corrupt=True)


@pytest.mark.parametrize("suffix", ["gif", "jfif", "jp2"])
def test_images_of_every_suffix_are_read(tmp_path, suffix):
    root = write_folder(tmp_path)
    write_image(root / "train" / "cat" / f"x.{suffix}", colour="red")
    assert len(load_image_folder(root).train) == 7


def test_an_image_that_cannot_be_read_is_not_left_out_in_silence(tmp_path):
    root = write_folder(tmp_path)
    file = break_image(root / "train" / "cat" / "x.heic", "text")
    with pytest.raises(InputError, match="cannot decode .*x.heic: not an image that Pillow reads; repair or remove"):
        load_image_folder(root)
    assert load_image_folder(root, skip_corrupt=True).skipped == [file]


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


def test_validation_images_that_are_training_images_are_said(tmp_path, monkeypatch, capsys):
    root = write_folder(tmp_path)
    assert load_data(DataSettings(data_path=str(root))).shared == [] and not capsys.readouterr().err
    os.symlink(root / "train" / "cat" / "0.png", root / "val" / "cat" / "x.png")
    os.link(root / "train" / "dog" / "0.png", root / "val" / "dog" / "y.png")
    monkeypatch.setattr(listing, "READ_AT_MOST", 0)  # links are found without reading
    data = load_data(DataSettings(data_path=str(root)))
    assert data.shared == [str(root / "val" / "cat" / "x.png"), str(root / "val" / "dog" / "y.png")]
    assert (
        f"at least 2 of {len(data.val)} validation images are training images too, as {data.shared[0]}"
        in capsys.readouterr().err
    )


def test_copies_of_training_images_in_the_validation_folder_are_found(tmp_path, monkeypatch):
    """By their content: neither by name, nor by size or a part of it."""
    for name, content in {"t/1": b"a" * 9000, "t/2": b"b" * 9000, "t/3": b"c", "v/1": b"a" * 9000,
                          "v/2": b"x" + b"a" * 8999, "v/3": b"d", "v/4": b"other"}.items():  # fmt: skip
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    train, val = ({str(p): p.stat().st_size for p in sorted((tmp_path / s).iterdir())} for s in "tv")
    assert listing.copies(train, val) == {str(tmp_path / "v" / "1")}
    monkeypatch.setattr(listing, "READ_AT_MOST", 1)
    assert listing.copies(train, val) == {str(tmp_path / "v" / "1")}, "one training image of its size is read"
    monkeypatch.setattr(listing, "READ_AT_MOST", 0)
    assert not listing.copies(train, val)
    assert not listing.copies({str(tmp_path / "gone"): 5}, {str(tmp_path / "v" / "gone"): 5})
    root = write_folder(tmp_path / "data")
    monkeypatch.undo()
    shutil.copy(root / "train" / "cat" / "0.png", root / "val" / "cat" / "other name.png")
    assert load_image_folder(root).shared == [str(root / "val" / "cat" / "other name.png")]
