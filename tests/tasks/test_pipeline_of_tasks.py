"""The pipeline on tasks that are no classification: stages, rounds, training, refusals."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from EnhancedPruning import EnhancedPruning, InputError, PruningSettings
from taylor_pruning.repair import network as network_module
from taylor_pruning.repair.network import split
from taylor_pruning.surgery.nested import tensors_in
from taylor_pruning.tasks.classification import MultiLabel
from taylor_pruning.tasks.dense import Regression, Segmentation
from taylor_pruning.tasks.task import Task
from taylor_pruning.training.fine_tuning import Recipe


def body(*end):
    layers = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()
    return nn.Sequential(*layers, *end)


def pooled(outputs):
    return body(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, outputs))


generator = torch.Generator().manual_seed(0)
IMAGES = torch.randn(24, 3, 8, 8, generator=generator)
CASES = {
    "segmentation": (
        Segmentation(),
        lambda: body(nn.Conv2d(8, 3, 1)),
        torch.randint(3, (24, 8, 8), generator=generator),
    ),
    "regression": (Regression(), lambda: pooled(1), torch.randn(24, generator=generator)),
    "multi-label": (MultiLabel(), lambda: pooled(4), torch.randint(2, (24, 4), generator=generator)),
}


def pipeline(name, **options):
    task, network, labels = CASES[name]
    torch.manual_seed(0)
    loader = DataLoader(TensorDataset(IMAGES, labels), 8)
    options = {"task": task, "recipe": Recipe(epochs=1, lr=0.001), "progress": False} | options
    return EnhancedPruning(network(), loader, loader, **options)


@pytest.mark.parametrize("size", [(12,), (4, 6, 4)])
def test_series_and_volumes_are_segmented(size):
    conv = {1: nn.Conv1d, 3: nn.Conv3d}[len(size)]
    torch.manual_seed(0)
    model = nn.Sequential(conv(2, 8, 3, padding=1), nn.ReLU(), conv(8, 3, 1))
    loader = DataLoader(TensorDataset(torch.randn(12, 2, *size), torch.randint(3, (12, 1, *size))), 4)
    pruning = EnhancedPruning(
        model, loader, loader, task=Segmentation(), settings=PruningSettings(rounds=1), progress=False
    )
    result = pruning.run_full_pruning(30, 2)
    assert result.model[0].out_channels == 6 and result.stages[-1]["miou"] > 0
    one_hot = [(x, nn.functional.one_hot(y[:, 0], 3).movedim(-1, 1)) for x, y in loader]
    with pytest.raises(InputError, match="give class numbers"):
        EnhancedPruning(model, one_hot, loader, task=Segmentation(), progress=False).run_full_pruning(30, 2)


@pytest.mark.parametrize("name", CASES)
def test_a_task_runs_through_all_stages_with_its_own_metrics(name):
    task = CASES[name][0]
    settings = PruningSettings(rounds=2, budget="macs", class_probes=4, fine_tune_between=1)
    result = pipeline(name, settings=settings).run_full_pruning(40, 2)
    assert [stage["stage"] for stage in result.stages][::2] == ["dense", "compensated"]
    for stage in result.stages:
        assert {task.main, "loss", "images", "macs"} <= stage.keys() and "top1" not in stage
    assert result.stages[-1]["macs"] < 0.75 * result.stages[0]["macs"]
    last = result.rounds[-1]
    assert last["loss"] == "divergence" and last["measured_loss_change"] > 0 and last["predicted_loss_change"] > 0
    assert last["after_compensation"].keys() == {task.main, "loss"}
    assert {task.main, "train_loss"} <= result.fine_tuning[0].keys()


@pytest.mark.parametrize("name", CASES)
def test_the_repair_across_layers_follows_the_divergence_of_a_task(name, monkeypatch):
    monkeypatch.setattr(network_module, "SURE", 0.0)  # four images judge
    task, _, _ = CASES[name]
    pruning = pipeline(name, settings=PruningSettings(rounds=1, repair="network", repair_passes=20))
    result = pruning.prune(50, 2)
    assert [stage["stage"] for stage in result.stages] == ["dense", "pruned", "compensated", "repaired"]
    images = torch.cat([images for images, _ in split(pruning.images.compensation, 0)[1]])
    assert len(images) == result.repair["held_out"] == 4
    with torch.no_grad():
        divergence = task.divergence(result.model.eval()(images), pruning.model.eval()(images)).mean().item()
    assert divergence == pytest.approx(result.repair["loss_after"], rel=1e-2)  # of numbers of 1e-5 in single precision
    assert result.repair["loss_after"] < result.repair["loss_before"]


def test_the_weights_of_the_best_epoch_stay_where_a_small_metric_is_good():
    result = pipeline("regression", recipe=Recipe(epochs=3, lr=0.05)).run_full_pruning(30, 1)
    before, after = result.stages[-2]["mae"], result.stages[-1]["mae"]
    assert after == min([before, *(epoch["mae"] for epoch in result.fine_tuning)]) and after < before


@pytest.mark.parametrize("order", [1, 2, 3])
def test_scores_without_compensation_and_baselines_serve_a_task(order):
    pruning = pipeline("segmentation", settings=PruningSettings(rounds=1, compensate=False, hessian_probes=2))
    result = pruning.prune(30, order)
    assert result.rounds[0]["loss"] == "loss" and result.stages[-1]["stage"] == "pruned"
    if order == 1:
        repaired = pruning.prune_by_baseline("magnitude", 30, compensate=True)
        assert repaired.stages[-1]["stage"] == "compensated"
        with pytest.raises(InputError, match="molchanov2019 needs class logits"):
            pruning.prune_by_baseline("molchanov2019")


def test_an_oracle_that_cannot_score_is_refused_before_work_begins(monkeypatch):
    """It judges scores without compensation, which have no joint selection for a task."""
    pruning = pipeline("regression", settings=PruningSettings(rounds=1, selection="joint"))
    monkeypatch.setattr(pruning.rankings, "_ranked", lambda *arguments: pytest.fail("work began"))
    with pytest.raises(InputError, match="selection='joint' without compensation needs class logits"):
        pruning.prune(30, 2, oracle_samples=2)


class NoDivergence(Regression):
    divergence = Task.divergence


class NoMetrics(Regression):
    statistics = Task.statistics


class NoLoss(Regression):
    loss = Task.loss


class NoMain(Regression):
    main = None


class OtherMain(Regression):
    main = "rmse"


class Offset(Regression):
    def divergence(self, outputs, dense_outputs):
        return super().divergence(outputs, dense_outputs) + 1


class MeanLoss(Regression):
    def loss(self, outputs, batch):
        return super().loss(outputs, batch).mean()


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (NoDivergence(), "does not define divergence, which compensation needs"),
        (NoMetrics(), "does not define evaluate, which every stage needs"),
        (NoLoss(), "does not define loss, which the scores need"),
        (NoMain(), "does not define main, which every stage needs"),
        (
            OtherMain(),
            "gives mae, loss, images for the first batch of the training loader, but its main metric is rmse",
        ),
        (Offset(), "is not 0 where both outputs are the same"),
        (MeanLoss(), "give one number a sample"),
        (Segmentation, "give an instance"),
        (MultiLabel(), "the labels of"),
        (Segmentation(), "the labels of"),
    ],
)
def test_what_a_task_does_not_define_is_refused_before_work_begins(task, message):
    with pytest.raises(InputError, match=message):
        pipeline("regression", task=task)


@pytest.mark.parametrize("field", ["label_smoothing", "distillation_weight"])
def test_what_a_recipe_asks_of_class_logits_is_refused_by_name(field, monkeypatch):
    pruning = pipeline("regression", recipe=Recipe(epochs=1, **{field: 0.1}))
    monkeypatch.setattr(pruning, "prune", lambda *arguments, **options: pytest.fail("work began"))
    with pytest.raises(InputError, match=f"{field} needs class logits"):
        pruning.run_full_pruning(30)


def test_a_task_without_a_divergence_is_pruned_without_compensation():
    settings = PruningSettings(rounds=1, compensate=False, hessian_probes=2)
    result = pipeline("regression", task=NoDivergence(), settings=settings).prune(30, 2)
    assert result.rounds[0]["measured_loss_change"] == result.rounds[0]["label_loss_change"]


class OutAndAux(nn.Module):
    """As torchvision's segmentation networks."""

    def __init__(self):
        super().__init__()
        self.body, self.out, self.aux = body(), nn.Conv2d(8, 3, 1), nn.Conv2d(8, 3, 1)

    def forward(self, images):
        features = self.body(images)
        return {"out": self.out(features), "aux": self.aux(features)}


class OfFloats(Segmentation):
    def loss(self, outputs, batch):
        assert all(output.dtype == torch.float32 for output in tensors_in(outputs))
        return super().loss(outputs, batch)


@pytest.mark.parametrize("amp", [None, "bf16"])
def test_a_segmentation_network_of_torchvision_trains_both_outputs(amp, capsys):
    torch.manual_seed(0)
    loader = DataLoader(TensorDataset(IMAGES, CASES["segmentation"][2]), 8)
    settings, recipe = PruningSettings(rounds=1), Recipe(epochs=1, lr=0.1, amp=amp)
    pruning = EnhancedPruning(OutAndAux(), loader, loader, task=OfFloats(), settings=settings, recipe=recipe)
    (epoch,) = pruning.run_full_pruning(30).fine_tuning
    assert epoch["train_loss"] > 1.4 * epoch["loss"]  # half of the second output's loss is added
    said = f"1/1: train loss {epoch['train_loss']:.4f}, validation miou {epoch['miou']:.4g}, pixel_accuracy "
    assert said in capsys.readouterr().out
