"""What a network costs: parameters, multiply-accumulates, bytes on disk, milliseconds."""

import io
import math

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from taylor_pruning.modes import frozen
from taylor_pruning.stored import stored
from taylor_pruning.surgery.nested import tensors_in
from taylor_pruning.surgery.recording import call
from taylor_pruning.timing import least_milliseconds
from taylor_pruning.training.throughput import throughput

COSTS = ("parameters", "macs", "file_bytes", "latency_ms", "images_per_second")  # of `profile`
LATENCY_RUNS = 15


def _layer_of_mkldnn(inputs, of_input, of_state, *_, **__) -> int:
    """Operations of one direction of a recurrent layer; shapes [steps, batch, features] and of its two matrices."""
    return 2 * math.prod(inputs[:-1]) * (math.prod(of_input) + math.prod(of_state))


def _layers_of_cudnn(inputs, weights, *_, **__) -> int:
    """Operations of a whole recurrent network; shapes of its inputs and of all its matrices and biases."""
    return 2 * math.prod(inputs[:-1]) * sum(math.prod(shape) for shape in weights if len(shape) == 2)


def _attention(queries, keys, values, *_, **__) -> int:
    """Operations of attention; shapes [..., tokens, features]. Every query meets every key, then every value."""
    return 2 * math.prod(queries[:-1]) * keys[-2] * (queries[-1] + values[-1])


def _vector(factor, *_, **__) -> int:
    """Operations of a product with a vector; shape of the other factor."""
    return 2 * math.prod(factor)


def _deformed(images, weight, *_, out_shape, **__) -> int:
    """Operations of a deformable convolution (torchvision), without those that read between pixels."""
    return 2 * math.prod((*out_shape, *weight[1:]))


# Calls that PyTorch's counter takes for nothing.
FUSED = {
    torch.ops.aten.mv: _vector,
    torch.ops.aten.dot: _vector,
    torch.ops.aten.vdot: _vector,
    torch.ops.aten.addmv: lambda added, *factors, **_: _vector(*factors),
    torch.ops.aten.mkldnn_rnn_layer: _layer_of_mkldnn,
    torch.ops.aten._cudnn_rnn: _layers_of_cudnn,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
}


def profile(model: nn.Module, example: Tensor) -> dict:
    """Costs of `model` on one image.

    Args:
        model: it runs in evaluation mode and comes back as it was.
        example: [1, ...] image on the model's device; a list is the network's one argument, a tuple or dict all of them.

    Returns:
        {"parameters", "macs" (multiply-accumulates), "file_bytes" (of the saved weights), "latency_ms" (see `latency`),
        "images_per_second" (by batch size, see training.throughput; {} unless the example is a tensor)}.
    """
    with frozen(model), torch.no_grad():
        buffer = io.BytesIO()
        torch.save(stored(model), buffer)
        return {
            "parameters": sum(p.numel() for p in model.parameters()),
            "macs": _multiply_accumulates(model, example),
            "file_bytes": buffer.tell(),
            "latency_ms": latency(model, example),
            "images_per_second": throughput(model, example) if isinstance(example, Tensor) else {},
        }


def _multiply_accumulates(model: nn.Module, example) -> int:
    """Multiply-accumulates of a forward. Encoders run step by step: as a single call the counter takes them for nothing."""
    deformable = getattr(torch.ops.torchvision, "deform_conv2d", None)  # there once torchvision is imported
    counted = FUSED | ({} if deformable is None else {deformable: _deformed})
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with FlopCounterMode(display=False, custom_mapping=counted) as counter:
            call(model, example)
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    return counter.get_total_flops() // 2


def latency(model: nn.Module, example: Tensor) -> float:
    """Wall-clock milliseconds of a forward, the least of LATENCY_RUNS, see timing.least_milliseconds."""
    device = next((tensor.device for tensor in tensors_in(example) if tensor.is_cuda), torch.device("cpu"))
    return least_milliseconds(lambda: call(model, example), device, LATENCY_RUNS)
