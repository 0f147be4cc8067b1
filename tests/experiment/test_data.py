"""Decoded images: crops and flips."""

import torch
from image_files import normalised

from taylor_pruning.experiment.data import TensorImages


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
