"""The inputs of a proof: random, and as small as a network allows whose smallest feature maps still have 2 x 2 pixels.

The width of a tensor does not depend on the size of its image, so that a cut that is right on small images is right on large
ones; where a network does not run on small ones, or the outputs differ there, the size of the example decides.
"""

import math

import torch

from taylor_pruning.surgery.nested import map_tensors, tensors_in
from taylor_pruning.surgery.recorded_calls import operation_name

FORWARD_ERRORS = (TypeError, ValueError, RuntimeError, AttributeError, LookupError, AssertionError, ArithmeticError)
LEAST_MAP = 2  # pixels: attention over one position or a statistic of one pixel would hide faults
STEP = 32  # a smaller side stays a multiple of this one, or of what it has in common with the example's


def trial_examples(example, graph):
    """Examples in the order in which a proof tries them: with smaller images, if there are any, and as given.

    Args:
        example: example_input of the network.
        graph: fx.Graph of its forward on that size.
    """
    images = [t for t in tensors_in(example) if t.dim() > 3]
    maps = [min(n.meta["shape"][-2:]) for n in graph.nodes if _is_map(n)]
    if not images or not maps:
        return [example]
    share = LEAST_MAP / min(maps)

    def side(size):
        step = math.gcd(size, STEP)
        return min(size, math.ceil(size * share / step) * step)

    def smaller(tensor):
        return tensor[..., : side(tensor.shape[-2]), : side(tensor.shape[-1])] if tensor.dim() > 3 else tensor

    if all(smaller(t).numel() == t.numel() for t in images):
        return [example]
    return [map_tensors(example, smaller), example]


def _is_map(node):
    """Whether the node is a convolution that sees more than one pixel; squeeze-and-excitation sees one."""
    shape = node.meta.get("shape", ())
    convolves = node.op == "call_function" and operation_name(node).startswith("conv")
    return convolves and len(shape) > 3 and min(shape[-2:]) > 1


def random_inputs(example, samples, dtype, device):
    """The example with `samples` random ones in the place of its own; integers are repeated.

    Args:
        example: tensors [N, ...], all with the same N, or without a batch.
    """
    generator = torch.Generator().manual_seed(0)
    batch = len(tensors_in(example)[0])

    def drawn(tensor):
        shape = tensor.shape
        if tensor.dim() and len(tensor) == batch:
            shape = (samples, *shape[1:])
        if not tensor.is_floating_point():
            return tensor[:1].expand(shape).to(device) if tensor.dim() else tensor.to(device)
        return torch.randn(shape, generator=generator, dtype=dtype).to(device)

    return map_tensors(example, drawn)
