"""Random directions of every ready-made task, and of any divergence, against its Hessian; batches of any structure."""

import pytest
import torch

from taylor_pruning.errors import InputError
from taylor_pruning.tasks import batches
from taylor_pruning.tasks.classification import Classification, MultiLabel, bernoulli_divergence
from taylor_pruning.tasks.dense import Regression, Segmentation
from taylor_pruning.tasks.directions import bernoulli_directions, random_directions, random_signs, root_times
from taylor_pruning.tasks.task import Task, flatten

OUTPUTS = torch.randn(2, 3, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
TASKS = {
    "classification": (Classification(), OUTPUTS.flatten(1)[:, :5]),
    "multi-label": (MultiLabel(), OUTPUTS.flatten(1)[:, :5]),
    "segmentation": (Segmentation(), OUTPUTS),
    "regression": (Regression(), OUTPUTS),
    "scaled regression": (Regression(torch.tensor([0.5, 1, 2, 3, 4])), OUTPUTS.flatten(1)[:, :5]),
}


def hessian(task, z):
    """[B, D, D] of the divergence from the outputs z [B, ...] themselves."""
    size = z[0].numel()
    rows = [
        torch.autograd.functional.hessian(lambda a, own=own: task.divergence(a[None], own[None])[0], own) for own in z
    ]
    return torch.stack(rows).reshape(len(z), size, size)


def drawn(projection, z, count):
    """[count, B, D] directions w: of a batch in which every sample stands `count` times."""
    leaf = z.repeat(count, *(1,) * (z.dim() - 1)).requires_grad_()
    (w,) = torch.autograd.grad(projection(leaf, random_signs(0, 0, *flatten(leaf).shape)).sum(), leaf)
    return w.reshape(count, len(z), -1)


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("closed_form", [True, False], ids=["own", "any divergence"])
def test_directions_have_the_hessian_of_the_divergence_as_their_second_moment(name, closed_form):
    task, z = TASKS[name]
    w = drawn(task.projection if closed_form else lambda *a: Task.projection(task, *a), z, 2000)
    products = w[..., :, None] * w[..., None, :]
    mean, error = products.mean(0), products.std(0) / len(w) ** 0.5
    assert ((mean - hessian(task, z)).abs() <= 5 * error + 1e-9).all()
    assert (error < 0.3 * hessian(task, z).abs().amax()).all()


def test_sure_labels_have_directions_and_a_divergence_in_single_precision_too():
    """From a logit of 17 on, a probability of 1 - p is none in single precision."""
    logits, changed = torch.tensor([[20.0, -20.0, 15.0]]), torch.tensor([[16.0, -16.0, 18.0]])
    signs, found = random_signs(0, 0, 1, 3), []
    for dtype in (torch.float32, torch.float64):
        own = logits.to(dtype)
        found.append(
            [*bernoulli_directions(own, signs)[0].tolist(), *bernoulli_divergence(changed.to(dtype), own)[0].tolist()]
        )
    assert found[0] == pytest.approx(found[1], rel=1e-4, abs=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sureness", [10, 30, 80])
def test_sure_classes_have_directions_that_know_no_change_of_all_logits(sureness, dtype):
    """The entry of the sure class is less than the rounding of 1 - p, and yet as large as all others together."""
    logits = torch.tensor([[sureness, 0.0, 1.0, -1.0]] * 16, dtype=torch.float64)
    signs = torch.cartesian_prod(*[torch.tensor([-1, 1])] * 4)  # all there are, so that the mean over them is exact
    w = random_directions(logits.to(dtype), signs).double()
    assert (w.sum(1).abs() <= 1e-6 * w.abs().amax(1)).all()
    p = logits[0].softmax(0)
    wanted = torch.diag(p) - p[:, None] * p
    wanted[0] = wanted[:, 0] = -wanted[1:].sum(0)
    wanted[0, 0] = -wanted[0, 1:].sum()
    torch.testing.assert_close((w[:, :, None] * w[:, None, :]).mean(0), wanted, rtol=1e-4, atol=1e-5 * wanted.max())


def test_the_root_of_a_hessian_is_exact():
    generator = torch.Generator().manual_seed(0)
    factor = torch.randn(3, 6, 4, dtype=torch.float64, generator=generator)  # rank 4 of 6
    matrix = factor @ factor.mT
    signs = 2 * torch.randint(2, (3, 6), generator=generator).double() - 1
    found = root_times(lambda v: (matrix @ v[:, :, None]).squeeze(2), signs)
    values, axes = torch.linalg.eigh(matrix)
    root = axes @ torch.diag_embed(values.clamp_min(0).sqrt()) @ axes.mT
    torch.testing.assert_close(found, (root @ signs[:, :, None]).squeeze(2), rtol=1e-6, atol=1e-6)


def test_a_divergence_that_is_not_smallest_at_the_own_outputs_is_refused():
    class Upside(Task):
        def divergence(self, outputs, dense_outputs):
            return -(outputs - dense_outputs).square().flatten(1).sum(1)

    with pytest.raises(InputError, match="curves downwards"):
        Upside().projection(OUTPUTS, random_signs(0, 0, 2, 12))


def test_batches_of_any_structure_are_taken_apart_and_joined():
    images = torch.arange(12.0).reshape(3, 4)
    targets = [{"boxes": torch.full((n, 4), float(n))} for n in range(3)]
    for batch in (
        (images, torch.arange(3)),
        {"image": images, "more": {"y": torch.arange(3)}},
        ({"image": images}, torch.arange(3)),
        (list(images), targets),
        images,
    ):
        assert batches.size(batch) == 3
        parts = batches.split(batch, 2)
        assert [batches.size(part) for part in parts] == [2, 1]
        whole = batches.join(parts)
        assert batches.size(whole) == 3
        assert torch.equal(torch.stack(list(batches.images(whole))), images)
    last = batches.select((list(images), targets), torch.tensor([2]))
    assert len(last[1]) == 1 and len(last[1][0]["boxes"]) == 2
    with pytest.raises(InputError, match="one entry a sample"):
        batches.size({"scale": 2})
