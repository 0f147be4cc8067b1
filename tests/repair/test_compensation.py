import copy

import pytest
import torch
from torch import nn

from taylor_pruning.errors import InputError
from taylor_pruning.repair import paired_runs, regression
from taylor_pruning.repair.batchnorm import update_statistics
from taylor_pruning.repair.compensation import compensate
from taylor_pruning.repair.plan import RepairPlan
from taylor_pruning.repair.ridge import DualRidgeSolver, RidgeSolver, Rows
from taylor_pruning.surgery.graph import ChannelGraph


class Residual(nn.Module):
    """A stem, two residual blocks and a classifier."""

    def __init__(self, width=8, downsample=False):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.conv1, self.bn1 = nn.Conv2d(width, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.conv2, self.bn2 = nn.Conv2d(12, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.conv4 = nn.Conv2d(width, 12, 1), nn.Conv2d(12, width, 3, padding=1)
        self.shortcut = nn.Conv2d(width, width, 1) if downsample else nn.Identity()
        self.head = nn.Linear(width, 5)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        x = torch.relu(self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))) + x)
        y = self.conv4(torch.relu(self.conv3(x)))
        y += self.shortcut(x)
        return self.head(torch.relu(y).mean((2, 3)))


def plain(**second):
    """Conv, the conv under test, and a linear layer behind a flatten; a 9x9 image."""
    body = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 6, **second), nn.BatchNorm2d(6), nn.ReLU()]
    features = nn.Sequential(*body)(torch.zeros(2, 3, 9, 9)).flatten(1).shape[1]
    return nn.Sequential(*body, nn.Flatten(), nn.Linear(features, 5))


NETWORKS = {
    "plain": lambda: plain(kernel_size=3, padding=1),
    "stride and dilation": lambda: plain(kernel_size=3, stride=2, dilation=2, padding=(2, 1)),
    "pointwise": lambda: plain(kernel_size=1, bias=False),
    "grouped": lambda: plain(kernel_size=3, groups=2),
    "reflected, uneven kernel": lambda: plain(kernel_size=(3, 5), padding="same", padding_mode="reflect"),
    "residual": Residual,
    "residual with downsampling": lambda: Residual(downsample=True),
}


def randomised(model):
    """Activations of order 1 behind every layer, and BatchNorms that are not the identity."""
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight)
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.3)
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return model.eval()


@pytest.fixture(params=["stride and dilation", "grouped", "residual with downsampling"])
def network(request):
    torch.manual_seed(0)
    return randomised(NETWORKS[request.param]())


def images(number=50, size=9, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(number, 3, size, size, generator=generator, dtype=torch.float64).to(dtype)
    return [(part, torch.zeros(len(part), dtype=torch.long)) for part in x.split(30)]


def logits(model, batches):
    with torch.no_grad():
        return torch.cat([model(x) for x, _ in batches])


def cut(model, plan):
    """(smaller network, kept) for a plan {layer: filters to remove}."""
    graph = ChannelGraph(model, torch.zeros(1, 3, 9, 9, dtype=next(model.parameters()).dtype))
    kept = {n: [i for i in range(info.filters) if i not in plan.get(n, ())] for n, info in graph.layers.items()}
    return graph.remove(plan), kept


def random_plan(model, percentage=40):
    """Units of every group of coupled layers, at random."""
    graph = ChannelGraph(model, torch.zeros(1, 3, 9, 9, dtype=next(model.parameters()).dtype))
    groups = {}
    for unit in graph.units:
        groups.setdefault(tuple(sorted({name for name, _ in unit.filters})), []).append(unit.index)
    chosen = []
    for indices in groups.values():
        order = torch.randperm(len(indices))[: round(len(indices) * percentage / 100)]
        chosen += [indices[i] for i in order.tolist()]
    return graph.plan_of(chosen)


def test_nothing_removed_changes_nothing(network):
    smaller = copy.deepcopy(network)
    report = compensate(network, smaller, images(), progress=False)
    assert not report.layers
    assert torch.equal(logits(smaller, images()), logits(network, images()))


def make_dependent(layer, gone, sources):
    """The filters `gone` of a conv become copies of 2x and 0.5x other filters: through a ReLU exactly linear."""
    with torch.no_grad():
        for index, source, factor in zip(gone, sources, (2.0, 0.5), strict=True):
            layer.weight[index] = factor * layer.weight[source]
            if layer.bias is not None:
                layer.bias[index] = factor * layer.bias[source]


DEPENDENT = {  # network: {cut layer: (removed filters, filters that they are multiples of)}
    "plain": {"0": ((1, 6), (0, 3))},
    "stride and dilation": {"0": ((1, 6), (0, 3))},
    "pointwise": {"0": ((1, 6), (0, 3))},
    "grouped": {"0": ((1, 5), (0, 4))},  # the second conv's groups lose equal positions
    "reflected, uneven kernel": {"0": ((1, 6), (0, 3))},
    "residual": {"conv3": ((1, 6), (0, 3))},
    "residual with downsampling": {"conv3": ((1, 6), (0, 3))},
}


@pytest.mark.parametrize("name", DEPENDENT)
def test_linearly_dependent_channels_come_back(name):
    torch.manual_seed(0)
    model = randomised(NETWORKS[name]())
    plan = {}
    for layer, (gone, sources) in DEPENDENT[name].items():
        make_dependent(model.get_submodule(layer), gone, sources)
        plan[layer] = list(gone)
    assert_comes_back(model, plan)


def test_channels_with_large_means_come_back_in_single_precision():
    """Their squares are 10,000 times their variances."""
    torch.manual_seed(0)
    model = randomised(
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.Flatten(), nn.Linear(150, 5))
    )
    make_dependent(model[0], (1, 6), (0, 3))
    with torch.no_grad():
        model[0].bias += 100
        model[2].bias -= 100 * model[2].weight.sum((1, 2, 3))
    smaller, kept = cut(model, {"0": [1, 6]})
    report = compensate(model, smaller, images(150), kept, progress=False)
    assert report.layers[0].name == "2" and report.layers[0].error_after < 1e-3 < report.layers[0].error_before


def test_linear_layer_after_flatten_comes_back():
    torch.manual_seed(0)
    model = randomised(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(3), nn.Flatten(), nn.Linear(32, 5)))
    make_dependent(model[0], (1, 6), (0, 3))
    assert_comes_back(model, {"0": [1, 6]})


def test_channels_of_the_residual_stream_come_back():
    torch.manual_seed(0)
    model = randomised(Residual())
    model.bn2.weight.data[[1, 6]] = model.bn2.weight[[0, 3]] * torch.tensor([2.0, 0.5])
    for tensor in (model.bn2.running_mean, model.bn2.running_var):
        tensor[[1, 6]] = tensor[[0, 3]]
    model.bn2.bias.data[[1, 6]] = model.bn2.bias[[0, 3]] * torch.tensor([2.0, 0.5])
    model.conv2.weight.data[[1, 6]] = model.conv2.weight[[0, 3]]
    make_dependent(model.stem, (1, 6), (0, 3))
    make_dependent(model.conv4, (1, 6), (0, 3))
    assert_comes_back(model, {name: [1, 6] for name in ("stem", "conv2", "conv4")})


def assert_comes_back(model, plan):
    smaller, kept = cut(model, plan)
    batches = images(150)
    dense = logits(model, batches)
    assert (logits(smaller, batches) - dense).abs().max() > 0.01
    compensate(model, smaller, batches, kept, progress=False)
    assert (logits(smaller, batches) - dense).abs().max() < 1e-4


def unfolded(module, x):
    """Patches [images x positions, channels x kernel] of a conv that pads with zeros, by `unfold`."""
    if isinstance(module, nn.Linear):
        return x
    padding = module.padding
    if padding == "same":  # an odd one of several goes behind
        extents = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        sides = [side for extent in reversed(extents) for side in (extent // 2, extent - extent // 2)]
        x, padding = nn.functional.pad(x, sides), 0
    columns = nn.functional.unfold(x, module.kernel_size, module.dilation, padding, module.stride)
    return columns.mT.flatten(0, 1)


@pytest.mark.parametrize(
    "second",
    [
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": 3, "stride": 2, "dilation": 2, "padding": (2, 1)},
        {"kernel_size": (1, 3), "bias": False},
        {"kernel_size": 3, "groups": 2},
        {"kernel_size": (4, 3), "dilation": (1, 2), "padding": "same"},
    ],
)
def test_weights_are_the_ridge_solution(second, monkeypatch):
    """Against `lstsq` on stacked rows [patches; sqrt(ridge)], group by group, with the intercept through centring."""
    monkeypatch.setattr(regression, "RIDGES", (1e-2,))
    torch.manual_seed(0)
    model = randomised(plain(**second)).double()
    smaller, kept = cut(model, {"0": [1, 5]})
    before = copy.deepcopy(smaller)
    batches = images(30, dtype=torch.float64)
    report = compensate(model, smaller, batches, kept, progress=False)
    assert report.layers[0].name == "2" and report.layers[0].ridge == 1e-2

    x = torch.cat([x for x, _ in batches])
    conv, groups = before[2], before[2].groups
    residual = (model[:3](x) - before[:3](x)).flatten(2).mT.flatten(0, 1)
    patches = unfolded(conv, before[:2](x)).unflatten(1, (groups, -1))
    for group in range(groups):
        outputs = slice(group * 6 // groups, (group + 1) * 6 // groups)
        rows, left = patches[:, group], residual[:, outputs]
        centred = rows - rows.mean(0)
        penalty = (1e-2 * centred.square().sum(0).mean()).sqrt() * torch.eye(rows.shape[1], dtype=torch.float64)
        wanted = torch.cat([left - left.mean(0), torch.zeros(len(penalty), left.shape[1])])
        change = torch.linalg.lstsq(torch.cat([centred, penalty]), wanted).solution
        bias = left.mean(0) - rows.mean(0) @ change
        torch.testing.assert_close((smaller[2].weight - conv.weight)[outputs].flatten(1), change.T)
        torch.testing.assert_close(zero_of(before[3])[outputs] - zero_of(smaller[3])[outputs], bias)


def test_a_large_ridge_where_smaller_ones_are_of_no_use(monkeypatch):
    """A fit of 405 columns to 80 rows follows them alone, unless the ridge holds it back."""
    monkeypatch.setattr(regression, "RIDGES", (1e-12,))
    torch.manual_seed(0)
    model = randomised(NETWORKS["plain"]()).double()
    smaller, kept = cut(model, {"2": [0]})
    batches = images(100, dtype=torch.float64)
    (fit,) = compensate(model, smaller, batches, kept, progress=False, to_predictions=False).layers
    assert fit.ridge == regression.LAST_RIDGE and fit.error_after < fit.error_before


def zero_of(norm):
    """The input at which a BatchNorm in evaluation gives 0."""
    return norm.running_mean - norm.bias * (norm.running_var + norm.eps).sqrt() / norm.weight


def test_training_starts_at_the_compensated_network():
    """In training mode, which normalises by the batch, the network gives what it gives in evaluation."""
    torch.manual_seed(0)
    model = randomised(Residual()).double()
    smaller, kept = cut(model, random_plan(model))
    batches = images(100, dtype=torch.float64)
    compensate(model, smaller, batches, kept, progress=False)
    x = torch.cat([x for x, _ in batches])
    with torch.no_grad():
        torch.testing.assert_close(copy.deepcopy(smaller).train()(x), smaller.eval()(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("budget", [0, 2**28])
def test_batchnorms_hold_the_statistics_of_their_present_inputs(budget):
    """Also behind layers that were not fitted, and where the networks run again."""
    torch.manual_seed(0)
    model = randomised(Residual()).double()
    smaller, kept = cut(model, random_plan(model))
    batches = images(100, dtype=torch.float64)
    compensate(model, smaller, batches, kept, progress=False, activation_budget=budget)
    norms, seen = [m for m in smaller.modules() if isinstance(m, nn.BatchNorm2d)], {}
    for norm in norms:
        norm.register_forward_pre_hook(lambda module, inputs: seen.setdefault(module, []).append(inputs[0]))
    logits(smaller, batches)
    for norm in norms:
        x = torch.cat(seen[norm])
        torch.testing.assert_close(norm.running_mean, x.mean((0, 2, 3)))
        torch.testing.assert_close(norm.running_var, x.var((0, 2, 3), unbiased=False))


def test_statistics_of_some_images_do_not_depend_on_the_batches(monkeypatch):
    monkeypatch.setattr(paired_runs, "STATISTICS_ROWS", 81 * 10)
    model = randomised(Residual()).double()
    plan, found = random_plan(model), []
    x = torch.cat([part for part, _ in images(100, dtype=torch.float64)])
    for size in (100, 7):
        smaller, kept = cut(model, plan)
        compensate(model, smaller, [(part, None) for part in x.split(size)], kept, progress=False)
        found.append({name: tensor for name, tensor in smaller.state_dict().items() if "running" in name})
    torch.testing.assert_close(*found, rtol=1e-8, atol=1e-10)


def test_statistics_of_some_images_are_of_images_from_all_of_the_batches(monkeypatch):
    """Images may follow each other by class."""
    monkeypatch.setattr(paired_runs, "STATISTICS_ROWS", 81 * 20)
    torch.manual_seed(0)
    model = randomised(Residual()).double()
    smaller, kept = cut(model, {"conv1": [1]})
    x = images(100, dtype=torch.float64)[0][0].repeat(4, 1, 1, 1)[:100] * torch.linspace(0.1, 2, 100).view(-1, 1, 1, 1)
    seen = []
    compensate(model, smaller, [(part, None) for part in x.split(30)], kept, progress=False)
    smaller.bn2.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    logits(smaller, [(x, None)])
    wanted = seen[0].var((0, 2, 3))
    assert ((smaller.bn2.running_var - wanted).abs() < 0.4 * wanted).all()


@pytest.mark.parametrize("shared", ["running_mean", "weight"])
def test_a_batchnorm_that_shares_tensors_is_left_as_it_is(shared):
    """One scale or one mean cannot fit the inputs of two layers."""
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 4, 3)
    model = randomised(nn.Sequential(*layers))
    setattr(model[3], shared, getattr(model[1], shared))
    smaller = copy.deepcopy(model)
    with torch.no_grad():
        smaller[0].weight.mul_(1.1)  # so that there is something to fit
    compensate(model, smaller, images(100), progress=False)
    for i in (1, 3):
        torch.testing.assert_close(smaller[i].running_var, model[i].running_var, rtol=0, atol=0)


def test_statistics_of_a_half_precision_network_whose_squares_are_beyond_its_range():
    model = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4)).eval()
    model[0].weight.data = 100 + 10 * torch.randn(4, 3, 1, 1, generator=torch.Generator().manual_seed(0))
    x = 1 + torch.rand(20, 3, 5, 5, generator=torch.Generator().manual_seed(1))
    model, x = model.half(), x.half()
    model[1].running_var.fill_(1e4)
    values = model[0](x).double()
    paired_runs.refresh_batchnorms(model, [x])
    assert values.square().min() > torch.finfo(torch.float16).max
    torch.testing.assert_close(model[1].running_var.double(), values.var((0, 2, 3), correction=0), rtol=1e-2, atol=0)


def test_new_batchnorm_statistics_change_no_output():
    torch.manual_seed(0)
    norm, x = randomised(nn.BatchNorm2d(4)).double().eval(), torch.randn(8, 4, 5, 5, dtype=torch.float64)
    before, rows = norm(x), x.movedim(1, 0).flatten(1)
    with torch.no_grad():
        update_statistics(norm, rows.shape[1], rows.sum(1), rows.square().sum(1))
    torch.testing.assert_close(norm(x), before)
    torch.testing.assert_close(norm.running_mean, rows.mean(1))


def test_sum_is_matched(monkeypatch):
    """conv4's fit aims at dense sum - present stream, and does better there than the fit of its branch alone."""
    torch.manual_seed(0)
    model = randomised(Residual())
    smaller, kept = cut(model, random_plan(model))
    batches = images(100)
    branch = copy.deepcopy(smaller)
    report = compensate(model, smaller, batches, kept, progress=False)
    assert {fit.name: fit.matches for fit in report.layers}["conv4"] == "sum"
    monkeypatch.setattr(RepairPlan, "_stream", staticmethod(lambda *a: None))
    compensate(model, branch, batches, kept, progress=False)
    sums = [[], [], []]
    for network, found in zip((model, smaller, branch), sums, strict=True):
        network.head.register_forward_pre_hook(lambda module, inputs, found=found: found.append(inputs[0]))
        logits(network, batches)
    dense, by_sum, by_branch = (torch.cat(found) for found in sums)
    dense = dense[:, kept["conv4"]]
    assert (by_sum - dense).norm() < (by_branch - dense).norm()


class Stream(nn.Module):
    """Two layers with a BatchNorm, each added to a stream."""

    def __init__(self):
        super().__init__()
        self.stem, self.conv1, self.conv2 = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.bn1, self.bn2, self.head = nn.BatchNorm2d(8), nn.BatchNorm2d(8), nn.Linear(8, 5)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        x = torch.relu(self.bn1(self.conv1(x)) + x)
        return self.head((self.bn2(self.conv2(x)) + x).mean((2, 3)))


def test_errors_of_the_stream_are_divided_by_the_scale_of_the_batchnorm(monkeypatch):
    """Only a channel that all but vanishes behind it is left out; and errors count by that scale when a ridge is chosen."""
    monkeypatch.setattr(regression, "RIDGES", (1e-3,))
    torch.manual_seed(0)
    model = randomised(Stream()).double()
    model.bn2.weight.data[3] = 1e-4
    cut_once, kept = cut(model, {"stem": [1, 5], "conv1": [1, 5], "conv2": [1, 5]})
    smaller, batches = copy.deepcopy(cut_once), images(40, dtype=torch.float64)
    fit = next(f for f in compensate(model, smaller, batches, kept, progress=False).layers if f.name == "conv2")
    seen = {}
    for name, network in (("dense", model), ("present", smaller)):
        network.conv2.register_forward_hook(lambda m, args, y, name=name: seen.update({name: (args[0], y)}))
        logits(network, [(torch.cat([x for x, _ in batches]), None)])
    (dense_stream, dense), (stream, _) = seen["dense"], seen["present"]
    some, norm, conv = kept["conv2"], cut_once.bn2, cut_once.conv2
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    divisor = torch.where(torch.tensor([i == 3 for i in some]), torch.inf, scale).view(-1, 1, 1)
    target = dense[:, some] + (dense_stream[:, some] - stream) / divisor
    rows = stream.movedim(1, -1).flatten(0, 2)
    left, target = ((t.movedim(1, -1).flatten(0, 2)) for t in (target - conv(stream), target))
    centred = rows - rows.mean(0)
    gram = centred.T @ centred
    ridge = 1e-3 * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    change = torch.linalg.solve(gram + ridge, centred.T @ left)
    torch.testing.assert_close((smaller.conv2.weight - conv.weight).flatten(1), change.T)

    held_out = (torch.randperm(40, generator=torch.Generator().manual_seed(0)) < 8).repeat_interleave(81)
    left, target = (scale * part[held_out] for part in (left, target))
    spread = (target - target.mean(0)).square().sum()
    assert fit.matches == "sum" and fit.error_before == pytest.approx((left.square().sum() / spread).sqrt().item())


def test_drawn_positions_do_not_depend_on_the_batches(monkeypatch):
    monkeypatch.setattr(regression, "ENOUGH_ROWS", 1)
    torch.manual_seed(0)
    model, found = randomised(NETWORKS["pointwise"]()).double(), []
    x = torch.cat([part for part, _ in images(60, dtype=torch.float64)])
    for size in (60, 7):
        smaller, kept = cut(model, {"0": [1, 5]})
        report = compensate(model, smaller, [(part, None) for part in x.split(size)], kept, progress=False)
        assert report.layers[0].rows == 60
        found.append(smaller[2].weight)
    torch.testing.assert_close(*found)


def test_repairs_and_says_so(network):
    smaller, kept = cut(network, random_plan(network))
    batches, fresh = images(180), images(240)[6:]
    before = (logits(smaller, fresh) - logits(network, fresh)).norm()
    report = compensate(network, smaller, batches, kept, progress=False)
    assert (logits(smaller, fresh) - logits(network, fresh)).norm() < 0.9 * before
    assert all(fit.error_after <= fit.error_before for fit in report.layers)
    assert report.as_dict()["layers"][0]["name"] == report.layers[0].name


def test_rounds_continue_from_original_indices():
    torch.manual_seed(0)
    model = randomised(NETWORKS["plain"]())
    batches = images(100)
    once, kept_once = cut(model, {"0": [1, 4, 6], "2": [0, 5]})
    compensate(model, once, batches, kept_once, progress=False)
    first, kept = cut(model, {"0": [1, 4], "2": [5]})
    compensate(model, first, batches, kept, progress=False)
    second, local = cut(first, {"0": [4], "2": [0]})  # filter 6 of "0" is the fifth of the seven that are left
    kept = {name: [kept[name][i] for i in local[name]] for name in local}
    assert kept == kept_once
    compensate(model, second, batches, kept, progress=False)
    error = [(logits(m, batches) - logits(model, batches)).norm() for m in (once, second)]
    assert error[1] < 1.2 * error[0]


def test_budget_and_row_sampling_change_nothing_or_little(network, monkeypatch):
    plan = random_plan(network)
    results = []
    for budget in (0, 10_000, 2**30):
        smaller, kept = cut(network, plan)
        report = compensate(network, smaller, images(), kept, progress=False, activation_budget=budget)
        results.append(logits(smaller, images()))
        assert report.layers
    torch.testing.assert_close(results[0], results[2])
    torch.testing.assert_close(results[1], results[2])


def test_the_networks_run_again_only_on_batches_for_which_there_is_no_room(monkeypatch):
    model = randomised(NETWORKS["plain"]())
    plan, batches = random_plan(model), images(120)
    calls, evaluate = [], paired_runs.evaluate
    monkeypatch.setattr(paired_runs, "evaluate", lambda *given, **at: calls.append(1) or evaluate(*given, **at))

    def count(budget):
        calls.clear()
        smaller, kept = cut(model, plan)
        compensate(model, smaller, batches, kept, progress=False, activation_budget=budget)
        return len(calls)

    counts = [count(budget) for budget in (0, 100_000, 200_000, 2**30)]
    assert counts == sorted(set(counts), reverse=True), counts


@pytest.mark.parametrize("period", [2, 5, 10])
def test_held_out_images_do_not_follow_the_order_of_the_classes(period):
    """Calibration images come with the classes taking turns; all of them must choose the ridge."""
    torch.manual_seed(0)
    model = randomised(NETWORKS["plain"]())
    smaller, kept = cut(model, {"0": [1]})
    (layer, *_) = RepairPlan(model, smaller, kept, images(2)[0][0]).layers
    held_out = regression.LayerRegression(layer, 0, [120, 80]).is_held_out
    assert held_out.sum() == 40
    assert set((held_out.nonzero().flatten() % period).tolist()) == set(range(period))


def test_dual_form_is_the_same_solution(monkeypatch):
    torch.manual_seed(0)
    model = randomised(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(392, 5))).double()
    batches, weights = images(50, dtype=torch.float64), []
    for largest in (392, 391):
        monkeypatch.setattr(regression, "LARGEST_MATRIX", largest * 6 // 8)  # 294 columns are left
        smaller, kept = cut(model, {"0": [1, 5]})
        report = compensate(model, smaller, batches, kept, progress=False)
        weights.append(smaller[3].weight)
        assert report.layers[0].columns == 294
    torch.testing.assert_close(weights[0], weights[1])


@pytest.mark.parametrize("size", [1e-30, 1e30])
@pytest.mark.parametrize("kind", ["normal equations", "dual", "predictions"])
def test_the_size_of_a_layers_inputs_changes_no_repair(size, kind, monkeypatch):
    """Their squares are beyond the range of single precision."""
    torch.manual_seed(0)
    body = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(3)
    model = randomised(nn.Sequential(*body, nn.Flatten(), nn.Linear(72, 5)))
    monkeypatch.setattr(regression, "LARGEST_MATRIX", 50 if kind == "dual" else 6144)
    x, answers = images(1)[0][0], []
    for factor in (1.0, size):
        with torch.no_grad():
            model[1].weight *= factor
            model[1].bias *= factor
            model[5].weight /= factor
        smaller, kept = cut(model, {"0": [1, 5]})
        compensate(model, smaller, images(), kept, progress=False, to_predictions=kind == "predictions")
        answers.append(logits(smaller, [(x, None)]))
    torch.testing.assert_close(answers[1], answers[0], rtol=1e-4, atol=1e-4)


def test_a_fit_that_fails_with_all_images_is_not_reported_as_one(monkeypatch):
    """The matrix of all rows may not be positive definite where that of the rows that chose the ridge was."""
    torch.manual_seed(0)
    model = randomised(NETWORKS["plain"]())
    smaller, kept = cut(model, {"0": [1]})
    before, factorise = copy.deepcopy(smaller), RidgeSolver.factorise

    def failing(solver, ridge):
        return factorise(solver, ridge) | (solver.rows == 50 * 81)

    monkeypatch.setattr(RidgeSolver, "factorise", failing)
    fit = compensate(model, smaller, images(), kept, progress=False, to_predictions=False).layers[0]
    assert fit.name == "2" and fit.rows == 50 * 81 and torch.equal(smaller[2].weight, before[2].weight)
    assert fit.ridge is None and fit.error_after == fit.error_before


class Oddities(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.twice = nn.Conv2d(8, 8, 1)
        self.up = nn.ConvTranspose2d(8, 4, 2)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = self.depthwise(self.stem(x).relu())
        return self.head(self.up(self.twice(self.twice(x).relu())).relu().mean((2, 3)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dual", [False, True])
def test_inputs_that_never_vary_leave_all_to_the_intercept(dual, dtype):
    """Less a rounded mean they would be tiny constants, to which a fit would give weights of any size."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        x, r = (torch.randn(1, 1, n, generator=generator, dtype=torch.float64).to(dtype) for n in (5, 3))
        rows = [Rows(x.expand(1, n, 5), r.expand(1, n, 3)) for n in (48, 5, 7)]
        solver = DualRidgeSolver(True) if dual else RidgeSolver(1, 5, 3, True, x)
        for part in rows:
            solver.add(part)
        for ridge in (0.1, 1e-3, 1e-8):
            assert not solver.factorise(ridge)
            weights, bias = solver.solve()
            assert not weights.any() and rows[0].left(weights, bias).abs().max() < 10 * torch.finfo(dtype).eps


def test_layers_left_alone_are_named():
    torch.manual_seed(0)
    model = Oddities().eval()
    smaller, kept = cut(model, random_plan(model))
    report = compensate(model, smaller, images(), kept, progress=False)
    assert [fit.name for fit in report.layers] == ["head"]
    assert report.left_alone == {
        "stem": "its outputs are the dense network's",
        "depthwise": "depthwise: it mixes no channels",
        "twice": "its weights are used more than once",
        "up": "a transposed conv",
    }


def test_conv1d_and_conv3d():
    for conv, norm, shape in ((nn.Conv1d, nn.BatchNorm1d, (3, 20)), (nn.Conv3d, nn.BatchNorm3d, (3, 5, 6, 7))):
        torch.manual_seed(0)
        model = nn.Sequential(
            conv(3, 8, 3, padding=1),
            nn.ReLU(),
            conv(8, 6, 3, stride=2),
            norm(6),
            nn.ReLU(),
            nn.Flatten(),
            nn.LazyLinear(4),
        )
        x = torch.randn(100, *shape)
        model.eval()(x[:2])
        make_dependent(model[0], (1, 6), (0, 3))
        graph = ChannelGraph(model, x[:1])
        smaller = graph.remove({"0": [1, 6]})
        compensate(model, smaller, [(x, None)], {"0": [0, 2, 3, 4, 5, 7]}, progress=False)
        assert (smaller(x) - model(x)).abs().max() < 1e-4


def test_networks_come_back_as_they_were_given():
    torch.manual_seed(0)
    model = randomised(Residual())
    smaller, kept = cut(model, random_plan(model))
    model.train()
    smaller.train()
    smaller.bn1.eval()
    state = copy.deepcopy(model.state_dict())
    batches = images()
    copies = [x.clone() for x, _ in batches]
    compensate(model, smaller, batches, kept, progress=False)
    assert model.training and smaller.training and not smaller.bn1.training and smaller.bn2.training
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in smaller.parameters())
    assert all(torch.equal(x, c) for (x, _), c in zip(batches, copies, strict=True))


def test_errors():
    torch.manual_seed(0)
    model = randomised(Residual())
    smaller, kept = cut(model, random_plan(model))
    with pytest.raises(InputError, match="no calibration images"):
        compensate(model, smaller, [], kept, progress=False)
    with pytest.raises(InputError, match="conv1 has .* of 12 filters"):
        compensate(model, smaller, images(), {**kept, "conv1": [0]}, progress=False)
    with pytest.raises(InputError, match="same layers"):
        compensate(NETWORKS["plain"](), smaller, images(), kept, progress=False)
    bad = images()
    bad[0][0][3] = float("nan")
    with pytest.raises(InputError, match="NaN"):
        compensate(model, smaller, bad, kept, progress=False)
    plain = randomised(NETWORKS["plain"]())
    smaller, kept = cut(plain, {"0": [1]})
    plain.get_submodule("2").bias.data[0] = float("inf")
    with pytest.raises(InputError, match="NaN or Inf in 2 on batch 0"):
        compensate(plain, smaller, images(), kept, progress=False)


class Shifted(nn.Module):
    """The second conv is followed by the sum with something of another shape than its output."""

    def __init__(self, other):
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 4)
        self.bias, self.other = nn.Parameter(torch.randn(1, 8, 1, 1)), other

    def forward(self, x):
        x = self.second(torch.relu(self.first(x)))
        return self.head(torch.relu(x + self.other(self, x)).mean((2, 3)))


@pytest.mark.parametrize(
    "other", [lambda s, x: s.bias, lambda s, x: x.shape[2], lambda s, x: x.mean((2, 3), keepdim=True)]
)
def test_a_sum_is_matched_only_at_one_shape(other):
    torch.manual_seed(0)
    model, x = Shifted(other).double().eval(), torch.randn(24, 3, 8, 8, dtype=torch.double)
    smaller = ChannelGraph(model, x[:1]).remove({"first": [0, 3]})
    before = (smaller(x) - model(x)).norm()
    report = compensate(model, smaller, [(x, None)], {"first": [1, 2, 4, 5, 6, 7]}, progress=False)
    assert {fit.name: fit.matches for fit in report.layers} == {"second": "layer", "head": "layer"}
    assert (smaller(x) - model(x)).norm() < before


def test_hooks_that_change_what_passes_run():
    torch.manual_seed(0)
    model, x = Shifted(lambda s, x: x).double().eval(), torch.randn(24, 3, 8, 8, dtype=torch.double)
    model.second.register_forward_hook(lambda module, inputs, output: output * 2 + 1)
    model.register_forward_pre_hook(lambda module, inputs: inputs[0] * 2)
    smaller = ChannelGraph(model, x[:1]).remove({"first": [0, 3]})
    before = (smaller(x) - model(x)).norm()
    report = compensate(model, smaller, [(x, None)], {"first": [1, 2, 4, 5, 6, 7]}, progress=False)
    assert [fit.name for fit in report.layers] == ["second", "head"]
    assert (smaller(x) - model(x)).norm() < before


class Windows(nn.Module):
    """Convs that see nine windows of an image as images of their own."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 6, 1), nn.Linear(6, 5)

    def forward(self, x):
        images = x.shape[0]
        x = x.view(images, 3, 3, 3, 3, 3).permute(0, 2, 4, 1, 3, 5).reshape(-1, 3, 3, 3)
        x = torch.relu(self.conv2(torch.relu(self.conv1(x))))
        return self.head(x.mean((2, 3)).view(images, 9, 6).mean(1))


def test_all_windows_of_an_image_are_fitted_and_held_out_with_it(monkeypatch):
    torch.manual_seed(0)
    model, kinds, found = randomised(Windows()).double(), [], []
    keep = regression.LayerRegression._keep

    def kept_rows(fit, rows, wanted, is_held_out):
        kinds.append((fit.layer.name, is_held_out, rows.x.shape[1]))
        if fit.layer.name == "conv2" and is_held_out:
            found.append(rows.x[0])
        keep(fit, rows, wanted, is_held_out)

    monkeypatch.setattr(regression.LayerRegression, "_keep", kept_rows)
    smaller, kept = cut(model, {"conv1": [1, 5]})
    batches = [(torch.randn(number, 3, 9, 9, dtype=torch.float64), None) for number in (10, 7, 13)]
    report = compensate(model, smaller, batches, kept, progress=False, to_predictions=False)
    fit = next(fit for fit in report.layers if fit.name == "conv2")
    assert fit.rows == 30 * 9 * 9  # images, windows, positions
    assert sum(rows for name, is_held_out, rows in kinds if name == "conv2" and is_held_out) == 6 * 9 * 9
    held_out = torch.randperm(30, generator=torch.Generator().manual_seed(0)) < 6
    with torch.no_grad():
        windows = [smaller.conv1(part.view(-1, 3, 3, 3, 3, 3).permute(0, 2, 4, 1, 3, 5).reshape(-1, 3, 3, 3)).relu()
                   for part, _ in batches]  # fmt: skip
    rows = torch.cat(windows).unflatten(0, (30, 9))[held_out].movedim(2, -1).reshape(-1, 6)
    torch.testing.assert_close(*(part.sort(0)[0] for part in (rows, torch.cat(found))))


class Tokens(nn.Module):
    """A block on the positions of a map, with a residual sum; the first dimension is that of the samples or of the tokens."""

    def __init__(self, samples_first):
        super().__init__()
        self.order = (0, 2, 1) if samples_first else (2, 0, 1)
        self.stem, self.head = nn.Conv2d(3, 8, 3, stride=2), nn.Linear(8, 5)
        self.wide, self.narrow = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        x = self.stem(x).flatten(2).permute(self.order)
        x = x + self.narrow(torch.relu(self.wide(x)))
        return self.head(x.mean(self.order.index(2)))


def test_samples_are_held_out_whole_where_tokens_come_first():
    batches, found = [(torch.randn(9, 3, 9, 9), None), (torch.randn(6, 3, 9, 9), None)], []
    for samples_first in (True, False):
        torch.manual_seed(0)
        model = randomised(Tokens(samples_first)).eval()
        graph = ChannelGraph(model, batches[0][0][:1], prune_linear=True)
        plan = graph.plan_of([unit.index for unit in graph.units if unit.filters[0][0] == "wide"][::2])
        smaller = graph.remove(plan)
        kept = {
            name: [i for i in range(len(graph.layers[name].unit_of)) if i not in gone] for name, gone in plan.items()
        }
        report = compensate(model, smaller, batches, kept, progress=False)
        assert "narrow" in [fit.name for fit in report.layers]
        found.append((smaller, report))
    (one, first), (other, second) = found
    for fit, same in zip(first.layers, second.layers, strict=True):
        assert fit.error_after == pytest.approx(same.error_after, rel=1e-3) and fit.ridge == same.ridge
    for weight, same in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(weight, same, rtol=1e-3, atol=1e-4)


class Reads(nn.Module):
    """A residual block whose second branch is a layer that reads something else than the first conv's channels."""

    def __init__(self, branch, layer):
        super().__init__()
        self.stem, self.conv, self.layer, self.head = (
            nn.Conv2d(3, 8, 3, padding=1),
            nn.Conv2d(8, 8, 1),
            layer,
            nn.Linear(8, 5),
        )
        self.branch, self.position = branch, nn.Parameter(torch.randn(1, 6, 9, 9))

    def forward(self, x):
        x = torch.relu(self.stem(x))
        return self.head(torch.relu(self.conv(x) + self.branch(self, x)).mean((2, 3)))


@pytest.mark.parametrize(
    ("branch", "layer", "reason"),
    [
        (lambda net, x: net.layer(net.position), nn.Conv2d(6, 8, 1), "its input does not depend on the images"),
        (
            lambda net, x: net.layer(torch.arange(6.0).to(x).sin())[None, :, None, None],
            nn.Linear(6, 8),
            "its input does not depend on the images",
        ),
        (
            lambda net, x: net.layer(x.flatten(2)).view_as(x),
            nn.Linear(81, 81),
            "it is applied along channels that were removed",
        ),
    ],
    ids=["a parameter", "a constant", "positions"],
)
def test_a_layer_that_does_not_read_the_channels_is_left_alone(branch, layer, reason):
    torch.manual_seed(0)
    model = randomised(Reads(branch, layer))
    graph = ChannelGraph(model, torch.zeros(1, 3, 9, 9))
    gone = {name: [1, 4] for name, info in graph.layers.items() if info.removable.all()}
    smaller, before = graph.remove(gone), copy.deepcopy(layer.state_dict())
    kept = {name: [i for i in range(8) if i not in (1, 4)] for name in gone}
    report = compensate(model, smaller, images(40), kept, progress=False)
    assert report.left_alone["layer"] == reason and "head" in [fit.name for fit in report.layers]
    assert all(torch.equal(value, before[name]) for name, value in model.layer.state_dict().items())


@pytest.mark.parametrize("left", [40, 41, 82])
def test_every_number_of_filters_that_are_left_is_repaired(left):
    """Networks whose sizes differ may be traced on batches of different sizes."""
    torch.manual_seed(0)
    model = randomised(
        nn.Sequential(nn.Conv2d(3, 90, 3), nn.ReLU(), nn.Conv2d(90, 4, 1), nn.Flatten(), nn.Linear(196, 5))
    )
    smaller, kept = cut(model, {"0": range(left, 90)})
    report = compensate(model, smaller, images(40), kept, progress=False)
    assert [fit.name for fit in report.layers] == ["2", "4"] and not report.left_alone.keys() - {"0"}
