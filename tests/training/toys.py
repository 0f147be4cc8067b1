"""Small networks, data and loaders that the tests of training share."""

import math

import torch
from torch import nn

from taylor_pruning.training.fine_tuning import Recipe, fine_tune

RICH = Recipe(
    epochs=4, lr=0.05, warmup_epochs=0.5, label_smoothing=0.1, distillation_weight=0.5, ema_decay=0.8, clip_ratio=0.5
)


class ListLoader:
    """Batches of a tensor pair, shuffled by (seed, epoch) once set_epoch was called; `on_batch(epoch, i)` may interfere."""

    def __init__(self, images, labels, batch_size, on_batch=None):
        self.images, self.labels, self.batch_size, self.on_batch = images, labels, batch_size, on_batch
        self.epoch = None

    def __len__(self):
        return math.ceil(len(self.labels) / self.batch_size)

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        order = torch.arange(len(self.labels))
        if self.epoch is not None:
            order = torch.randperm(len(order), generator=torch.Generator().manual_seed(1000 + self.epoch))
        for i in range(len(self)):
            rows = order[i * self.batch_size : (i + 1) * self.batch_size]
            if self.on_batch:
                self.on_batch(self.epoch, i)
            yield self.images[rows], self.labels[rows]


def toy_data(images=96, classes=3, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(images) % classes
    means = torch.randn(classes, 3, 6, 6, generator=generator)
    return (means[labels] + 0.7 * torch.randn(images, 3, 6, 6, generator=generator)).to(dtype), labels


def toy_model(classes=3, batchnorm=True, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8) if batchnorm else nn.Identity(),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.2) if batchnorm else nn.Identity(),
        nn.Linear(32, classes),
    )


def toy_loaders(batch_size=16, on_batch=None, **options):
    images, labels = toy_data(**options)
    return ListLoader(images, labels, batch_size, on_batch), ListLoader(images[:50], labels[:50], 20)


def states_equal(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def without_seconds(history):
    return [{key: value for key, value in epoch.items() if key != "seconds"} for epoch in history.epochs]


class Fixed(nn.Module):
    """Logits straight from the image's first pixels; `bias` makes it a model with a parameter."""

    def __init__(self, classes):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(classes))

    def forward(self, images):
        return images.flatten(1)[:, : len(self.bias)] + self.bias


class Poisoned(nn.Module):
    """The wrapped model, with logits multiplied by `factor` from training step `step` on."""

    def __init__(self, model, step, factor):
        super().__init__()
        self.model, self.step, self.factor, self.steps = model, step, factor, 0

    def forward(self, images):
        self.steps += self.training
        return self.model(images) * (self.factor if self.training and self.steps >= self.step else 1.0)


def raise_at(epoch, batch, error):
    def on_batch(at_epoch, at_batch):
        if (at_epoch, at_batch) == (epoch, batch):
            raise error

    return on_batch


def rich_run(checkpoint=None, resume=False, on_batch=None, recipe=RICH, model=None):
    """The run that the tests below break off: dropout, BatchNorm, EMA, distillation, smoothing, clipping."""
    torch.manual_seed(5)
    model = model or toy_model()
    train, val = toy_loaders(on_batch=on_batch)
    history = fine_tune(
        model, train, val, recipe, teacher=toy_model(seed=1), checkpoint=checkpoint, resume=resume, progress=False
    )
    return model, history
