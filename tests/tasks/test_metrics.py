"""Metrics of the ready-made tasks by hand, and as sums over batches."""

import pytest
import torch

from taylor_pruning.errors import InputError
from taylor_pruning.tasks.classification import MultiLabel
from taylor_pruning.tasks.dense import Regression, Segmentation


def metrics(task, outputs, labels):
    """Of one batch, after a check that two batches of half the size give the same."""
    whole = task.statistics(outputs, (None, labels)).double()
    halves = [slice(None, len(labels) // 2), slice(len(labels) // 2, None)]
    torch.testing.assert_close(
        sum(task.statistics(outputs[half], (None, labels[half])).double() for half in halves), whole
    )
    return task.metrics(whole)


def test_f1_is_the_mean_over_labels_that_occur_or_are_said():
    """Label 0: 1 right of 2 said and 1 true; label 1: never said of 2 true; label 2: neither said nor true."""
    outputs = torch.tensor([[3.0, -1.0, -1.0], [2.0, -2.0, -1.0]])
    labels = torch.tensor([[1, 1, 0], [0, 1, 0]])
    said_in_vain = metrics(
        MultiLabel(), torch.cat([outputs, torch.ones(2, 1)], 1), torch.cat([labels, 0 * labels[:, :1]], 1)
    )
    assert said_in_vain["f1"] == pytest.approx(100 * (2 / 3 + 0 + 0) / 3)
    found = metrics(MultiLabel(), outputs, labels)
    assert found["f1"] == pytest.approx(100 * (2 / 3 + 0) / 2) and found["images"] == 2
    wrong = torch.tensor([[0.0486, 1.3133, 0.3133], [2.1269, 2.1269, 0.3133]])  # -log of the probability of every label
    assert found["loss"] == pytest.approx(wrong.sum().item() / 2, abs=1e-3)


def test_miou_leaves_unlabelled_pixels_and_absent_classes_out():
    """Class 0: 2 of 3 in the union; class 1: 2 of 3; class 2 is in neither; one pixel has no label."""
    said = torch.tensor([[[0, 0]], [[1, 0]], [[1, 2]]])
    labels = torch.tensor([[[0, 0]], [[1, 1]], [[1, 255]]])
    outputs = 10 * torch.nn.functional.one_hot(said, 3).movedim(3, 1).float()
    found = metrics(Segmentation(), outputs, labels)
    assert found["miou"] == pytest.approx(100 * (2 / 3 + 2 / 3) / 2)
    assert found["pixel_accuracy"] == pytest.approx(80)


def test_the_loss_of_an_image_is_the_mean_over_its_labelled_pixels():
    generator = torch.Generator().manual_seed(0)
    outputs, labels = torch.randn(3, 4, 2, 5, generator=generator), torch.randint(4, (3, 2, 5), generator=generator)
    labels[0, 0, :3], labels[1] = 255, 255
    at = outputs.log_softmax(1).gather(1, labels.clamp_max(3)[:, None])[:, 0]
    wanted = [
        -image[known].mean() if known.any() else torch.tensor(0.0)
        for image, known in zip(at, labels != 255, strict=True)
    ]
    loss = Segmentation(aux_weight=0.3).loss(outputs, (None, labels))
    torch.testing.assert_close(loss, torch.stack(wanted))
    both = Segmentation(aux_weight=0.3).loss({"out": outputs, "aux": outputs.flip(1)}, (None, labels))
    torch.testing.assert_close(both, loss + 0.3 * Segmentation().loss(outputs.flip(1), (None, labels)))


def test_classes_that_occur_or_are_said_count_however_rare():
    """Class 0: 2 of 3 in the union; class 1: 1 pixel, found; class 2: said once, in vain."""
    said, labels = torch.tensor([[[0, 0, 2, 1]]]), torch.tensor([[[0, 0, 0, 1]]])
    outputs = 10 * torch.nn.functional.one_hot(said, 4).movedim(3, 1).float()
    task = Segmentation()
    assert task.metrics(task.statistics(outputs, (None, labels)))["miou"] == pytest.approx(100 * (2 / 3 + 1 + 0) / 3)


def test_mae_is_in_the_units_of_the_targets_whatever_the_scale():
    outputs, targets = torch.tensor([[1.0, 10.0], [2.0, 20.0]]), torch.tensor([[0.0, 10.0], [2.0, 40.0]])
    found = metrics(Regression(scale=torch.tensor([1.0, 10.0])), outputs, targets)
    assert found == {"mae": 21 / 4, "loss": (1 / 2 + 4 / 2) / 2, "images": 2}


@pytest.mark.parametrize(
    "labels", [torch.tensor([0, 1]), torch.tensor([[0, 2], [1, 0]]), torch.tensor([[0.5, 1], [1, 0]])]
)
def test_labels_that_are_not_yes_or_no_are_refused(labels):
    with pytest.raises(InputError, match="give 0 or 1 for every image and label"):
        MultiLabel().read((torch.zeros(2, 3, 4, 4), labels), "the first batch")
