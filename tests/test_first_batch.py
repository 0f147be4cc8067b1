import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, SequentialSampler, TensorDataset

from EnhancedFilterPruner import Rankings
from EnhancedPruning import EnhancedPruning, PruningSettings
from taylor_pruning.errors import InputError
from taylor_pruning.experiment.data import TensorImages
from taylor_pruning.experiment.loaders import make_loader
from taylor_pruning.first_batch import Batches, check_inputs, check_training, device_of
from taylor_pruning.training.fine_tuning import Recipe
from taylor_pruning.training.sampling import spread_images

CPU = torch.device("cpu")
LABELS = torch.arange(33) % 4


@pytest.fixture
def images():
    return torch.randn(33, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def network(*end, channels=3):
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(channels, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.ReLU())
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4), *end).eval()


def with_batchnorm_1d():
    model = network()
    model.insert(7, nn.BatchNorm1d(6))
    return model.eval()


class Count(nn.Module):
    """Works on integer images, as networks do that normalise them."""

    def __init__(self):
        super().__init__()
        self.network = network()

    def forward(self, x):
        return self.network(x.float() / 50 - 2)


class Endless(IterableDataset):
    def __iter__(self):
        return iter([(torch.zeros(3, 8, 8), n % 4) for n in range(33)])


def check(model, *batches):
    check_inputs(model, [Batches(list(batches), "the loader", CPU)])


def test_a_network_that_fits_its_data_passes_and_stays_as_it_was(images):
    model = network().train()
    before = copy.deepcopy(model.state_dict())
    check(model, (images, LABELS))
    assert model.training and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("end", [nn.Softmax(1), nn.LogSoftmax(1), nn.Sequential(nn.Flatten(), nn.Softmax(-1))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_probabilities_are_no_logits(images, end, dtype):
    with pytest.raises(InputError, match="ends in (Log)?Softmax; give it without"):
        check(network(end).to(dtype), (images.to(dtype), LABELS))


@pytest.mark.parametrize(
    ("model", "change", "message"),
    [
        (network(), lambda x: x.double(), "float64 images and float32 weights; convert them to torch.float32"),
        (network().half(), lambda x: x, "float32 images and float16 weights"),
        (network(), lambda x: (50 * x + 100).byte(), "uint8 images and float32 weights; scale and normalise them"),
        (network(channels=1), lambda x: x, r"cannot run on the first batch of the loader, images \[8, 3, 8, 8\]"),
        (network(), lambda x: x[:, :, 0], "cannot run"),
        (network(nn.Unflatten(1, (2, 2))), lambda x: x, "must give logits"),
        (nn.Sequential(nn.Flatten()), lambda x: x.fill_(3e38) * 10, "pixels"),
    ],
)
def test_what_does_not_fit_is_said(images, model, change, message):
    with pytest.raises(InputError, match=message):
        check(model, (change(images.clone()), LABELS))


def test_weights_that_are_not_finite_are_named(images):
    model = network()
    model[3].weight.data[0, 0, 0, 0] = torch.inf
    with pytest.raises(InputError, match=r"3\.weight"):
        check(model, (images, LABELS))


def test_inference_mode_is_refused(images):
    with torch.inference_mode(), pytest.raises(InputError, match="outside of torch.inference_mode"):
        check(network(), (images, LABELS))


def test_where_a_network_lies():
    assert device_of(network()) == CPU
    with pytest.raises(InputError, match="no parameters"):
        device_of(nn.ReLU())
    with pytest.raises(InputError, match="cpu, meta; move it to one device"):
        device_of(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta")))
    with pytest.raises(
        InputError, match="mps cannot compute in float64, which scores need; move the network to the cpu"
    ):
        device_of(SimpleNamespace(parameters=lambda: [SimpleNamespace(device=torch.device("mps"))]))


@pytest.mark.parametrize(
    ("loader", "message"),
    [((b for b in [1]), "only once"), (7, "not iterable"), (None, "not iterable"), ([], "gives no batch")],
)
def test_loaders_that_are_none(loader, message):
    with pytest.raises(InputError, match=f"the loader.*{message}"):
        Batches(loader, "the loader", CPU).first()


def test_the_first_batch_leaves_the_random_generator_alone(images):
    loader = DataLoader(TensorDataset(images, LABELS), 8, shuffle=True)
    torch.manual_seed(1)
    expected = next(iter(loader))[1]
    torch.manual_seed(1)
    batches = Batches(loader, "the loader", CPU)
    batches.first()
    assert torch.equal(next(iter(batches))[1], expected)


def loaders(images):
    """{name: (loader, whether a batch has one image)}"""
    data = TensorDataset(images, LABELS)
    own = TensorImages((images > 0).byte(), LABELS)
    return {
        "list": ([(images[:32], LABELS[:32]), (images[32:], LABELS[32:])], True),
        "list of whole batches": ([(images, LABELS)], False),
        "DataLoader": (DataLoader(data, 16), True),
        "shuffled": (DataLoader(data, 16, shuffle=True), True),
        "without the last": (DataLoader(data, 16, drop_last=True), False),
        "another size": (DataLoader(data, 11), False),
        "one by one": (DataLoader(data, 1), True),
        "batch sampler": (DataLoader(data, batch_sampler=BatchSampler(RandomSampler(data), 16, False)), True),
        "list of indices": (DataLoader(data, batch_sampler=[[0, 1], [2]]), True),
        "own": (make_loader(own, 16, shuffle=True), False),
        "own, one by one": (make_loader(own, 1, shuffle=True), True),
    }


@pytest.mark.parametrize("kind", loaders(torch.zeros(33, 3, 8, 8)))
def test_a_batch_of_one_image_is_found_where_batchnorm_cannot_take_it(images, kind):
    loader, single = loaders(images)[kind]
    batches = Batches(loader, "the training loader", CPU)
    check_training(network(), batches)  # its BatchNorm sees several positions of one image
    if not single:
        return check_training(with_batchnorm_1d(), batches)
    with pytest.raises(InputError, match="the training loader has one image.*drop_last"):
        check_training(with_batchnorm_1d(), batches)


def test_what_cannot_be_trained_is_refused(images):
    batches = Batches([(images, LABELS)], "the training loader", CPU)
    with pytest.raises(InputError, match="no parameter of the network requires a gradient"):
        check_training(network().requires_grad_(False), batches)
    with torch.no_grad(), pytest.raises(InputError, match="outside of torch.no_grad"):
        check_training(network(), batches)
    with pytest.raises(InputError, match="has no length"):
        check_training(network(), Batches(DataLoader(Endless(), 8), "the training loader", CPU))


def pruned(model, train, val=None, **settings):
    settings = PruningSettings(rounds=1, **settings)
    pruning = EnhancedPruning(model, train, val or train, settings=settings, recipe=Recipe(epochs=1), progress=False)
    return pruning.run_full_pruning(30, 2)


def test_everything_is_checked_before_the_dense_network_is_evaluated(images, monkeypatch):
    monkeypatch.setattr(EnhancedPruning, "dense_stage", lambda self: pytest.fail("evaluated"))
    monkeypatch.setattr(Rankings, "of", lambda self, *args: pytest.fail("scored"))
    data = [(images, LABELS)]
    for model, train, val in (
        (network(), data, [(images, LABELS + 1)]),
        (network(), [(images, LABELS, LABELS)], data),
        (network(nn.Softmax(1)), data, data),
        (network().requires_grad_(False), data, data),
        (with_batchnorm_1d(), [*data, (images[:1], LABELS[:1])], data),
    ):
        with pytest.raises(InputError):
            pruned(model, train, val)


@pytest.mark.parametrize("change", [lambda y: y.int(), lambda y: y[:, None].byte(), lambda y: y])
def test_the_pipeline_runs_on_labels_of_other_types(images, change):
    expected = pruned(network(), [(images, LABELS)])
    result = pruned(network(), [(images, change(LABELS))])
    assert result.plan == expected.plan and result.stages[-1]["loss"] == expected.stages[-1]["loss"]


def test_a_frozen_network_is_pruned_without_fine_tuning(images):
    data = [(images, LABELS)]
    model = network().requires_grad_(False)
    pruning = EnhancedPruning(model, data, data, settings=PruningSettings(rounds=1), progress=False)
    assert pruning.run_full_pruning(30, 2, fine_tune_epochs=0).stages[-1]["stage"] == "compensated"


def test_validation_data_need_no_length(images):
    data = [(images, LABELS)]
    pruning = EnhancedPruning(network(), data, DataLoader(Endless(), 8), progress=False)
    assert pruning.dense_stage()["images"] == 33


def test_integer_images_of_a_network_that_takes_them(images):
    result = pruned(Count().eval(), [((50 * images + 100).clamp(0, 255).byte(), LABELS)])
    assert result.stages[-1]["parameters"] < result.stages[0]["parameters"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("settings", [{}, {"compensate": False}, {"compensate": False, "curvature": "hvp"}])
def test_half_precision_prunes_much_as_single_does(images, dtype, settings):
    single = pruned(network(), [(images, LABELS)], **settings)
    half = pruned(network().to(dtype), [(images.to(dtype), LABELS)], **settings)
    assert {p.dtype for p in half.model.parameters()} == {dtype}
    for name, scores in single.scores.items():
        torch.testing.assert_close(torch.tensor(half.scores[name]), torch.tensor(scores), rtol=0.1, atol=2e-3)


def test_the_monitored_images_of_a_plain_loader_are_read_alone():
    """A DataLoader in order reads the spread images and no others; they are those that a full pass would give."""
    read = []

    class Images(torch.utils.data.Dataset):
        def __len__(self):
            return 50

        def __getitem__(self, index):
            read.append(index)
            return torch.full((3, 2, 2), float(index)), index % 4

    loader = torch.utils.data.DataLoader(Images(), batch_size=8)
    batches = spread_images(Batches(loader, "the validation loader", torch.device("cpu")), 10)
    assert [index // 5 for index in read] == list(range(10))  # one of every five
    assert torch.cat([labels for _, labels in batches]).tolist() == [index % 4 for index in read]
    assert torch.cat([images for images, _ in batches])[:, 0, 0, 0].tolist() == read


@pytest.mark.parametrize("part", [{"sampler": SequentialSampler(range(21))}, {"drop_last": True, "batch_size": 21}])
def test_no_image_is_monitored_that_the_loader_never_gives(part):
    data = TensorDataset(torch.arange(40.0)[:, None, None, None].expand(40, 3, 2, 2), torch.zeros(40).long())
    loader = DataLoader(data, **{"batch_size": 8, **part})
    batches = spread_images(Batches(loader, "the validation loader", CPU), 10)
    assert max(batch[0].max() for batch in batches) < 21
