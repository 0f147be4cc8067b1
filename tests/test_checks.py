"""Batches, logits and weights that are taken, and those that are refused."""

import math

import pytest
import torch
from torch import nn
from toys import toy_model

from taylor_pruning.checks import check_batch, check_logits, nonfinite_weight, read_batch
from taylor_pruning.errors import InputError

IMAGES, LABELS = torch.zeros(4, 3, 6, 6), torch.tensor([0, 1, 1, 0])


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool])
@pytest.mark.parametrize("shape", [(4,), (4, 1)])
def test_labels_of_every_integer_type_are_class_numbers(dtype, shape):
    _, labels = read_batch([IMAGES, LABELS.to(dtype).view(shape)], "a batch")
    assert labels.dtype == torch.int64 and torch.equal(labels, LABELS)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ((IMAGES, LABELS.float()), r"labels are float32|are float32"),
        ((IMAGES, LABELS[:, None].float()), "are float32"),
        ((IMAGES, torch.eye(4)), r"\[4, 4\], like one-hot"),
        ((IMAGES, torch.eye(4).long()), "like one-hot"),
        ((IMAGES, LABELS[:3]), r"\[3\] for 4 images"),
        ((IMAGES, torch.zeros(4, 6, 6).long()), r"\[4, 6, 6\] for 4 images"),
        ((IMAGES, LABELS.tolist()), "labels of a batch are a list of 4"),
        ((IMAGES.numpy(), LABELS), "images of a batch are an object of type ndarray"),
        (((IMAGES, IMAGES), LABELS), "images of a batch are a tuple of 2"),
        ((IMAGES, LABELS, LABELS), "a tuple of 3, not a pair"),
        ({"image": IMAGES, "label": LABELS}, "a dict with the keys image, label, not a pair"),
        (IMAGES[:2], r"a tensor \[2, 3, 6, 6\], not a pair"),
        ((IMAGES[:0], LABELS[:0]), "holds no images"),
    ],
)
def test_batches_without_a_clear_meaning_are_refused(batch, message):
    with pytest.raises(InputError, match=message):
        read_batch(batch, "a batch")


def test_tensors_of_inference_mode_can_be_used():
    with torch.inference_mode():
        batch = IMAGES + 1, LABELS + 0
    images, _ = read_batch(batch, "a batch")
    assert not images.is_inference() and torch.equal(images, batch[0])


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        ({"logits": torch.zeros(4, 2), "aux": 0}, "a dict with the keys logits, aux"),
        ((torch.zeros(4, 2), torch.zeros(4, 2)), "a tuple of 2"),
        (None, "NoneType"),
        (torch.zeros(4), r"\[4\].*one number an image"),
        (torch.zeros(4, 1), r"\[4, 1\].*one logit a class"),
        (torch.zeros(4, 2, 1), r"flatten\(1\)"),
        (torch.zeros(3, 2), r"must give logits \[4, classes\]"),
        (torch.zeros(4, 2, 1, 1), r"flatten\(1\)"),
        (torch.zeros(4, 2, 6, 6), r"must give logits \[4, classes\]"),
        (torch.zeros(2), r"must give logits \[4, classes\]"),
    ],
)
def test_outputs_that_are_no_logits_are_refused(outputs, message):
    with pytest.raises(InputError, match=message):
        check_logits(outputs, 4, "a batch")


def test_pixels_and_labels_are_checked():
    check_batch(IMAGES, LABELS, torch.zeros(4, 2), "a batch")
    with pytest.raises(InputError, match="holds label 2, but the model has 2 outputs.*give the model as many"):
        check_batch(IMAGES, LABELS + 1, torch.zeros(4, 2), "a batch")
    with pytest.raises(InputError, match="holds label -100.*leave out images without a class"):
        check_batch(IMAGES, torch.tensor([0, -100, 1, 1]), torch.zeros(4, 2), "a batch")
    with pytest.raises(InputError, match="NaN or Inf pixels"):
        check_batch(IMAGES / 0, LABELS, torch.zeros(4, 2), "a batch")


def test_the_first_nonfinite_tensor_is_named():
    model = toy_model()
    assert nonfinite_weight(model) is None and nonfinite_weight(torch.nn.ReLU()) is None
    model[1].running_var[2] = math.inf
    assert nonfinite_weight(model) == "1.running_var"
    with torch.no_grad():
        model[6].bias[0] = math.nan
    assert nonfinite_weight(model) == "6.bias"


def test_infinite_values_of_a_mask_are_no_fault():
    model = toy_model()
    model.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(4))
    assert nonfinite_weight(model) is None


def test_finite_tensors_with_an_infinite_sum_are_finite():
    model = toy_model()
    with torch.no_grad():
        model[6].weight.fill_(3e38)
    assert nonfinite_weight(model) is None
