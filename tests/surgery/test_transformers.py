"""Hidden units and attention heads of transformers: the law, files, exports, and a whole run."""

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import randomise
from torch import nn

from EnhancedPruning import EnhancedPruning, InputError, PruningSettings, load_pruned, save_pruned
from taylor_pruning.experiment.export import export_model
from taylor_pruning.surgery.graph import ChannelGraph

WIDTH, HEADS, SIZE, HIDDEN = 12, 3, 4, 10  # of the stream, heads, channels of a head, hidden units


class Attention(nn.Module):
    """Self-attention over tokens with one layer for queries, keys and values; in windows with a bias for every head."""

    def __init__(self, windows):
        super().__init__()
        self.num_heads, self.head_dim, self.scale, self.windows = HEADS, SIZE, SIZE**-0.5, windows
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * HEADS * SIZE), nn.Linear(HEADS * SIZE, WIDTH)
        if windows:
            self.table = nn.Parameter(torch.randn(9, HEADS))
            self.register_buffer("index", torch.arange(16) % 9)

    def forward(self, x):
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        if self.windows:
            scores = (q * self.scale) @ k.transpose(-2, -1)
            scores = scores + self.table[self.index].view(n, n, -1).permute(2, 0, 1)[None]
            x = scores.softmax(-1) @ v
        else:
            x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(b, n, -1))


class Transformer(nn.Module):
    """Patches, one pre-norm block, a head; `windows`: attention in shifted windows of 2 x 2."""

    def __init__(self, windows=False):
        super().__init__()
        self.windows, self.stem = windows, nn.Conv2d(3, WIDTH, 2, 2)
        self.norm1, self.attention = nn.LayerNorm(WIDTH), Attention(windows)
        self.norm2, self.fc1, self.fc2 = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x):
        x = self.stem(x).permute(0, 2, 3, 1)
        y = self.norm1(x)
        b, h, w, c = y.shape
        if self.windows:
            y = y.roll((-1, -1), (1, 2)).view(b, h // 2, 2, w // 2, 2, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, c)
            y = self.attention(y).view(b, h // 2, w // 2, 2, 2, c).permute(0, 1, 3, 2, 4, 5).reshape(b, h, w, c)
            x = x + y.roll((1, 1), (1, 2))
        else:
            x = x + self.attention(y.reshape(b, h * w, c)).reshape(b, h, w, c)
        return self.head((x + self.fc2(F.gelu(self.fc1(self.norm2(x))))).mean((1, 2)))


@pytest.fixture(params=[False, True], ids=["tokens", "windows"])
def network(request):
    torch.manual_seed(0)
    return randomise(Transformer(request.param))


def pictures(number=2):
    return torch.randn(number, 3, 8, 8, dtype=torch.double, generator=torch.Generator().manual_seed(1))


def closed(graph, units, x):
    gates = torch.ones(len(graph.units), dtype=x.dtype)
    gates[[unit.index for unit in units]] = 0
    with torch.no_grad(), graph.gated(gates):
        return graph.model(x)


ASKED = {  # options: units, hidden units and heads
    (True, False): (HIDDEN, 0),
    (False, True): (0, HEADS),
    (True, True): (HIDDEN, HEADS),
}


@pytest.mark.parametrize("asked", ASKED)
def test_what_is_asked_for_can_go_exactly(asked, network):
    hidden, heads = ASKED[asked]
    inside = SIZE if asked == (True, False) and network.windows else 0  # one channel of every head, with a fixed scale
    graph = ChannelGraph(network, pictures(1), prune_linear=asked[0], prune_heads=asked[1])
    assert sorted(len(unit.filters) for unit in graph.units) == [1] * hidden + [3 * HEADS] * inside + [3 * SIZE] * heads
    units = [unit for unit in graph.units if unit.index % 3 == 0]
    smaller, x = graph.remove(units), pictures()
    with torch.no_grad():
        torch.testing.assert_close(smaller(x), closed(graph, units, x), rtol=1e-9, atol=0)
    assert smaller.attention.num_heads == HEADS - bool(heads)
    if network.windows:
        assert smaller.attention.table.shape == (9, smaller.attention.num_heads)
    reasons = {name: info.reason for name, info in graph.layers.items()}
    assert (reasons["attention.qkv"] is None) == bool(heads or inside) and "layer_norm" in reasons["stem"]
    assert reasons["fc1"] == (None if hidden else "fully connected (see prune_linear)")


def test_nothing_of_it_goes_by_default(network):
    graph = ChannelGraph(network, pictures(1))
    assert not graph.units and graph.layers.keys() == {"stem"}


@pytest.mark.parametrize("norm", [nn.Identity, lambda: nn.LayerNorm(WIDTH)], ids=["free", "normalised"])
def test_heads_stay_where_their_size_is_computed_from_their_number(norm):
    """The width of the input over the number of heads: one head less would change the size of all others."""

    class Dividing(Attention):
        def forward(self, x):
            b, n, c = x.shape
            shape = (b, n, 3, self.num_heads, c // self.num_heads)
            q, k, v = self.qkv(x).reshape(shape).permute(2, 0, 3, 1, 4).unbind(0)
            return self.proj(((q @ k.transpose(-2, -1)).softmax(-1) @ v).transpose(1, 2).reshape(b, n, -1))

    torch.manual_seed(0)
    network = Transformer()
    network.attention, network.norm1 = Dividing(windows=False), norm()
    graph = ChannelGraph(randomise(network), pictures(1), prune_heads=True, verify=False)  # known without a trial
    reason = graph.layers["attention.qkv"].reason
    assert reason is not None and "in reshape (attention)" in reason, reason


class Grouped(nn.Module):
    """Several heads of queries read the same keys and values."""

    def __init__(self, heads):
        super().__init__()
        self.size, self.q, self.proj = SIZE, nn.Linear(WIDTH, 4 * SIZE), nn.Linear(4 * SIZE, WIDTH)
        self.k, self.v = (nn.Linear(WIDTH, heads * SIZE) for _ in range(2))

    def forward(self, x):
        b, n, _ = x.shape
        q, k, v = (layer(x).view(b, n, -1, self.size).transpose(1, 2) for layer in (self.q, self.k, self.v))
        x = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return self.proj(x.transpose(1, 2).reshape(b, n, -1))


@pytest.mark.parametrize(("heads", "filters"), [(2, 4 * SIZE), (1, SIZE)], ids=["with their keys", "alone"])
def test_heads_of_queries_that_share_keys_go(heads, filters):
    torch.manual_seed(0)
    network = Transformer()
    network.attention = Grouped(heads)
    graph = ChannelGraph(randomise(network), pictures(1), prune_heads=True)
    assert [len(unit.filters) for unit in graph.units] == [filters] * (2 if heads > 1 else 4)
    smaller, x = graph.remove(graph.units[:1]), pictures()
    with torch.no_grad():
        torch.testing.assert_close(smaller(x), closed(graph, graph.units[:1], x), rtol=1e-9, atol=0)
    if heads == 1:  # no head of it can go: the reason is not that of the stream that it reads
        assert not {graph.layers[f"attention.{name}"].reason for name in "kv"} & {graph.layers["stem"].reason, None}


def test_fewer_heads_are_saved_loaded_and_exported(tmp_path):
    torch.manual_seed(0)
    network = randomise(Transformer(windows=True)).float()
    x = pictures().float()
    graph = ChannelGraph(network, x[:1], prune_linear=True, prune_heads=True)
    smaller = graph.remove(graph.units[::2])
    save_pruned(tmp_path / "pruned.pt", smaller)
    loaded = load_pruned(tmp_path / "pruned.pt", lambda: Transformer(windows=True))
    export_model(smaller, x, tmp_path / "pruned.pt2", "pt2")
    with torch.no_grad():
        assert torch.equal(loaded(x), smaller(x)) and loaded.attention.num_heads < HEADS
        torch.testing.assert_close(torch.export.load(tmp_path / "pruned.pt2").module()(x), smaller(x))
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    export_model(smaller, x, tmp_path / "pruned.onnx", "onnx")
    session = onnxruntime.InferenceSession(tmp_path / "pruned.onnx", providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"images": pictures(3).float().numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(logits), smaller(pictures(3).float()), rtol=1e-4, atol=1e-5)


def test_a_run_removes_heads_and_hidden_units():
    torch.manual_seed(0)
    network = randomise(Transformer())
    data = [(pictures(8), torch.arange(8) % 4)] * 2
    settings = PruningSettings(rounds=1, prune_linear=True, prune_heads=True, layer_bound=2)
    before = copy.deepcopy(network.state_dict())
    result = EnhancedPruning(network, data, data, settings=settings, progress=False).prune(45, 2)
    assert result.model.attention.num_heads < HEADS and result.model.fc1.out_features < HIDDEN
    assert result.stages[-1]["macs"] < result.stages[0]["macs"]
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    with pytest.raises(InputError, match="prune_heads"):
        PruningSettings(prune_heads=3)


class Latents(nn.Module):
    """Learned latents and the tokens of the input are read by one layer."""

    def __init__(self):
        super().__init__()
        self.stem, self.latents = nn.Conv2d(3, WIDTH, 2, 2), nn.Parameter(torch.randn(1, 2, WIDTH))
        self.read, self.head = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, 4)

    def forward(self, x):
        x = self.stem(x).flatten(2).transpose(1, 2)
        return self.head(self.read(x).mean(1) + self.read(self.latents.repeat(len(x), 1, 1)).mean(1))


def test_a_sum_over_parameters_alone_is_named():
    graph = ChannelGraph(randomise(Latents()), pictures(1), prune_linear=True)
    assert graph.layers["stem"].reason.startswith("is summed over parameters alone")
