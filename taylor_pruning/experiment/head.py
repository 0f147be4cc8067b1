"""Specialising: a classifier of the classes that the data have, and labels that count these alone.

    data, built = present_classes(data, built)      # an ImageNet network for the ten synset folders that one has

The remaining logits are those of the whole classifier; nothing is trained.
"""

import copy
from dataclasses import replace

import torch
from torch import nn
from torch.utils.data import Dataset

from taylor_pruning.errors import InputError
from taylor_pruning.experiment.data import ImageData, TensorImages
from taylor_pruning.experiment.folders import FolderImages
from taylor_pruning.experiment.models import BuiltModel, head_name
from taylor_pruning.surgery.copying import copy_of


def present_classes(data: ImageData, built: BuiltModel) -> tuple[ImageData, BuiltModel]:
    """The data with labels 0, 1, ... of the classes that have training images, and a network with their logits alone.

    Labels keep their order. Both come back unchanged where every class is present.

    Raises:
        InputError: the class folders are not ImageNet's, so that no logits belong to them.
    """
    if not data.imagenet_labels:
        raise InputError(
            "--head present needs class folders that are named by ImageNet's synset ids, as n01440764; leave it out, and a "
            f"network without the {data.num_classes} classes gets a new head"
        )
    present = sorted({int(label) for label in data.train.targets})
    if len(present) == data.num_classes:
        return data, built
    labels = {label: place for place, label in enumerate(present)}
    sets = {name: relabelled(getattr(data, name), labels) for name in ("train", "val", "evaluation_train")}
    classes = [data.classes[label] for label in present]
    data = replace(data, **sets, classes=classes, num_classes=len(classes), imagenet_labels=False)
    return data, replace(built, model=reduced_head(built.model, present), num_classes=len(classes))


def relabelled(dataset: Dataset, labels: dict[int, int]) -> Dataset:
    """A copy of the data set with other labels."""
    if isinstance(dataset, TensorImages):
        return replace(dataset, targets=torch.tensor([labels[int(label)] for label in dataset.targets]))
    other: FolderImages = copy.copy(dataset)
    other.keep([(path, labels[label]) for path, label in dataset.samples])
    other.class_to_idx = {name: labels[label] for name, label in dataset.class_to_idx.items() if label in labels}
    other.classes = list(other.class_to_idx)
    return other


def reduced_head(model: nn.Module, classes: list[int]) -> nn.Module:
    """A copy of the network whose classifying layer has the outputs `classes` alone."""
    model = copy_of(model)
    head = model.get_submodule(head_name(model))
    head.weight = nn.Parameter(head.weight.detach()[classes].clone(), requires_grad=head.weight.requires_grad)
    if head.bias is not None:
        head.bias = nn.Parameter(head.bias.detach()[classes].clone(), requires_grad=head.bias.requires_grad)
    width = "out_features" if isinstance(head, nn.Linear) else "out_channels"
    setattr(head, width, len(classes))
    return model
