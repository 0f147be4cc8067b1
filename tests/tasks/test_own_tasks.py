"""Tasks that users write: from a few lines to a pruned, repaired, fine-tuned, saved and reloaded network."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from EnhancedPruning import EnhancedPruning, InputError, PruningSettings, load_pruned, save_pruned
from taylor_pruning.tasks.dense import Regression, Segmentation
from taylor_pruning.tasks.task import Task
from taylor_pruning.training.evaluation import measure
from taylor_pruning.training.fine_tuning import Recipe

generator = torch.Generator().manual_seed(0)
IMAGES = torch.randn(24, 3, 8, 8, generator=generator)
LABELS = torch.arange(24) % 4
HEATMAPS = torch.rand(24, 2, 8, 8, generator=generator)
DEPTH = IMAGES.mean(1, keepdim=True).masked_fill(torch.rand(24, 1, 8, 8, generator=generator) < 0.3, torch.nan)


def squares(outputs, others):
    return (outputs - others).square().flatten(1).mean(1)


def layer(inputs, outputs, stride=1):
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())


class Depth(Task):
    """Batches are dictionaries; where the depth is NaN it is unknown."""

    name, main, larger_is_better = "depth", "rmse", False

    def inputs(self, batch):
        return batch["image"]

    def loss(self, outputs, batch):
        known = batch["depth"].isfinite()
        return squares(outputs * known, batch["depth"].nan_to_num())

    def divergence(self, outputs, dense_outputs):
        return squares(outputs, dense_outputs)

    def statistics(self, outputs, batch):
        known = batch["depth"].isfinite()
        errors = (outputs - batch["depth"])[known].square()
        return torch.stack([errors.sum(), known.sum()])

    def metrics(self, sums):
        return {"rmse": (sums[0] / sums[1]).sqrt().item()}


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(layer(3, 8), layer(8, 8, 2))
        self.kind, self.box = nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, image):
        features = self.body(image).mean((2, 3))
        return {"kind": self.kind(features), "box": self.box(features)}


class KindAndBox(Task):
    """Outputs and labels are dictionaries; the metric is computed by `evaluate`."""

    name, main = "kind and box", "right"

    def loss(self, outputs, batch):
        wanted = batch[1]
        return F.cross_entropy(outputs["kind"], wanted["kind"], reduction="none") + squares(
            outputs["box"], wanted["box"]
        )

    def divergence(self, outputs, dense_outputs):
        wanted = dense_outputs["kind"].softmax(1)
        kl = F.kl_div(outputs["kind"].log_softmax(1), wanted, reduction="none").sum(1)
        return kl + squares(outputs["box"], dense_outputs["box"])

    def evaluate(self, model, loader):
        right = [model(images)["kind"].argmax(1) == wanted["kind"] for images, wanted in loader]
        return {"right": 100 * torch.cat(right).double().mean().item()}


class Denoising(Task):
    """A batch is the images alone, which are input and target."""

    name, main, larger_is_better = "denoising", "mse", False

    def loss(self, outputs, batch):
        return squares(outputs, batch)

    def divergence(self, outputs, dense_outputs):
        return squares(outputs, dense_outputs)

    def statistics(self, outputs, batch):
        return torch.stack([squares(outputs, batch).sum(), torch.tensor(len(batch))])

    def metrics(self, sums):
        return {"mse": (sums[0] / sums[1]).item()}


class Embedding(Task):
    """Embeddings of unit length, whose loss compares the images of a batch."""

    name, main = "embedding", "recall"

    def loss(self, outputs, batch):
        same = (batch[1][:, None] == batch[1]).fill_diagonal_(False)
        nearness = (outputs @ outputs.mT / 0.1).masked_fill(torch.eye(len(outputs), dtype=torch.bool), -1e4)
        return -(nearness.log_softmax(1) * same).sum(1) / same.sum(1).clamp_min(1)

    def divergence(self, outputs, dense_outputs):
        return squares(outputs, dense_outputs)

    def evaluate(self, model, loader):
        found = [(model(images), labels) for images, labels in loader]
        embeddings, labels = (torch.cat(parts) for parts in zip(*found, strict=True))
        nearest = (embeddings @ embeddings.mT).fill_diagonal_(-9).argmax(1)
        return {"recall": 100 * (labels[nearest] == labels).double().mean().item()}


class Embedder(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Sequential(layer(3, 8), layer(8, 8, 2)), nn.Linear(8, 4)

    def forward(self, images):
        return F.normalize(self.head(self.body(images).mean((2, 3))), dim=1)


def maps(outputs, stride=1):
    back = [nn.Upsample(scale_factor=stride)] if stride > 1 else []
    return nn.Sequential(layer(3, 8, stride), layer(8, 8), *back, nn.Conv2d(8, outputs, 3, padding=1))


CASES = {
    "depth": (
        Depth(),
        lambda: maps(1),
        [{"image": x, "depth": y, "name": "a"} for x, y in zip(IMAGES, DEPTH, strict=True)],
    ),
    "depth, ready-made": (Regression(ignore_nan=True), lambda: maps(1), list(zip(IMAGES, DEPTH, strict=True))),
    "heatmaps": (Regression(), lambda: maps(2), list(zip(IMAGES, HEATMAPS, strict=True))),
    "two heads": (
        KindAndBox(),
        TwoHeads,
        [(x, {"kind": k, "box": b}) for x, k, b in zip(IMAGES, LABELS, HEATMAPS[:, 0, 0, :4], strict=True)],
    ),
    "denoising": (Denoising(), lambda: maps(3, 2), IMAGES),
    "embedding": (Embedding(), Embedder, list(zip(IMAGES, LABELS, strict=True))),
}


@pytest.mark.parametrize("case", CASES)
def test_a_task_of_ones_own_is_pruned_trained_saved_and_loaded(case, tmp_path):
    task, network, samples = CASES[case]
    torch.manual_seed(0)
    loader, settings = DataLoader(samples, 8), PruningSettings(target_macs="50%", rounds=1)
    pruning = EnhancedPruning(network(), loader, loader, task=task, settings=settings, recipe=Recipe(epochs=1, lr=0.01),
                              calibration_samples=16, progress=False)  # fmt: skip
    result = pruning.run_full_pruning(taylor_order=2)
    first, *_, last = result.stages
    assert [stage["stage"] for stage in result.stages] == ["dense", "pruned", "compensated", "fine-tuned"]
    assert task.main in last and last["macs"] < 0.65 * first["macs"]
    save_pruned(tmp_path / "small.pt", result.model)
    batch = next(iter(loader))
    with torch.no_grad():
        outputs, again = (
            task.forward(model, batch)
            for model in (result.model.eval(), load_pruned(tmp_path / "small.pt", factory=network))
        )
    torch.testing.assert_close(again, outputs)


class Killed(Exception):
    pass


class Loader(list):
    """Batches; training is killed before its second epoch where `breaks` is set."""

    breaks = False

    def set_epoch(self, epoch):
        if epoch == 2 and self.breaks:
            raise Killed


def test_a_killed_run_of_a_task_goes_on_where_it_was(tmp_path):
    task, network, samples = CASES["two heads"]
    settings, recipe = PruningSettings(target_macs="50%", rounds=1), Recipe(epochs=3, lr=0.01)
    loader = Loader(DataLoader(samples, 8))

    def run(checkpoint):
        torch.manual_seed(0)
        pruning = EnhancedPruning(
            network(), loader, loader, task=task, settings=settings, recipe=recipe, progress=False
        )
        return pruning.run_full_pruning(checkpoint=tmp_path / checkpoint, resume=True)

    whole = run("whole.pt")
    loader.breaks = True
    with pytest.raises(Killed):
        run("killed.pt")
    loader.breaks = False
    again = run("killed.pt")
    assert [e["train_loss"] for e in again.fine_tuning] == [e["train_loss"] for e in whole.fine_tuning]
    torch.testing.assert_close(again.model.state_dict(), whole.model.state_dict(), rtol=0, atol=0)


class Careless(Denoising):
    def evaluate(self, model, loader):
        model.eval()
        return super().evaluate(model, loader)


def test_an_evaluation_that_leaves_the_network_in_evaluation_mode_changes_no_training():
    model = maps(3).train()
    measure(Careless(), model, DataLoader(IMAGES, 8))
    assert all(module.training for module in model.modules())


def test_unknown_targets_change_neither_loss_nor_metric():
    task, outputs = Regression(ignore_nan=True), torch.tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True)
    batch = None, torch.tensor([[0.0, torch.nan], [1.0, 1.0]])
    loss = task.loss(outputs, batch)
    assert loss.tolist() == [1.0, 6.5]
    loss.sum().backward()
    assert outputs.grad.tolist() == [[2.0, 0.0], [2.0, 3.0]]
    assert task.metrics(task.statistics(outputs, batch)) == {"mae": 2.0, "loss": 3.75, "images": 2}


@pytest.mark.parametrize("target", [torch.nan, torch.inf])
def test_targets_that_are_no_numbers_are_refused(target):
    batch = IMAGES, DEPTH.nan_to_num(target)
    with pytest.raises(InputError, match="hold NaN or Inf"):
        Regression(ignore_nan=target == torch.inf).read(batch, "the first batch")
    with pytest.raises(InputError, match="are complex; give their real and imaginary parts"):
        Regression().read((IMAGES, DEPTH + 1j), "the first batch")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Segmentation(ignore_index=None), "ignore_index must be a whole number, not None"),
        (lambda: Segmentation(aux_weight=-1), "aux_weight must be at least 0, not -1"),
        (lambda: Regression(ignore_nan="no"), "ignore_nan must be True or False, not 'no'"),
        (lambda: Regression(scale="mm"), "scale must be numbers above 0: .*, not 'mm'"),
        (lambda: Regression(scale=torch.inf), "scale must be numbers above 0: .*, not inf"),
    ],
)
def test_wrong_arguments_of_a_task_are_named(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_targets_in_another_order_than_the_outputs_are_refused():
    outputs = torch.zeros(2, 3, 4, 4)
    for shape in ((2, 48), (2, 3, 4, 4), (2, 1, 3, 4, 4)):
        Regression().check(outputs, (None, torch.zeros(shape)), "a batch")
    with pytest.raises(InputError, match="give them in the same order of dimensions, or flat"):
        Regression().check(outputs, (None, torch.zeros(2, 4, 4, 3)), "a batch")
    with pytest.raises(InputError, match=r"scale is \[5\], but an output \[3, 4, 4\]; give one number each"):
        Regression(torch.ones(5)).check(outputs, (None, outputs), "a batch")


@pytest.mark.parametrize("place", ["train", "val"])
def test_a_later_batch_with_a_wrong_class_is_named(place):
    good = [(IMAGES[:4], torch.zeros(4, *IMAGES.shape[2:], dtype=torch.long))]
    loaders = {"train": good, "val": good, place: [*good, (good[0][0], good[0][1] + 7)]}
    pruning = EnhancedPruning(maps(2), loaders["train"], loaders["val"], task=Segmentation(), calibration=good,
                              held_out=good, settings=PruningSettings(rounds=1), progress=False)  # fmt: skip
    with pytest.raises(InputError, match="batch 1.* holds class 7, but the network has 2 classes"):
        pruning.run_full_pruning(30, fine_tune_epochs=1)


class Constant(Denoising):
    def loss(self, outputs, batch):
        return outputs.flatten(1).sum(1) * 0

    def divergence(self, outputs, dense_outputs):
        return squares(outputs, dense_outputs) * 0


@pytest.mark.parametrize(("order", "message"), [(1, "loss has no slope"), (2, "divergence does not change")])
def test_scores_that_are_all_zero_are_refused(order, message):
    loader = DataLoader(IMAGES, 8)
    pruning = EnhancedPruning(maps(3), loader, loader, task=Constant(), progress=False)
    with pytest.raises(InputError, match=f"order {order} cannot choose: the task's {message}"):
        pruning.prune(30, order)


class ByName(Depth):
    """Inputs are a dictionary inside the batch, and the network takes them by their names."""

    def inputs(self, batch):
        return batch["inputs"]


def test_named_inputs_score_as_others_do():
    torch.manual_seed(0)
    model = nn.Sequential(layer(3, 8), nn.Conv2d(8, 1, 3, padding=1)).eval()
    batches = {
        ByName: [{"inputs": {"input": IMAGES[:8]}, "depth": DEPTH[:8]}],
        Depth: [{"image": IMAGES[:8], "depth": DEPTH[:8]}],
    }
    settings = PruningSettings(rounds=1)
    scores = [
        EnhancedPruning(model, part, part, task=task(), settings=settings, progress=False).prune(30).scores
        for task, part in batches.items()
    ]
    assert scores[0] == scores[1]


def test_an_evaluation_of_nothing_is_refused_and_an_error_of_the_metric_itself_is_not_hidden():
    with pytest.raises(InputError, match="depth: the loader gives no samples to evaluate; check the data"):
        Depth().evaluate(maps(1), [])

    class Faulty(Denoising):
        def statistics(self, outputs, batch):
            raise ValueError("a fault of the metric")

    with pytest.raises(ValueError, match="a fault of the metric"):
        Faulty().evaluate(maps(3), [IMAGES])
