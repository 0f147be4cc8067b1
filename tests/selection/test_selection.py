"""Joint selection against exhaustive search, budgets, bounds, widths, and clear refusals."""

import copy
import itertools
import math

import pytest
import torch
from torch.nn import functional as F

from EnhancedFilterPruner import EnhancedFilterPruner
from taylor_pruning.errors import InputError, OutOfReachError
from taylor_pruning.scoring.flow import weigh
from taylor_pruning.scoring.layer_costs import removal_costs
from taylor_pruning.scoring.taylor import Directions, class_basis
from taylor_pruning.selection import greedy
from taylor_pruning.selection.constraints import Constraints, Ledger, Selection
from taylor_pruning.selection.costs import CostModel
from taylor_pruning.selection.greedy import select_by_score, select_jointly, select_uniformly

BUDGETS = ("filters", "params", "macs")  # what can be counted; times: test_latency.py


def test_greedy_takes_account_of_what_is_chosen(graph, directions):
    """Two units that cancel each other's effect: alone each is costly, together they are free; and the reverse."""
    units = len(graph.units)
    c = torch.zeros_like(directions.coordinates)
    c[:, 0, 0], c[:, 1, 0] = 0.5, -0.5
    c[:, 2:, 1] = 0.6
    directions.coordinates = c
    directions.logits = torch.zeros_like(directions.logits)
    selection = Selection(graph, 100 * 2 / units, Constraints(layer_bound=math.inf))
    assert sorted(select_jointly(selection, directions, 3)) == [0, 1]
    shift = c[:, [0, 1]].sum(1)
    assert directions.loss_change_at(shift) == pytest.approx(0, abs=1e-12)
    assert directions.loss_change_at(c[:, [0, 2]].sum(1)) > 0.01


def test_a_joint_choice_is_rounded_by_what_each_unit_would_cost_next(graph, directions, monkeypatch):
    seen = []
    monkeypatch.setattr(greedy, "round_widths", lambda selection, scores: seen.append(scores.clone()))
    chosen = select_jointly(Selection(graph, 30, Constraints(layer_bound=math.inf)), directions, 3)
    others = [unit for unit in range(len(graph.units)) if unit not in chosen]
    costs = [directions.loss_change_at(directions.coordinates[:, [*chosen, u]].sum(1)) for u in others]
    assert torch.corrcoef(torch.stack([torch.tensor(costs), seen[0][others].float()]))[0, 1] > 0.9


@pytest.mark.parametrize("order", [2, 3])
def test_joint_is_near_the_best_subset_and_not_worse_than_independent(graph, directions, order):
    units = len(graph.units)
    joint = select_jointly(Selection(graph, 100 * 3 / units, Constraints()), directions, order)
    alone = select_by_score(Selection(graph, 100 * 3 / units, Constraints()), directions.scores(order))

    def change(chosen):
        return directions.loss_change_at(directions.coordinates[:, list(chosen)].sum(1))

    every = sorted(change(s) for s in itertools.combinations(range(units), 3))
    assert change(joint) <= change(alone) + 1e-12
    assert change(joint) <= every[len(every) // 20]  # among the best twentieth of all subsets


@pytest.mark.parametrize("budget", ["filters", "macs"])
@pytest.mark.parametrize("own_targets", [False, True])
def test_joint_selection_is_as_good_as_scoring_all_units_after_every_choice(many_units, own_targets, budget):
    """Many units that move the logits alike: those that look best together on the same scores overshoot together."""
    units, generator = len(many_units.units), torch.Generator().manual_seed(0)
    kinds = torch.randn(30, 12, 4, generator=generator, dtype=torch.float64)
    kind = torch.randint(12, (units,), generator=generator)
    coordinates = 0.3 * kinds[:, kind] + 0.05 * torch.randn(30, units, 4, generator=generator, dtype=torch.float64)
    logits = torch.randn(30, 5, generator=generator, dtype=torch.float64)
    labels = torch.randint(5, (30,), generator=generator)
    directions = Directions(
        coordinates, class_basis(logits, labels, 4)[0], logits, labels, 0.0, own_targets=own_targets
    )
    joint = select_jointly(Selection(many_units, 5, Constraints(budget)), directions, 2)

    selection, shift = Selection(many_units, 5, Constraints(budget)), torch.zeros(30, 4, dtype=torch.float64)
    while not selection.done():
        scores, saved = directions.scores(2, shift), selection.savings()
        scores = torch.where(scores > 0, scores / saved, scores * saved)
        best = int(scores.masked_fill(~selection.open, torch.inf).argmin())
        if selection.take(best):
            shift += coordinates[:, best]
    change, wanted = directions.loss_change_at(coordinates[:, joint].sum(1)), directions.loss_change_at(shift)
    assert change <= wanted + 0.012 * abs(wanted)


def test_first_marginals_are_the_single_scores(graph, directions):
    for order in (2, 3):
        chosen = select_jointly(Selection(graph, 9.1, Constraints()), directions, order)
        assert chosen == [int(directions.scores(order).argmin())]


def test_predicted_loss_change_is_close_to_the_measured(plain_network, images, labels):
    """Closing gates of the last hidden layer moves the logits exactly as the directions say."""
    pruner = EnhancedFilterPruner(plain_network, images, 3, exclude=["0"], progress=False).rank([(images, labels)])
    smaller = pruner.graph.remove(pruner.get_pruning_plan(34))
    with torch.no_grad():
        true = F.cross_entropy(smaller(images), labels) - F.cross_entropy(plain_network(images), labels)
    assert pruner.chosen.predicted_loss_change == pytest.approx(true.item(), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("percentage", [10, 30, 50, 90])
def test_the_percentage_of_filters_is_met(resnet, percentage):
    _, graph = resnet
    scores = torch.rand(len(graph.units), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    plan = graph.plan_of(select_by_score(Selection(graph, percentage, Constraints()), scores))
    total = sum(int(info.removable.sum()) for info in graph.layers.values())
    largest = max(len(unit.filters) for unit in graph.units)
    assert abs(sum(map(len, plan.values())) - percentage / 100 * total) <= largest / 2 + 1


@pytest.mark.parametrize("budget", ["params", "macs"])
def test_a_budget_of_parameters_or_macs_is_met_by_the_real_network(resnet, budget):
    from taylor_pruning.training.profile import profile

    model, graph = resnet
    example = torch.randn(1, 3, 64, 64)
    key = {"params": "parameters", "macs": "macs"}[budget]
    dense = profile(model, example)[key]
    assert CostModel(graph, budget).total() == pytest.approx(dense, rel=0.01)
    scores = torch.rand(len(graph.units), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    chosen = select_by_score(Selection(graph, 40, Constraints(budget=budget)), scores)
    smaller = profile(graph.remove([graph.units[u] for u in chosen]), example)[key]
    assert smaller / dense == pytest.approx(0.6, abs=0.01)


def test_a_unit_is_weighed_per_filter(resnet):
    _, graph = resnet
    wide = max(graph.units, key=lambda unit: len(unit.filters))
    narrow = next(unit for unit in graph.units if len(unit.filters) == 1)
    scores = torch.full((len(graph.units),), 10.0, dtype=torch.float64)
    scores[wide.index], scores[narrow.index] = 2.0, 1.0
    chosen = select_by_score(Selection(graph, 1, Constraints()), scores)
    assert chosen[0] == wide.index


def better_in_both(graph, budget):
    """(units, scores): the lower a unit scores the more it saves, from negative scores over zero to positive ones."""
    saved = Selection(graph, 20, Constraints(budget)).savings()
    units = [int((saved == value).nonzero()[0]) for value in saved.unique().flip(0)]
    scores = torch.ones(len(graph.units), dtype=torch.float64)
    scores[units] = torch.linspace(-0.010, 0.005, len(units), dtype=torch.float64)
    return units, scores


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("shift", [0.0, 0.02, -0.02])  # scores of both signs, or of one
def test_of_two_units_the_one_that_scores_lower_and_saves_more_goes_first(resnet, budget, shift):
    _, graph = resnet
    units, scores = better_in_both(graph, budget)
    selection = Selection(graph, 20, Constraints(budget))
    order = selection.per_saving(scores + shift)[units]
    assert len(units) > 1 and order.argsort().tolist() == list(range(len(units)))
    some = torch.tensor(units[1:])
    assert torch.equal(selection.per_saving(scores[some] + shift, some), order[1:])


@pytest.mark.parametrize("joint", [False, True])
def test_a_removal_that_lowers_the_loss_is_no_bargain_because_it_saves_little(resnet, joint):
    """The unit that lowers the loss most also saves most, as much as is asked for: it goes, alone."""
    _, graph = resnet
    (best, *_), scores = better_in_both(graph, "macs")
    costs = CostModel(graph, "macs")
    selection = Selection(graph, 100 * costs.savings()[best].item() / costs.total(), Constraints("macs"))
    if joint:
        nothing = torch.zeros(1, len(graph.units), 1, dtype=torch.float64)
        directions = Directions(nothing, nothing[:, :2], nothing[:, :2, 0], torch.tensor([0]), 0.0)
        assert select_jointly(selection, directions, 2, correction=scores) == [best]
    else:
        assert select_by_score(selection, scores) == [best]


def test_no_layer_loses_more_than_the_bound(resnet):
    _, graph = resnet
    scores = torch.tensor([float(unit.filters[0][0].startswith("layer1")) for unit in graph.units], dtype=torch.float64)
    for budget, bound in itertools.product(BUDGETS, (1.0, 1.3)):
        selection = Selection(graph, 30, Constraints(budget=budget, layer_bound=bound))
        plan = graph.plan_of(select_by_score(selection, -scores))
        for name, gone in plan.items():
            assert len(gone) <= math.ceil(bound * 0.3 * int(graph.layers[name].removable.sum()))
        assert selection.bound_held


def test_widths_are_free_by_default_where_the_budget_is_not_in_filters(resnet):
    _, graph = resnet
    scores = torch.tensor([float(unit.filters[0][0].startswith("layer1")) for unit in graph.units], dtype=torch.float64)
    plans = {
        budget: graph.plan_of(select_by_score(Selection(graph, 30, Constraints(budget=budget)), scores))
        for budget in BUDGETS
    }
    bound = {name: math.ceil(1.03 * 0.3 * int(info.removable.sum())) for name, info in graph.layers.items()}
    free = {budget: any(len(gone) > bound[name] for name, gone in plan.items()) for budget, plan in plans.items()}
    assert free == {"filters": False, "params": True, "macs": True}


def test_a_bound_that_had_to_yield_says_so(resnet):
    _, graph = resnet
    selection = Selection(graph, 30, Constraints(layer_bound=1.0, min_filters=64))  # all that the first layers have
    select_by_score(selection, torch.zeros(len(graph.units)))
    assert not selection.bound_held


def test_the_bound_counts_what_earlier_rounds_removed(graph, plain_network, images, batches):
    constraints = Constraints(layer_bound=1.0)
    ledger = Ledger.open(graph, constraints)
    pruner = EnhancedFilterPruner(plain_network, images, 2, layer_bound=1.0, progress=False).rank(batches)
    plan = pruner.get_pruning_plan(30, ledger)
    ledger.record(plan)
    smaller = graph.remove(plan)
    pruner = EnhancedFilterPruner(smaller, images, 2, layer_bound=1.0, progress=False).rank(batches)
    final = pruner.graph.remove(pruner.get_pruning_plan(60, ledger))
    assert abs(final[0].out_channels + final[4].out_channels - 11 * 0.4) <= 1
    assert final[0].out_channels >= 5 - math.ceil(0.6 * 5) and final[4].out_channels >= 6 - math.ceil(0.6 * 6)


def test_every_layer_keeps_its_least_number_of_filters(graph):
    scores = torch.arange(len(graph.units), dtype=torch.float64)
    plan = graph.plan_of(select_by_score(Selection(graph, 60, Constraints(min_filters=2)), scores))
    assert all(graph.layers[name].filters - len(gone) >= 2 for name, gone in plan.items())
    with pytest.raises(OutOfReachError, match="lower percentage"):
        select_by_score(Selection(graph, 90, Constraints(min_filters=2)), scores)


@pytest.mark.parametrize("order", [1, 2])
def test_widths_are_multiples_and_the_total_stays_close(resnet, order):
    _, graph = resnet
    scores = torch.rand(len(graph.units), dtype=torch.float64, generator=torch.Generator().manual_seed(order))
    plan = graph.plan_of(select_by_score(Selection(graph, 30, Constraints(round_to=8)), scores))
    assert all((graph.layers[name].filters - len(gone)) % 8 == 0 for name, gone in plan.items())
    total = sum(info.filters for info in graph.layers.values())
    assert abs(sum(map(len, plan.values())) / total - 0.3) < 0.03


def test_order_1_selects_by_squares_per_sample(plain_network, images, labels, directions, graph):
    pruner = EnhancedFilterPruner(plain_network, images, 1, progress=False).rank([(images, labels)])
    wanted = directions.moments(order=1)[0].square().mean(0).argsort()[:3]
    assert sorted(pruner.select(100 * 3 / len(graph.units))) == sorted(wanted.tolist())


def test_gradient_flow_changes_the_plan_as_its_weights_say(plain_network, images, labels):
    pruner = EnhancedFilterPruner(
        plain_network, images, 2, use_gradient_flow=True, selection="independent", progress=False
    ).rank([(images, labels)])
    wanted = weigh(pruner.scores(), pruner.flow_weights()).argsort()[:4]
    assert sorted(pruner.select(100 * 4 / len(pruner.graph.units))) == sorted(wanted.tolist())


@pytest.mark.parametrize("percentage", [0, 100, -5, math.nan, "30"])
def test_percentages_outside_of_0_to_100_are_refused(graph, percentage):
    with pytest.raises(InputError, match="percentage"):
        Selection(graph, percentage, Constraints())


@pytest.mark.parametrize(
    "wrong",
    [{"taylor_order": 4}, {"selection": "both"}, {"curvature": "none"}, {"class_probes": 0}, {"hessian_probes": 0}],
)
def test_wrong_arguments_are_refused(plain_network, images, wrong):
    with pytest.raises(InputError, match=next(iter(wrong))):
        EnhancedFilterPruner(plain_network, images, **wrong)


def test_weights_that_are_not_finite_are_refused(plain_network, images):
    plain_network[0].weight.data[0, 0, 0, 0] = torch.nan
    with pytest.raises(InputError, match=r"0\.weight"):
        EnhancedFilterPruner(plain_network, images)


def test_a_network_without_removable_filters_is_refused(plain_network, images):
    with pytest.raises(InputError, match="no filter"):
        EnhancedFilterPruner(plain_network, images, exclude=["0", "4"])


@pytest.mark.usefixtures("costs_count")
def test_the_automatic_bound_is_off_behind_compensation(plain_network, images, batches):
    """One layer is worth nothing: without compensation it may lose its share alone, behind it as many as are asked for."""
    with torch.no_grad():
        plain_network[8].weight[:, 8:] = 0  # channels 2 to 5 of the second conv, four features each
    pruner = EnhancedFilterPruner(plain_network, images, 2, selection="independent", progress=False).rank(batches)
    assert len(pruner.get_pruning_plan(36)["4"]) <= math.ceil(1.03 * 0.36 * 6)
    pruner = EnhancedFilterPruner(plain_network, images, 2, progress=False).rank(batches, batches)
    assert len(pruner.get_pruning_plan(36)["4"]) == 4
    bounded = EnhancedFilterPruner(plain_network, images, 2, layer_bound=1.03, progress=False)
    assert len(bounded.rank(batches, batches).get_pruning_plan(36)["4"]) <= math.ceil(1.03 * 0.36 * 6)


@pytest.mark.usefixtures("costs_count")
@pytest.mark.parametrize("order", [1, 2, 3])
def test_selection_behind_repair_is_greedy_on_costs_per_saving(relu_network, images, batches, order):
    """Every choice is the cheapest per saving of all for which there is room, at the costs that the ones before leave."""
    pruner = EnhancedFilterPruner(relu_network, images, order, budget="macs", progress=False)
    pruner.rank(batches, batches)
    chosen = pruner.select(40)
    found = pruner.behind_repair
    costs = removal_costs(pruner.model, found.moments, found.fisher, len(pruner.graph.units))
    costs.start_at(pruner.levels())
    model, total = CostModel(pruner.graph, "macs"), 0.0
    assert torch.allclose(costs.marginal, pruner.levels(order).double())
    selection = Selection(pruner.graph, 40, Constraints("macs", None))
    for _ in chosen:
        ratio = (costs.marginal / model.savings().clamp_min(1e-9)).masked_fill(~selection.open, math.inf)
        full = [u for u, c in enumerate(selection.layer_counts) if any(selection.room[n] < k for n, k in c.items())]
        ratio[full] = math.inf
        unit = int(ratio.argmin())
        total += costs.marginal[unit].item()
        selection.take(unit)
        costs.remove(unit)
        model.remove(unit)
    assert sorted(selection.chosen) == chosen
    assert pruner.chosen.predicted_loss_change == pytest.approx(total)


def test_what_units_save_is_what_removing_them_saves(resnet):
    """Units of one kind share a column of counts; the savings are those of every unit by itself."""
    _, graph = resnet
    for unit in (0, 70, len(graph.units) - 1):
        model = CostModel(graph, "params")
        saved, before = model.savings()[unit].item(), model.total()
        model.remove(unit)
        assert before - model.total() == pytest.approx(saved, rel=0.02)


@pytest.mark.parametrize("budget", BUDGETS)
def test_uniform_widths_are_a_share_of_every_layer_under_any_budget(resnet, budget):
    _, graph = resnet
    scores = torch.rand(len(graph.units), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    selection = Selection(graph, 60, Constraints(budget, layer_bound=math.inf))
    chosen = select_uniformly(selection, scores)
    gone = [len(filters) / graph.layers[name].filters for name, filters in graph.plan_of(chosen).items()]
    assert max(gone) - min(gone) < 0.03 and abs(selection.missing()) < 0.01 * selection.ledger.total
    layer = graph.layers["layer1.0.conv1"].unit_of
    removed = torch.isin(layer, torch.tensor(chosen))
    assert scores[layer][removed].max() < scores[layer][~removed].min()


def test_a_least_share_of_every_layer_stays_where_the_budget_allows_it(resnet):
    _, graph = resnet
    scores = torch.tensor([float(not u.filters[0][0].startswith("layer1")) for u in graph.units], dtype=torch.float64)
    for share, held in ((0.25, True), (0.9, False)):
        selection = Selection(graph, 40, Constraints("macs", min_share=share))
        plan = graph.plan_of(select_by_score(selection, scores + 1e-3))
        kept = min(1 - len(gone) / graph.layers[name].filters for name, gone in plan.items())
        assert selection.bound_held == held and (kept >= share) == held


@pytest.mark.parametrize("scale, uniform", [(0.05, True), (30.0, False), (1e8, True)])
def test_where_costs_say_nothing_widths_are_uniform(half_resnet_of_4, images, batches, scale, uniform):
    """Answers that hardly depend on the image, or are so sure that no derivative is left: a layer that looks free is not
    emptied, and the plan has the shares of uniform widths at the same cost.
    """
    model = copy.deepcopy(half_resnet_of_4).double()
    with torch.no_grad():
        logits = model(images)
        model.fc.bias -= logits.mean(0)
        for parameter in (model.fc.weight, model.fc.bias):
            parameter *= scale / logits.std(0).mean()
    pruner = EnhancedFilterPruner(model, images, 2, budget="macs", progress=False).rank(batches, batches)
    plan = pruner.get_pruning_plan(40)
    shares = [len(gone) / pruner.graph.layers[name].filters for name, gone in plan.items()]
    assert pruner.chosen.uniform_widths == uniform == (max(shares) - min(shares) < 0.05)
    if uniform:
        selection = Selection(pruner.graph, 40, Constraints("macs"))
        assert pruner.select(40) == select_uniformly(selection, pruner.levels())
