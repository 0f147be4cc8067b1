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


class WithBuffers(nn.Module):
    """None of its buffers is saved: one has less memory than numbers, one counts calls, one is made in training."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 6, 3), nn.Linear(6, 3)
        self.register_buffer("ramp", torch.linspace(1, 2, 4).expand(4, 4), persistent=False)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long), persistent=False)

    def forward(self, x):
        self.calls += 1
        if self.training and not hasattr(self, "made"):
            self.register_buffer("made", torch.zeros(1), persistent=False)
        return self.head((torch.relu(self.conv(x)) * self.ramp).mean((2, 3)))


def test_buffers_that_are_expanded_or_new_are_left_alone():
    model = WithBuffers()
    kept = snapshot(model)
    model(torch.zeros(1, 3, 6, 6))
    restore(model, kept)
    assert model.calls == 0 and "made" in dict(model.named_buffers())


def test_what_a_forward_counts_is_no_part_of_a_network(tmp_path):
    torch.manual_seed(0)
    batches = [(torch.randn(6, 3, 6, 6), torch.arange(6) % 3) for _ in range(2)]
    pruning = EnhancedPruning(WithBuffers(), batches, batches, settings=PruningSettings(rounds=1), progress=False)
    first = pruning.prune(30, 1, checkpoint=tmp_path / "rounds").model
    again = pruning.prune(30, 1, checkpoint=tmp_path / "rounds", resume=True).model
    assert all(map(torch.equal, first.parameters(), again.parameters()))


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
