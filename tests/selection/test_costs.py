"""What a budget counts is what the network has, before and after a cut, whatever operations its forward is made of."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import deform_conv2d

from taylor_pruning.selection.costs import CostModel
from taylor_pruning.surgery.graph import ChannelGraph
from taylor_pruning.surgery.parts import PartsGraph
from taylor_pruning.training.profile import profile

HEAD = 4


def parameter(*shape):
    return nn.Parameter(torch.randn(*shape))


def of_experts(net, x):
    """Every sample has its own kernel, mixed of four."""
    kernels = torch.einsum("be,eoikl->boikl", net.route(x.mean((2, 3))).softmax(1), net.experts)
    y = F.conv2d(x.reshape(1, -1, *x.shape[2:]), kernels.flatten(0, 1), padding=1, groups=x.shape[0])
    return y.view(len(x), -1, *y.shape[2:])


def of_two_tensors(net, x):
    return F.conv2d(x, torch.cat([net.first, net.second]))


def of_low_rank(net, x):
    return F.conv2d(x, (net.left @ net.right)[..., None, None])


def of_every_third(net, x):
    return F.conv2d(x, net.experts[1])


def of_three_factors(net, x):
    return torch.einsum("bchw,cr,ro->bohw", x, net.left, net.right)


def squares(net, x):
    """A product that sums nothing has none that count."""
    return torch.einsum("bchw,bchw->bchw", x, x)


def widens(net, x):
    return net.conv(x)


def attends(net, x):
    tokens = x.flatten(2).mT
    q, k, v = net.qkv(tokens).view(len(x), tokens.shape[1], 3, -1, HEAD).permute(2, 0, 3, 1, 4)
    out = (q @ k.mT * HEAD**-0.5).softmax(-1) @ v
    return net.out(out.transpose(1, 2).flatten(2)).mT.unflatten(2, x.shape[2:])


def attends_in_one_call(net, x):
    tokens = x.flatten(2).mT
    q, k, v = net.qkv(tokens).view(len(x), tokens.shape[1], 3, -1, HEAD).permute(2, 0, 3, 1, 4)
    out = F.scaled_dot_product_attention(q, k, v)
    return net.out(out.transpose(1, 2).flatten(2)).mT.unflatten(2, x.shape[2:])


def meets_positions(net, x):
    y = net.value(x).flatten(2) @ (net.query(x).flatten(2).mT @ net.key(x).flatten(2)).softmax(-1)
    return y.unflatten(2, x.shape[2:])


def mixes_positions(net, x):
    """The rows of the layers are channels."""
    return net.back(F.relu(net.tokens(x.flatten(2)))).unflatten(2, x.shape[2:])


def keeps_a_head(net, x):
    net.kept = net.aux(x)
    return net.conv(x)


def adds_a_map(net, x):
    return net.conv(x) + net.of_map(net.map)


def scales(net, x):
    return net.conv(x) * net.scale


def bends(net, x):
    return deform_conv2d(x, net.places(x), net.conv.weight, net.conv.bias, padding=1)


BLOCKS = {  # function: (the block's layers and parameters, its output channels)
    of_experts: (lambda: {"experts": parameter(4, 10, 8, 3, 3), "route": nn.Linear(8, 4)}, 10),
    of_two_tensors: (lambda: {"first": parameter(6, 8, 3, 3), "second": parameter(4, 8, 3, 3)}, 10),
    of_low_rank: (lambda: {"left": parameter(10, 3), "right": parameter(3, 8)}, 10),
    of_every_third: (lambda: {"experts": parameter(4, 10, 8, 3, 3)}, 10),
    of_three_factors: (lambda: {"left": parameter(8, 3), "right": parameter(3, 10)}, 10),
    squares: (dict, 8),
    widens: (lambda: {"conv": nn.ConvTranspose2d(8, 10, 3, stride=2)}, 10),
    attends: (lambda: {"qkv": nn.Linear(8, 3 * 3 * HEAD), "out": nn.Linear(3 * HEAD, 10)}, 10),
    attends_in_one_call: (lambda: {"qkv": nn.Linear(8, 3 * 3 * HEAD), "out": nn.Linear(3 * HEAD, 10)}, 10),
    meets_positions: (lambda: {name: nn.Conv2d(8, 6, 1) for name in ("query", "key", "value")}, 6),
    mixes_positions: (lambda: {"tokens": nn.Linear(81, 20), "back": nn.Linear(20, 81)}, 8),
    keeps_a_head: (lambda: {"conv": nn.Conv2d(8, 10, 3), "aux": nn.Conv2d(8, 20, 3)}, 10),
    adds_a_map: (lambda: {"conv": nn.Conv2d(8, 10, 1), "of_map": nn.Conv2d(4, 10, 3, padding=1),
                          "map": parameter(1, 4, 9, 9)}, 10),
    bends: (lambda: {"places": nn.Conv2d(8, 18, 3, padding=1), "conv": nn.Conv2d(8, 10, 3)}, 10),
    scales: (lambda: {"conv": nn.Conv2d(8, 10, 3), "scale": parameter(1), "unused": nn.Conv2d(3, 50, 3)}, 10),
}  # fmt: skip


class Around(nn.Module):
    """A block between two convs."""

    def __init__(self, block):
        super().__init__()
        layers, out = BLOCKS[block]
        for name, value in layers().items():
            setattr(self, name, value)
        self.a, self.b, self.fc, self.block = nn.Conv2d(3, 8, 3), nn.Conv2d(out, 6, 1), nn.Linear(6, 5), block

    def forward(self, x):
        return self.fc(F.relu(self.b(F.relu(self.block(self, F.relu(self.a(x)))))).mean((2, 3)))


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.__name__)
def test_a_budget_counts_what_the_network_has(block):
    torch.manual_seed(0)
    images, model = torch.randn(1, 3, 11, 11), Around(block).eval()
    graph = ChannelGraph(model, images, prune_linear=True, prune_heads=True)
    gone = graph.units[1::3]
    networks = [(), gone[:1], gone]
    costs = [profile(graph.remove(units), images) for units in networks]
    for budget, key in (("macs", "macs"), ("params", "parameters")):
        for units, cost in zip(networks, costs, strict=True):
            model = CostModel(graph, budget)
            for unit in units:
                model.remove(unit.index)
            assert model.total() == pytest.approx(cost[key], rel=1e-9)
        saved = CostModel(graph, budget).savings()[gone[0].index].item()
        assert saved == pytest.approx(costs[0][key] - costs[1][key], rel=0.1)


@pytest.mark.parametrize("budget, key", [("macs", "macs"), ("params", "parameters")])
def test_a_budget_of_parts_counts_those_alone(budget, key):
    torch.manual_seed(0)
    images = torch.randn(2, 3, 11, 11)

    def part(inputs):
        return nn.Sequential(nn.Conv2d(inputs, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))

    model = nn.Sequential(part(3), nn.Conv2d(4, 5, 1), part(5)).eval()
    graph = PartsGraph(model, ["0", "2"], lambda network: network(images), len(images))
    costs, gone = CostModel(graph, budget), graph.units[1::3]
    dense, cut = (profile(network, images[:1])[key] for network in (model, graph.remove(gone)))
    total = costs.total()
    between = profile(model[1], model[0](images[:1]))[key]
    assert total == dense - between
    for unit in gone:
        costs.remove(unit.index)
    assert total - costs.total() == dense - cut
