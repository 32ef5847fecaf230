"""A training step under ``torch.compile``: one graph, compiled once, the same numbers, the same memory."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend

from conftest import projected, tiny_dataset
from iexact_runner.compression.maps import MapFormat
from iexact_runner.config import CompressionConfig, SAGEConfig
from iexact_runner.data.graph import mean_adjacency
from iexact_runner.measure import SavedTensors
from iexact_runner.nn import build_model


def layout(*, share_maps, store_dropout_mask, levels="uniform"):
    masks_and_maps = dict(store_dropout_mask=store_dropout_mask, share_maps=share_maps)
    return projected(bits=2, kept_frac=0.125, col_size=8, levels=levels, **masks_and_maps)


LAYOUTS = {
    "two maps stored": layout(share_maps=False, store_dropout_mask=True),
    "two maps regenerated": layout(share_maps=False, store_dropout_mask=False),
    "one map stored": layout(share_maps=True, store_dropout_mask=True),
    "one map regenerated": layout(share_maps=True, store_dropout_mask=False),
    "optimal levels": layout(share_maps=True, store_dropout_mask=False, levels="optimal"),
    "lowrank": CompressionConfig(scheme="lowrank", bits=4, rank=8, col_size=4, share_maps=True),
    "lowrank, dealt bits": CompressionConfig(scheme="lowrank", map_bits=32, share_maps=True),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_compiled_step_keeps_numbers_and_memory(name):
    torch._dynamo.reset()
    dataset = tiny_dataset(nodes=512)
    graph = mean_adjacency(dataset.edge_index, dataset.num_nodes)
    config = SAGEConfig(name="sage", num_layers=3, hidden_channels=32, dropout=0.5)
    torch.manual_seed(0)
    model = build_model(config, in_channels=13, out_channels=3, compression=LAYOUTS[name])
    # aot_eager traces and partitions the step as every compiler does, and needs no compiler on the machine.
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)

    def step(forward, seed):
        model.zero_grad()
        scores = forward(dataset.x, graph, seed=torch.tensor(seed))
        F.cross_entropy(scores, dataset.y).backward()
        return scores.detach(), torch.cat([parameter.grad.flatten() for parameter in model.parameters()])

    def kept_bytes(forward):
        with SavedTensors(model, excluded=[dataset.x, *graph.tensors()]) as saved, warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Using `torch.compile")  # layer names do not matter here
            return sum(record.bytes for record in saved.kept(forward(dataset.x, graph, seed=torch.tensor(0))))

    for seed in (3, 4, 5):
        expected, actual = step(model, seed), step(compiled, seed)
        assert torch.equal(actual[0], expected[0]) and torch.equal(actual[1], expected[1])
    assert counter.frame_count == 1
    kept = kept_bytes(model)
    # Of directions that a block keeps under two scales, the compiler keeps one.
    least = 0.7 if name.startswith("lowrank") else 0.98
    assert least * kept <= kept_bytes(compiled) <= kept


def test_compiled_step_stores_all_signs():
    """Which are then true, as without a threshold."""
    torch._dynamo.reset()
    dataset = tiny_dataset(nodes=512)
    graph = mean_adjacency(dataset.edge_index, dataset.num_nodes)
    config = SAGEConfig(name="sage", num_layers=3, hidden_channels=32, dropout=0.5)
    gradients = []
    for threshold in (None, 1.0):
        torch.manual_seed(0)
        scheme = CompressionConfig(scheme="lowrank", map_bits=32, sign_threshold=threshold, share_maps=True)
        model = build_model(config, in_channels=13, out_channels=3, compression=scheme)
        forward = model if threshold is None else torch.compile(model, backend="aot_eager", fullgraph=True)
        F.cross_entropy(forward(dataset.x, graph, seed=torch.tensor(3)), dataset.y).backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    assert torch.equal(*gradients)


def test_levels_are_chosen_where_the_number_of_rows_varies():
    torch._dynamo.reset()
    form = MapFormat(2, 1.0, col_size=4, levels=None, max_block_size=None, backend="torch", optimal=True)

    def decoded(x):
        layout, tensors = form.keep(x, seed=torch.tensor(3), project=False)
        return layout.decode(tensors)

    compiled = torch.compile(decoded, backend="aot_eager", fullgraph=True)
    for rows in (50, 60, 70):
        x = torch.randn(rows, 16)
        torch._dynamo.mark_dynamic(x, 0)
        assert torch.equal(compiled(x), decoded(x))
