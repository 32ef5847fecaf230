"""What has no twin, compressed where autograd saves it: gradients, bytes, sharing, and what stays exact."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch_geometric import nn as pyg

from conftest import relative_error
from iexact_runner import compress, compressed_saved_tensors
from iexact_runner.errors import ConfigError
from iexact_runner.measure import SavedTensors

NODES, WIDTH = 600, 64


@pytest.fixture(scope="module")
def graph():
    generator = torch.Generator().manual_seed(0)
    edges = torch.randint(NODES, (2, 6 * NODES), generator=generator)
    return torch.randn(NODES, WIDTH, generator=generator), edges, torch.randint(8, (NODES,), generator=generator)


class Chain(nn.Module):
    """Two convolutions with what users put between them."""

    def __init__(self, make, norm=None, act=None):
        super().__init__()
        self.first, self.second = make(WIDTH, WIDTH), make(WIDTH, WIDTH)
        self.norm, self.act, self.head = norm or nn.Identity(), act or nn.ReLU(), nn.Linear(2 * WIDTH, 8)

    def forward(self, x, edges):
        first = self.act(self.norm(self.first(x, edges)))
        return self.head(torch.cat([first, self.second(first, edges)], dim=1))


class EdgeFeatures(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = pyg.GINEConv(nn.Linear(WIDTH, WIDTH), edge_dim=4)
        self.head = nn.Linear(WIDTH, 8)
        self.register_buffer("edge_features", torch.randn(6 * NODES, 4, generator=torch.Generator().manual_seed(1)))

    def forward(self, x, edges):
        return self.head(self.conv(x, edges, self.edge_features).tanh())


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 2 * WIDTH, dropout=0.0, batch_first=True, activation="gelu")
        self.encoder, self.head = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(WIDTH, 8)

    def forward(self, x, edges):
        return self.head(self.encoder(x.view(10, -1, WIDTH)).flatten(0, 1))


class Relations(nn.Module):
    def __init__(self):
        super().__init__()
        relations = {("a", kind, "a"): pyg.GATv2Conv(WIDTH, WIDTH, add_self_loops=False) for kind in ("to", "from")}
        self.conv, self.head = pyg.HeteroConv(relations), nn.Linear(WIDTH, 8)

    def forward(self, x, edges):
        out = self.conv({"a": x}, {("a", "to", "a"): edges, ("a", "from", "a"): edges.flip(0)})
        return self.head(F.silu(out["a"]))


MODELS = {
    "GATv2": lambda: Chain(pyg.GATv2Conv),
    "Transformer": lambda: Chain(pyg.TransformerConv),
    "LayerNorm": lambda: Chain(pyg.SAGEConv, nn.LayerNorm(WIDTH)),
    "GraphNorm": lambda: Chain(pyg.SAGEConv, pyg.GraphNorm(WIDTH)),
    "RMSNorm-GELU": lambda: Chain(pyg.GraphConv, nn.RMSNorm(WIDTH), nn.GELU()),
    "GINE": EdgeFeatures,
    "encoder": Encoder,
    "HeteroConv-SiLU": Relations,
}
# Share of FP32 that is kept at 4 bits, and the relative error of the gradient at 4 and at 8 bits, on features of noise.
MOST = {
    "GATv2": (0.20, 0.13, 0.01),
    "Transformer": (0.20, 0.13, 0.01),
    "LayerNorm": (0.22, 0.13, 0.01),
    "GraphNorm": (0.36, 0.13, 0.01),  # what it divides by has the size of a map
    "RMSNorm-GELU": (0.25, 0.13, 0.01),
    "GINE": (0.20, 0.13, 0.01),
    "encoder": (0.22, 0.13, 0.01),
    "HeteroConv-SiLU": (0.20, 0.13, 0.01),
}


def made(name):
    torch.manual_seed(0)
    return MODELS[name]().train()


def kept_and_gradient(model, graph):
    x, edges, labels = graph
    model.zero_grad()
    with SavedTensors(model, excluded=[x, edges]) as saved:
        out = model(x, edges)
        kept = sum(record.bytes for record in saved.kept(out))
    F.cross_entropy(out, labels).backward()
    return kept, torch.cat([each.grad.flatten() for each in model.parameters() if each.grad is not None])


@pytest.mark.parametrize("name", MODELS)
def test_models_without_twins_keep_little_and_have_their_gradient(name, graph):
    plain, exact = kept_and_gradient(made(name), graph)
    share, *errors = MOST[name]
    for preset, most in zip(("int4", "int8"), errors, strict=True):
        model = made(name)
        report = compress(model, preset)
        kept, gradient = kept_and_gradient(model, graph)
        assert relative_error(gradient, exact) < most
        assert kept < (share if preset == "int4" else 2 * share) * plain
        assert "saved by" in str(report)
    without = made(name)
    compress(without, "int4", fallback=None)
    assert kept_and_gradient(without, graph)[0] > kept


@pytest.mark.parametrize(("preset", "least"), [("lowrank", 0.5), ("iexact", 0.2), ("int4", 0.99)])
def test_every_preset_takes_the_fallback(preset, least, graph):
    _, exact = kept_and_gradient(made("LayerNorm"), graph)
    model = made("LayerNorm")
    compress(model, preset)
    _, gradient = kept_and_gradient(model, graph)
    assert torch.nn.functional.cosine_similarity(gradient, exact, dim=0) > least


def test_gradients_are_unbiased_where_they_are_linear_in_what_is_kept():
    """A product of maps: each one's gradient is that of the others' decoded values."""
    first, second = (torch.randn(80, 64, requires_grad=True) for _ in range(2))
    weight = torch.randn(80, 64)

    def gradient():
        return (first * 1.0) * (second * 1.0) * weight

    exact = torch.autograd.grad(gradient().sum(), first)[0]
    draws = []
    for seed in range(300):
        with compressed_saved_tensors(bits=1, seed=seed):
            out = gradient().sum()
        draws.append(torch.autograd.grad(out, first)[0])
    errors = torch.stack(draws) - exact
    functionals = torch.randn(20, exact.numel()) @ errors.flatten(1).T  # [20, 300]
    assert (functionals.mean(1).abs() < 4 * functionals.std(1) / 300**0.5).all()
    assert errors.abs().mean() > 0.1  # there is noise to average away


def saved_bytes(block, *, bits=4, inputs=()):
    with compressed_saved_tensors(bits=bits, inputs=inputs) as savings:
        out = block()
    out.sum().backward()
    return savings


def test_one_storage_is_kept_once_and_views_share_it():
    x = torch.randn(100, 64, requires_grad=True)

    def block():
        h = x * 2.0
        return (h * h).sum() + (h.view(64, 100) * 1.0).pow(2).sum() + h.pow(2).sum() + h.unsqueeze(0).pow(2).sum()

    savings = saved_bytes(block)
    before = sum(before for before, _ in savings.compressed.values())
    # h once for all who save it, and what is a map of its own: the product of the view.
    assert before == 2 * x.nbytes


def test_repeats_of_expand_are_not_kept():
    x = torch.randn(64, 128, requires_grad=True)
    rows = (x * 1.0).unsqueeze(1)
    savings = saved_bytes(lambda: rows.expand(64, 50, 128) * torch.randn(1, requires_grad=True))
    assert sum(before for before, _ in savings.compressed.values()) == x.nbytes


def test_masks_and_indices_are_exact_and_small():
    x = torch.randn(200, 64, requires_grad=True)

    def block():
        h = x * 1.0
        return torch.where(h > 0, h, -h), torch.zeros(200, 64).scatter_add(1, h.argsort(dim=1), h)

    def gradient(outputs):
        return torch.autograd.grad(outputs, x, [torch.ones(200, 64), torch.arange(64.0).expand(200, 64)])[0]

    with compressed_saved_tensors() as savings:
        outputs = block()
    mask, index = x.numel() // 8, x.numel()
    # Whoever saves the order first: argsort does, for its own gradient.
    assert savings.compressed == {"where": [x.numel(), mask], "argsort": [8 * x.numel(), index]}
    assert torch.equal(gradient(outputs), gradient(block()))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.softmax(1),
        lambda x: x.abs().add(1.0).sqrt(),
        lambda x: 1.0 / (x.abs() + 1.0),
        lambda x: x.amax(0).repeat(10),
        lambda x: torch.zeros(10, 64).scatter_reduce(0, torch.arange(100)[:, None].expand(100, 64) % 10, x, "amax"),
        lambda x: x.exp(),
        lambda x: x.relu(),
        lambda x: (x + 9.0).pow(-0.5),
        lambda x: (0.01 * x + 1.0).prod(0),
        lambda x: x.clamp(-0.5, 0.5),
        lambda x: x.std(0),
    ],
    ids=["softmax", "sqrt", "division", "amax", "scatter_reduce", "exp", "relu", "power", "product", "clamp", "std"],
)  # fmt: skip
def test_what_a_backward_pass_needs_exactly_stays_exact(function):
    x = torch.randn(100, 64, requires_grad=True)
    weight = torch.randn_like(function(x))
    exact = torch.autograd.grad((function(x) * weight).sum(), x)[0]
    with compressed_saved_tensors(bits=1):
        out = function(x * 1.0)  # no parameter, which would be kept anyway
    assert torch.equal(torch.autograd.grad((out * weight).sum(), x)[0], exact)


def test_parameters_inputs_and_small_tensors_stay_references():
    weight, x, few = nn.Parameter(torch.randn(128, 128)), torch.randn(128, 128), torch.randn(8, 8, requires_grad=True)
    savings = saved_bytes(lambda: (x @ weight).sum() + (few * few).sum() + (weight.t() * weight).sum(), inputs=[x])
    assert savings.compressed == {}


def test_nothing_outlives_the_graph():
    model = made("GATv2")
    compress(model, "int4")
    out = model(torch.randn(NODES, WIDTH), torch.randint(NODES, (2, 100)))
    node = weakref.ref(out.grad_fn)
    del out
    gc.collect()
    assert node() is None


def test_passes_may_overlap_and_models_may_be_copied(graph):
    """Several forward passes before the backward one, gradient accumulation, deepcopy and pickle."""
    x, edges, labels = graph
    model = made("GATv2")
    compress(model, "int8")
    exact = kept_and_gradient(made("GATv2"), graph)[1]
    for copied in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        copied.zero_grad()
        losses = [F.cross_entropy(copied(x, edges), labels) for _ in range(3)]
        for loss in reversed(losses):
            (loss / 3).backward()
        assert relative_error(torch.cat([each.grad.flatten() for each in copied.parameters()]), exact) < 0.005


def test_hooks_further_out_see_what_is_kept():
    seen = []

    def pack(tensor):
        seen.append(tensor.dtype)
        return tensor

    x = torch.randn(100, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), compressed_saved_tensors():
        out = (x * 1.0).sin().sum()
    out.backward()
    assert torch.uint8 in seen and x.grad.isfinite().all()


def test_wrong_arguments_are_one_line():
    with pytest.raises(ConfigError, match=r"bits=3: must be one of 1, 2, 4, 8"), compressed_saved_tensors(bits=3):
        pass
    with pytest.raises(ConfigError, match=r"fallback=no: must be one of saved_tensors, None"):
        compress(nn.Linear(2, 2), "int4", fallback="no")
