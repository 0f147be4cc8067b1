"""The pipeline in one process: what a round predicts, measures, records, and how it resumes."""

import copy
import dataclasses
import math
from pathlib import Path

import pytest
import torch
from conftest import plain
from torch import nn
from torch.nn import functional as F
from watching import interrupted_at, with_flipped_bit, without_timings

import EnhancedFilterPruner as EnhancedFilterPruner_module
from EnhancedFilterPruner import EnhancedFilterPruner
from EnhancedPruning import EnhancedPruning, PruningSettings
from taylor_pruning.errors import InputError
from taylor_pruning.experiment import choices as choices_module
from taylor_pruning.experiment import rounds as rounds_module
from taylor_pruning.experiment.loaders import make_loader
from taylor_pruning.repair import network as network_module
from taylor_pruning.repair import parts as parts_module
from taylor_pruning.repair.compensation import CompensationReport
from taylor_pruning.scoring.folds import by_fold
from taylor_pruning.training import fine_tuning as FineTuning
from taylor_pruning.training.fine_tuning import Recipe, evaluate


@pytest.fixture
def progressive(plain_network, images, labels, monkeypatch):
    """progressive(steps between the rounds): a pipeline of three rounds, the networks that were trained between the rounds
    and (target, smaller network, kept filters) of every compensation, which here doubles the first layer's weights."""
    loader = make_loader(torch.utils.data.TensorDataset(images, labels), 6, shuffle=True)
    trained, compensations = [], []

    def train_steps(model, *arguments, **keywords):
        trained.append(model)
        FineTuning.train_steps(model, *arguments, **keywords)

    def compensate(target, smaller, batches, kept, **options):
        compensations.append((target, copy.deepcopy(smaller), kept))
        smaller.get_submodule("0").weight.data.mul_(2)
        return CompensationReport()

    def pipeline(steps):
        settings = PruningSettings(rounds=3, fine_tune_between=steps, guard=False)
        pruning = EnhancedPruning(plain_network, loader, loader, settings=settings, progress=False)
        return pruning, trained, compensations

    monkeypatch.setattr(rounds_module, "train_steps", train_steps)
    monkeypatch.setattr(parts_module, "compensate", compensate)
    return pipeline


@pytest.mark.parametrize("steps", [0, 3])
def test_compensation_fits_to_the_dense_network_or_to_the_trained_one_before_the_cut(progressive, steps):
    """And starts at the weights of that network: fits do not pile up over the rounds."""
    pruning, trained, compensations = progressive(steps)
    result = pruning.prune(60, 2)
    after = [r["after_training"] is not None for r in result.rounds]
    assert after == [steps > 0, steps > 0, False]  # after every round but the last
    expected = [pruning.model, *trained] if steps else [pruning.model] * 3
    for (target, smaller, kept), network in zip(compensations, expected, strict=True):
        assert target is network
        for layer in ("0", "4"):
            weight, source = smaller.get_submodule(layer).weight, target.get_submodule(layer).weight
            assert len(kept[layer]) == len(weight) and set(kept[layer]) <= set(range(len(source)))
            if layer == "0":  # its inputs are whole: the kept filters are those of the target
                assert torch.equal(weight, source[kept[layer]])


@pytest.mark.parametrize(("percentage", "order", "message"), [(99, 2, "lower percentage"), (100, 2, "between 0 and 100"),
                                                              (30, 4, "taylor_order")])  # fmt: skip
def test_what_cannot_be_pruned_is_refused_before_it_is_scored(progressive, monkeypatch, percentage, order, message):
    pruning = progressive(0)[0]
    monkeypatch.setattr(pruning.rankings, "_ranked", lambda *arguments: pytest.fail("scored"))
    with pytest.raises(InputError, match=message):
        pruning.prune(percentage, order)


@pytest.mark.parametrize(("steps", "compensated"), [(0, True), (3, True), (0, False)])
def test_what_is_predicted_and_what_is_measured_of_a_round(
    plain_network, images, labels, steps, compensated, monkeypatch
):
    """Behind compensation the divergence from the network of the round, and the change of that from the dense network; else
    the change of the loss with the labels."""
    loader = make_loader(torch.utils.data.TensorDataset(images, labels), 6)
    one_by_one = {"selection": "independent"} if compensated else {}  # the closed form has tests of its own
    settings = PruningSettings(rounds=3, fine_tune_between=steps, compensate=compensated, **one_by_one)
    pruning = EnhancedPruning(plain_network, loader, loader, settings=settings, progress=False)
    pruners, choose = [], EnhancedFilterPruner.select

    def select(pruner, *arguments):
        pruners.append((pruner, choose(pruner, *arguments)))
        return pruners[-1][1]

    monkeypatch.setattr(EnhancedFilterPruner, "select", select)
    result = pruning.prune(60, 2)
    scored = images  # in the order in which they are scored
    if compensated:
        scored = torch.cat([x for _, part in by_fold([(images, labels)]) for x, _ in part])

    def loss(logits, of=images, other=plain_network):
        return F.cross_entropy(logits, other(of).softmax(1) if compensated else labels).item()

    networks = [pruner.model for pruner, _ in pruners]
    assert networks[0] is plain_network and len(networks) == 3
    for (pruner, chosen), record in zip(pruners, result.rounds, strict=True):
        assert record["loss"] == ("divergence" if compensated else "cross-entropy")
        directions = pruner.directions
        shift = directions.coordinates[:, chosen].sum(1)
        assert torch.allclose(directions.logits, pruner.model(scored))
        shifted = directions.logits - torch.einsum("nkr,nr->nk", directions.basis, shift)
        predicted = loss(shifted, scored, pruner.model) - loss(directions.logits, scored, pruner.model)
        assert record["predicted_loss_change"] == pytest.approx(predicted, abs=1e-9)
    ends = [*networks[1:], result.model]
    for start, end, record in zip(networks, ends, result.rounds, strict=True):
        if not steps:  # training changes the network between two rounds
            assert record["measured_loss_change"] == pytest.approx(loss(end(images)) - loss(start(images)), abs=1e-9)
            labelled = [F.cross_entropy(model(images), labels).item() for model in (start, end)]
            assert record["label_loss_change"] == pytest.approx(labelled[1] - labelled[0], abs=1e-9)


@pytest.mark.parametrize("compensated", [True, False])
def test_the_pruned_stage_is_the_plan_without_any_repair(plain_network, images, labels, compensated):
    loader = make_loader(torch.utils.data.TensorDataset(images, labels), 6)
    settings = PruningSettings(rounds=3, compensate=compensated)
    pruning = EnhancedPruning(plain_network, loader, loader, settings=settings, progress=False)
    result = pruning.prune(60, 2)
    stage = result.stages[1]
    loss = F.cross_entropy(pruning.graph.remove(result.plan)(images), labels).item()
    assert stage["stage"] == "pruned" and stage["loss"] == pytest.approx(loss)
    if compensated:
        assert result.stages[2]["loss"] == pytest.approx(F.cross_entropy(result.model(images), labels).item())
        assert result.stages[2]["loss"] != pytest.approx(loss)


@pytest.mark.parametrize(("curvature", "orders"), [("hvp", {"1", "2"}), ("auto", {"1", "2", "3"})])
def test_the_oracle_judges_the_orders_that_the_network_has(images, labels, tmp_path, curvature, orders):
    """PyTorch's third derivative of LayerNorm is wrong; class directions do not need it."""
    torch.manual_seed(0)
    network = plain(nn.SiLU)
    network.insert(6, nn.LayerNorm((6, 4, 4)))
    loader = make_loader(torch.utils.data.TensorDataset(images, labels), 6)
    settings = PruningSettings(rounds=1, curvature=curvature)
    pruning = EnhancedPruning(network.double().eval(), loader, loader, settings=settings, progress=False)
    for resume in (False, True):
        oracle = pruning.prune(30, 2, oracle_samples=3, checkpoint=tmp_path / "rounds.pt", resume=resume).oracle
        assert oracle["predicted"].keys() == oracle["spearman"].keys() == orders and len(oracle["true"]) == 3
        assert oracle["left_out"].keys() == {"3"} - orders
        assert all("third derivative of layer_norm" in reason for reason in oracle["left_out"].values())


@pytest.mark.parametrize("compensated", [True, False])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_results_hold_the_ranking_that_selected_from_one_pass(
    silu_network, images, labels, order, compensated, monkeypatch
):
    loader = make_loader(torch.utils.data.TensorDataset(images, labels), 6)
    settings = PruningSettings(
        rounds=1, compensate=compensated, selection="independent", curvature="hvp", layer_bound=math.inf
    )
    pruning = EnhancedPruning(silu_network, loader, loader, settings=settings, progress=False)
    passes = interrupted_at(monkeypatch, EnhancedFilterPruner, "rank", None)
    probed = interrupted_at(monkeypatch, EnhancedFilterPruner_module, "probe_derivatives", None)
    result = pruning.prune(40, order, use_gradient_flow=True)
    assert len(passes) == 1 and len(probed) == (order > 1 and not compensated)
    path = (None, "directions" if compensated else "hvp", "exact" if compensated else "hvp")[order - 1]
    assert result.curvature["path"] == path
    assert (result.curvature["h_error"] is not None) == (order > 1)
    order_of_units = sorted(range(len(pruning.graph.units)), key=lambda u: score_of(result, pruning.graph.units[u]))
    gone = {u for u, unit in enumerate(pruning.graph.units) if unit.filters[0][1] in result.plan[unit.filters[0][0]]}
    assert gone == set(order_of_units[: len(gone)]), "the lowest scores are those that went"
    assert ("nats²" in result.criterion) == (order == 1) and "weighed by gradient flow" in result.criterion
    assert result.gradient_flow["units"]["score"] == [score_of(result, unit) for unit in pruning.graph.units]


def score_of(result, unit):
    layer, index = unit.filters[0]
    return result.scores[layer][index]


def test_gradient_flow_covers_the_same_layers_before_and_after(plain_network, images, labels):
    network = nn.Sequential(*plain_network[:-1], nn.Linear(24, 12), nn.ReLU(), nn.Linear(12, 4)).double().eval()
    loader = make_loader(torch.utils.data.TensorDataset(images, labels), 6)
    settings = PruningSettings(rounds=1, exclude=("4",), prune_linear=True)
    pruning = EnhancedPruning(network, loader, loader, settings=settings, recipe=Recipe(epochs=1), progress=False)
    flow = pruning.fine_tune(pruning.prune(30, 2, use_gradient_flow=True)).gradient_flow
    measured = {stage: {name for name, values in flow["layers"].items() if values[stage] is not None}
                for stage in ("dense", "pruned", "fine-tuned")}  # fmt: skip
    assert measured["dense"] == measured["pruned"] == measured["fine-tuned"] == {"0", "8"}


def test_results_say_what_compensation_did_to_every_layer(plain_network, images, labels):
    network = nn.Sequential(*plain_network[:6], nn.Conv2d(6, 6, 3, groups=6), *plain_network[6:]).double().eval()
    loader = make_loader(torch.utils.data.TensorDataset(images, labels), 6)
    pruning = EnhancedPruning(network, loader, loader, settings=PruningSettings(rounds=2), progress=False)
    for record in pruning.prune(40, 2).rounds:
        fitted = {layer["name"] for layer in record["compensation"]["layers"]}
        left_alone = record["compensation"]["left_alone"]
        assert fitted | left_alone.keys() == {"0", "4", "6", "9"}
        assert "depthwise" in left_alone["6"]
        assert all(
            {"error_before", "error_after", "ridge"} <= layer.keys() for layer in record["compensation"]["layers"]
        )


def test_the_seed_reaches_every_random_draw(silu_network, images, labels, monkeypatch):
    """Probes, random directions, a fit's images and positions, random scores, dropout."""
    seeds = set()
    loader = make_loader(torch.utils.data.TensorDataset(images, labels), 6)

    def spy(module, name):
        function = getattr(module, name)

        def call(*arguments, **keywords):
            seeds.add((name, keywords["seed"] if "seed" in keywords else arguments[-1]))
            return function(*arguments, **keywords)

        monkeypatch.setattr(module, name, call)

    spy(parts_module, "compensate")
    spy(choices_module, "baseline_scores")
    spy(EnhancedFilterPruner_module, "collect_behind_repair")
    spy(EnhancedFilterPruner_module, "probe_derivatives")
    for compensated in (True, False):
        settings = PruningSettings(rounds=1, compensate=compensated, curvature="hvp", seed=7)
        pruning = EnhancedPruning(silu_network, loader, loader, settings=settings, progress=False)
        pruning.prune(30, 2)
        pruning.prune_by_baseline("random", 30)
    assert seeds == {(n, 7) for n in ("compensate", "baseline_scores", "collect_behind_repair", "probe_derivatives")}


def test_more_rounds_than_filters_are_none_without_a_cut(progressive):
    pruning = progressive(0)[0]
    pruning.settings = dataclasses.replace(pruning.settings, rounds=10**6)
    assert len(pruning.prune(40, 2).rounds) <= len(pruning.graph.units)


def test_a_baseline_without_filters_to_remove_is_refused_and_not_done_in_no_rounds():
    loader = [(torch.randn(8, 3, 4, 4), torch.arange(8) % 4)] * 2
    pruning = EnhancedPruning(nn.Sequential(nn.Flatten(), nn.Linear(48, 4)), loader, loader, progress=False)
    with pytest.raises(InputError, match="no filter of this network may be removed"):
        pruning.prune_by_baseline("l1", 30, compensate=True)


def test_what_lies_between_rounds_is_trained_and_the_last_round_is_not(progressive):
    pruning, trained, _ = progressive(3)
    result = pruning.prune(60, 2)
    assert len(trained) == 2 and [r["after_training"] is not None for r in result.rounds] == [True, True, False]
    trained.clear()
    baseline = pruning.prune_by_baseline("magnitude", 60)  # one shot: there is nothing between rounds
    assert not trained and "train" not in baseline.seconds and baseline.criterion == "magnitude"


@pytest.mark.parametrize("steps", [0, 3])
def test_no_finished_round_of_pruning_is_repeated(plain_network, images, labels, steps, tmp_path, monkeypatch):
    """Nor, with training between the rounds, is another order of batches or another mask of dropout drawn."""
    network = nn.Sequential(*plain_network[:-1], nn.Dropout(0.5), plain_network[-1]).double().eval()
    data = torch.utils.data.TensorDataset(images, labels)
    train, val, everything = make_loader(data, 6, shuffle=True), make_loader(data, 6), [(images, labels)]
    settings, checkpoint = PruningSettings(rounds=3, fine_tune_between=steps), tmp_path / "run.pt"

    def run(percentage=60, order=2, network=network, settings=settings, calibration=everything, **keywords):
        pruning = EnhancedPruning(network, train, val, settings=settings, calibration=calibration, progress=False)
        return pruning.run_full_pruning(percentage, order, fine_tune_epochs=0, checkpoint=checkpoint, **keywords)

    whole = run()
    other = copy.deepcopy(network)
    other[0].weight.data[0, 0, 0, 0] += 1
    refused = {
        "pruning_percentage was 60, is 30": {"percentage": 30},
        "taylor_order was 2, is 1": {"order": 1},
        "the dense network was": {"network": other},
        "seed was 0, is 1": {"settings": dataclasses.replace(settings, seed=1)},
        "rounds was 3, is 4": {"settings": dataclasses.replace(settings, rounds=4)},
        "budget was filters, is macs": {"settings": dataclasses.replace(settings, budget="macs")},
        "the calibration images was": {"calibration": [(images[:6], labels[:6])]},
    }
    assert run(settings=dataclasses.replace(settings, memory_limit="1GB"), resume=True).rounds == whole.rounds
    written = Path(f"{checkpoint}.rounds").read_bytes()
    for message, change in refused.items():
        with pytest.raises(InputError, match=f"another pruning: .*{message}"):
            run(**change, resume=True)
    assert Path(f"{checkpoint}.rounds").read_bytes() == written
    for content in (b"something else", with_flipped_bit(Path(f"{checkpoint}.rounds"))):
        Path(f"{checkpoint}.rounds").write_bytes(content)
        with pytest.raises(InputError, match="no checkpoint of pruning rounds, or is damaged"):
            run(resume=True)
    rounds = interrupted_at(monkeypatch, rounds_module.Rounds, "next", 3)
    with pytest.raises(KeyboardInterrupt):
        run()
    broken = run(resume=True)
    assert [number for _, _, number, *_ in rounds] == [1, 2, 3, 3]
    assert without_timings(whole.as_dict()) == without_timings(broken.as_dict())
    ours, theirs = broken.model.state_dict(), whole.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_another_forward_or_other_validation_images_do_not_continue_a_run(plain_network, images, labels, tmp_path):
    """Weights of the same shapes fit both networks, and results would be of two."""
    everything = [(images, labels)]

    def run(network=plain_network, val=everything, **keywords):
        pruning = EnhancedPruning(network, everything, val, settings=PruningSettings(rounds=1), calibration=everything,
                                  progress=False)  # fmt: skip
        return pruning.run_full_pruning(30, fine_tune_epochs=1, checkpoint=tmp_path / "run.pt", **keywords)

    run()
    run(resume=True)
    smooth = nn.Sequential(*(nn.ELU() if isinstance(module, nn.ReLU) else module for module in plain_network))
    with pytest.raises(InputError, match="on the calibration images, .* its forward or the data have changed"):
        run(smooth, resume=True)
    with pytest.raises(InputError, match="written with 12 validation images, and there are 6 now"):
        run(val=[(images[:6], labels[:6])], resume=True)
    with pytest.raises(InputError, match="on the validation images, .* its forward or the data have changed"):
        run(val=[(10 * images, labels)], resume=True)


def test_checkpoints_with_dots_in_their_names_keep_rounds_of_their_own(plain_network, images, labels, tmp_path):
    everything, settings = [(images, labels)], PruningSettings(rounds=1)
    pruning = EnhancedPruning(plain_network, everything, everything, settings=settings, progress=False)
    runs = {"share_0.3": 30, "share_0.5": 50, "run.rounds": 60}
    whole = {name: pruning.run_full_pruning(share, fine_tune_epochs=1, checkpoint=tmp_path / name)
             for name, share in runs.items()}  # fmt: skip
    for name, share in runs.items():
        again = pruning.run_full_pruning(share, fine_tune_epochs=1, checkpoint=tmp_path / name, resume=True)
        assert without_timings(again.as_dict()) == without_timings(whole[name].as_dict())


def test_dropout_in_fine_tuning_follows_the_seed(plain_network, images, labels):
    network = nn.Sequential(*plain_network[:-1], nn.Dropout(0.5), plain_network[-1]).double().eval()
    loader = make_loader(torch.utils.data.TensorDataset(images, labels), 6)
    losses = []
    for seed in (0, 0, 1):
        settings = PruningSettings(rounds=1, compensate=False, seed=seed)
        recipe = Recipe(epochs=1, lr=0.1)
        pruning = EnhancedPruning(network, loader, loader, settings=settings, recipe=recipe, progress=False)
        losses.append(pruning.run_full_pruning(30, 2).fine_tuning[0]["train_loss"])
    assert losses[0] == losses[1] != losses[2]


def test_a_classifier_is_fine_tuned_towards_the_dense_network_unless_told_otherwise(plain_network, batches):
    def first_loss(weight):
        recipe, settings = Recipe(epochs=1, lr=1e-6, distillation_weight=weight), PruningSettings(rounds=1)
        pruning = EnhancedPruning(plain_network, batches, batches, settings=settings, recipe=recipe, progress=False)
        return pruning.run_full_pruning(40, 2).fine_tuning[0]["train_loss"]

    assert first_loss(None) == first_loss(0.5) != first_loss(0.0)


class CountedLoader:
    """Counts the passes over a list of batches that reach the end."""

    def __init__(self, batches):
        self.batches, self.passes = batches, 0

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        yield from self.batches
        self.passes += 1

    def spread(self, samples):
        return self.batches[:1]


@pytest.mark.parametrize("reestimate", [False, True])
def test_nothing_is_evaluated_twice(plain_network, batches, reestimate):
    """Dense, pruned, compensated, three epochs; one more where the statistics that fine-tuning begins with are new."""
    val = CountedLoader(batches)
    settings = PruningSettings(rounds=2, reestimate_batchnorm=reestimate)
    pruning = EnhancedPruning(plain_network, batches, val, settings=settings, progress=False)
    result = pruning.run_full_pruning(40, 2, fine_tune_epochs=3)
    assert val.passes == 6 + reestimate
    last = result.stages[-1]
    accuracy = evaluate(result.model, batches, progress=False)
    assert {key: last[key] for key in vars(accuracy)} == vars(accuracy)


def test_a_baseline_is_repaired_in_rounds_and_meets_the_budget_with_its_own_or_uniform_widths(
    relu_network, images, labels
):
    loader = make_loader(torch.utils.data.TensorDataset(images, labels), 6)
    settings = PruningSettings(rounds=2, budget="macs")
    pruning = EnhancedPruning(relu_network, loader, loader, settings=settings, progress=False)
    found = {}
    for widths in ("own", "uniform"):
        for compensate in (False, True):
            result = pruning.prune_by_baseline("lamp", 40, widths=widths, compensate=compensate)
            assert len(result.rounds) == (2 if compensate else 1) and result.criterion == "lamp"
            assert ("compensated" in [stage["stage"] for stage in result.stages]) == compensate
            assert result.stages[-1]["macs"] / result.stages[0]["macs"] == pytest.approx(0.6, abs=0.12)
            found[widths, compensate] = result
    assert {key: result.rounds[0]["uniform_widths"] for key, result in found.items()} == {
        key: key[0] == "uniform" for key in found
    }
    assert found["own", False].plan != found["uniform", False].plan
    assert found["own", True].stages[-1]["loss"] != found["own", False].stages[-1]["loss"]
    with pytest.raises(InputError, match="widths"):
        pruning.prune_by_baseline("lamp", 40, widths="free")


def test_a_criterion_of_ones_own_scores_every_network_on_the_way(plain_network, images, labels):
    loader, sizes = make_loader(torch.utils.data.TensorDataset(images, labels), 6), []

    def last_first(graph):
        sizes.append(len(graph.units))
        return -torch.arange(len(graph.units)).double()

    pruning = EnhancedPruning(plain_network, loader, loader, settings=PruningSettings(rounds=2), progress=False)
    result = pruning.prune_by_baseline(last_first, 30, compensate=True)
    assert sizes == [11, 9] and result.plan == {"0": [], "4": [3, 4, 5]} and result.criterion == "last_first"


@pytest.mark.usefixtures("costs_count")
def test_the_repair_across_layers_follows_the_last_round(plain_network, images, labels, tmp_path, monkeypatch):
    """It lowers the divergence that compensation left, is a stage of its own, and is not repeated by a resumed run."""
    plain_network[-1].weight.data.mul_(20)  # answers that differ between images
    train = make_loader(torch.utils.data.TensorDataset(images, labels), 6)
    more = torch.randn(240, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    repairs, found = interrupted_at(monkeypatch, rounds_module, "repair_network", 2), {}

    def run(repair, **keywords):
        settings = PruningSettings(rounds=2, repair=repair)
        pruning = EnhancedPruning(plain_network, train, train, settings=settings, compensation=[(more, labels.repeat(20))],
                                  progress=False)  # fmt: skip
        return pruning.prune(30, 2, checkpoint=tmp_path / repair, **keywords)

    found = {repair: run(repair) for repair in ("layer", "network")}
    assert [s["stage"] for s in found["network"].stages] == ["dense", "pruned", "compensated", "repaired"]
    assert without_timings(found["network"].stages[:3]) == without_timings(found["layer"].stages)
    assert without_timings(found["network"].rounds) == without_timings(found["layer"].rounds)
    assert (
        found["layer"].repair is None and found["network"].repair["loss_after"] < found["network"].repair["loss_before"]
    )
    again = run("network", resume=True)
    assert len(repairs) == 1 and without_timings(again.as_dict()) == without_timings(found["network"].as_dict())
    with pytest.raises(KeyboardInterrupt):
        run("network")
    broken = run("network", resume=True)
    assert len(repairs) == 3 and without_timings(broken.as_dict()) == without_timings(found["network"].as_dict())


def test_a_repair_that_gains_nothing_leaves_the_compensated_network(plain_network, images, labels, monkeypatch):
    loader = make_loader(torch.utils.data.TensorDataset(images, labels), 6)
    for name in ("RATE_A_PASS", "LARGEST_RATE"):
        monkeypatch.setattr(network_module, name, 10.0)
    settings = PruningSettings(rounds=1, repair="network")
    pruning = EnhancedPruning(plain_network, loader, loader, settings=settings, progress=False)
    result = pruning.prune(30, 2)
    assert result.repair["steps"] == 0 and result.stages[-1]["stage"] == "repaired"
    assert result.stages[-1]["loss"] == result.stages[-2]["loss"]


def test_repair_and_compensate_say_one_thing():
    assert PruningSettings().compensate and not PruningSettings(repair="none").compensate
    assert PruningSettings(repair="network").compensate and not PruningSettings(compensate=False).compensate
    with pytest.raises(InputError, match="fine_tune_between"):
        PruningSettings(repair="network", fine_tune_between=3)
    for repair in ("layer", "network"):
        with pytest.raises(InputError, match="contradict"):
            PruningSettings(repair=repair, compensate=False)


def zeroed(*layers, above):
    """A stand-in for compensation that destroys the network as soon as more than `above` filters are gone."""

    def compensate(target, smaller, batches, kept, **options):
        gone = sum(len(target.get_submodule(name).weight) - len(filters) for name, filters in kept.items())
        with torch.no_grad():
            rare = torch.cat([target(x).argmax(1) for x, _ in batches]).bincount(minlength=4).argmin()
            for name in layers if gone > above else ():
                smaller.get_submodule(name).weight.zero_()
                smaller.get_submodule(name).bias.copy_(60.0 * F.one_hot(rare, 4))  # the same answer for all images
        return CompensationReport()

    return compensate


@pytest.fixture
def sure_network(plain_network, images):
    """Answers that depend on the image: large logits, each class the top of some images."""
    with torch.no_grad():
        last = plain_network[8]
        logits = plain_network(images)
        last.bias -= logits.mean(0)
        last.weight *= 30 / logits.std()
        last.bias *= 30 / logits.std()
        assert plain_network(images).argmax(1).unique().numel() >= 3
    return plain_network


@pytest.mark.parametrize("above", [0, 3])
def test_a_round_that_destroys_the_network_is_tried_in_smaller_steps_and_then_not_taken(
    sure_network, images, labels, above, monkeypatch, tmp_path
):
    monkeypatch.setattr(parts_module, "compensate", zeroed("8", above=above))
    loader = make_loader(torch.utils.data.TensorDataset(images, labels), 6)
    pruning = EnhancedPruning(sure_network, loader, loader, settings=PruningSettings(rounds=2), progress=False)
    result = pruning.prune(60, 2, checkpoint=tmp_path / "rounds")
    removed = sum(map(len, result.plan.values()))
    stopped = result.as_dict()["stopped"]
    assert removed <= above and stopped["asked"] == 60 and stopped["reached"] < stopped["tried"] < 60
    assert stopped["held_out"]["divergence"] > stopped["held_out"]["constant_divergence"]
    assert stopped["reached"] == (result.rounds[-1]["percentage"] if result.rounds else 0)
    assert result.stages[-1]["top1"] == result.stages[0]["top1"] or removed  # what was reached is what was measured
    again = pruning.prune(60, 2, checkpoint=tmp_path / "rounds", resume=True)
    assert without_timings(again.as_dict()) == without_timings(result.as_dict())
    unguarded = dataclasses.replace(pruning.settings, guard=False)
    pruning = EnhancedPruning(sure_network, loader, loader, settings=unguarded, progress=False)
    assert pruning.prune(60, 2).stopped is None


def test_smaller_steps_are_taken_where_they_help(sure_network, images, labels, monkeypatch):
    """Six filters at once destroy the network, three and three do not."""
    monkeypatch.setattr(parts_module, "compensate", lambda *arguments, **keywords: CompensationReport())
    monkeypatch.setattr(rounds_module, "is_destroyed", lambda state: state.rounds[-1]["filters_removed"] > 4)
    loader = make_loader(torch.utils.data.TensorDataset(images, labels), 6)
    pruning = EnhancedPruning(sure_network, loader, loader, settings=PruningSettings(rounds=1), progress=False)
    result = pruning.prune(60, 2)
    assert result.stopped is None and [r["percentage"] for r in result.rounds] == [30, 60]
    assert sum(map(len, result.plan.values())) == 7


def test_rounds_are_judged_on_images_that_neither_score_nor_repair(plain_network, images, labels):
    loader = make_loader(torch.utils.data.TensorDataset(images, labels), 5)
    pruning = EnhancedPruning(plain_network, loader, loader, calibration_samples=7, settings=PruningSettings(rounds=1),
                              progress=False)  # fmt: skip
    scored = torch.cat([x for x, _ in pruning.images.calibration])
    judged = torch.cat([x for x, _ in pruning.measuring.held_out])
    assert torch.equal(scored, images[:7]) and torch.equal(judged, images[7:])
    found = pruning.prune(30, 1).rounds[0]["held_out"]
    assert found["images"] == 5 and found["divergence"] > 0


def test_fidelity_is_the_divergence_beside_that_of_a_constant_answer(plain_network, images, labels):
    from taylor_pruning.training.measuring import Measuring

    other = copy.deepcopy(plain_network)
    other[8].weight.data *= 0.5
    batches = [(images, labels)]
    found = Measuring(plain_network, batches, batches).fidelity(other)
    with torch.no_grad():
        p, q = (network(images).softmax(1) for network in (plain_network, other))
    assert found["divergence"] == pytest.approx((p * (p / q).log()).sum(1).mean().item())
    assert found["constant_divergence"] == pytest.approx((p * (p / p.mean(0)).log()).sum(1).mean().item())
    assert found["constant_agreement"] == pytest.approx(100 * p.argmax(1).bincount().max().item() / 12)
    assert found["agreement"] == pytest.approx(100 * (p.argmax(1) == q.argmax(1)).double().mean().item())


@pytest.mark.usefixtures("costs_count")
def test_the_trade_of_a_round_leads_from_the_width_before_to_the_width_after_and_sums_to_the_prediction(
    relu_network, images, labels
):
    loader = make_loader(torch.utils.data.TensorDataset(images, labels), 6)
    settings = PruningSettings(rounds=2, budget="macs", guard=False)
    result = EnhancedPruning(relu_network, loader, loader, settings=settings, progress=False).prune(50, 2)
    widths = {name: layer["filters"] for name, layer in result.layers.items()}
    for record in result.rounds:
        for name, found in record["trade"].items():
            assert found["filters"][0] == widths[name] and found["cost"][0] == 0
            assert found["filters"] == sorted(found["filters"], reverse=True)
            widths[name] = found["filters"][-1]
        predicted = sum(found["cost"][-1] for found in record["trade"].values())
        assert predicted == pytest.approx(record["predicted_loss_change"])
    first = {graph_layer: layer["kept"] for graph_layer, layer in result.layers.items() if graph_layer in widths}
    assert all(widths[name] == kept for name, kept in first.items() if name in result.rounds[0]["trade"])
    assert result.rounds[0]["trade"]


def test_the_trade_keeps_few_points_and_the_ends():
    from types import SimpleNamespace

    units = [SimpleNamespace(filters=(("a", i), ("b", i))) for i in range(300)]
    graph = SimpleNamespace(units=units, layers={"a": SimpleNamespace(filters=400)})
    found = choices_module.trade_of(graph, [(u, 0.5) for u in range(300)])
    assert list(found) == ["a"] and len(found["a"]["cost"]) == choices_module.TRADE_POINTS
    assert (found["a"]["filters"][0], found["a"]["filters"][-1]) == (400, 100)
    assert (found["a"]["cost"][0], found["a"]["cost"][-1]) == (0, 150)


@pytest.mark.filterwarnings("ignore:.*weight_norm")
def test_a_result_that_was_run_with_gradients_is_fine_tuned(plain_network, images, labels):
    """The weight that weight norm computed in that run has a history, which copy.deepcopy refuses."""
    nn.utils.weight_norm(plain_network[4])
    loader = make_loader(torch.utils.data.TensorDataset(images, labels), 6)
    pruning = EnhancedPruning(plain_network, loader, loader, settings=PruningSettings(rounds=1), progress=False)
    result = pruning.prune(30, 2)
    result.model(images).sum().backward()
    assert pruning.fine_tune(result, 1).stages[-1]["stage"] == "fine-tuned"
