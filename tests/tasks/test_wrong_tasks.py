"""Tasks that do not give what their methods promise, and networks whose outputs are of another kind than the task takes."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from EnhancedFilterPruner import EnhancedFilterPruner
from EnhancedPruning import EnhancedPruning, InputError, PruningSettings
from taylor_pruning.tasks.classification import Classification, MultiLabel
from taylor_pruning.tasks.dense import Regression, Segmentation
from taylor_pruning.tasks.task import Task

IMAGES = torch.randn(12, 3, 8, 8, generator=torch.Generator().manual_seed(0))
TARGETS = IMAGES.mean((2, 3))[:, :1]


def network(*end, outputs=1):
    torch.manual_seed(0)
    body = nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 6, 3, padding=1), nn.ReLU()
    return nn.Sequential(*body, nn.Conv2d(6, outputs, 1), *end).eval()


def one_number():
    return network(nn.AdaptiveAvgPool2d(1), nn.Flatten())


def prune(task, model, *batches):
    pruning = EnhancedPruning(model, batches, batches, task=task, settings=PruningSettings(rounds=1), progress=False)
    return pruning.prune(30)


class Own(Task):
    name, main, larger_is_better = "own", "rmse", False

    def loss(self, outputs, batch):
        return (outputs - batch[1]).square().flatten(1).mean(1)

    def divergence(self, outputs, dense_outputs):
        return (outputs - dense_outputs).square().flatten(1).mean(1)

    def evaluate(self, model, loader):
        return {"rmse": 1.0}


WRONG = {
    "a loss without a gradient": (
        "loss",
        lambda *args: Own.loss(*args).detach(),
        "loss of the task own has no gradient",
    ),
    "a loss of whole numbers": (
        "loss",
        lambda *args: Own.loss(*args).long(),
        r"torch.int64 \[8\].*one number a sample",
    ),
    "a divergence without a gradient": (
        "divergence",
        lambda *args: Own.divergence(*args).detach(),
        "has no gradient in",
    ),
    "a linear divergence": (
        "divergence",
        lambda self, a, b: (a - b).mean(1),
        "no second derivative; take one that is",
    ),
    "a root as divergence": (
        "divergence",
        lambda self, a, b: (a - b).square().mean(1).sqrt(),
        "divergence of the task own has no gradient where both outputs are the same, .*; give its square",
    ),
    "metrics in a list": (
        "evaluate",
        lambda *args: [1.0],
        "evaluate of the task own gives a list of 1; give {metric: number}",
    ),
    "a number as metrics": ("evaluate", lambda *args: 1.0, "of type float; give {metric: number}"),
    "a metric in words": (
        "evaluate",
        lambda *args: {"rmse": "good"},
        "rmse of the task own is .* of type str; give a number",
    ),
    "no metric": ("evaluate", lambda *args: {"rmse": None}, "give a number"),
    "metrics of classes": ("evaluate", lambda *args: {"rmse": torch.ones(2)}, r"is a tensor \[2\]; give a number"),
    "a loss that is NaN": (
        "loss",
        lambda *args: Own.loss(*args) * torch.nan,
        "loss of the task own is NaN or infinite for",
    ),
    "outputs that are no numbers": (
        "forward",
        lambda self, model, batch: ["a"] * 12,
        "the network gives no numbers for the first batch of the training loader; define forward",
    ),
    "a direction in words": ("larger_is_better", "no", "larger_is_better must be True or False, not 'no'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_a_task_gives_is_checked(case):
    name, wrong, message = WRONG[case]
    with pytest.raises(InputError, match=message):
        prune(type("Wrong", (Own,), {name: wrong})(), one_number(), (IMAGES, TARGETS))


def test_fields_of_unequal_length_are_refused():
    with pytest.raises(InputError, match="batch 0 of the training loader has fields of 5 and 12 samples"):
        prune(Own(), one_number(), (IMAGES, TARGETS[:5]))
    assert prune(Own(), one_number(), (IMAGES, TARGETS, ["a name"] * 12, 7)).plan


@pytest.mark.parametrize(("end", "name"), [(nn.Softmax(1), "Softmax"), (nn.LogSoftmax(1), "LogSoftmax")])
def test_probabilities_of_pixels_are_no_logits(end, name):
    batch = IMAGES, (IMAGES[:, 0] > 0).long()
    assert prune(Segmentation(), network(outputs=2), batch).plan
    with pytest.raises(InputError, match=f"ends in {name}; give it without"):
        prune(Segmentation(), network(end, outputs=2), batch)


def test_probabilities_of_labels_are_no_logits():
    end, batch = (nn.AdaptiveAvgPool2d(1), nn.Flatten()), (IMAGES, (IMAGES[:, :2].mean((2, 3)) > 0))
    model = network(*end, outputs=2)
    model[4].bias.data.fill_(0.5)  # logits between 0 and 1, which are none
    assert prune(MultiLabel(), model, batch).plan
    with pytest.raises(InputError, match="ends in a sigmoid; give it without"):
        prune(MultiLabel(), network(*end, nn.Sigmoid(), outputs=2), batch)


def test_scores_do_not_evaluate():
    class Choosy(Own):
        def evaluate(self, model, loader):
            raise AssertionError

    EnhancedFilterPruner(one_number(), IMAGES[:1], task=Choosy(), progress=False).rank([(IMAGES, TARGETS)])


def test_the_check_for_a_sigmoid_leaves_nothing_behind():
    class Counting(nn.Sequential):
        calls = 0

        def forward(self, x):
            self.calls += 1
            return super().forward(x).sigmoid() / 2

    model = Counting(*network(nn.AdaptiveAvgPool2d(1), nn.Flatten(), outputs=4))
    MultiLabel().check_kind(model, model(IMAGES).detach(), (IMAGES, torch.ones(12, 4)))
    assert model.calls == 1


class Dice(Segmentation):
    def loss(self, outputs, batch):
        return 1 - outputs.gather(1, batch[1][:, None]).mean((1, 2, 3))


class NegativeLogLikelihood(Classification):
    def loss(self, outputs, batch):
        return F.nll_loss(outputs.log(), batch[1], reduction="none")


class OfProbabilities(MultiLabel):
    def loss(self, outputs, batch):
        return F.binary_cross_entropy(outputs, batch[1].to(outputs), reduction="none").sum(1)


@pytest.mark.parametrize(
    "task", [Dice(), NegativeLogLikelihood(), OfProbabilities()], ids=lambda task: type(task).__name__
)
def test_a_loss_of_ones_own_may_take_probabilities(task):
    pooled = () if isinstance(task, Dice) else (nn.AdaptiveAvgPool2d(1), nn.Flatten())
    end = nn.Sigmoid() if isinstance(task, MultiLabel) else nn.Softmax(1)
    labels = (IMAGES[:, 0] > 0).long() if isinstance(task, Dice) else torch.arange(12) % 2
    batch = IMAGES, F.one_hot(labels) if isinstance(task, MultiLabel) else labels
    settings = PruningSettings(rounds=1, compensate=False)
    model = network(*pooled, end, outputs=2)
    assert EnhancedPruning(model, [batch], [batch], task=task, settings=settings, progress=False).prune(30).plan


def test_a_loss_may_write_to_the_outputs():
    class Writing(Own):
        def loss(self, outputs, batch):
            return outputs.sub_(batch[1]).square().flatten(1).mean(1)

    assert prune(Writing(), one_number(), (IMAGES, TARGETS)).plan


@pytest.mark.parametrize("task", [Classification(), MultiLabel(), Regression(), Segmentation()], ids=lambda t: t.name)
def test_several_inputs_need_a_task_of_ones_own(task):
    with pytest.raises(InputError, match=r"a tuple of 3, not a pair .*several inputs needs a task of your own"):
        EnhancedPruning(
            one_number(), [(IMAGES, IMAGES, TARGETS)], [(IMAGES, IMAGES, TARGETS)], task=task, progress=False
        )


class Twice(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return (out := self.model(x)), out.detach()


@pytest.mark.parametrize(
    ("task", "labels"),
    [(MultiLabel(), TARGETS > 0), (Regression(), TARGETS), (Segmentation(), IMAGES[:, 0] > 0)],
    ids=lambda value: getattr(value, "name", ""),
)
def test_several_outputs_are_wrapped_or_need_a_task_of_ones_own(task, labels):
    batches = [(IMAGES, labels.long() if labels.dtype == torch.bool else labels)]
    with pytest.raises(InputError, match="gives a tuple of 2 .* must give one tensor: wrap it .* a task of your own"):
        EnhancedPruning(Twice(one_number()), batches, batches, task=task, progress=False)


def huge(model):
    """Outputs beyond the range of single precision, from weights that are finite."""
    with torch.no_grad():
        for layer in (model[2], model[4]):
            layer.weight.mul_(1e30)
    return model


MAPS = (IMAGES[:, 0] > 0).long()
UNSUITABLE = {
    "words": (Own(), one_number, ["abc"], "batch 0 .* holds no tensors; let the loader give tensors, or"),
    "no samples": (
        Own(),
        one_number,
        (IMAGES[:0], TARGETS[:0]),
        "batch 0 .* holds no samples; leave out empty batches",
    ),
    "a dictionary": (Own(), one_number, {"x": IMAGES, "y": TARGETS}, "does not say which of x, y the network reads"),
    "infinite outputs": (Own(), lambda: huge(one_number()), (IMAGES, TARGETS), "gives NaN or infinite outputs for"),
    "infinite logits": (
        Classification(),
        lambda: huge(network(nn.AdaptiveAvgPool2d(1), nn.Flatten(), outputs=2)),
        (IMAGES, torch.arange(12) % 2),
        "gives NaN or infinite logits for .*; check its weights",
    ),
    "more labels": (
        MultiLabel(),
        lambda: network(nn.AdaptiveAvgPool2d(1), nn.Flatten(), outputs=2),
        (IMAGES, torch.ones(12, 3)),
        r"gives \[8, 2\] for .*, but the labels are \[8, 3\]; give as many",
    ),
    "smaller maps": (
        Segmentation(),
        lambda: network(nn.MaxPool2d(2), outputs=2),
        (IMAGES, MAPS),
        r"gives \[8, 2, 4, 4\] for .*; it must give logits \[8, classes, 8, 8\], as large as the labels",
    ),
    "fewer targets": (
        Regression(),
        one_number,
        (IMAGES, TARGETS[:5]),
        r"targets of .* are \[5, 1\] for 12 images; give one",
    ),
    "longer targets": (
        Regression(),
        one_number,
        (IMAGES, TARGETS.expand(12, 2)),
        r"gives \[8, 1\] for .*, but the targets are \[8, 2\]; give as many",
    ),
}


@pytest.mark.parametrize("case", UNSUITABLE)
def test_batches_and_outputs_that_do_not_suit_the_task_are_named(case):
    task, model, batch, message = UNSUITABLE[case]
    with pytest.raises(InputError, match=message):
        prune(task, model(), batch)


class PositionsFirst(nn.Module):
    """Outputs [positions, samples, 1]."""

    def __init__(self):
        super().__init__()
        self.body = network()

    def forward(self, images):
        return self.body(images).flatten(2).permute(2, 0, 1)


class AtPositions(Own):
    def loss(self, outputs, batch):
        return (outputs - batch[1]).square().mean((0, 2))

    def divergence(self, outputs, dense_outputs):
        return (outputs - dense_outputs).square().mean((0, 2))


class SamplesFirst(AtPositions):
    def forward(self, model, batch):
        return super().forward(model, batch).transpose(0, 1)

    def loss(self, outputs, batch):
        return super().loss(outputs.transpose(0, 1), batch)

    def divergence(self, outputs, dense_outputs):
        return super().divergence(outputs.transpose(0, 1), dense_outputs.transpose(0, 1))


def test_outputs_whose_first_dimension_holds_no_samples_have_scores_but_no_directions():
    batches, found = [(IMAGES, TARGETS)], []
    for task in (AtPositions(), SamplesFirst()):
        pruner = EnhancedFilterPruner(PositionsFirst().eval(), IMAGES[:1], task=task, progress=False)
        found.append(pruner)
    found[1].model.load_state_dict(found[0].model.state_dict())
    torch.testing.assert_close(*(pruner.rank(batches).scores() for pruner in found))
    found[1].rank(batches, batches)
    with pytest.raises(InputError, match="outputs with one row a sample, but the task own gives 64 rows for"):
        found[0].rank(batches, batches)
