"""What callers do around the pipeline, what they give it, and what they do with its results."""

import copy
import json

import numpy as np
import pytest
import torch
from conftest import Residual
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from EnhancedFilterPruner import ChannelGraph, EnhancedFilterPruner
from EnhancedPruning import EnhancedPruning, InputError, PruningSettings
from GradientFlowAnalyzer import GradientFlowAnalyzer
from taylor_pruning.tasks.dense import Segmentation
from taylor_pruning.tasks.task import Task
from taylor_pruning.training.fine_tuning import Recipe

generator = torch.Generator().manual_seed(0)
IMAGES, LABELS = torch.rand(24, 3, 8, 8, generator=generator), torch.randint(4, (24,), generator=generator)
BATCHES = [(x, y) for x, y in zip(IMAGES.split(8), LABELS.split(8), strict=True)]


def network():
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1)
    return nn.Sequential(*layers, nn.Flatten(), nn.Dropout(0.5), nn.Linear(8, 4)).eval()


def pipeline(batches=BATCHES, model=None, **options):
    options = {
        "settings": PruningSettings(rounds=1, guard=False),
        "recipe": Recipe(lr=0.01),
        "progress": False,
    } | options
    return EnhancedPruning(model or network(), batches, batches, **options)


def test_autocast_of_the_caller_changes_no_score_and_no_weight():
    apart = pipeline(settings=PruningSettings(rounds=2, repair="network")).prune(40, 2)
    with torch.autocast("cpu", torch.bfloat16):
        under = pipeline(settings=PruningSettings(rounds=2, repair="network")).prune(40, 2)
    assert under.plan == apart.plan and under.scores == apart.scores
    for ours, theirs in zip(under.model.parameters(), apart.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_random_numbers_of_the_caller_go_on_after_fine_tuning():
    pruning, drawn = pipeline(), []
    for runs in (False, True):
        torch.manual_seed(1)
        if runs:
            pruning.run_full_pruning(30, 2, fine_tune_epochs=1)
        drawn.append(torch.rand(4))
    assert torch.equal(*drawn)


@pytest.mark.parametrize("kind", [np.int64, np.float32, np.float64])
def test_numbers_of_numpy_are_numbers(kind):
    settings = PruningSettings(rounds=np.int64(1), guard=False, class_probes=np.int32(2))
    result = pipeline(settings=settings).run_full_pruning(kind(30), np.int64(2), fine_tune_epochs=np.int64(1))
    assert result.plan == pipeline(settings=settings).prune(30, 2).plan and len(result.fine_tuning) == 1


def test_a_run_with_numbers_of_numpy_goes_on(tmp_path):
    """A checkpoint can hold none, and 1,000,003 times a seed of 32 bits overflows."""
    numbers = {"rounds": np.int32(2), "seed": np.int32(5000), "layer_bound": np.float32(2)}
    settings = PruningSettings(**numbers, guard=False, budget=np.str_("filters"))
    assert repr(settings) == repr(PruningSettings(rounds=2, guard=False, seed=5000, layer_bound=2.0))
    run = {"checkpoint": tmp_path / "rounds"}
    plan = pipeline(settings=settings).prune(np.float32(30), np.int64(2), **run).plan
    assert pipeline(settings=settings).prune(30, 2, **run, resume=True).plan == plan


@pytest.mark.parametrize("value", ["30", True, float("nan")])
def test_what_is_no_percentage_is_shown(value):
    with pytest.raises(InputError, match=f"number between 0 and 100 .both excluded., not {value!r}"):
        pipeline().prune(value)


@pytest.mark.parametrize("count", [2, 24])
def test_results_are_strict_json(count):
    """With two images no image is left to judge a layer's fit: its errors are not known."""
    result = pipeline([(IMAGES[:count], LABELS[:count])]).run_full_pruning(40, 2, fine_tune_epochs=1)
    assert json.loads(json.dumps(result.as_dict(), allow_nan=False)) == result.as_dict()


class Stream(IterableDataset):
    """Images one after the other, and how many there are."""

    def __iter__(self):
        return iter(zip(IMAGES, LABELS, strict=True))

    def __len__(self):
        return len(IMAGES)


def test_a_stream_of_known_length_is_trained_on():
    result = pipeline(DataLoader(Stream(), 8)).run_full_pruning(30, 2, fine_tune_epochs=1)
    assert result.fine_tuning[0]["train_loss"] > 0
    with pytest.raises(InputError, match="a batch of the training loader has one image"):
        network_1d = network()
        network_1d.insert(7, nn.BatchNorm1d(8))
        pipeline(DataLoader(Stream(), 23), network_1d.eval()).run_full_pruning(30, 2, fine_tune_epochs=1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_repaired_across_layers(dtype):
    batches = [(x.to(dtype), y) for x, y in BATCHES]
    pruning = pipeline(batches, network().to(dtype), settings=PruningSettings(rounds=1, guard=False, repair="network"))
    result = pruning.prune(40, 2)
    assert result.stages[-1]["stage"] == "repaired" and next(result.model.parameters()).dtype == dtype


SCORES = {
    "too few": (lambda units: torch.rand(3), r"of the shape \[3\]"),
    "columns": (lambda units: torch.rand(units, 1), "of the shape"),
    "NaN": (lambda units: torch.full((units,), torch.nan), "gives NaN"),
    "text": (lambda units: "abc", "gives an object of type str"),
}


@pytest.mark.parametrize("case", SCORES)
def test_a_criterion_that_gives_no_scores_is_refused(case):
    make, message = SCORES[case]
    with pytest.raises(InputError, match=f"the criterion <lambda> .*{message}"):
        pipeline().prune_by_baseline(lambda graph: make(len(graph.units)), 30)


def test_a_criterion_of_gradients_takes_those_of_order_1():
    pruning = pipeline()
    result = pruning.prune_by_baseline("molchanov2019", 30)
    ranked = pruning.rankings.of(pruning.model, 1)
    for name, scores in ranked.by_filter(ranked.criterion()[0]).items():
        known = ~scores.isnan()
        found = torch.tensor([float("nan") if x is None else x for x in result.scores[name]]).double()
        torch.testing.assert_close(found[known], scores[known], rtol=1e-5, atol=0)


def test_a_criterion_may_give_whole_numbers_or_a_list():
    pruning = pipeline()
    plans = [
        pruning.prune_by_baseline(criterion, 30).plan
        for criterion in (
            lambda graph: torch.arange(len(graph.units)),
            lambda graph: [0.5 * unit for unit in range(len(graph.units))],
        )
    ]
    assert plans[0] == plans[1] and any(plans[0].values())


@pytest.mark.parametrize("modules", [(), ("0",)])
def test_a_criterion_that_runs_the_network_leaves_it_as_it_was(modules):
    """Gradients in training mode, as many criteria take them, fill `grad` and move the statistics of BatchNorm."""
    model = network().train()
    model = nn.Sequential(model[:5], model[5:])
    before = copy.deepcopy(model.state_dict())

    def gradients(graph):
        graph.model.train()
        nn.functional.cross_entropy(graph.model(IMAGES), LABELS).backward()
        weights = dict(graph.model.named_parameters())
        found = [[weights[f"{layer}.weight"].grad[index].norm() for layer, index in u.filters] for u in graph.units]
        return torch.stack([torch.stack(norms).mean() for norms in found])

    settings = PruningSettings(rounds=2, guard=False, prune_modules=modules)
    result = pipeline(model=model, settings=settings).prune_by_baseline(gradients, 40, compensate=True)
    assert sum(map(len, result.plan.values())) > 0
    for each in (model, result.model):
        assert all(parameter.grad is None for parameter in each.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_images_of_two_sizes_are_refused_before_any_round():
    batches = [*BATCHES, (torch.rand(8, 3, 10, 10), LABELS[:8])]
    with pytest.raises(InputError, match="images of different sizes cannot form one batch"):
        pipeline(batches, settings=PruningSettings(repair="network"))
    pipeline(batches).prune(30)  # layers alone


def test_gradients_whose_squares_overflow_are_named_with_their_layer():
    model = network()
    model[-1].weight.data *= 1e25
    with pytest.raises(InputError, match="scores: numbers at the layer 3 are too large for the sums of their squares"):
        pipeline(model=model).prune(30, 1)


@pytest.mark.parametrize("method", [1, 2, "magnitude"])
def test_numbers_whose_squares_overflow_are_named_with_their_layer(method):
    """As those of images that nobody normalised, or of weights whose training diverged."""
    pruning = pipeline([(1e25 * x, y) for x, y in BATCHES])
    with pytest.raises(InputError, match="numbers at the layer .* are too large for the sums of their squares"):
        if method == "magnitude":
            pruning.prune_by_baseline(method, 30, compensate=True)
        else:
            pruning.prune(30, method)


def test_new_values_beyond_the_range_of_half_precision_are_named():
    batches = [(3e4 * x.half(), y) for x, y in BATCHES]
    with pytest.raises(
        InputError, match="new values of 1.running_var are beyond the range of its type; .* model.float()"
    ):
        pipeline(batches, network().half()).prune(30)


def test_cuts_are_verified_on_numbers_as_large_as_the_images():
    """Once it is repaired, a network for such images gives the same for all of usual size."""
    batches = [(1e10 * (images - 0.5), labels) for images, labels in BATCHES]
    settings = PruningSettings(rounds=2, repair="network", guard=False)
    pruning = pipeline(batches, Residual().eval(), settings=settings, calibration_samples=16)
    assert sum(map(len, pruning.prune(40).plan.values())) > 0


def test_a_single_image_does_not_repair_a_network():
    single = [(BATCHES[0][0][:1], LABELS[:1])]
    with pytest.raises(InputError, match="at least two compensation images"):
        pipeline(compensation=single, settings=PruningSettings(repair="network"))
    pipeline(compensation=single)


def test_no_images_and_complex_ones_are_refused():
    with pytest.raises(InputError, match="calibration_samples must be at least 1, not 0"):
        pipeline(calibration_samples=0)
    with pytest.raises(InputError, match="complex images; give their real and imaginary parts as channels"):
        pipeline([(IMAGES.to(torch.complex64), LABELS)])


def test_a_metric_that_is_not_known_is_refused():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 3, 1)).eval()
    unlabelled = [(IMAGES[:8], torch.full((8, 8, 8), 255))]
    with pytest.raises(InputError, match="miou of the dense network is nan; check the validation images"):
        pipeline(unlabelled, model, task=Segmentation()).prune(30)


class Own(Task):
    """Metrics as tensors, under the names given."""

    main = "error"

    def __init__(self, *names):
        self.names = names

    def loss(self, outputs, batch):
        return (outputs.mean(1) - batch[1]).square()

    def divergence(self, outputs, dense_outputs):
        return (outputs - dense_outputs).square().mean(1)

    def evaluate(self, model, loader):
        return {name: torch.cat([self.loss(self.forward(model, b), b) for b in loader]).mean() for name in self.names}


def test_metrics_of_a_task_are_plain_numbers_with_names_of_their_own():
    result = pipeline(task=Own("error")).prune(30)
    assert isinstance(result.stages[0]["error"], float) and json.dumps(result.as_dict())
    with pytest.raises(InputError, match="a metric called 'macs', as a stage's own; rename it"):
        pipeline(task=Own("error", "macs")).prune(30)


def test_a_run_whose_task_gives_numbers_of_numpy_goes_on(tmp_path):
    """A checkpoint that holds some could not be read again."""

    class OfNumPy(Own):
        def evaluate(self, model, loader):
            error = super().evaluate(model, loader)["error"].numpy()
            return {"error": np.mean(error), "each": {"first": [np.float32(error)]}, "all": torch.full((2,), 1.0)}

    def run(resume):
        run = {"checkpoint": tmp_path / "run", "resume": resume}
        return pipeline(task=OfNumPy("error")).run_full_pruning(30, fine_tune_epochs=1, **run).as_dict()["stages"]

    first, second = run(False), run(True)
    assert type(first[0]["error"]) is float and first[0]["all"] == [1.0, 1.0]
    assert [stage["error"] for stage in second] == [stage["error"] for stage in first]


def test_another_default_device_is_named():
    """Here one without values; a GPU refuses the draws of the CPU's generator."""
    model = network()
    with torch.device("meta"), pytest.raises(InputError, match="set_default_device.'meta'. .*set it back to 'cpu'"):
        ChannelGraph(model, IMAGES[:1])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"settings": {"rounds": 2}}, "settings is of type dict; give an instance of PruningSettings"),
        ({"recipe": 0.01}, "recipe is of type float; give an instance of Recipe"),
        ({"calibration_samples": "300"}, "calibration_samples must be a whole number, not '300'"),
        ({"calibration_samples": 0}, "calibration_samples must be at least 1, not 0"),
    ],
)
def test_what_a_pipeline_cannot_be_made_of_is_named(wrong, message):
    with pytest.raises(InputError, match=message):
        pipeline(**wrong)


def test_a_graph_of_another_network_is_refused():
    wrapped = nn.Sequential(nn.DataParallel(network()))
    graph = ChannelGraph(wrapped, IMAGES[:1])
    assert EnhancedFilterPruner(wrapped, IMAGES[:1], graph=graph).model is graph.model
    for face in (EnhancedFilterPruner, GradientFlowAnalyzer):
        assert face(graph.model, IMAGES[:1], graph=graph).model is graph.model
        with pytest.raises(InputError, match="graph is not the ChannelGraph of this model"):
            face(network(), IMAGES[:1], graph=graph)


def test_a_loss_that_is_no_number_an_image_is_refused():
    pruner = EnhancedFilterPruner(network(), IMAGES[:1], loss=nn.CrossEntropyLoss(), progress=False)
    with pytest.raises(InputError, match=r"the loss gives a tensor \[\]; give one number an image"):
        pruner.rank(BATCHES)
    with pytest.raises(InputError, match="settings is of type Recipe"):
        EnhancedFilterPruner(network(), IMAGES[:1], settings=Recipe())


@pytest.mark.parametrize("exclude", [3, None, "0"])
def test_layers_to_exclude_are_a_list(exclude):
    with pytest.raises(InputError, match=f"exclude must be a list, not {exclude!r}"):
        PruningSettings(exclude=exclude)


@pytest.mark.parametrize("prune", ["prune", "prune_by_baseline"])
def test_a_share_that_is_given_for_a_percentage_is_refused_where_it_would_remove_nothing(prune):
    start = {"prune": (), "prune_by_baseline": ("magnitude",)}[prune]
    with pytest.raises(InputError, match="0.3 % of the budget would remove nothing, .* as 30 for 30 %"):
        getattr(pipeline(), prune)(*start, 0.3)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"taylor_order": True}, "taylor_order must be one of 1, 2, 3, not True"),
        ({"taylor_order": "2"}, "taylor_order must be one of 1, 2, 3, not '2'"),
        ({"use_gradient_flow": "no"}, "use_gradient_flow must be True or False, not 'no'"),
        ({"oracle_samples": -1}, "oracle_samples must be at least 0, not -1"),
        ({"oracle_samples": 1.5}, "oracle_samples must be a whole number, not 1.5"),
        ({"resume": True}, "resume=True needs checkpoint=, the file to continue from"),
        ({"resume": "run.pt"}, "resume must be True or False, not 'run.pt'"),
        ({"checkpoint": ""}, "the checkpoint . is a folder; give the path of a file"),
        ({"checkpoint": 3}, "the checkpoint is of type int; give the path of a file"),
        ({"checkpoint": "/no/such/run.pt"}, "there is no folder /no/such; make it first"),
    ],
)
def test_a_wrong_argument_is_named_before_work_begins(wrong, message, monkeypatch):
    pruning = pipeline()
    monkeypatch.setattr(pruning.rankings, "_ranked", lambda *arguments: pytest.fail("scored"))
    with pytest.raises(InputError, match=message):
        pruning.run_full_pruning(30, **wrong)


@pytest.mark.parametrize("percentage", [0, -5, float("nan"), "30", True])
def test_a_baseline_of_no_percentage_is_no_unpruned_network(percentage):
    with pytest.raises(InputError, match="the pruning percentage must be a number between 0 and 100"):
        pipeline().prune_by_baseline("magnitude", percentage)


def test_a_checkpoint_of_other_filters_is_refused(tmp_path):
    """Its weights fit: as many filters of every layer were removed."""
    pruning, file = pipeline(), tmp_path / "run.pt"
    first, other = (
        pruning.prune_by_baseline(lambda graph, sign=sign: sign * torch.arange(len(graph.units)), widths="uniform")
        for sign in (1, -1)
    )
    assert [p.shape for p in first.model.parameters()] == [p.shape for p in other.model.parameters()]
    pruning.fine_tune(first, 1, checkpoint=file)
    pruning.fine_tune(first, 1, checkpoint=file, resume=True)
    with pytest.raises(
        InputError, match=r"run.pt is of another fine-tuning: the removed filters \('\w+' there, '\w+' here\)"
    ):
        pruning.fine_tune(other, 1, checkpoint=file, resume=True)
    state = torch.load(file)
    for name in first.identity:
        del state["identity"][name]
    torch.save(state, file)  # as older versions wrote it
    assert pruning.fine_tune(first, 1, checkpoint=file, resume=True).fine_tuning


def test_what_is_no_result_is_not_fine_tuned():
    pruning = pipeline()
    with pytest.raises(InputError, match="result is of type Sequential; give an instance of PruningResult"):
        pruning.fine_tune(pruning.model, 1)
    other = network()
    torch.nn.init.normal_(other[0].weight)
    for result in (
        pipeline(model=other).prune(30),
        pipeline(model=nn.Sequential(nn.Conv2d(3, 3, 1), *network())).prune(30),
    ):
        with pytest.raises(InputError, match="result is of another dense network, or of other weights of it; give one"):
            pruning.fine_tune(result, 1)
    with pytest.raises(InputError, match="samples must be at least 1, not -1"):  # not all filters but one
        pruning.oracle(-1)
