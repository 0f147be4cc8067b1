"""Networks whose `state_dict` is not a list of their tensors."""

import torch
from torch import nn

from EnhancedPruning import EnhancedPruning, PruningSettings
from taylor_pruning.stored import restore, snapshot
from taylor_pruning.training.recipe import Recipe


class OfAdapters(nn.Module):
    """Saves its adapter alone, and an epoch beside the tensors."""

    def __init__(self):
        super().__init__()
        self.conv, self.adapter, self.head = nn.Conv2d(3, 6, 3), nn.Conv2d(3, 6, 3), nn.Linear(6, 3)
        self.register_buffer("steps", torch.zeros(1), persistent=False)

    def state_dict(self, *args, **options):
        return {name: value for name, value in super().state_dict(*args, **options).items() if "adapter" in name}

    def forward(self, x):
        return self.head(torch.relu(self.conv(x) + self.adapter(x)).mean((2, 3)))


class WithEpoch(OfAdapters):
    state_dict = nn.Module.state_dict

    def get_extra_state(self):
        return {"epoch": 3}

    def set_extra_state(self, state):
        self.epoch = state["epoch"]


def test_every_tensor_comes_back():
    model = OfAdapters()
    before, kept = [t.clone() for t in (*model.parameters(), model.steps)], snapshot(model)
    with torch.no_grad():
        for tensor in (*model.parameters(), model.steps):
            tensor.add_(1)
    restore(model, kept)
    assert all(map(torch.equal, before, (*model.parameters(), model.steps)))


def test_such_networks_are_repaired_trained_and_continued(tmp_path):
    torch.manual_seed(0)
    batches = [(torch.randn(6, 3, 6, 6), torch.arange(6) % 3) for _ in range(2)]
    settings = PruningSettings(rounds=1, repair="network", repair_passes=1)
    for kind in (OfAdapters, WithEpoch):
        options = {"settings": settings, "recipe": Recipe(epochs=1), "progress": False}
        pruning, place = EnhancedPruning(kind(), batches, batches, **options), {"checkpoint": tmp_path / kind.__name__}
        first = pruning.run_full_pruning(30, 1, **place).model
        again = pruning.run_full_pruning(30, 1, resume=True, **place).model
        assert all(map(torch.equal, first.parameters(), again.parameters()))
