"""What a checkpoint of pruning rounds takes for the same images and the same network."""

import pytest
import torch
from torch import nn

from taylor_pruning.errors import InputError
from taylor_pruning.experiment.checkpoint import RoundsCheckpoint, RoundsState, fingerprint
from taylor_pruning.surgery.graph import ChannelGraph


def test_a_fingerprint_tells_values_shapes_and_types_apart_and_not_layouts():
    tensor = torch.arange(12.0).view(3, 4)
    others = [tensor + 1, tensor.view(4, 3), tensor.view(torch.int32), tensor.T]
    assert len({fingerprint([t]) for t in (tensor, *others)}) == 5
    every_second = torch.arange(12.0)[::2]
    assert fingerprint([every_second]) == fingerprint([every_second.clone()])
    assert fingerprint([tensor.T]) == fingerprint([tensor.T.contiguous()])


def test_a_setting_that_one_of_two_versions_lacks_is_named(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    graph = ChannelGraph(model, torch.zeros(1, 3, 4, 4))

    def of(settings):
        return RoundsCheckpoint(tmp_path / "rounds", graph, {}, settings)

    of({"seed": 0}).save(RoundsState(model, {}))
    assert of({"seed": 0}).load().rounds == []
    of({"seed": 0, "gone": 1}).save(RoundsState(model, {}))
    with pytest.raises(InputError, match="gone was 1, is None, new was None, is 2"):
        of({"seed": 0, "new": 2}).load()
