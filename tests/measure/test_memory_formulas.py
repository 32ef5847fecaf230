"""Kept memory of every model under every preset, at the true size of ogbn-arxiv, against docs/memory.md."""

from __future__ import annotations

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from conftest import REPOSITORY
from iexact_runner.cli import compose_config
from iexact_runner.data import load_dataset
from iexact_runner.measure import MIB, SavedTensors, total_bytes
from iexact_runner.nn import build_model
from iexact_runner.problem import prepare, training_input

MEMORY_PAGE = REPOSITORY / "docs" / "memory.md"
NODES, FEATURES, CLASSES, EDGES = 169_343, 128, 40, 2_315_598
FLOAT = 4 * NODES  # a column of floats


class Formula:
    """The words of docs/memory.md for one preset: a map's bytes by its width, kept as the preset keeps it."""

    def __init__(self, compression):
        self.compression = compression
        self.compressed = compression.scheme == "projected"
        self.sketched = compression.scheme == "lowrank"

    def quantized(self, width):
        """Q(D): a map quantized without projection."""
        bits, rows = self.compression.bits, max(1, self.compression.col_size)
        if rows > 1:
            rows = min(rows, max(1, round(1024 / width)))
        return NODES * width * bits / 8 + 4 * math.ceil(NODES / rows)

    def projected(self, width):
        """P(D): a map projected to R columns and then quantized."""
        return self.quantized(math.ceil(self.compression.kept_frac * width))

    def input(self, width):
        """Input of a linear layer."""
        return self.projected(width) if self.compressed else FLOAT * width

    def norm(self, width):
        """BatchNorm: its input, and mean and deviation of each column."""
        return (self.quantized(width) if self.compressed else FLOAT * width) + 8 * width

    def masks(self, width):
        """ReLU and dropout: two bits an element, or the output and a mask of floats."""
        return 2 * NODES * width / 8 if self.compressed else 2 * FLOAT * width

    def sketch(self, width):
        """S(D): coefficients in R directions, a sign mask, directions and shift for the consumers of the map."""
        rank = self.compression.rank
        coefficients = NODES * rank * self.compression.bits / 8 + 4 * math.ceil(NODES / self.compression.col_size)
        return coefficients + NODES * width / 8 + 4 * width * (rank + 1)

    def sketched_norm(self, width):
        """S(D) of a block with BatchNorm, which has directions of its own, and deviations."""
        return self.sketch(width) + 4 * width * (self.compression.rank + 2)

    def sage(self, layers, hidden):
        if self.sketched:
            return (layers - 1) * self.sketched_norm(hidden)
        if self.compression.share_maps:  # mean(x) W = mean(x W): as GCN
            return self.gcn(layers, hidden)
        first = 2 * self.projected(FEATURES) if self.compressed else FLOAT * FEATURES
        later = (layers - 1) * 2 * self.input(hidden)
        return first + later + (layers - 1) * (self.norm(hidden) + self.masks(hidden))

    graphconv = sage

    def gcn(self, layers, hidden):
        if self.sketched:
            return (layers - 1) * self.sketched_norm(hidden)
        first = self.projected(FEATURES) if self.compressed else 0
        return first + (layers - 1) * (self.input(hidden) + self.norm(hidden) + self.masks(hidden))

    def gcn2(self, layers, hidden):
        if self.sketched:  # the published model adds residuals: the sum has a sketch beside the normalised map
            sums = layers * (self.sketched_norm(hidden) + self.sketch(hidden) - NODES * hidden / 8)
            return self.sketch(hidden) + sums - layers * 4 * hidden * (self.compression.rank + 1)
        initial = self.masks(hidden) + (self.projected(hidden) if self.compressed else 0)
        each = self.input(hidden) + self.norm(hidden) + self.masks(hidden)
        return self.input(FEATURES) + initial + layers * each + self.input(hidden)

    def deepergcn(self, layers, hidden):
        if self.sketched:
            first, sums = self.sketch(hidden), layers * (self.sketch(hidden) - NODES * hidden / 8)
            return first + sums + layers * self.sketched_norm(hidden) + self.messages(hidden) * layers
        first = NODES * hidden / 8 if self.compressed else FLOAT * hidden
        each = self.messages(hidden) + self.input(hidden) + self.norm(hidden) + self.masks(hidden)
        features = self.projected(FEATURES) if self.compressed else 0
        return features + first + layers * each + self.input(hidden)

    def messages(self, width):
        """Softmax aggregation: its input, or the softmax of each edge and its target as an int64."""
        if self.sketched:
            return 0
        edges = EDGES + NODES
        return self.quantized(width) if self.compressed else edges * (4 * width + 8)

    def gat(self, layers, hidden, heads):
        edges, total = EDGES + NODES, 0.0
        for layer in range(layers):
            last = layer == layers - 1
            fed = FEATURES + CLASSES if layer == 0 else heads * hidden
            width, of_heads = (CLASSES, 1) if last else (heads * hidden, heads)
            if self.sketched:
                total += FLOAT * of_heads + (0 if last else self.sketched_norm(width))
                continue
            if self.compressed:
                total += self.projected(fed) + self.quantized(width) + FLOAT * of_heads
            else:
                # What each edge gathers, four steps of its softmax, and its target as an int64.
                total += FLOAT * (fed + width) + edges * (4 * width + 16 * of_heads + 8)
            total += 0 if last else self.norm(width) + self.masks(width)
        return total


@pytest.fixture(scope="module")
def arxiv():
    return load_dataset(compose_config("dataset=synthetic_arxiv").dataset)


def kept_bytes(dataset, model, preset, *overrides):
    """Bytes kept by a forward pass with tensors that have no memory, and those of the data."""
    config = compose_config("dataset=synthetic_arxiv", f"model={model}", f"compression={preset}", *overrides)
    problem = prepare(dataset, config.model, inductive=False, device=torch.device("cpu"))
    features = training_input(problem, seed=0)[0]
    with FakeTensorMode() as fake:
        features, graph = fake.from_tensor(features), problem.training.graph.map(fake.from_tensor)
        net = build_model(
            config.model, in_channels=problem.in_channels, out_channels=CLASSES, compression=config.compression
        )
        with SavedTensors(net, excluded=[features, *graph.tensors()]) as saved:
            kept = sum(record.bytes for record in saved.kept(net(features, graph)))
    return kept, total_bytes(problem.tensors()), Formula(config.compression)


@pytest.mark.parametrize("preset", ["plain", "none", "exact", "iexact", "lowrank_v1"])
@pytest.mark.parametrize(
    ("model", "sizes", "overrides"),
    [
        ("sage", (3, 128), ()),
        ("graphconv", (3, 128), ()),
        ("gcn", (3, 128), ()),
        ("gcn2", (16, 256), ()),
        ("deepergcn", (28, 128), ()),
        # How many edges dropout leaves is a number, which tensors without memory do not have.
        ("gat", (3, 128, 3), ("model.edge_dropout=0",)),
    ],
    ids=["sage", "graphconv", "gcn", "gcn2", "deepergcn", "gat"],
)
def test_kept_bytes_are_those_of_the_formula(arxiv, model, sizes, overrides, preset):
    kept, data, formula = kept_bytes(arxiv, model, preset, *overrides)
    expected = getattr(formula, model)(*sizes)
    assert kept == pytest.approx(expected, rel=0.002), f"{kept / MIB:.2f} MiB, formula {expected / MIB:.2f}"
    assert data / MIB <= 100
    rows = [line for line in MEMORY_PAGE.read_text().splitlines() if line.lower().startswith(f"| {model} ")]
    for figure in (kept, data):
        assert f" {figure / MIB:.2f} |" in rows[-1], f"docs/memory.md lacks {figure / MIB:.2f} MiB of {model}"
