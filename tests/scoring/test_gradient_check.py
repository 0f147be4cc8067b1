import pytest
import torch
from conftest import randomise
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from EnhancedFilterPruner import EnhancedFilterPruner
from GradientFlowAnalyzer import GradientFlowAnalyzer
from taylor_pruning.errors import InputError


class Network(nn.Module):
    """Two convs whose outputs `between` makes something of, one conv behind it."""

    def __init__(self, between):
        super().__init__()
        self.between = between
        self.first = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Conv2d(5, 6, 3), nn.BatchNorm2d(6), nn.ReLU())
        self.second = nn.Conv2d(6, 6, 3, padding=1)
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        x = self.between(self, self.first, x)
        return self.head(F.relu(self.second(x)).mean((2, 3)))


def no_grad(network, first, x):
    with torch.no_grad():
        return first(x)


def a_part_behind_detach(network, first, x):
    x = first[1](first[0](x)).detach()
    return first[4](first[3](first[2](x)))


def detached_operand(network, first, x):
    x = first(x)
    return x + F.relu(network.second(x.detach()))


def kept(network, first, x):
    network.last = first(x).detach()
    return first(x)


def sharp_threshold(network, first, x):
    return (first(x) > 0.3).to(x.dtype)


WRONG = {  # what the forward does: layers along whose gates the gradient is not the derivative
    "no_grad": (no_grad, "first.0, first.2"),
    "detach": (lambda network, first, x: first(x).detach(), "first.0, first.2"),
    "data": (lambda network, first, x: first(x).data, "first.0, first.2"),
    "comparison": (sharp_threshold, "first.0"),
    "rounding": (lambda network, first, x: first(x).round(), "first.0, first.2"),
    "a part behind detach": (a_part_behind_detach, "first.0"),
    "a detached operand": (detached_operand, "first.0"),
    "a detached scale": (lambda network, first, x: (y := first(x)) / (y.detach().mean() + 0.1), "first.0"),
}


def halves(network, first, x):
    one, other = first(x).chunk(2, 1)  # filters in pairs
    return torch.cat([one + other, one * other.sign().detach()], 1)


class OwnBackward(torch.autograd.Function):
    """Keeps nothing of its forward, as parts of reversible networks; its backward would compute it anew."""

    @staticmethod
    def forward(ctx, x, part, *parameters):
        with torch.no_grad():
            return part(x)


RIGHT = {
    "filters in pairs": halves,
    "nothing": lambda network, first, x: first(x),
    "kept": kept,
    "constants": lambda network, first, x: torch.maximum(y := first(x), torch.zeros_like(y)) * y.new_ones(1),
    "an own backward": lambda network, first, x: OwnBackward.apply(x, first, *first.parameters()),
    "a shut layer": lambda network, first, x: F.relu(first(x) - 1e3) + x.mean(),
}


def network(between):
    torch.manual_seed(0)
    return randomise(Network(between))


@pytest.mark.parametrize("options", [{}, {"curvature": "hvp"}, {"use_gradient_flow": True}])
@pytest.mark.parametrize("kind", WRONG)
def test_layers_without_a_true_derivative_are_named(kind, options, images, labels):
    between, layers = WRONG[kind]
    pruner = EnhancedFilterPruner(network(between), images, progress=False, **options)
    with pytest.raises(
        InputError, match=f"filters of {layers} (although|is not the derivative).*or exclude these layers"
    ):
        pruner.rank([(images, labels)])


@pytest.mark.parametrize("kind", RIGHT)
def test_networks_with_true_derivatives_are_scored(kind, images, labels):
    pruner = EnhancedFilterPruner(network(RIGHT[kind]), images, progress=False)
    assert torch.isfinite(pruner.rank([(images, labels)]).scores()).all()


def test_what_the_refusal_asks_for_is_enough(images, labels):
    pruner = EnhancedFilterPruner(network(no_grad), images, exclude=("first.*",), progress=False)
    assert pruner.rank([(images, labels)]).get_pruning_plan(30).keys() == {"second"}


def test_scores_behind_compensation_are_refused_too(images, labels):
    pruner = EnhancedFilterPruner(network(no_grad), images, progress=False)
    with pytest.raises(InputError, match="first.0, first.2"):
        pruner.rank([(images, labels)], compensation=[(images, labels)])


def test_a_forward_without_any_gradient_is_refused(images, labels):
    class WithoutGradient(Network):
        forward = torch.no_grad()(Network.forward)

    torch.manual_seed(0)
    model = randomise(WithoutGradient(RIGHT["nothing"]))
    with pytest.raises(InputError, match="no gradient leads from the outputs to any filter"):
        EnhancedFilterPruner(model, images, progress=False).rank([(images, labels)])


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_what_turns_gradients_off_for_a_backward_of_its_own_is_scored_as_what_it_wraps(images, labels):
    wrapped = {
        "reentrant": lambda network, first, x: checkpoint(first, x, use_reentrant=True),
        "checkpoint": lambda network, first, x: checkpoint(first, x, use_reentrant=False),
        "function": RIGHT["an own backward"],
    }
    plain = EnhancedFilterPruner(network(RIGHT["nothing"]), images, progress=False).rank([(images, labels)])
    for between in wrapped.values():
        pruner = EnhancedFilterPruner(network(between), images, progress=False).rank([(images, labels)])
        torch.testing.assert_close(pruner.scores(), plain.scores())


@pytest.mark.parametrize("kind", ["no_grad", "detach"])
def test_the_analyzer_reports_what_no_gradient_reaches(kind, images, labels):
    report = GradientFlowAnalyzer(network(WRONG[kind][0]), images).analyze([(images, labels)])
    assert report.findings[0] == "no gradient: none reaches first.0, first.2"


def test_batchnorm_without_running_statistics_mixes_images(images, labels):
    norm = nn.BatchNorm2d(5, track_running_stats=False)
    model = nn.Sequential(
        nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Conv2d(5, 5, 3), norm, nn.ReLU(), nn.Flatten(), nn.Linear(80, 4)
    )
    model = model.double().eval()
    pruner = EnhancedFilterPruner(model, images, progress=False)
    assert pruner.curvature_path == "gauss-newton"
    assert pruner.curvature_reason == "the network has batch_norm without running statistics"
    with pytest.raises(InputError, match="depend on the other images of its batch"):
        pruner.rank([(images, labels)])


MIXING = {
    "the largest of the batch": lambda y: y + y.amax(0, keepdim=True),
    "each with the one before": lambda y: torch.cat([y[:1], y[1:] + y[:-1]]),
}


@pytest.mark.parametrize("mixed", MIXING.values(), ids=MIXING)
def test_images_compared_with_each_other_mix(mixed, images, labels):
    model = network(lambda network, first, x: mixed(first(x)))
    with pytest.raises(InputError, match="depend on the other images of its batch"):
        EnhancedFilterPruner(model, images, progress=False).rank([(images, labels)])


def test_a_softmax_less_the_maximum_of_the_batch_mixes_nothing_but_rounding(images, labels):
    def attention(network, first, x):
        exponentials = (first(x) - first(x).max()).exp()
        return first(x) * exponentials / exponentials.sum((2, 3), keepdim=True)

    model = network(attention).float()
    EnhancedFilterPruner(model, images.float(), progress=False).rank([(images.float(), labels)])


@pytest.mark.parametrize("norm", [nn.LayerNorm((5, 4, 4)), nn.InstanceNorm2d(5)], ids=["layer", "instance"])
def test_order_3_is_refused_where_pytorch_has_a_wrong_third_derivative(norm, images, labels):
    model = nn.Sequential(
        nn.Conv2d(3, 5, 3), nn.SiLU(), nn.Conv2d(5, 5, 3), norm, nn.SiLU(), nn.Flatten(), nn.Linear(80, 4)
    )
    with pytest.raises(InputError, match="no right third derivative of .*_norm.*curvature exact"):
        EnhancedFilterPruner(model.double().eval(), images, 3, curvature="hvp", progress=False).rank([(images, labels)])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_gradients_that_the_caller_has_switched_off(mode):
    images = torch.zeros(4, 3, 8, 8)
    pruner = EnhancedFilterPruner(Network(lambda network, first, x: first(x)), images[:1], progress=False)
    with mode(), pytest.raises(InputError, match="scoring needs gradients; call this outside of torch.no_grad"):
        pruner.rank([(images, torch.arange(4))])


def test_an_operation_without_a_derivative_is_named(images, labels):
    class Incomplete(Network):
        def forward(self, x):
            return torch.igamma(super().forward(x).abs() + 1, x.new_ones(()))

    model = randomise(Incomplete(RIGHT["nothing"]))
    with pytest.raises(
        InputError, match=r"no gradient along its filters \(.*igamma.* is not implemented\); change its"
    ):
        EnhancedFilterPruner(model, images, progress=False).rank([(images, labels)])
