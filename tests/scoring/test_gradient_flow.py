import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.autograd.graph import get_gradient_edge
from torch.nn import functional as F

from GradientFlowAnalyzer import GradientFlowAnalyzer, GradientFlowReport, _shrinkage, _trend_findings, collect_flow
from taylor_pruning.errors import InputError
from taylor_pruning.scoring.collecting import Wanted, collect_directions
from taylor_pruning.scoring.flow import WEIGHT_FLOOR, relative_flow, unit_gradient_norms, weigh
from taylor_pruning.surgery.graph import ChannelGraph


class Chain(nn.Module):
    """conv - BatchNorm - ReLU - conv - ReLU - linear; the ReLUs work in place unless `activation` says otherwise."""

    def __init__(self, activation=None):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 5, 3)
        self.bn1 = nn.BatchNorm2d(5)
        self.conv2 = nn.Conv2d(5, 4, 3, stride=2)
        self.act = activation or nn.ReLU(inplace=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = self.act(self.conv2(self.act(self.bn1(self.conv1(x)))))
        return self.head(x.mean((2, 3)))


class Residual(nn.Module):
    """Units of `stem` and `second` are the same channels, gated at two sites; `first` has its own."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.first = nn.Conv2d(4, 6, 3, padding=1)
        self.second = nn.Conv2d(6, 4, 3, padding=1)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = F.relu(self.stem(x))
        x = x + self.second(F.relu(self.first(x)))
        return self.head(F.relu(x).mean((2, 3)))


class SqueezeExcitation(nn.Module):
    """Six convs, a weak squeeze-and-excitation branch between the third and the fourth."""

    def __init__(self):
        super().__init__()
        self.before, self.after = stack(3, channels=3), stack(3, channels=8)
        self.fc1, self.fc2 = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.gate = nn.Sigmoid()
        self.head = nn.Linear(8, 3)
        nn.init.normal_(self.fc2.weight, std=1e-9)

    def forward(self, x):
        x = self.before(x)
        x = x * self.gate(self.fc2(F.leaky_relu(self.fc1(x.mean((2, 3), keepdim=True)))))
        return self.head(self.after(x).mean((2, 3)))


def stack(depth, gain=1.0, channels=3, width=8):
    """`depth` He-initialised convs without BatchNorm, every weight times `gain`; leaky ReLUs, so that none is dead."""
    layers = []
    for i in range(depth):
        conv = nn.Conv2d(channels if i == 0 else width, width, 3, padding=1)
        nn.init.kaiming_normal_(conv.weight, a=0.1, mode="fan_out")
        with torch.no_grad():
            conv.weight *= gain
        layers += [conv, nn.LeakyReLU(0.1, inplace=True)]
    return nn.Sequential(*layers)


def classifier(depth, gain=1.0):
    return nn.Sequential(*stack(depth, gain), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))


def batches(number=1, size=40, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(size, 3, 8, 8, generator=generator, dtype=dtype),
            torch.randint(0, 3, (size,), generator=generator),
        )
        for _ in range(number)
    ]


def analyze(model, number=1, size=40):
    return GradientFlowAnalyzer(model, torch.zeros(1, 3, 8, 8)).analyze(batches(number, size))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def chain():
    model = Chain().double().eval()
    nn.init.uniform_(model.bn1.weight, 0.5, 2)
    nn.init.normal_(model.bn1.running_mean)
    return model


def brute_force_flow(forward_parts, model, images, labels):
    """[N, units] from one backward pass per sample through activations that the forward is written out with.

    forward_parts(model, images) -> logits, [(activation [1, C, H, W], first unit of its channels)]
    """
    rows = []
    for image, label in zip(images, labels, strict=True):
        logits, activations = forward_parts(model, image[None])
        grads = torch.autograd.grad(F.cross_entropy(logits, label[None]), [a for a, _ in activations])
        squares = torch.zeros(1 + max(u + a.shape[1] for a, u in activations), dtype=images.dtype)[:-1]
        for (_, unit), grad in zip(activations, grads, strict=True):
            squares[unit : unit + grad.shape[1]] += grad[0].flatten(1).square().sum(1)
        rows.append(squares.sqrt())
    return torch.stack(rows)


def chain_parts(model, x):
    first = model.bn1(model.conv1(x))
    second = model.conv2(F.relu(first))
    return model.head(F.relu(second).mean((2, 3))), [(first, 0), (second, 5)]


def residual_parts(model, x):
    stem = model.stem(x)
    first = model.first(F.relu(stem))
    second = model.second(F.relu(first))
    return model.head(F.relu(F.relu(stem) + second).mean((2, 3))), [(stem, 0), (first, 4), (second, 0)]


def test_flow_equals_brute_force_behind_in_place_relu(chain):
    data = batches(2, 4, dtype=torch.float64)
    flow = collect_flow(chain, ChannelGraph(chain, data[0][0][:1]), data)
    expected = torch.cat([brute_force_flow(chain_parts, chain, *batch) for batch in data])
    torch.testing.assert_close(flow, expected)


def test_sites_of_a_unit_add_up_in_squares():
    model, data = Residual().double().eval(), batches(1, 4, dtype=torch.float64)
    graph = ChannelGraph(model, data[0][0][:1])
    order = [graph.layers["stem"].unit_of.tolist(), graph.layers["first"].unit_of.tolist()]
    flow = collect_flow(model, graph, data)
    torch.testing.assert_close(flow[:, order[0] + order[1]], brute_force_flow(residual_parts, model, *data[0]))


def test_overwritten_activation_is_refused(chain):
    images, labels = batches(1, 2, dtype=torch.float64)[0]
    graph = ChannelGraph(chain, images[:1])
    gates, gated = torch.ones(2, len(graph.units), dtype=torch.float64, requires_grad=True), []
    with graph.gated(gates, on_activation=lambda site, output: gated.append((site, output))):
        loss = F.cross_entropy(chain(images), labels, reduction="sum")
    with pytest.raises(ValueError, match="get_gradient_edge"):
        unit_gradient_norms(loss, gated, len(images), len(graph.units))


def test_tensors_and_edges_agree_where_nothing_is_in_place():
    model, (images, labels) = Residual().double().eval(), batches(1, 3, dtype=torch.float64)[0]
    graph = ChannelGraph(model, images[:1])
    tensors, edges = [], []

    def record(site, output):
        tensors.append((site, output))
        edges.append((site, get_gradient_edge(output)))

    gates = torch.ones(len(graph.units), dtype=torch.float64, requires_grad=True)
    with graph.gated(gates, on_activation=record):
        loss = F.cross_entropy(model(images), labels, reduction="sum")
    flow = unit_gradient_norms(loss, tensors, len(images), len(graph.units))
    torch.testing.assert_close(unit_gradient_norms(loss, edges, len(images), len(graph.units)), flow)


class Rows(nn.Module):
    """A conv over images, one over their rows of pixels as samples of their own, and one with the batch in another place."""

    def __init__(self):
        super().__init__()
        self.conv, self.line = nn.Conv2d(3, 5, 3), nn.Conv1d(5, 4, 3)
        self.point, self.head = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.parts(x)[0]

    def parts(self, x):
        first = self.conv(x)
        lines = F.relu(first).permute(0, 2, 1, 3).flatten(0, 1)
        second = self.line(lines)
        steps = F.relu(second).mean(2).unflatten(0, (len(x), -1)).transpose(0, 1)
        third = self.point(steps)
        return self.head(F.relu(third).mean(0)), [(first, 0), (second, 5), (third, 9)]


def test_rows_of_one_image_add_up():
    model, (images, labels) = Rows().double().eval(), batches(1, 4, dtype=torch.float64)[0]
    flow = collect_flow(model, ChannelGraph(model, images[:1], prune_linear=True), [(images, labels)])
    rows = []
    for image, label in zip(images, labels, strict=True):
        logits, parts = model.parts(image[None])
        grads = torch.autograd.grad(F.cross_entropy(logits, label[None]), [part for part, _ in parts])
        first, second, third = (grad.square() for grad in grads)
        rows.append(torch.cat([first.sum((0, 2, 3)), second.sum((0, 2)), third.sum((0, 1))]).sqrt())
    torch.testing.assert_close(flow, torch.stack(rows))


def test_flow_of_a_flat_activation():
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    images, labels = batches(1, 5, dtype=torch.float64)[0]
    flow = collect_flow(model, ChannelGraph(model, images[:1], prune_linear=True), [(images, labels)])
    hidden = model[1](images.flatten(1)).detach().requires_grad_()
    F.cross_entropy(model[3](hidden.relu()), labels, reduction="sum").backward()
    torch.testing.assert_close(flow, hidden.grad.abs())


def test_flow_does_not_depend_on_the_batch_size(chain):
    images, labels = batches(1, 6, dtype=torch.float64)[0]
    graph = ChannelGraph(chain, images[:1])
    whole = collect_flow(chain, graph, [(images, labels)])
    parts = collect_flow(chain, graph, list(zip(images.split(4), labels.split(4), strict=True)))
    torch.testing.assert_close(whole, parts)


@pytest.mark.parametrize("channels", [3, 4])  # the forward raises on images of four channels
def test_the_model_comes_back_as_it_was(channels):
    model = Chain()
    model.train()
    model.bn1.eval()
    model.conv2.weight.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    analyzer = GradientFlowAnalyzer(model, torch.zeros(1, 3, 8, 8))
    data = [(torch.randn(4, channels, 8, 8), torch.tensor([0, 1, 2, 0]))]
    if channels == 3:
        analyzer.analyze(data)
    else:
        with pytest.raises(InputError):
            analyzer.analyze(data)
    assert model.training and model.conv1.training and not model.bn1.training
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["conv2.weight"]
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "gives no batch"),
        (7, "the images of gradient flow is not iterable; give"),
        ([(torch.zeros(1, 3, 8, 8), torch.tensor([3]))], "labels"),
        ([(torch.full((1, 3, 8, 8), torch.nan), torch.tensor([0]))], "NaN"),
    ],
)
def test_data_that_cannot_be_measured(data, message):
    with pytest.raises(InputError, match=message):
        GradientFlowAnalyzer(Chain(), torch.zeros(1, 3, 8, 8)).analyze(data)


def test_a_generator_of_batches_is_measured():
    reports = [GradientFlowAnalyzer(Chain().eval(), torch.zeros(1, 3, 8, 8)) for _ in range(2)]
    reports[1].model.load_state_dict(reports[0].model.state_dict())
    data = batches(2, 4)
    assert reports[0].analyze(iter(data)).layers == reports[1].analyze(data).layers


def test_gradients_that_the_caller_has_switched_off():
    analyzer = GradientFlowAnalyzer(Chain(), torch.zeros(1, 3, 8, 8))
    with torch.no_grad(), pytest.raises(InputError, match="gradient flow needs gradients; call this outside of"):
        analyzer.analyze(batches(1, 4))


def test_network_without_units_is_refused():
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
    with pytest.raises(InputError, match="no filter"):
        GradientFlowAnalyzer(model, torch.zeros(1, 3, 8, 8)).analyze(batches())


def test_report_from_flow_equals_analyze_and_checks_its_shape():
    model = Chain()
    graph = ChannelGraph(model, torch.zeros(1, 3, 8, 8))
    flow = collect_flow(model, graph, batches(2, 20))
    report = GradientFlowReport.from_flow(graph, flow)
    assert report.as_dict() == analyze(model, 2, 20).as_dict()
    with pytest.raises(InputError, match="9 units"):
        GradientFlowReport.from_flow(graph, flow[:, 1:])
    with pytest.raises(InputError, match="NaN"):
        GradientFlowReport.from_flow(graph, flow * torch.nan)


def test_layer_figures():
    model = Chain()
    graph = ChannelGraph(model, torch.zeros(1, 3, 8, 8))
    flow = torch.rand(30, 9, dtype=torch.float64) + 0.1
    flow[:, 2] *= 1e-3
    report = GradientFlowReport.from_flow(graph, flow)
    torch.testing.assert_close(report.unit_flow, flow.mean(0))
    conv1, conv2 = report.layers
    norms = flow[:, :5].norm(dim=1)
    assert conv1.mean == pytest.approx(flow[:, :5].mean().item())
    assert conv1.spread == pytest.approx(flow[:, :5].mean(0).std(correction=0).item())
    assert conv1.norm == pytest.approx(norms.mean().item())
    assert conv1.signal_to_noise == pytest.approx((norms.mean() / norms.std(correction=0)).item(), rel=1e-3)
    assert (conv1.near_zero, conv2.near_zero) == (0.2, 0)
    assert conv1.ratio_next == pytest.approx(conv1.norm / conv2.norm) == pytest.approx(1 / conv2.ratio_previous)
    assert conv1.ratio_previous is None and conv2.ratio_next is None


def test_layers_that_share_units_count_once_and_per_gate():
    graph = ChannelGraph(Residual(), torch.zeros(1, 3, 8, 8))
    flow = torch.ones(3, len(graph.units))
    flow[:, graph.layers["stem"].unit_of] = 2**0.5  # two sites, each of norm 1
    layers = {layer.name: layer for layer in GradientFlowReport.from_flow(graph, flow).layers}
    assert layers["stem"].mean == pytest.approx(1) and layers["first"].mean == pytest.approx(1)
    assert layers["second"].same_as == "stem" and layers["second"].ratio_previous is None
    assert layers["first"].ratio_next is None


def test_protected_layers_are_named_and_not_measured():
    model = Chain()
    graph = ChannelGraph(model, torch.zeros(1, 3, 8, 8), exclude=["conv1"])
    report = GradientFlowAnalyzer(model, torch.zeros(1, 3, 8, 8), graph).analyze(batches())
    conv1 = report.layers[0]
    assert (conv1.filters, conv1.measured, conv1.norm) == (5, 0, None) and "excluded" in conv1.reason
    assert report.as_dict()["filters"]["conv1"] == [None] * 5
    assert "1 of 2 layers" in str(report)


def test_as_dict_is_plain_json():
    text = json.dumps(analyze(classifier(6)).as_dict(), allow_nan=False)
    assert set(json.loads(text)) == {"samples", "shrinkage", "findings", "thresholds", "layers", "filters"}


@pytest.mark.parametrize("model", [classifier, SqueezeExcitation], ids=["chain", "squeeze-and-excitation"])
def test_a_healthy_network_has_no_findings(model):
    report = analyze(model(12) if model is classifier else model())
    assert report.findings == () and "nothing remarkable" in str(report)


def test_dead_filters_are_named():
    model = classifier(6)
    with torch.no_grad():
        model[6].weight[:, [1, 5]] = 0  # nothing reads them
    assert analyze(model).findings == ("dead filters: 2 of 8 in 4 (1, 5)",)
    assert analyze(model, size=20).findings == ()  # too few images to call a filter dead
    assert analyze(model, size=20).layers[2].dead == (1, 5)


def test_a_filter_whose_relu_is_shut_is_dead():
    model = Chain()
    with torch.no_grad():
        model.bn1.bias[3] = -1e3
    assert analyze(model).layers[0].dead == (3,)


def test_a_layer_that_no_gradient_reaches():
    model = classifier(6)
    nn.init.zeros_(model[4].weight)
    assert analyze(model).findings == ("no gradient: none reaches 0, 2",)


def test_vanishing_gradient():
    report = analyze(classifier(12, gain=0.3))
    (finding,) = report.findings
    assert finding.startswith("vanishing gradient") and " 0, 2, " in finding and " 22" not in finding
    assert 0.2 < report.shrinkage < 0.45


def test_exploding_gradient():
    report = analyze(classifier(12, gain=3))
    (finding,) = report.findings
    assert finding.startswith("exploding gradient") and " 0, 2, " in finding and " 22" not in finding
    assert 2.2 < report.shrinkage < 4.5


def test_vanishing_gradient_does_not_underflow():
    report = analyze(classifier(30, gain=0.1))
    assert 0 < report.layers[0].norm < 1e-25
    assert [line.split(":")[0] for line in report.findings] == ["vanishing gradient"]


def test_bottleneck():
    model = classifier(12)
    with torch.no_grad():
        model[4].weight *= 1e-3
    assert analyze(model).findings == ("bottlenecks: most of the gradient is lost at 4 -> 2",)


def test_findings_are_at_most_ten_lines():
    model = classifier(14, gain=0.2)
    with torch.no_grad():
        for conv in model[2:28:2]:
            conv.weight[:, 0] = 0
        model[24].weight *= 1e-6
        model[2].weight.zero_()
    findings = analyze(model).findings
    assert 7 <= len(findings) <= 10 and "further layers" in "".join(findings)


@pytest.fixture(params=["chain", "residual"])
def graph(request):
    model = Chain() if request.param == "chain" else Residual()
    return ChannelGraph(model, torch.zeros(1, 3, 8, 8))


def test_weights_are_positive_with_mean_one_in_each_layer(graph):
    values = torch.rand(7, len(graph.units)) * torch.logspace(-9, 3, len(graph.units))
    values[:, 0] = 0
    weights = relative_flow(graph, values)
    assert weights.shape == (len(graph.units),) and weights.min() >= WEIGHT_FLOOR
    for info in graph.layers.values():
        assert weights[info.unit_of].mean().item() == pytest.approx(1)


def test_weights_without_any_flow_are_one(graph):
    weights = relative_flow(graph, torch.zeros(4, len(graph.units)))
    torch.testing.assert_close(weights, torch.ones_like(weights))


def test_mean_is_one_in_layers_that_share_a_part_of_their_units():
    class PartlyShared(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right, self.sum = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.Conv2d(3, 8, 1)
            self.head = nn.Conv2d(8, 3, 1)

        def forward(self, x):
            return self.head(F.relu(torch.cat([self.left(x), self.right(x)], 1) + self.sum(x))).mean((2, 3))

    graph = ChannelGraph(PartlyShared(), torch.zeros(1, 3, 8, 8))
    assert len(graph.units) == 8
    weights = relative_flow(graph, torch.rand(5, 8))
    for info in (graph.layers[name] for name in ("left", "right", "sum")):
        assert weights[info.unit_of].mean().item() == pytest.approx(1)


def test_relative_flow_formula():
    graph = ChannelGraph(Chain(), torch.zeros(1, 3, 8, 8))
    flow = torch.rand(6, 9, dtype=torch.float64)
    mean = flow.mean(0)
    expected = 0.1 + 0.9 * torch.cat([mean[:5] / mean[:5].mean(), mean[5:] / mean[5:].mean()])
    torch.testing.assert_close(relative_flow(graph, flow), expected)
    scaled = torch.cat([flow[:, :5] * 100, flow[:, 5:]], 1)  # the scale of a layer does not matter
    torch.testing.assert_close(relative_flow(graph, scaled), expected)


def test_weigh_keeps_units_of_large_weight_whatever_the_sign():
    scores = torch.tensor([2.0, -2.0, 0.0, torch.nan])
    for low, high in ((0.1, 0.5), (0.5, 1.0), (1.0, 3.0)):
        less, more = (weigh(scores, torch.full((4,), w, dtype=torch.float64)) for w in (low, high))
        assert more[0] > less[0] > 0 and less[1] < more[1] < 0
        assert more[2] == 0 and more[3].isnan()
    assert torch.equal(weigh(scores[:3], torch.ones(3)), scores[:3])


@pytest.mark.parametrize("sign, kind", [(1, "vanishing"), (-1, "exploding")])
def test_a_trend_names_the_layers_that_are_far_off_the_median(sign, kind):
    norms = [10.0 ** (sign * power) for power in (-8, -6, -4, -2, 0)]
    passing = [(SimpleNamespace(name=name), norm) for name, norm in zip("abcde", norms, strict=True)]
    (line,) = _trend_findings(passing, _shrinkage(passing))
    assert line == f"{kind} gradient: x {10.0 ** (-2 * sign):.2g} per layer towards the input, most in a, b"


class Gated(nn.Module):
    """x * sigmoid(x), and a SiLU in place."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 5, 3), nn.Linear(5, 3)

    def parts(self, x):
        first = self.first(x)
        second = self.second(first * first.sigmoid())
        return self.head(F.silu(second.clone(), inplace=True).mean((2, 3))), [(first, 0), (second, 6)]

    def forward(self, x):
        return self.parts(x)[0]


@pytest.mark.parametrize("once", [True, False])
def test_flow_is_that_before_smooth_functions(once):
    torch.manual_seed(0)
    model, data = Gated().double().eval(), batches(1, 4, dtype=torch.float64)
    graph = ChannelGraph(model, data[0][0][:1])
    assert [site.node.name.partition("_")[0] for site in graph.sites] == ["mul", "silu"]
    if once:
        flow = collect_directions(model, graph, data, Wanted(4, flow=True), progress=False).flow
    else:
        flow = collect_flow(model, graph, data)
    torch.testing.assert_close(flow, brute_force_flow(Gated.parts, model, *data[0]))


@pytest.mark.parametrize("function", [nn.Tanh, nn.SiLU, nn.GELU])
def test_filters_whose_smooth_function_is_saturated_are_dead(function):
    torch.manual_seed(0)
    layers = [layer for width in (3, 8) for layer in (nn.Conv2d(width, 8, 3), function())]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)).eval()
    with torch.no_grad():
        model[2].bias[5] = -60
    (found,) = GradientFlowAnalyzer(model, torch.randn(1, 3, 9, 9)).analyze(batches(2, 20)).findings
    assert found == "dead filters: 1 of 8 in 2 (5)"
