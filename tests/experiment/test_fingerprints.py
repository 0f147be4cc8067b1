"""What a checkpoint of pruning rounds takes for the same images and the same network."""

import torch

from taylor_pruning.experiment.checkpoint import fingerprint


def test_a_fingerprint_tells_values_shapes_and_types_apart_and_not_layouts():
    tensor = torch.arange(12.0).view(3, 4)
    others = [tensor + 1, tensor.view(4, 3), tensor.view(torch.int32), tensor.T]
    assert len({fingerprint([t]) for t in (tensor, *others)}) == 5
    every_second = torch.arange(12.0)[::2]
    assert fingerprint([every_second]) == fingerprint([every_second.clone()])
    assert fingerprint([tensor.T]) == fingerprint([tensor.T.contiguous()])
