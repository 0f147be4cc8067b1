"""A budget of time: what is timed, what is predicted of a cut network, and the file of measured times."""

import dataclasses
import itertools
import json

import pytest
import torch
from conftest import Residual, plain, randomise
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.flop_counter import FlopCounterMode

from EnhancedFilterPruner import EnhancedFilterPruner
from EnhancedPruning import EnhancedPruning, PruningSettings
from taylor_pruning.errors import InputError
from taylor_pruning.selection import latency as latency_module
from taylor_pruning.selection import layer_calls as layer_calls_module
from taylor_pruning.selection.constraints import Constraints, Selection
from taylor_pruning.selection.costs import LatencyCosts
from taylor_pruning.selection.greedy import select_by_score
from taylor_pruning.selection.latency import measure_latency, nonnegative_fit
from taylor_pruning.selection.latency_table import LatencyTable, LayerTimes, NetworkLatency
from taylor_pruning.selection.layer_calls import layer_calls
from taylor_pruning.surgery.graph import ChannelGraph
from taylor_pruning.surgery.parts import PartsGraph


def inverted(width=16):
    """A depthwise conv, a grouped one and a transposed one among plain ones."""
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU6(),
        nn.Conv2d(width, width, 3, padding=1, groups=width), nn.ReLU6(),
        nn.Conv2d(width, width, 1), nn.ReLU(),
        nn.Conv2d(width, width, 3, 2, 1, groups=4, bias=False), nn.ReLU(),
        nn.ConvTranspose2d(width, width, 2, 2), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * width, 5),
    )  # fmt: skip


NETWORKS = {"plain": plain, "residual": Residual, "inverted": inverted}


@pytest.fixture(params=NETWORKS)
def graph(request, images):
    torch.manual_seed(0)
    return ChannelGraph(randomise(NETWORKS[request.param]()), images)


def uniform_networks(graph):
    """Those at which the whole network is timed."""
    for share in latency_module.NETWORK_SHARES:
        units = latency_module.uniform_units(graph, 1 - share)
        yield graph.remove([graph.units[u] for u in units], verify=False) if units else graph.model


def time_with(monkeypatch, timer):
    """Layers and networks are timed by `timer`."""
    for module in (latency_module, layer_calls_module):
        monkeypatch.setattr(module, "least_milliseconds", timer)


@pytest.fixture
def counted(monkeypatch):
    """A device on which 1,000 multiply-accumulates take a millisecond, and nothing else takes time."""

    def milliseconds(call, device):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            call()
        return counter.get_total_flops() / 2000

    time_with(monkeypatch, milliseconds)


def test_a_layer_is_timed_on_the_shapes_that_it_has_in_the_cut_network(graph, monkeypatch):
    """What is called for a pair of widths gives an output of that width, on inputs of the graph's size."""
    outputs = []
    time_with(monkeypatch, lambda call, device: outputs.append(call()) or 1.0)
    like = next(graph.model.parameters()).detach()
    names = []
    for call in layer_calls(graph):
        inputs, widths = call.grid(1)
        for into, out in itertools.product(inputs, widths):
            call.milliseconds(into, out, 3, like)
            shape = [*call.node.meta["shape"]]
            shape[-1 if "linear" in call.key(3) else 1] = out
            shape[0] = 3
            assert outputs[-1].shape == tuple(shape) and outputs[-1].dtype == like.dtype
        names.append(call.weight)
    conv_like = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)
    wanted = [f"{name}.weight" for name, m in graph.model.named_modules() if isinstance(m, conv_like)]
    assert sorted(names) == sorted(wanted)


def test_predicted_times_are_those_of_the_cut_network(graph, counted, images):
    """Where a layer's time is a product of its widths, interpolation is exact at any widths."""
    latency = measure_latency(graph, images[:1])
    costs = LatencyCosts(graph, latency)
    assert costs.total() == pytest.approx(latency_module.network_milliseconds(graph.model, images[:1], 1), rel=1e-6)
    units = [u.index for u in graph.units if u.index % 3 == 1]
    for unit in units:
        costs.remove(unit)
    smaller = graph.remove([graph.units[u] for u in units])
    measured = latency_module.network_milliseconds(smaller, images[:1], 1)
    assert costs.total() == pytest.approx(measured, rel=1e-3)
    assert LatencyCosts(ChannelGraph(smaller, images), latency).total() == pytest.approx(measured, rel=1e-3)


def test_what_a_unit_saves_is_the_slope(graph, counted, images):
    latency = measure_latency(graph, images[:1])
    for unit in (0, len(graph.units) - 1):
        costs = LatencyCosts(graph, latency)
        saved, before = costs.savings()[unit].item(), costs.total()
        costs.remove(unit)
        assert before - costs.total() == pytest.approx(saved, rel=0.35)  # a unit shrinks both sides of some layers


def test_elements_of_outputs_count_in_what_a_unit_saves(graph, counted, images):
    latency = dataclasses.replace(measure_latency(graph, images[:1]), scale=0.0, each=0.5)
    for unit in (0, len(graph.units) - 1):
        costs = LatencyCosts(graph, latency)
        saved, before = costs.savings()[unit].item(), costs.total()
        costs.remove(unit)
        assert before - costs.total() == pytest.approx(saved) and saved > 0


def test_steps_and_noise_in_measured_times_are_smoothed(images):
    """Times that are flat up to a multiple, and one outlier: every channel is worth something, none is worth less than none."""
    torch.manual_seed(0)
    graph = ChannelGraph(nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 4)),
                         images.float())  # fmt: skip
    layer = LayerTimes("0.weight", (3,), (4, 8, 16, 24, 32), ((1.0,), (1.0,), (0.9,), (2.0,), (2.0,)), 36)
    costs = LatencyCosts(graph, NetworkLatency((layer,), 0.0, 1.0, 0.0, 1, "here"))
    for unit in range(28):
        assert (costs.savings() >= 0).all()
        costs.remove(unit)
    assert costs.total() == 1.0
    costs = LatencyCosts(graph, NetworkLatency((layer,), 0.0, 1.0, 0.0, 1, "here"))
    for unit in range(8):
        costs.remove(unit)
    assert costs.savings()[0].item() == pytest.approx(1 / 8)  # from 24 to 16


@pytest.mark.parametrize("true", [(0.3, 0.8, 0.02), (0.0, 1.1, 0.0), (2.0, 0.0, 0.1)])
def test_coefficients_are_found_and_never_negative(true):
    rows = [[1.0, 8.0, 40.0], [1.0, 5.0, 30.0], [1.0, 2.2, 20.0], [1.0, 0.7, 10.0]]
    values = [sum(a * b for a, b in zip(row, true, strict=True)) for row in rows]
    assert nonnegative_fit(rows, values) == pytest.approx(true, abs=1e-6)
    noisy = [v * f for v, f in zip(values, (1.1, 0.8, 1.2, 0.9), strict=True)]
    assert min(nonnegative_fit(rows, noisy)) >= 0


@pytest.mark.parametrize("target", ["50%", "absolute"])
def test_the_target_is_met_and_predicted_and_measured_agree(target, counted, images, labels, tmp_path):
    torch.manual_seed(0)
    model, batches = randomise(inverted()), [(images, labels)]
    table = tmp_path / "times.json"
    dense = latency_module.network_milliseconds(model, images[:1], 2)
    text = "50%" if target == "50%" else f"{0.5 * dense:.6f}ms"
    settings = PruningSettings(target_latency=text, latency_table=str(table), latency_batch=2, rounds=2)
    assert settings.budget == "latency"
    result = EnhancedPruning(model, batches, batches, settings=settings, progress=False).prune(taylor_order=1)
    found = result.as_dict()["latency"]
    assert found["dense_ms"] == pytest.approx(dense) and found["batch_size"] == 2
    assert found["pruned_ms"] == pytest.approx(0.5 * dense, rel=0.05)
    assert found["predicted_ms"] == pytest.approx(found["pruned_ms"], rel=0.02)
    assert found["asked_ms"] == pytest.approx(0.5 * dense)
    assert "batch 2" in table.read_text()


@pytest.mark.parametrize("rounds", [1, 3])
@pytest.mark.parametrize("keeps", [True, False])
def test_where_layers_times_do_not_add_up_the_network_is_timed_and_chosen_again(
    rounds, keeps, counted, images, labels, tmp_path, monkeypatch
):
    """A network that is not uniform takes longer than its layers: the choice aims lower, and the asked time is met."""
    torch.manual_seed(5)  # its first choices are none of the uniform networks
    model, batches = randomise(inverted()), [(images, labels)]
    uniform = {tuple(p.shape for p in m.parameters()) for m in uniform_networks(ChannelGraph(model, images))}
    timer = latency_module.network_milliseconds

    def slower(network, example, batch_size):
        is_uniform = tuple(p.shape for p in network.parameters()) in uniform
        return timer(network, example, batch_size) * (1 if is_uniform else 1.25)

    monkeypatch.setattr(latency_module, "network_milliseconds", slower)
    monkeypatch.setattr(latency_module, "cache_folder", lambda: None)
    table = str(tmp_path / "times.json") if keeps else None
    settings = PruningSettings(target_latency="50%", latency_table=table, rounds=rounds)
    pruning = EnhancedPruning(model, batches, batches, settings=settings, progress=False)
    results = [pruning.prune(taylor_order=1).as_dict() for _ in range(2)]
    found, rounds = results[0]["latency"], results[0]["rounds"]
    assert found["pruned_ms"] == pytest.approx(found["asked_ms"], rel=0.05)
    assert found["predicted_ms"] == pytest.approx(found["pruned_ms"], rel=0.05)
    assert all(r["times"]["measured"] == pytest.approx(r["times"]["asked"], rel=0.1) for r in rounds)
    assert results[0]["layers"] == results[1]["layers"]


@pytest.fixture
def slower_pruning(counted, images, labels, tmp_path, monkeypatch):
    """A pruning in three rounds in which every choice is made anew: no cut network takes the time of its layers."""
    torch.manual_seed(0)
    model, batches = randomise(inverted()), [(images, labels)]
    settings = PruningSettings(target_latency="50%", latency_table=str(tmp_path / "times.json"), rounds=3)
    pruning = EnhancedPruning(model, batches, batches, settings=settings, progress=False)
    timer = latency_module.network_milliseconds
    monkeypatch.setattr(latency_module, "network_milliseconds", lambda network, example, batch_size: timer(
        network, example, batch_size) * (1 if network is model else 1.25))  # fmt: skip
    return pruning


def watched(monkeypatch, name, before=lambda calls: None):
    """[network of every call of a method of the pruner]; `before` is called with that list at every call."""
    function, calls = getattr(EnhancedFilterPruner, name), []

    def call(pruner, *arguments, **keywords):
        calls.append(pruner.model)
        before(calls)
        return function(pruner, *arguments, **keywords)

    monkeypatch.setattr(EnhancedFilterPruner, name, call)
    return calls


def test_a_network_that_is_chosen_from_again_is_not_scored_again(slower_pruning, monkeypatch):
    scored, chosen = (watched(monkeypatch, name) for name in ("rank", "get_pruning_plan"))
    result = slower_pruning.prune(taylor_order=2)
    assert len(scored) == len(result.rounds) == 3 and len({*chosen}) == 3 < len(chosen)
    assert not slower_pruning.rankings._of_last  # it would hold memory while layers are repaired


def test_an_error_in_a_later_choice_is_not_taken_for_a_time_out_of_reach(slower_pruning, monkeypatch):
    def fail_at_the_second(calls):
        if len(calls) == 2:
            raise InputError("the logits are NaN")

    watched(monkeypatch, "get_pruning_plan", fail_at_the_second)
    with pytest.raises(InputError, match="logits are NaN"):
        slower_pruning.prune(taylor_order=2)


@pytest.mark.parametrize("rounds", [1, 2])
def test_a_time_out_of_reach_is_approached_as_far_as_layers_can_shrink(
    rounds, counted, images, labels, monkeypatch, tmp_path
):
    """What the layers' times call possible is not: the run does what can be done, and says what was asked and reached."""
    torch.manual_seed(0)
    model, batches = randomise(inverted()), [(images, labels)]
    timer = latency_module.network_milliseconds

    def hardly_faster(network, example, batch_size):
        return 0.8 * timer(model, example, batch_size) + 0.2 * timer(network, example, batch_size)

    settings = PruningSettings(target_latency="50%", latency_table=str(tmp_path / "times.json"), rounds=rounds)
    pruning = EnhancedPruning(model, batches, batches, settings=settings, progress=False)
    monkeypatch.setattr(latency_module, "network_milliseconds", hardly_faster)
    found = pruning.prune(taylor_order=1).as_dict()["latency"]
    assert found["asked_ms"] == pytest.approx(0.5 * found["dense_ms"])
    assert 0.8 * found["dense_ms"] < found["pruned_ms"] < 0.9 * found["dense_ms"]


def test_the_real_device_can_be_timed(images):
    torch.manual_seed(0)
    graph = ChannelGraph(randomise(plain()), images)
    latency = measure_latency(graph, images[:1])
    assert latency.fixed >= 0 and latency.scale >= 0 and latency.each >= 0 and "thread" in latency.device
    assert LatencyCosts(graph, latency).total() > 0


def test_an_interrupted_measurement_continues(counted, images, tmp_path, monkeypatch):
    graph, path, calls = ChannelGraph(randomise(plain()), images), tmp_path / "deep" / "times.json", []
    timer = latency_module.least_milliseconds

    def interrupted(call, device):
        calls.append(1)
        if len(calls) == 50:
            raise KeyboardInterrupt
        return timer(call, device)

    time_with(monkeypatch, interrupted)
    with pytest.raises(KeyboardInterrupt):
        measure_latency(graph, images[:1], table=path)
    stored = sum(
        len(widths) for d in json.loads(path.read_text()).values() for v in d.values() for widths in v.values()
    )
    assert 0 < stored < 20
    measure_latency(graph, images[:1], table=path)
    whole, again = len(calls), json.loads(path.read_text())
    measure_latency(graph, images[:1], table=path)
    assert len(calls) == whole and json.loads(path.read_text()) == again


def test_with_one_table_the_times_of_a_network_are_the_same_again(images, tmp_path):
    """Times that are measured once more differ: a run that goes on, or is repeated, would prune to another target."""
    torch.manual_seed(0)
    network = randomise(plain())
    first, again = (
        measure_latency(ChannelGraph(network, images), images[:1], table=tmp_path / "times.json") for _ in range(2)
    )
    assert first == again
    graph = ChannelGraph(network, images)
    networks = network, graph.remove(graph.units[:1])
    assert len({latency_module.network_key(graph, model, batch) for model in networks for batch in (1, 2)}) == 4


def test_without_a_cache_the_times_are_kept_in_the_runs_folder(counted, images, tmp_path, monkeypatch):
    monkeypatch.setattr(latency_module, "cache_folder", lambda: None)
    graph, settings = ChannelGraph(randomise(plain()), images), PruningSettings(budget="latency")
    settings = latency_module.with_times(settings, graph, images[:1], folder=tmp_path)
    assert settings.times is not None and (tmp_path / "latency.json").exists()


def test_the_table_keeps_what_others_wrote_and_refuses_other_files(tmp_path):
    path = tmp_path / "times.json"
    one, other = LatencyTable(path, "a", "1"), LatencyTable(path, "b", "1")
    one.update([(("conv", 3, 4), 1.5)])
    other.update([(("conv", 3, 4), 2.5)])
    one.update([(("conv", 3, 8), 2.0)])
    assert json.loads(path.read_text()) == {
        "a": {"1": {"conv": {"3x4": 1.5, "3x8": 2.0}}},
        "b": {"1": {"conv": {"3x4": 2.5}}},
    }
    times = ('"fast"', "0.0", "-1.0", "Infinity", "1e300", "NaN")
    for text in ("{", "[1]", *(f'{{"a": {{"1": {{"conv": {{"3x4": {time}}}}}}}}}' for time in times)):
        path.write_text(text)
        with pytest.raises(InputError, match="not a latency table"):
            LatencyTable(path, "a", "1")


def test_a_budget_of_time_without_times_is_refused(images):
    graph = ChannelGraph(randomise(plain()), images)
    with pytest.raises(InputError, match="measured times"):
        Selection(graph, 30, Constraints("latency"))


@pytest.mark.parametrize(
    ("given", "named"), [({"budget": "latency"}, "budget latency"), ({"target_latency": "50%"}, "--target-latency")]
)
def test_time_as_the_budget_of_parts_of_a_network_is_refused_by_name(given, named):
    with pytest.raises(InputError, match=f"{named} and prune_modules exclude each other"):
        PruningSettings(prune_modules=["backbone"], **given)


def test_parts_of_a_network_are_not_timed(images):
    model = randomise(plain())
    parts = PartsGraph(nn.Sequential(model), ["0"], lambda network: network(images), len(images))
    with pytest.raises(InputError, match="parts of a network cannot be timed"):
        EnhancedFilterPruner(parts.model, images, budget="latency", graph=parts, progress=False)


def test_slow_layers_go_first(counted, images):
    """At equal scores the layer whose filters take most time loses most."""
    graph = ChannelGraph(randomise(plain()), images)
    constraints = Constraints("latency", times=measure_latency(graph, images[:1]))
    chosen = select_by_score(Selection(graph, 25, constraints), torch.ones(len(graph.units)).double())
    saved = LatencyCosts(graph, constraints.times).savings()
    assert graph.units[chosen[0]].filters[0][0] == ("0" if saved[0] > saved[5] else "4")


def test_a_batch_that_memory_does_not_hold_is_named(images):
    """10^15 images: no machine has the memory, and none of it is touched."""
    graph = ChannelGraph(randomise(plain()), images[:2])
    with pytest.raises(
        InputError, match=r"out of memory while layers are timed on 1000000000000000 .*lower --latency-batch"
    ):
        measure_latency(graph, images[:1], batch_size=10**15)


def test_other_errors_while_layers_are_timed_are_not_those_of_memory(images, monkeypatch):
    def failing(*_):
        raise RuntimeError("of another kind")

    monkeypatch.setattr(latency_module, "_measured", failing)
    with pytest.raises(RuntimeError, match="of another kind"):
        measure_latency(ChannelGraph(randomise(plain()), images[:2]), images[:1])


def test_a_network_without_a_layer_that_can_be_timed_is_refused(images):
    model = nn.Sequential(weight_norm(nn.Conv2d(3, 6, 3)), nn.ReLU(), weight_norm(nn.Conv2d(6, 4, 3))).double()
    with pytest.raises(InputError, match="no layer of this network can be timed; give a budget of macs or params"):
        measure_latency(ChannelGraph(model, images), images[:1])


def test_layers_are_announced_unless_the_table_knows_them(counted, images, tmp_path):
    graph, lines = ChannelGraph(randomise(plain()), images), []
    for _ in range(2):
        measure_latency(graph, images[:1], table=tmp_path / "times.json", progress=lines.append)
    assert lines == [f"timing layer {n} of 3, {name}.weight" for n, name in enumerate(("0", "4", "8"), 1)]
