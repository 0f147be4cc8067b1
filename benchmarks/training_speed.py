"""Images a second of training.fine_tuning.fine_tune against a plain PyTorch loop with the same augmentation.

    python benchmarks/training_speed.py --data-path cifar10 --model vgg11_bn --repeats 9
    python benchmarks/training_speed.py                       # on the embedded images, written as PNG files

The plain loop is what one writes by hand: a DataLoader with persistent workers over torchvision's ImageFolder and
transforms, nothing cached, SGD with Nesterov momentum and a cosine. Both train the same network on the same folder, in
turn, after one repetition that does not count; in float32, and in bf16 with channels-last. Reading and decoding
the folder, which the toolkit does once for small images, is a line of its own.
"""

import argparse
import copy
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, Subset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from taylor_pruning.experiment.data import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    SMALL_SIDE,
    TensorImages,
    embedded_data,
    load_image_folder,
    make_loader,
)
from taylor_pruning.experiment.models import build_model
from taylor_pruning.training.fine_tuning import Recipe, fine_tune

SETTINGS = [{}, {"amp": "bf16", "channels_last": True}]


def write_embedded(root):
    """The embedded images as an ImageFolder of PNG files."""
    data = embedded_data(2000, 100)
    for split, images in (("train", data.evaluation_train), ("val", data.val)):
        for index, (pixels, label) in enumerate(zip(images.images, images.targets.tolist(), strict=True)):
            file = root / split / data.classes[label] / f"{index}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(file)


def loaders(root, data, arguments, device):
    """The toolkit's and the plain one, over the same images drawn at random: `--steps` batches, or the whole folder.

    Both go through all of their images, so that no worker is still at it while the other's time is taken.
    """
    index = torch.randperm(len(data.train))[: arguments.steps * arguments.batch_size]
    if isinstance(data.train, TensorImages):
        train = replace(data.train, images=data.train.images[index], targets=data.train.targets[index])
    else:
        train = Subset(data.train, index.tolist())
    ours = make_loader(train, arguments.batch_size, shuffle=True, workers=arguments.workers, seed=0, device=device)
    return ours, plain_loader(root, data.image_size, index.tolist(), arguments, device)


def plain_loader(root, size, index, arguments, device):
    crop = v2.RandomCrop(size, size // 8, padding_mode="reflect") if size <= SMALL_SIDE else v2.RandomResizedCrop(size)
    tensor = [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
    dataset = ImageFolder(root / "train", v2.Compose([crop, v2.RandomHorizontalFlip(), *tensor]))
    return DataLoader(
        Subset(dataset, index),
        arguments.batch_size,
        shuffle=True,
        num_workers=arguments.workers,
        persistent_workers=arguments.workers > 0,
        pin_memory=device.type == "cuda",
    )


def plain_training(model, loader, recipe, device):
    layout = torch.channels_last if recipe.channels_last else torch.contiguous_format
    model.to(memory_format=layout).train()
    optimizer = torch.optim.SGD(model.parameters(), recipe.lr, recipe.momentum, weight_decay=recipe.weight_decay, nesterov=True)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(loader))
    for images, labels in loader:
        images = images.to(device, memory_format=layout, non_blocking=True)
        labels = labels.to(device, non_blocking=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=recipe.amp == "bf16"):
            loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        scheduler.step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def speeds(root, data, model, arguments, device, settings):
    """{"fine_tune", "plain loop": [images a second, one a repetition]}."""
    recipe, model = Recipe(epochs=1, **settings), model.to(device)
    ours, plain = loaders(root, data, arguments, device)
    image, label = data.val[0]
    one_image = [(image[None].to(device), torch.tensor([label], device=device))]  # validation costs next to nothing
    ways = {
        "fine_tune": lambda model: fine_tune(model, ours, one_image, recipe, progress=False),
        "plain loop": lambda model: plain_training(model, plain, recipe, device),
    }
    measured = {name: [] for name in ways}
    for repeat in range(arguments.repeats + 1):
        for name in sorted(ways, reverse=repeat % 2 == 1):
            copied = copy.deepcopy(model)
            start = time.perf_counter()
            ways[name](copied)
            if repeat:
                measured[name].append(len(ours.dataset) / (time.perf_counter() - start))
    return measured


def row(device, settings, measured):
    ratios = [a / b for a, b in zip(measured["fine_tune"], measured["plain loop"], strict=True)]
    ours, plain = (f"{statistics.median(values):.0f}" for values in measured.values())
    ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
    precision = f"{settings['amp']}, channels-last" if settings else "float32"
    return f"| {device} | {precision} | {ours} | {plain} | {ratio} | {len(ratios)} |"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vgg11_bn", help="torchvision's")
    parser.add_argument("--data-path", help="ImageFolder root (default: the embedded images, as files)")
    parser.add_argument("--steps", type=int, default=50, help="of every repetition, at most a pass")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--devices", nargs="+", choices=("cpu", "cuda"), help="default: all there are")
    arguments = parser.parse_args()
    devices = arguments.devices or ["cpu", "cuda"][: 1 + torch.cuda.is_available()]
    with tempfile.TemporaryDirectory() as folder:
        root = Path(arguments.data_path or folder)
        if not arguments.data_path:
            write_embedded(root)
        start = time.perf_counter()
        data = load_image_folder(root)
        print(f"{arguments.model}, {len(data.train)} images of {data.image_size} pixels, {arguments.steps} steps of "
              f"{arguments.batch_size}, {arguments.workers} workers, {torch.get_num_threads()} thread(s), torch "
              f"{torch.__version__}; reading the folder: {time.perf_counter() - start:.1f} s\n")  # fmt: skip
        model = build_model(arguments.model, data.num_classes, image_size=data.image_size, weights="none").model
        print("| device | precision | fine_tune (images/s) | plain loop (images/s) | ratio: median (range) | n |")
        print("|---|---|---|---|---|---|")
        for device in devices:
            for settings in SETTINGS:
                print(row(device, settings, speeds(root, data, model, arguments, torch.device(device), settings)), flush=True)


if __name__ == "__main__":
    main()
