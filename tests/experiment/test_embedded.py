"""The embedded data set: repeatable, balanced, and not to be solved by a linear classifier."""

import hashlib

import pytest
import torch

from taylor_pruning.errors import InputError
from taylor_pruning.experiment.embedded import embedded_data, embedded_shapes


def test_embedded_images_are_the_same_everywhere():
    data = embedded_data(1000, 20)
    pixels = data.evaluation_train.images[[0, 17, 999]].numpy().tobytes() + data.val.images[:5].numpy().tobytes()
    assert hashlib.sha256(pixels).hexdigest() == "d8fc07d995b37c6df775c5988d844f54f5a75d3d10a9a76e9a93af648afd353c"
    assert torch.equal(embedded_data(510, 10).train.images, data.train.images[:510])
    assert not torch.equal(data.val.images, data.train.images[:20])


def test_embedded_set_is_balanced_and_described():
    data = embedded_data(100, 50)
    assert data.train.targets.bincount().tolist() == [10] * 10 and data.val.targets.bincount().tolist() == [5] * 10
    assert data.classes[:2] == ["striped disc", "checkered disc"] and len(set(data.classes)) == data.num_classes == 10
    assert (data.image_size, data.train.images.dtype, data.train.padding) == (32, torch.uint8, 4)
    with pytest.raises(InputError, match="10 images"):
        embedded_data(9, 10)
    with pytest.raises(InputError, match="there is no shape cube; choose from"):
        embedded_shapes(10, 0, ["cube"])


def test_a_linear_classifier_fails_on_the_embedded_set():
    data = embedded_data(1500, 500)
    splits = (data.evaluation_train, data.val)
    train, val = (split.take(torch.arange(len(split))).flatten(1).double() for split in splits)
    kernel, scale = train @ train.T, train.shape[1]
    one_hot = torch.nn.functional.one_hot(data.train.targets).double() - 0.1
    for ridge in (0.01, 0.1, 1.0, 10.0):
        dual = torch.linalg.solve(kernel + ridge * scale * torch.eye(len(train)), one_hot)
        accuracy = ((val @ train.T @ dual).argmax(1) == data.val.targets).double().mean()
        assert accuracy < 0.25
