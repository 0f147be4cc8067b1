"""What fits into memory: the count of live bytes, parts of batches, limits in words."""

import os
import platform
import subprocess
import sys

import pytest
import torch

from EnhancedFilterPruner import EnhancedFilterPruner
from taylor_pruning import memory
from taylor_pruning.errors import InputError
from taylor_pruning.experiment.settings import PruningSettings
from taylor_pruning.memory import (
    ENOUGH_FORWARD,
    PROBES,
    Portions,
    _cached,
    _left_in_groups,
    _Live,
    free_bytes,
    is_out_of_memory,
    merged,
    parse_bytes,
    used_bytes,
)
from taylor_pruning.repair.compensation import compensate
from taylor_pruning.surgery.graph import ChannelGraph
from taylor_pruning.tasks.portions import in_portions
from taylor_pruning.training.measuring import Measuring

CPU = torch.device("cpu")
PAGE = os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize(
    ("text", "value"),
    [("4GB", 4 * 2**30), ("500 mb", 500 * 2**20), ("2.5G", 5 * 2**29), ("64", 64), ("4GiB", 4 * 2**30)],
)
def test_limits_in_words(text, value):
    assert parse_bytes(text) == value


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "4 apples", "nan"])
def test_what_is_no_limit_is_refused(text):
    with pytest.raises(InputError, match="4GB"):
        parse_bytes(text)


def test_live_bytes_are_those_of_the_tensors_that_live():
    x = torch.ones(1000)
    with _Live() as live:
        for _ in range(5):
            y = x + 1  # the one before lives until this one is there
            z = y.view(10, 100)
        assert live.peak == 8000 and live.now == 4000
        del y, z
        assert live.now == 0


def test_backward_counts_what_forward_keeps():
    x = torch.ones(1000, requires_grad=True)
    with _Live() as live:
        x.exp().exp().exp().sum().backward()
    assert live.peak >= 12000


def test_parts_cover_a_batch_and_follow_the_limit():
    portions, sizes = Portions(CPU, limit=10**12), []
    for images in (50, 7):
        covered = 0
        for part in portions.slices(images):
            with portions.measured(part):
                torch.zeros(part.stop - part.start, 250).exp()
            assert part.start == covered
            covered = part.stop
            sizes.append(part.stop - part.start)
        assert covered == images
    assert sizes == [*PROBES, 50 - sum(PROBES), 7]


def test_a_small_limit_makes_small_parts_and_one_image_always_runs():
    for limit, expected in ((0, 1), (None, 50)):
        portions = Portions(CPU, limit)
        for part in portions.slices(PROBES[0]):
            with portions.measured(part):
                torch.zeros(part.stop - part.start, 250).exp()
        assert min(50, portions.size) == expected
    assert 0 < free_bytes(CPU) < 2**50


@pytest.mark.parametrize(("compensated", "curvature"), [(True, "auto"), (False, "auto"), (False, "hvp")])
def test_scores_and_compensation_do_not_depend_on_the_limit(plain_network, images, labels, compensated, curvature):
    """One byte: every image by itself. Much: all images but the first ones at once."""
    found, batches = [], [(images, labels)]
    for limit in ("1", "1TB"):
        settings = PruningSettings(class_probes=1, curvature=curvature, memory_limit=limit)
        pruner = EnhancedFilterPruner(plain_network, images[:1], 2, settings=settings, progress=False)
        pruner.rank(batches, batches if compensated else None)
        plan = {"0": [1, 2]}
        kept, smaller = {"0": [0, 3, 4]}, pruner.graph.remove(plan)
        if compensated:
            limit = pruner.settings.memory_bytes
            compensate(plain_network, smaller, batches, kept, progress=False, memory_limit=limit)
        found.append((pruner.scores(), pruner.select(30), *smaller.state_dict().values()))
    torch.testing.assert_close(found[0], found[1], rtol=1e-8, atol=1e-10)


@pytest.mark.skipif(sys.platform != "linux", reason="of Linux")
def test_used_memory_is_counted_in_the_pages_of_the_machine(monkeypatch):
    before = used_bytes(CPU)
    monkeypatch.setattr(os, "sysconf", lambda name: 16 * 4096)  # of some ARM machines
    assert used_bytes(CPU) == pytest.approx(before * 16 * 4096 / PAGE, rel=0.1)


def test_evaluation_does_not_depend_on_the_limit(plain_network, images, labels):
    """One byte: every image by itself, in the float64 of the network."""
    seen = []
    plain_network.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    found = []
    for limit in (1, 2**40):
        measuring = Measuring(plain_network, [(images, labels)], [(images, labels)], memory_limit=limit, progress=False)
        smaller = ChannelGraph(plain_network, images[:1]).remove({"0": [1, 2]})
        found.append(measuring.quick(smaller) | measuring.losses(smaller) | measuring.fidelity(smaller))
    assert 1 in seen and max(seen) > PROBES[0]
    assert found[0] == pytest.approx(found[1], rel=1e-9)


def test_what_does_not_grow_with_the_images_counts_little_in_the_second_part():
    portions = Portions(CPU, limit=None, backward=False)
    for part in portions.slices(100):
        with portions.measured(part):
            torch.zeros(2**20), torch.zeros(part.stop - part.start, 2**10)
    assert portions.bytes_an_image < 2**22 / 4 / 3


def test_a_cpu_takes_parts_that_are_small_enough_for_its_allocator(monkeypatch):
    monkeypatch.setattr("torch.get_num_threads", lambda: 1)
    portions = Portions(CPU, backward=False)
    for part in portions.slices(50):
        with portions.measured(part):
            torch.empty(part.stop - part.start, ENOUGH_FORWARD // 40)
    assert portions.size == 10


@pytest.mark.skipif(sys.platform != "linux" or platform.libc_ver()[0] != "glibc", reason="of the C library of Linux")
def test_freed_memory_is_used_again():
    """In a process of its own: page faults of a large block that is taken and freed, before and after."""
    body = """
import resource
from taylor_pruning.memory import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        bytearray(2**26)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

first = faults()
keep_freed_memory()
faults()
print(first, faults())
"""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC", "GLIBC"))}
    found = subprocess.run([sys.executable, "-c", body], capture_output=True, text=True, check=True, env=environment)
    before, after = map(int, found.stdout.split())
    assert after < before / 10


def test_too_little_memory_is_no_fault_of_the_network():
    """A real failure of the allocator, whose error is a RuntimeError like those of a network that cannot run."""
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**58)
    assert is_out_of_memory(error.value) and not is_out_of_memory(RuntimeError("shapes do not fit"))

    class Hungry(torch.nn.Sequential):
        def forward(self, x):
            if x.dtype == torch.float64 or len(self[0].weight) < 4:
                torch.empty(2**58)
            return super().forward(x)

    model = Hungry(torch.nn.Conv2d(3, 4, 1), torch.nn.ReLU(), torch.nn.Conv2d(4, 2, 1))
    with pytest.raises(RuntimeError, match="allocate"):  # else every unit would be protected, for a wrong reason
        graph = ChannelGraph(model, torch.rand(2, 3, 8, 8))
        graph.remove(graph.units[:1])


def test_a_batch_for_which_a_gpu_has_no_room_runs_in_halves():
    def work(batch, first):
        if len(batch) > room:
            raise torch.OutOfMemoryError("out of memory")
        return first, batch.tolist()

    room = 2
    found = in_portions(work, torch.arange(PROBES[0] + 3), Portions(CPU))
    assert [row for _, rows in found for row in rows] == list(range(PROBES[0] + 3))
    assert all(len(rows) <= room and rows[0] == first for first, rows in found)
    room = 0
    with pytest.raises(InputError, match="one image does not fit into GPU memory; lower --image-size"):
        in_portions(work, torch.arange(3), Portions(CPU))


def test_other_systems_count_no_memory(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert free_bytes(CPU) == 8 * 2**30 and used_bytes(CPU) == 0


def test_a_gpu_gets_larger_batches():
    """Which hold the same images in the same order; those of several sizes, and lists, stay."""
    gpu, batches = torch.device("cuda"), [(torch.arange(n).reshape(n, 1), torch.arange(n)) for n in (3, 4, 2)]
    joined = merged(batches, gpu, size=5)
    assert [len(images) for images, _ in joined] == [5, 4]
    for images, labels in joined:
        assert torch.equal(images[:, 0], labels)
    assert torch.cat([labels for _, labels in joined]).tolist() == [0, 1, 2, 0, 1, 2, 3, 0, 1]
    assert merged([(x, None) for x, _ in batches], gpu)[0][1] is None
    for others in (batches[:1] + [(torch.zeros(2, 2), None)], [([torch.zeros(1)], None)]):
        assert merged(others, gpu) == others
    assert merged(batches, CPU) == batches


def test_control_groups_that_say_nothing_set_no_limit(monkeypatch, tmp_path):
    assert _cached(tmp_path) is None
    (tmp_path / "memory.stat").write_text("file 9\ninactive_file 5\n")
    assert _cached(tmp_path) == 5

    def unreadable(path):
        raise PermissionError(path)

    monkeypatch.setattr(memory.Path, "read_text", unreadable)
    assert not list(_left_in_groups())
