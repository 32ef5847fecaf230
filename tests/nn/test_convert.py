"""compress(model, config): whole models as people write them, and everything around a model's life."""

from __future__ import annotations

import copy
import pickle
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch_geometric import nn as pyg
from torch_geometric.nn.models import GAT, GCN, GraphSAGE

from conftest import FP32, assert_close, projected, relative_error, tiny_dataset
from iexact_runner.compression.seeds import mix
from iexact_runner.config import CompressionConfig, DigitsConfig, GATConfig, GCN2Config, GCNConfig, SAGEConfig
from iexact_runner.config.presets import preset
from iexact_runner.data import load_dataset
from iexact_runner.errors import ConfigError, TrainingError
from iexact_runner.measure import SavedTensors
from iexact_runner.nn import MODELS, build_model, compress, compressed_pass
from iexact_runner.nn.baseline import PyGBaseline, baseline_graph

IN, OUT, HIDDEN = 13, 3, 32
INT2 = projected(bits=2, kept_frac=0.125, col_size=8)


class OneReLU(nn.Module):
    """Every layer goes through the same ReLU and the same Dropout."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.conv1, self.conv2 = pyg.SAGEConv(IN, HIDDEN), pyg.SAGEConv(HIDDEN, HIDDEN)
        self.lin, self.norm = nn.Linear(HIDDEN, OUT), nn.BatchNorm1d(HIDDEN)
        self.act, self.drop = nn.ReLU(inplace=True), nn.Dropout(dropout)

    def forward(self, x, edge_index):
        x = self.drop(self.act(self.norm(self.conv1(x, edge_index))))
        return self.lin(self.drop(self.act(self.conv2(x, edge_index))))


class Functional(nn.Module):
    """No module but the layers with parameters; a weight of its own."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.conv1, self.conv2 = pyg.GATConv(IN, HIDDEN // 2, heads=2), pyg.GCNConv(HIDDEN, HIDDEN)
        self.weight, self.dropout = nn.Parameter(torch.randn(HIDDEN, OUT) / 6), dropout

    def forward(self, x, edge_index):
        x = F.dropout(x, self.dropout, self.training)
        x = F.elu(self.conv1(x, edge_index))
        x = F.dropout(x, p=self.dropout, training=self.training)
        x = self.conv2(x, edge_index).relu()
        return (x @ self.weight).log_softmax(dim=-1)


class Skips(nn.Module):
    """Residual blocks in an encoder of its own, and everything concatenated at the end."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(IN, HIDDEN), nn.LeakyReLU(0.1), nn.Dropout(dropout))
        self.convs = nn.ModuleList(pyg.GraphConv(HIDDEN, HIDDEN, aggr=aggr) for aggr in ("mean", "max", "add"))
        self.norms = nn.ModuleList(pyg.BatchNorm(HIDDEN) for _ in self.convs)
        self.head = nn.Linear(HIDDEN * 4, OUT)

    def forward(self, x, edge_index):
        maps = [self.encoder(x)]
        for conv, norm in zip(self.convs, self.norms, strict=True):
            maps.append(maps[-1] + F.relu(norm(conv(maps[-1], edge_index))))
        return self.head(torch.cat(maps, dim=-1))


ARCHITECTURES = {
    "GCN": lambda dropout=0.0: GCN(IN, HIDDEN, 3, OUT, dropout=dropout, norm="batch"),
    "GCN-jk": lambda dropout=0.0: GCN(IN, HIDDEN, 3, OUT, dropout=dropout, jk="cat", act="elu"),
    "GraphSAGE": lambda dropout=0.0: GraphSAGE(IN, HIDDEN, 3, OUT, dropout=dropout, norm="batch", act_first=True),
    "GraphSAGE-max": lambda dropout=0.0: GraphSAGE(IN, HIDDEN, 2, OUT, dropout=dropout, aggr="max", jk="last"),
    "GAT": lambda dropout=0.0: GAT(IN, HIDDEN, 3, OUT, dropout=dropout, heads=4, norm="batch", act="leaky_relu"),
    "one-relu": OneReLU,
    "functional": Functional,
    "skips": Skips,
}
architectures = pytest.mark.parametrize("name", ARCHITECTURES)


def make(name, dropout=0.0):
    torch.manual_seed(0)
    return ARCHITECTURES[name](dropout)


def data():
    dataset = tiny_dataset(symmetric=False)
    return dataset.x, dataset.edge_index.long(), dataset.y


def gradients(model):
    x, edge_index, y = data()
    model.zero_grad()
    output = model(x, edge_index)
    F.cross_entropy(output, y).backward()
    return output.detach(), torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


def kept(model):
    x, edge_index, _ = data()
    with SavedTensors(model, excluded=[x, edge_index]) as saved:
        return saved.kept(model(x, edge_index))


@architectures
def test_checkpoints_and_evaluation_are_the_same(name):
    model, twin = make(name, 0.5), make(name, 0.5)
    parameters = list(twin.parameters())
    compress(twin, INT2)
    assert all(ours is theirs for ours, theirs in zip(twin.parameters(), parameters, strict=True))
    x, edge_index, _ = data()
    gradients(twin)  # moves the running statistics
    assert list(twin.state_dict()) == list(model.state_dict())
    model.load_state_dict(twin.state_dict())
    assert torch.equal(model.eval()(x, edge_index), twin.eval()(x, edge_index))
    other = make(name)
    nn.init.normal_(next(other.parameters()))
    twin.load_state_dict(other.state_dict())
    assert torch.equal(other.eval()(x, edge_index), twin(x, edge_index))


@architectures
def test_gradients_are_pygs_without_compression_and_close_to_them_with_8_bits(name):
    model, twin = make(name), make(name)
    compress(twin, projected())
    eight = make(name)
    compress(eight, projected(bits=8))
    expected, exact = gradients(model)
    for compressed, tolerance in ((twin, 1e-5), (eight, 0.05)):
        output, grad = gradients(compressed)
        assert_close(output, expected)
        assert_close(grad, exact, tolerance=tolerance)
        for key, value in model.named_buffers():
            assert_close(compressed.get_buffer(key).float(), value.float())


@architectures
def test_two_bits_keep_far_less_and_no_map_in_float32(name):
    model, twin = make(name, 0.5), make(name, 0.5)
    x, edge_index, _ = data()
    compress(twin, INT2)
    plain, compressed = kept(model), kept(twin)
    before, after = (sum(record.bytes for record in records) for records in (plain, compressed))
    assert after < before / 6
    wide = [record for record in compressed if record.dtype == "float32" and record.shape[-1] >= HIDDEN]
    assert all(len(record.shape) == 1 or record.shape[0] < x.size(0) for record in wide), wide
    assert not any(record.shape[0] >= edge_index.size(1) and len(record.shape) > 1 for record in compressed)


SMALL = dict(num_layers=3, hidden_channels=HIDDEN, dropout=0.5, input_dropout=0.1)
OURS = {
    "sage": SAGEConfig(name="sage", **SMALL),
    "gcn": GCNConfig(name="gcn", **SMALL),
    "gcn2": GCN2Config(name="gcn2", **SMALL),
    "gcn2-shared": GCN2Config(name="gcn2", shared_weights=True, **SMALL),
    "gat": GATConfig(name="gat", heads=2, **SMALL),
    "gat-residual": GATConfig(name="gat", heads=2, residual=True, **SMALL),
}


def our_twin(name, config, *, symmetric=True):
    """Our own model and the same of PyG's layers compressed, with one set of weights."""
    dataset = tiny_dataset(symmetric=symmetric)
    torch.manual_seed(0)
    model = build_model(OURS[name], in_channels=IN, out_channels=OUT, compression=config)
    baseline = PyGBaseline(OURS[name], in_channels=IN, out_channels=OUT)
    shapes = [parameter.shape for parameter in baseline.parameters()]
    pairs = {}
    for key, value in baseline.named_parameters():
        kind, _, rest = key.partition(".")
        index, _, rest = rest.partition(".")
        if kind in ("lin_in", "lin_out"):
            pairs[key] = key
        elif kind == "norms":
            pairs[key] = f"blocks.{index}.norm.{rest}"
        else:
            pairs[key] = f"blocks.{index}.conv.{rest}" if int(index) < len(model.blocks) else f"head.{rest}"
        value.data.copy_(model.get_parameter(pairs[key]).data)
    assert len(shapes) == len(pairs)
    graph = MODELS[OURS[name].name].build_graph(dataset.edge_index, dataset.num_nodes)
    compress(baseline, config)
    return model, baseline, pairs, graph, baseline_graph(graph, OURS[name]), dataset


@pytest.mark.parametrize("share_maps", [False, True])
@pytest.mark.parametrize("store_dropout_mask", [False, True])
@pytest.mark.parametrize("name", OURS)
def test_pygs_layers_compressed_keep_the_bytes_of_our_own_model(name, share_maps, store_dropout_mask):
    config = projected(bits=2, kept_frac=0.125, share_maps=share_maps, store_dropout_mask=store_dropout_mask)
    model, baseline, _, graph, adjacency, dataset = our_twin(name, config)
    baseline(dataset.x, adjacency)
    patterns = baseline._compression.graphs.edges(adjacency, dataset.num_nodes).tensors()
    totals = []
    for network, operator, resident in ((model, graph, graph.tensors()), (baseline, adjacency, [adjacency, *patterns])):
        with SavedTensors(network, excluded=[dataset.x, *resident]) as saved:
            totals.append(sum(record.bytes for record in saved.kept(network(dataset.x, operator))))
    assert totals[0] == totals[1]


def low_rank(**fields):
    return CompressionConfig(**(dict(scheme="lowrank", bits=4, rank=4, col_size=8, share_maps=True) | fields))


@architectures
def test_gradients_are_pygs_with_all_directions_and_no_rounding(name):
    model, twin = make(name), make(name)
    compress(twin, low_rank(rank=99, bits=None))
    expected, exact = gradients(model)
    output, grad = gradients(twin)
    assert_close(output, expected)
    assert_close(grad, exact, tolerance=5e-4)


# PyG's BatchNorm comes before a residual as ours does, but the sum has then no sketch until a layer needs one.
@pytest.mark.parametrize("name", ["sage", "gcn", "gcn2", "gcn2-shared", "gat"])
def test_pygs_layers_keep_the_sketches_of_our_own_model(name):
    """The same coefficients and masks in the same order: no more bytes, and the same gradients."""
    model, baseline, pairs, graph, adjacency, dataset = our_twin(name, low_rank(bits=None))
    baseline(dataset.x, adjacency)
    patterns = baseline._compression.graphs.edges(adjacency, dataset.num_nodes).tensors()
    totals = []
    for network, operator, resident in ((model, graph, graph.tensors()), (baseline, adjacency, [adjacency, *patterns])):
        with SavedTensors(network, excluded=[dataset.x, *resident]) as saved:
            totals.append(sum(record.bytes for record in saved.kept(network(dataset.x, operator))))
    assert totals[1] <= totals[0]
    scores, output = model(dataset.x, graph, seed=mix(0, 3)), baseline(dataset.x, adjacency)
    assert_close(output, scores)
    F.cross_entropy(scores, dataset.y).backward()
    F.cross_entropy(output, dataset.y).backward()
    for key, other in pairs.items():
        ours, theirs = baseline.get_parameter(key).grad, model.get_parameter(other).grad
        assert (ours - theirs).abs().max() < 1e-6 or relative_error(ours, theirs) < 1e-4, key


@pytest.mark.parametrize("name", OURS)
def test_the_same_masks_give_the_same_gradients_as_our_own_model(name):
    model, baseline, pairs, graph, adjacency, dataset = our_twin(name, projected())
    scores = model(dataset.x, graph, seed=mix(0, 1))
    output = baseline(dataset.x, adjacency)
    assert_close(output, scores)
    F.cross_entropy(scores, dataset.y).backward()
    F.cross_entropy(output, dataset.y).backward()
    for key, other in pairs.items():
        ours, theirs = baseline.get_parameter(key).grad, model.get_parameter(other).grad
        assert (ours - theirs).abs().max() < 1e-6 or relative_error(ours, theirs) < 1e-5


def test_pygs_gcn_learns_digits_in_2_bits():
    dataset = load_dataset(DigitsConfig(name="digits", source="digits"))
    model = GCN(dataset.x.size(1), 64, 2, 10, dropout=0.3, norm="batch")
    compress(model, INT2)
    edge_index = dataset.edge_index.long()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(40):
        optimizer.zero_grad()
        train = dataset.train
        F.cross_entropy(model(dataset.x, edge_index)[train], dataset.y[train]).backward()
        optimizer.step()
    predicted = model.eval()(dataset.x, edge_index).argmax(-1)
    test = dataset.test
    assert (predicted[test] == dataset.y[test]).float().mean() > 0.9


def test_the_report_says_what_was_converted_and_why_the_rest_was_not():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = pyg.GATv2Conv(IN, HIDDEN, heads=1)
            self.powers = pyg.GENConv(HIDDEN, HIDDEN, aggr="powermean")
            self.norm = nn.LayerNorm(HIDDEN)
            self.act = nn.ReLU()
            self.none = nn.Identity()
            self.act_again = self.act
            self.head = pyg.SAGEConv(HIDDEN, OUT)

        def forward(self, x, edge_index):
            x = self.act(self.norm(self.conv(x, edge_index)))
            return self.head(F.dropout(self.powers(x, edge_index), 0.5, self.training), edge_index)

    model = Mixed()
    report = compress(model, INT2)
    converted = {layer.name: layer.kind for layer in report.layers if layer.converted}
    assert converted["act"] == "ReLU" and converted["head"] == "SAGEConv" and converted["conv.lin_l"] == "Linear"
    left = {layer.name: layer.note for layer in report.layers if not layer.converted}
    assert left == {
        "conv": "no twin; calls of known functions inside it are compressed",
        "powers": "no twin with aggr=powermean; calls of known functions inside it are compressed",
        "norm": "no twin; calls of known functions inside it are compressed",
    }
    assert "calls compressed so far" not in str(report)
    x, edge_index, _ = data()
    model(x, edge_index)
    assert report.functions["leaky_relu"] == 1 and report.functions["dropout"] >= 1  # GATv2's own, and the functional
    shown = str(model)
    assert (
        "CompressedSAGEConv(32, 3, aggr=mean)" in shown and "CompressedReLU()" in shown and "(norm): LayerNorm" in shown
    )
    assert str(report) in shown and "left: no twin with aggr=powermean" in shown and "leaky_relu 1" in shown


def test_what_torchscript_compiled_is_left_whole():
    model = nn.Sequential(torch.jit.trace(nn.Linear(IN, OUT), torch.randn(2, IN)), nn.Linear(OUT, OUT))
    report = compress(model, INT2)
    assert [layer.converted for layer in report.layers] == [False, True]
    assert report.layers[0].note == "compiled by TorchScript, which hides its calls"
    model(torch.randn(5, IN)).sum().backward()
    assert report.functions == {"linear": 1}


@pytest.mark.parametrize(
    "model_of", [lambda m: m, lambda m: m.conv1, lambda m: nn.Sequential(m)], ids=["whole", "part", "around"]
)
def test_compressing_twice_is_refused(model_of):
    model = OneReLU()
    compress(model, INT2)
    with pytest.raises(ConfigError, match=r"^model=\w+: is compressed already.*; compress a model once, as a whole$"):
        compress(model_of(model), INT2)


def test_a_model_of_which_a_part_is_compressed_is_refused_and_stays_as_it_is():
    model = OneReLU()
    compress(model.conv2, INT2)
    with pytest.raises(ConfigError, match=r"model=OneReLU: is compressed already \(layer conv2\)"):
        compress(model, INT2)
    assert type(model) is OneReLU and type(model.conv1) is pyg.SAGEConv


def test_a_preset_is_taken_by_its_name_with_fields_of_its_own():
    models = [OneReLU() for _ in range(3)]
    for model in models[1:]:
        model.load_state_dict(models[0].state_dict())
    compress(models[0], "lowrank", rank=3, seed=5)
    compress(models[1], preset("lowrank", rank=3), seed=5)
    compress(models[2], preset("lowrank"), seed=5, rank=3)
    x, edge_index = torch.randn(31, IN), torch.randint(31, (2, 90))
    for model in models:
        model(x, edge_index).square().sum().backward()
    first, *others = [[weight.grad for weight in model.parameters()] for model in models]
    for gradients in others:
        assert all(torch.equal(own, other) for own, other in zip(first, gradients, strict=True))
    assert models[0]._compression.config.rank == 3
    model = OneReLU()
    compress(model)
    assert model._compression.config == preset("lowrank")


def test_what_is_no_preset_is_refused_and_the_model_stays_as_it_is():
    model = OneReLU()
    for arguments, fields, message in (
        (["lowrnk"], {}, "compression=lowrnk: no such choice; did you mean lowrank?"),
        ([INT2], {"bitz": 4}, "compression.bitz=4: no such field; did you mean bits?"),
        ([3], {}, "compression=3: must be the name of a preset, such as lowrank or iexact, or a CompressionConfig"),
    ):
        with pytest.raises(ConfigError, match=f"^{re.escape(message)}"):
            compress(model, *arguments, **fields)
    assert type(model) is OneReLU


def test_plain_schemes_and_two_devices_are_refused():
    with pytest.raises(ConfigError, match="^compression.scheme=none: must be projected, lowrank or auto to compress"):
        compress(OneReLU(), FP32)
    model = OneReLU()
    model.lin.to("meta")
    with pytest.raises(ConfigError, match="^model=OneReLU: is on cpu and meta; must be on one device$"):
        compress(model, INT2)
    assert type(model) is OneReLU


def test_shared_parameters_and_layers_used_several_times():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.conv = nn.Linear(IN, IN), pyg.SAGEConv(IN, IN)
            self.again = nn.Linear(IN, IN)
            self.again.weight = self.inner.weight

        def forward(self, x, edge_index):
            for _ in range(2):
                x = torch.relu(self.conv(self.inner(x), edge_index))
            return self.again(x)

    model, twin = Tied(), Tied()
    twin.load_state_dict(model.state_dict())
    report = compress(twin, projected())
    assert twin.again.weight is twin.inner.weight
    expected, exact = gradients(model)
    output, grad = gradients(twin)
    assert_close(output, expected)
    assert_close(grad, exact)
    assert report.functions["linear"] == 2 * 3 + 1


def test_a_model_in_evaluation_mode_starts_to_compress_in_training():
    model, twin = make("GCN", 0.5).eval(), make("GCN", 0.5).eval()
    report = compress(twin, INT2)
    x, edge_index, _ = data()
    assert torch.equal(twin(x, edge_index), model(x, edge_index)) and not report.functions
    twin.train()(x, edge_index)
    assert report.functions["linear"] == 3


def test_copies_and_pickles_live_on_their_own():
    model = make("skips", 0.3)
    report = compress(model, INT2, seed=3)
    gradients(model)
    counted = dict(report.functions)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert str(twin) == str(model) and isinstance(twin.convs[0], pyg.GraphConv)
        assert twin._compression is not model._compression
        assert all(part._compression is twin._compression for part in (twin.head, twin.convs[1], twin.encoder[0]))
        twin.load_state_dict(model.state_dict())
        assert "int2" in [record.dtype for record in kept(twin)]
    assert report.functions == counted
    first, second = (gradients(twin)[1] for twin in (copy.deepcopy(model), copy.deepcopy(model)))
    assert torch.equal(first, second)
    with pytest.raises(ConfigError, match="is compressed already"):
        compress(twin, INT2)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_of_pygs_sequential_and_of_layers_without_a_twin_run(duplicate):
    chains = [
        pyg.Sequential("x, edge_index", [(pyg.GCNConv(IN, 16), "x, edge_index -> x"), nn.ReLU(inplace=True)]),
        pyg.Sequential("x, e", [(pyg.TransformerConv(IN, 16), "x, e -> h"), (nn.Linear(16, 3), "h -> h")]),
    ]
    x, edge_index, _ = data()
    expected = [chain.eval()(x, edge_index) for chain in chains]
    for chain in chains:
        report = compress(chain.train(), INT2)
        chain(x, edge_index)
        assert report.functions
    for chain, output in zip(chains, expected, strict=True):
        twin = duplicate(duplicate(chain))
        twin(x, edge_index).sum().backward()
        assert torch.equal(twin.eval()(x, edge_index), output)


def test_a_graph_traced_by_fx_is_left_and_its_layers_are_compressed():
    model = pyg.to_hetero(GraphSAGE((-1, -1), 16, 2, 3), (["a"], [("a", "to", "a")]))
    x, edge_index, _ = data()
    inputs = {"a": x}, {("a", "to", "a"): edge_index}
    expected = model(*inputs)["a"]
    report = compress(model, INT2)
    assert "traced by torch.fx" in report.layers[0].note
    for twin in (model, copy.deepcopy(model)):
        assert_close(twin(*inputs)["a"], expected)
    assert "relu" in report.functions and not report.left
    with compressed_pass(model), SavedTensors(model, excluded=[x]) as saved:
        records = saved.kept(model(*inputs)["a"])
    assert not [record for record in records if record.shape[0] == x.size(0) and record.dtype == "float32"]


def test_a_seed_repeats_a_training():
    grads = []
    for seed in (1, 1, 2):
        model = make("one-relu", 0.5)
        compress(model, INT2, seed=seed)
        grads.append([gradients(model)[1] for _ in range(2)])
    assert torch.equal(grads[0][0], grads[1][0]) and torch.equal(grads[0][1], grads[1][1])
    assert not torch.equal(grads[0][0], grads[2][0]) and not torch.equal(grads[0][0], grads[0][1])


def test_an_optimizer_made_before_goes_on():
    model = make("GraphSAGE")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    compress(model, INT2)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    gradients(model)
    optimizer.step()
    assert all(not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True) if new.dim() > 1)


def test_gradients_of_gradients_are_refused():
    model = make("one-relu")
    compress(model, INT2)
    x, edge_index, _ = data()
    x.requires_grad_()
    (grad,) = torch.autograd.grad(model(x, edge_index).logsumexp(-1).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_a_compressed_layer_is_refused(use_reentrant):
    class Checkpointed(OneReLU):
        def forward(self, x, edge_index):
            h = self.act(self.conv1(x, edge_index))
            h = checkpoint(self.conv2, h, edge_index, use_reentrant=use_reentrant)
            return self.lin(h)

    model = Checkpointed()
    compress(model, INT2)
    with pytest.raises(TrainingError, match="leave it out, the maps are compressed already"):
        gradients(model)


def test_autocast_trains():
    exact = gradients(make("skips"))[1]
    model = make("skips")
    compress(model, projected(bits=8))
    with torch.autocast("cpu", torch.bfloat16):
        _, grad = gradients(model)
    assert_close(grad, exact, tolerance=0.1)


def test_torch_compile_leaves_training_passes_as_they_are():
    model, twin = make("GraphSAGE"), make("GraphSAGE")
    report = compress(model, INT2)
    compress(twin, INT2)
    compiled = torch.compile(model, backend="eager")
    x, edge_index, _ = data()
    assert torch.equal(compiled(x, edge_index), twin(x, edge_index)) and report.functions["linear"] == 2 * 3
    assert torch.equal(compiled.eval()(x, edge_index), twin.eval()(x, edge_index))


class WithDefault(nn.Module):
    """A layer whose default argument is a layer, one for all that are ever made, as PyG's PerformerAttention has it."""

    def __init__(self, kernel=nn.ReLU()):  # noqa: B008
        super().__init__()
        self.linear, self.kernel, self.passed_on = nn.Linear(4, 4), kernel, nn.Sequential(kernel)

    def forward(self, x):
        return self.kernel(self.linear(x)) + self.passed_on(x)


def test_layers_that_are_default_arguments_stay_as_they_are_for_other_models():
    first, other, third = WithDefault(), WithDefault(), WithDefault()
    mine = nn.ReLU()
    given = WithDefault(mine)
    for model in (first, given):
        compress(model, INT2)
        assert type(model.kernel) is not nn.ReLU and isinstance(model.kernel, nn.ReLU)
        assert model.passed_on[0] is model.kernel
    assert given.kernel is mine and first.kernel is not other.kernel
    assert type(other.kernel) is nn.ReLU
    compress(third, INT2)  # which is not compressed already
    x = torch.randn(6, 4)
    assert torch.equal(other.train()(x), torch.relu(other.linear(x)) + torch.relu(x))
    for _ in range(2):
        compress(pyg.GPSConv(8, pyg.SAGEConv(8, 8), heads=2, attn_type="performer"), "int8")
