"""The fit of the layer that gives the logits, in float64 against its definition."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from taylor_pruning.repair import logits
from taylor_pruning.repair.compensation import compensate
from taylor_pruning.repair.logits import Logits
from taylor_pruning.surgery.graph import ChannelGraph


def rows(features=6, classes=5, number=40):
    return Logits(*(torch.randn(number, size, dtype=torch.double) for size in (features, classes, classes)))


def objective(found, ridge, weight, bias):
    """As the module's text says."""
    t = logits.TEMPERATURE
    p, q = (found.wanted / t).softmax(1), ((found.present + found.x @ weight + bias) / t).softmax(1)
    gram = (found.x - found.x.mean(0)).mT @ (found.x - found.x.mean(0))
    penalty = ridge / (2 * len(found.x)) * gram.diagonal().mean() * weight.square().sum()
    return t**2 * (p * (p / q).log()).sum(1).mean() + penalty


@pytest.mark.parametrize("ridge", [1.0, 1e-3])
def test_the_fit_is_the_least_of_what_the_text_says(ridge, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(logits, "ENOUGH", 1e-14)
    found = rows()
    weight, bias = (part.requires_grad_() for part in found.nearest(ridge, None, True))
    gradients = torch.autograd.grad(objective(found, ridge, weight, bias), (weight, bias))
    assert max(gradient.abs().max() for gradient in gradients) < 1e-5
    again = found.nearest(ridge, (torch.randn_like(weight), torch.randn_like(bias)), True)
    assert torch.allclose(again[0], weight, atol=1e-3)  # convex: it does not matter where the fit begins


@pytest.mark.parametrize("size", [1e-3, 1e3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_size_of_features_changes_no_fit(size, dtype):
    """Neither where it begins at zero nor where it goes on."""
    torch.manual_seed(0)
    one = Logits(*(part.to(dtype) for part in vars(rows(number=100)).values()))
    reached = []
    for found in (one, Logits(one.x * size, one.present, one.wanted)):
        first = found.nearest(1e-1, None, True)
        reached.append([found.divergence(*fit)[0] for fit in (first, found.nearest(1e-3, first, True))])
    assert reached[1] == pytest.approx(reached[0], rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_features_that_never_vary_leave_all_to_the_bias(dtype):
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        x, present, wanted = (torch.randn(1, n, generator=generator, dtype=torch.float64).to(dtype) for n in (6, 5, 5))
        found = logits.Logits(*(each.repeat(7, 1) for each in (x, present, wanted)))
        weight, _ = found.nearest(1e-4, None, True)
        assert not weight.any()


def test_without_a_bias_none_is_fitted(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(logits, "ENOUGH", 1e-14)
    found = rows()
    found.x -= found.x.mean(0)  # the penalty of the text is of centred features
    weight, bias = found.nearest(1e-2, None, False)
    weight.requires_grad_()
    (gradient,) = torch.autograd.grad(objective(found, 1e-2, weight, 0.0), weight)
    assert gradient.abs().max() < 1e-5 and not bias.any()


class Classifier(nn.Module):
    def __init__(self, bias, classes=30):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 24, 3), nn.Linear(24, classes, bias=bias)

    def forward(self, x):
        return self.head(torch.relu(self.conv(x)).mean((2, 3)))


def repaired(model, x, gone, **options):
    """The network without the first filters of its conv, and the report of its repair."""
    smaller = ChannelGraph(model, x[:1]).remove({"conv": list(range(gone))})
    kept = {"conv": list(range(gone, 24))}
    return smaller, compensate(model, smaller, [(x, None)], kept, progress=False, **options)


@pytest.mark.parametrize("bias", [True, False])
def test_predictions_on_other_images_come_closer_than_by_least_squares(bias):
    torch.manual_seed(0)
    model = Classifier(bias).double().eval()
    model.head.weight.data *= 40  # confident predictions
    x, others = (torch.randn(number, 3, 3, 3, dtype=torch.double) for number in (1000, 2000))
    found = {}
    for to_predictions in (True, False):
        smaller, report = repaired(model, x, 16, to_predictions=to_predictions)
        with torch.no_grad():
            p, q = ((net(others) / logits.TEMPERATURE).log_softmax(1) for net in (model, smaller))
        found[report.layers[-1].matches] = F.kl_div(q, p, log_target=True, reduction="batchmean")
    assert found["predictions"] < 0.9 * found["layer"]
    assert (smaller.head.bias is None) == (not bias)


def test_where_least_squares_come_closer_they_stay():
    """The removed features are multiples of others: nothing is lost."""
    torch.manual_seed(0)
    model = Classifier(True).double().eval()
    model.conv.weight.data[:10], model.conv.bias.data[:10] = model.conv.weight[10:20], model.conv.bias[10:20]
    x = torch.randn(100, 3, 3, 3, dtype=torch.double)
    smaller, report = repaired(model, x, 10)
    assert report.layers[-1].matches == "layer"
    with torch.no_grad():
        assert torch.allclose(smaller(x), model(x), atol=1e-4)


@pytest.mark.parametrize("tail", [nn.ReLU(), nn.Unflatten(1, (5, 6))])
def test_a_layer_whose_output_is_not_that_of_the_network_is_fitted_to_its_outputs(tail):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 24, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 30), tail
    )
    x = torch.randn(60, 3, 8, 8)
    smaller = ChannelGraph(model.eval(), x[:1]).remove({"0": [0, 1, 2]})
    report = compensate(model, smaller, [(x, None)], {"0": list(range(3, 24))}, progress=False)
    assert report.layers[-1].matches == "layer"


def test_the_largest_ridge_within_one_standard_error_is_taken(monkeypatch):
    torch.manual_seed(0)
    model = Classifier(True).double().eval()
    model.head.weight.data *= 10
    x, ridges = torch.randn(300, 3, 3, 3, dtype=torch.double), {}
    for error in (0.0, 0.05, 10.0):
        monkeypatch.setattr(logits, "mean_and_error", lambda values, e=error: (values.mean(), values.new_tensor(e)))
        ridges[error] = repaired(model, x, 16)[1].layers[-1].ridge
    assert ridges[0.0] < ridges[0.05] < ridges[10.0] == logits.RIDGES[0]


def test_no_ridge_is_taken_that_leads_away_from_the_dense_network(monkeypatch):
    """Though it lies within one standard error of the best."""
    torch.manual_seed(0)
    model, found = Classifier(True).double().eval(), iter([(1.0, 0.0), (2.0, 5.0), (0.5, 5.0), (0.6, 5.0)])
    monkeypatch.setattr(Logits, "divergence", lambda *args: next(found))
    monkeypatch.setattr(logits.LogitsRegression, "_reached_by_squares", lambda *args: (math.inf, 0.0))
    _, report = repaired(model, torch.randn(60, 3, 3, 3, dtype=torch.double), 16)
    assert report.layers[-1].ridge == logits.RIDGES[1]


@pytest.mark.parametrize("error, matches", [(0.0, "layer"), (10.0, "predictions")])
def test_least_squares_stay_only_where_they_come_clearly_closer(error, matches, monkeypatch):
    torch.manual_seed(0)
    model = Classifier(True).double().eval()
    model.head.weight.data *= 10
    monkeypatch.setattr(logits.LogitsRegression, "_reached_by_squares", lambda *args: (0.0, error))
    assert repaired(model, torch.randn(300, 3, 3, 3, dtype=torch.double), 16)[1].layers[-1].matches == matches


def test_half_precision():
    torch.manual_seed(0)
    model = Classifier(True).to(torch.bfloat16).eval()
    smaller, report = repaired(model, torch.randn(60, 3, 3, 3, dtype=torch.bfloat16), 16)
    fit = report.layers[-1]
    assert fit.matches == "predictions" and fit.error_after < fit.error_before
    assert smaller.head.weight.dtype == torch.bfloat16 and smaller.head.weight.isfinite().all()


def test_divergences_that_rounding_makes_negative_are_none():
    """As of predictions that hardly differ between images."""
    torch.manual_seed(0)
    means, spreads = [], []
    for _ in range(50):
        wanted = torch.randn(10) + 1e-5 * torch.randn(8, 10)
        found = Logits(torch.ones(8, 1), wanted + 1e-5 * torch.randn(8, 10), wanted)
        means.append(found.divergences().mean().item())
        assert found.divergence()[0] == max(0.0, means[-1])
        spreads.append(found.spread())
    assert min(means) < 0 and min(spreads) == 0.0


def test_where_neither_fit_comes_closer_the_weights_stay():
    """As where steps across layers have brought them: the fit of this layer alone is made from a few images."""
    torch.manual_seed(1)
    model = Classifier(True).double().eval()
    model.head.weight.data *= 40
    smaller, _ = repaired(model, torch.randn(1000, 3, 3, 3, dtype=torch.double), 16)
    before, kept = copy.deepcopy(smaller.state_dict()), {"conv": list(range(16, 24))}
    few = torch.randn(15, 3, 3, 3, dtype=torch.double)
    report = compensate(model, smaller, [(few, None)], kept, progress=False, only_logits=True)
    assert [(fit.name, fit.ridge) for fit in report.layers] == [("head", None)]
    assert all(torch.equal(tensor, before[name]) for name, tensor in smaller.state_dict().items())


def test_the_spread_of_very_sure_predictions_is_a_number():
    """The third class is never predicted: its probability is zero in single precision."""
    wanted = torch.tensor([[0.0, 500.0, -500.0], [500.0, 0.0, -500.0]])
    t = logits.TEMPERATURE
    assert Logits(torch.zeros(2, 1), wanted, wanted).spread() == pytest.approx(t**2 * math.log(2))
