"""What is checked of weights, batches and logits before any number is made from them."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from taylor_pruning.errors import InputError

CLASS_NUMBERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)


def nonfinite_tensor(tensors: Mapping[str, Tensor]) -> str | None:
    """Name of the first of the named tensors that holds NaN or infinite values. Waits for the device once."""
    tensors = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}
    # A sum shows every NaN and Inf and is 20 times as fast as isfinite(); where finite values overflow it, those decide.
    sums = [tensor.detach().sum().double() for tensor in tensors.values()]
    if not sums or torch.stack(sums).isfinite().all():
        return None
    return next((name for name, tensor in tensors.items() if not tensor.isfinite().all()), None)


def nonfinite_weight(model: nn.Module) -> str | None:
    """Name of the first parameter or running statistic of a norm that holds NaN or infinite values.

    Other buffers may: a causal mask is full of -inf.
    """
    return nonfinite_tensor(dict([*model.named_parameters(), *_statistics(model)]))


def _statistics(model):
    """The names and values of running means and variances, as a norm of any class keeps them."""
    return ((n, b) for n, b in model.named_buffers() if n.rpartition(".")[2] in ("running_mean", "running_var"))


def too_large(layer: str) -> str:
    """What an InputError says of a layer at which squares overflow."""
    return (
        f"numbers at the layer {layer} are too large for the sums of their squares; normalise the images as in training, and "
        "check that training has not diverged"
    )


def check_weights(model: nn.Module) -> None:
    """Raises InputError naming the first parameter or running statistic that holds NaN or infinite values."""
    if name := nonfinite_weight(model):
        raise InputError(f"the weights hold NaN or infinite values in {name}; load other weights")


def check_default_device() -> None:
    """Raises InputError if the caller's tensors are made elsewhere than on the CPU, where indices and draws belong."""
    if (device := torch.get_default_device()).type != "cpu":
        raise InputError(
            f"torch.set_default_device({str(device)!r}) moves indices and random draws there; set it back to 'cpu' and move "
            "the model and its images by to(device)"
        )


def check_gradient_mode(what: str) -> None:
    """Raises InputError if the caller has switched off gradients, which `what` needs."""
    if not torch.is_grad_enabled():
        raise InputError(f"{what} needs gradients; call this outside of torch.no_grad() and torch.inference_mode()")


def read_batch(batch, where: str, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """Images [B, ...] and class numbers int64 [B] of a loader's batch, on `device`.

    Labels of any integer type are class numbers, also as a column [B, 1].

    Raises:
        InputError: the batch is no pair of tensors, or its labels are no class numbers, one an image.
    """
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        raise no_pair(batch, where, "labels")
    for name, value in zip(("images", "labels"), batch, strict=True):
        if not isinstance(value, Tensor):
            raise InputError(f"the {name} of {where} are {describe(value)}; give them as one tensor")
    images, labels = map(usable, batch)
    if not images.dim() or not len(images):
        raise InputError(f"{where} holds no images; give [batch, channels, height, width]")
    if images.layout != torch.strided or images.is_meta:
        raise InputError(f"{where} holds images that are sparse or without values; give dense tensors")
    if images.is_complex():
        raise InputError(f"{where} holds complex images; give their real and imaginary parts as channels")
    labels = _class_numbers(labels, len(images), where)
    return images.to(device), labels.to(device)


def no_pair(batch, where: str, labels: str) -> InputError:
    """The error on a batch that is no pair of images and `labels`."""
    several = isinstance(batch, (tuple, list, dict)) and len(batch) > 2
    own = "; a network of several inputs needs a task of your own (docs/tasks.md)" if several else ""
    return InputError(
        f"{where} is {describe(batch)}, not a pair (images, {labels}); let the loader give such pairs{own}"
    )


def usable(tensor: Tensor) -> Tensor:
    """The tensor, copied if it was made in inference mode, where autograd could not use it."""
    if not tensor.is_inference():
        return tensor
    with torch.inference_mode(False):
        return tensor.clone()


def _class_numbers(labels, images, where):
    shape = [*labels.shape]
    if labels.dim() == 2 and shape[1] > 1 and shape[0] == images:
        raise InputError(
            f"the labels of {where} are {shape}, like one-hot vectors or class probabilities; give one class number an "
            "image, for instance labels.argmax(1)"
        )
    if labels.dtype not in CLASS_NUMBERS:
        raise InputError(f"the labels of {where} are {_type(labels)}; give class numbers, for instance labels.long()")
    if labels.dim() == 2 and shape[1] == 1:
        labels = labels[:, 0]
    if labels.shape != (images,):
        raise InputError(f"the labels of {where} are {shape} for {images} images; give one class number an image")
    return labels.long()


def check_batch(images: Tensor, labels: Tensor, logits, where: str) -> None:
    """Raises InputError if the logits of a batch are not [B, classes], pixels are not finite, or labels are out of range.

    Cross-entropy would give NaN for such a batch, or abort the process by an assertion on the GPU.
    """
    check_logits(logits, len(images), where)
    check_ranges(*torch.stack([*images.aminmax(), *labels.aminmax()]).tolist(), logits.shape[1], where)


def check_ranges(
    low_pixel: float, high_pixel: float, low_label: int, high_label: int, classes: int, where: str
) -> None:
    """Raises InputError if the smallest and largest pixel are not finite, or a label is outside 0 to `classes` - 1."""
    if not -torch.inf < low_pixel <= high_pixel < torch.inf:  # false for NaN too
        raise InputError(f"{where} holds NaN or Inf pixels; look for broken images or a zero in the normalisation")
    if low_label < 0 or high_label >= classes:
        label = int(low_label if low_label < 0 else high_label)
        raise InputError(
            f"{where} holds label {label}, but the model has {classes} outputs (labels 0 to {classes - 1}); "
            + ("leave out images without a class" if label < 0 else "give the model as many as the data has classes")
        )


def check_logits(logits, images: int, where: str) -> None:
    """Raises InputError if a network's outputs for a batch of `images` images are not logits [images, classes]."""
    if not isinstance(logits, Tensor):
        raise InputError(
            f"the network gives {describe(logits)} for {where}; it must give logits [batch, classes] alone: wrap it in "
            "a module whose forward returns them"
        )
    shape = [*logits.shape]
    if shape == [images] or shape == [images, 1]:
        raise InputError(
            f"the network gives {shape} for {where}, one number an image; it must give one logit a class: with two classes, "
            "wrap it in a module that returns torch.cat([torch.zeros_like(z), z], 1) for its output z [batch, 1]"
        )
    if logits.dim() > 2 and shape[0] == images and logits[0].numel() == shape[1]:
        raise InputError(
            f"the network gives {shape} for {where}, not logits [batch, classes]; let it end in flatten(1)"
        )
    if logits.dim() != 2 or shape[0] != images:
        raise InputError(f"the network gives {shape} for {where}; it must give logits [{images}, classes]")


def check_one_tensor(outputs, where: str) -> None:
    """Raises InputError if a network's outputs for a batch are not one tensor."""
    if not isinstance(outputs, Tensor):
        raise InputError(
            f"the network gives {describe(outputs)} for {where}; it must give one tensor: wrap it in a module whose forward "
            "returns that alone, or write a task of your own (docs/tasks.md)"
        )


def refuse_probabilities(outputs: Tensor) -> None:
    """Raises InputError if the outputs [B, K, ...] are those of a Softmax or a LogSoftmax over K."""
    values = outputs.double()
    tolerance = 1e-2 if outputs.element_size() < 4 else 1e-4
    probabilities = bool((values >= 0).all() and ((values.sum(1) - 1).abs() < tolerance).all())
    logarithms = bool((values <= 0).all() and (values.logsumexp(1).abs() < tolerance).all())
    if probabilities or logarithms:
        name = "Softmax" if probabilities else "LogSoftmax"
        raise InputError(
            f"the network ends in {name}; give it without that last step: the loss takes logits, whose softmax it computes"
        )


def describe(value) -> str:
    """What kind of value it is, for an error message: "a dict with the keys image, label", "a tuple of 3"."""
    if isinstance(value, dict):
        return f"a dict with the keys {', '.join(map(str, list(value)[:5]))}"
    if isinstance(value, (tuple, list)):
        return f"a {'tuple' if isinstance(value, tuple) else 'list'} of {len(value)}"
    return f"a tensor {[*value.shape]}" if isinstance(value, Tensor) else f"an object of type {type(value).__name__}"


def _type(tensor):
    return str(tensor.dtype).removeprefix("torch.")
