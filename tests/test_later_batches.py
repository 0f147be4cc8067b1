"""Batches after the first, streams, and images that are given beside the loaders."""

from weakref import WeakSet

import pytest
import torch
from torch import nn

from EnhancedFilterPruner import EnhancedFilterPruner
from EnhancedPruning import EnhancedPruning, InputError, PruningSettings
from GradientFlowAnalyzer import GradientFlowAnalyzer
from taylor_pruning.training.recipe import Recipe

IMAGES, LABELS = torch.randn(24, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(24) % 4
BATCHES = [(IMAGES[:16], LABELS[:16]), (IMAGES[16:], LABELS[16:])]


def network(*end):
    torch.manual_seed(0)
    body = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.ReLU()
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4), *end).eval()


def pipeline(train=BATCHES, val=BATCHES, model=None, **given):
    settings = PruningSettings(rounds=1)
    return EnhancedPruning(
        model or network(), train, val, settings=settings, recipe=Recipe(epochs=1), progress=False, **given
    )


UNSUITABLE = {
    "gray": (lambda x: x[:, :1], "expected input"),
    "half precision": (lambda x: x.half(), "float16 images and float32 weights; convert them to torch.float32"),
    "too small": (lambda x: x[..., :2, :2], "size"),
}
READERS = {
    "the training loader": lambda batches: pipeline(train=batches),
    "the validation loader": lambda batches: pipeline(val=batches),
    "the calibration images": lambda batches: pipeline(calibration=batches),
    "the held-out images": lambda batches: pipeline(held_out=batches),
    "the compensation images": lambda batches: EnhancedFilterPruner(network(), IMAGES[:1]).rank(BATCHES, batches),
    "the images of gradient flow": lambda batches: GradientFlowAnalyzer(network(), IMAGES[:1]).analyze(batches),
}


@pytest.mark.parametrize("change", UNSUITABLE)
@pytest.mark.parametrize("name", READERS)
def test_a_later_batch_that_the_network_cannot_take_is_named(name, change):
    spoilt, message = UNSUITABLE[change]
    with pytest.raises(InputError, match=f"cannot run on batch 1 of {name}.*{message}"):
        READERS[name]([BATCHES[0], (spoilt(IMAGES[:3]), LABELS[:3])])


def test_images_of_several_sizes_are_tried_once_each():
    tried = []

    class Watched(nn.Sequential):
        def forward(self, x):
            tried.append(tuple(x.shape))
            return super().forward(x)

    larger = nn.functional.interpolate(IMAGES[:3], size=12), LABELS[:3]
    pruning = pipeline(train=[*BATCHES, larger, larger], model=Watched(*network()))
    tried.clear()
    for _ in range(2):
        list(pruning.train_loader)
    assert not tried  # both sizes were seen when the first images were read
    fresh = pipeline(train=[*BATCHES, larger], calibration_samples=8, model=Watched(*network()))
    tried.clear()
    list(fresh.train_loader)
    assert tried in ([], [(2, 3, 12, 12)])


@pytest.mark.parametrize("reader", ["the calibration images", "the images of gradient flow"])
def test_probabilities_are_refused_wherever_images_are_given(reader):
    read = {
        "the calibration images": lambda model: EnhancedFilterPruner(model, IMAGES[:1]).rank(BATCHES),
        "the images of gradient flow": lambda model: GradientFlowAnalyzer(model, IMAGES[:1]).analyze(BATCHES),
    }[reader]
    with pytest.raises(InputError, match="ends in Softmax"):
        read(network(nn.Softmax(1)))


@pytest.mark.parametrize("name", ["calibration", "compensation"])
def test_given_images_are_not_replaced_by_others(name):
    with pytest.raises(InputError, match=f"the {name} images gives no batch"):
        pipeline(**{name: []})
    with pytest.raises(InputError, match=f"batch 0 of the {name} images is a tensor"):
        pipeline(**{name: IMAGES})


class Stream:
    """Gives batches without an end, and says how many make an epoch."""

    def __len__(self):
        return 2

    def __iter__(self):
        while True:
            yield BATCHES[0]


class Once(list):
    """Gives its batches to one reader after the other, as a list whose iterator is kept does."""

    left = 3

    def __iter__(self):
        self.left -= 1
        return iter([*super().__iter__()] if self.left >= 0 else [])


class Pairs(nn.Sequential):
    """Does not run on one sample."""

    def forward(self, x):
        assert len(x) > 1, "one sample"
        return super().forward(x)


def test_what_scores_and_flow_do_not_need_is_not_asked_of_a_network():
    model = Pairs(*network())
    EnhancedFilterPruner(model, IMAGES[:2], progress=False).rank(BATCHES)
    assert len(GradientFlowAnalyzer(model, IMAGES[:2]).analyze(BATCHES).layers)
    with pytest.raises(
        InputError, match="cannot run on one sample of the first batch of the training loader.*one sample"
    ):
        pipeline(model=model)


def test_flow_reads_one_batch_after_the_other():
    alive = WeakSet()

    class Loader:
        def __iter__(self):
            for index in range(4):
                images = IMAGES[4 * index : 4 * index + 4].clone()
                alive.add(images)
                assert len(alive) < 4
                yield images, LABELS[:4]

    GradientFlowAnalyzer(network(), IMAGES[:1]).analyze(Loader())


def test_a_network_that_makes_layers_in_its_first_forward_keeps_them():
    class Growing(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.last = network(), None

        def forward(self, x):
            if self.last is None:
                self.last = nn.Linear(4, 4)
            return self.last(self.body(x))

    model = Growing()
    pipeline(model=model).run_full_pruning(30)
    assert isinstance(model.last, nn.Linear)


def test_an_epoch_of_a_stream_ends_after_its_length():
    result = pipeline(train=Stream(), calibration=BATCHES).run_full_pruning(30)
    assert [record["epoch"] for record in result.fine_tuning] == [1] and result.accuracy_at_steps[-1]["step"] == 2


class Exhausted(Once):
    left = 1


@pytest.mark.parametrize(("name", "kind"), [("train", Once), ("train", Exhausted), ("val", Exhausted)])
def test_a_loader_that_is_empty_when_it_is_read_again_is_named(kind, name):
    """When training begins, or as early as the second time."""
    with pytest.raises(InputError, match=f"the {name}.* loader gives no batch; .* begins anew whenever it is read"):
        pipeline(**{name: kind(BATCHES)}).run_full_pruning(30)


@pytest.mark.parametrize("stage", ["known", {"top1": 90.0}])
def test_a_stage_of_the_dense_network_that_is_none_is_refused(stage):
    with pytest.raises(InputError, match="dense_stage must hold loss, macs, parameters, stage, top1"):
        pipeline(dense_stage=stage)


def test_images_without_values_or_in_another_layout_are_refused():
    for images in (IMAGES.to("meta"), IMAGES.to_sparse()):
        with pytest.raises(InputError, match="sparse or without values; give dense tensors"):
            pipeline(train=[(images, LABELS)])


def test_a_network_of_inference_mode_is_named():
    with torch.inference_mode():
        model = network()
    with pytest.raises(InputError, match="made in torch.inference_mode.*make the network outside of it"):
        pipeline(model=model)


def test_gradient_flow_that_was_not_collected_is_named():
    pruner = EnhancedFilterPruner(network(), IMAGES[:1], progress=False).rank(BATCHES)
    with pytest.raises(InputError, match="rank with use_gradient_flow=True"):
        pruner.flow_report()


def test_wrong_arguments_of_a_pruner_are_named():
    for given, message in (
        ({"loss": "mse"}, "the loss is 'mse'; give a function"),
        ({"loss": lambda z, y: z.sum(1), "task": pipeline().task}, "give a task or a loss, not both"),
        ({"use_gradient_flow": "no"}, "use_gradient_flow must be True or False, not 'no'"),
    ):
        with pytest.raises(InputError, match=message):
            EnhancedFilterPruner(network(), IMAGES[:1], progress=False, **given).rank(BATCHES)
    with pytest.raises(InputError, match="ledger is of type dict"):
        EnhancedFilterPruner(network(), IMAGES[:1], progress=False).rank(BATCHES).get_pruning_plan(30, {})


def test_a_batch_of_one_image_is_tried_on_a_copy_of_any_network():
    model = network()
    model[3] = nn.utils.weight_norm(model[3])
    model(IMAGES)  # leaves a weight with a history, which autograd refuses to copy
    assert pipeline(train=[BATCHES[0], (IMAGES[:1], LABELS[:1])], model=model).run_full_pruning(30).fine_tuning


def test_a_loader_is_read_to_its_end():
    class Counting:
        epochs = 0

        def __len__(self):
            return len(BATCHES)

        def __iter__(self):
            yield from BATCHES
            self.epochs += 1

    pruning = pipeline(train=(loader := Counting()), calibration=BATCHES)
    before = loader.epochs
    pruning.run_full_pruning(30)
    assert loader.epochs == before + 1
