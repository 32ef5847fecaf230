"""Exact scores of the whole graph, one layer after the other, a few rows at a time.

The maps between layers lie where the data do: on the host. On a CPU a layer reads them there; to a GPU go the rows of a
chunk and those of their neighbours. Shapes: N nodes, R rows of a chunk, D features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from iexact_runner.data.graph import Adjacency, Graph
from iexact_runner.data.sparse import CSR
from iexact_runner.nn import GCN2, GNN, Model
from iexact_runner.schemes.activation import Activation, Kept
from iexact_runner.schemes.rows import RowEvaluation

# Models that are chains of layers, each of which reads the map before it, and perhaps a first one.
CHAINS = (GNN, GCN2)
# Edges that end in the rows of a chunk; a chunk is at least one row.
CHUNK_ENTRIES = 1 << 18


class Chunk(NamedTuple):
    """Rows that are computed at once.

    Args:
        rows: which.
        graph: their part of the graph, (R, columns).
        columns: nodes that its columns stand for, the rows themselves first; None for all nodes.
    """

    rows: slice
    graph: Any
    columns: Tensor | None


@torch.no_grad()
def layerwise_scores(
    model: Model, features: Tensor, graph: Graph, *, device: torch.device, entries: int = CHUNK_ENTRIES
) -> Tensor:
    """Scores (N, classes) of a model in evaluation, where the features (N, D) lie.

    Args:
        model: on ``device``; one of ``CHAINS``.
        features: the model's input.
        graph: as the model takes it, where the features lie.
        device: what computes.
        entries: about how many edges end in the rows that are computed at once.
    """
    assert isinstance(model, CHAINS)
    gathers = device != features.device
    first, layers = model.layers()
    ops = RowEvaluation()
    factor: float = model.input_factor
    x = features if factor == 1.0 else features * factor
    initial: Tensor | None = None
    if first is not None:
        initial = _layer(first, x, None, graph, ops, device=device, entries=entries, gathers=gathers)
        x = initial * model.factor if isinstance(model, GCN2) and model.factor != 1.0 else initial
    for layer in layers:
        x = _layer(layer, x, initial, graph, ops, device=device, entries=entries, gathers=gathers)
    return x


def _layer(
    layer: Callable[..., Any],
    x: Tensor,
    initial: Tensor | None,
    graph: Graph,
    ops: RowEvaluation,
    *,
    device: torch.device,
    entries: int,
    gathers: bool,
) -> Tensor:
    """What a layer makes of a map (N, D)."""
    out: Tensor | None = None
    ops.begin_layer(remembers=not gathers)
    for rows, part, columns in _chunks(graph, entries, gathers=gathers):
        local, own = (x, rows) if columns is None else (x[columns].to(device), slice(0, rows.stop - rows.start))
        ops.rows = own
        beginning = [] if initial is None else [Activation(initial[rows].to(device), Kept())]
        made = layer(Activation(local, Kept()), part.map(lambda tensor: tensor.to(device)), ops, *beginning)
        value = made.value if isinstance(made, Activation) else made
        if out is None:
            out = torch.empty(x.size(0), value.size(1), dtype=value.dtype, device=x.device)
        out[rows] = value
    ops.begin_layer(remembers=False)
    assert out is not None
    return out


def _chunks(graph: Graph, entries: int, *, gathers: bool) -> Iterator[Chunk]:
    """Runs of rows, and their part of the graph."""
    assert isinstance(graph, (Adjacency, CSR))
    matrix = graph.matrix if isinstance(graph, Adjacency) else graph
    for rows, part, local in matrix.row_chunks(entries):
        if matrix.values is not None:
            local = local.with_values(matrix.values[part])
        columns = None
        if gathers:
            own = torch.arange(rows.start, rows.stop, device=local.columns.device)
            others = torch.unique(local.columns)
            others = others[(others < rows.start) | (others >= rows.stop)]
            columns = torch.cat([own, others.long()])
            positions = torch.full((matrix.offsets.numel() - 1,), -1, dtype=local.columns.dtype)
            positions[columns] = torch.arange(columns.numel(), dtype=positions.dtype)
            local = replace(local, columns=positions[local.columns.long()])
        if not isinstance(graph, Adjacency):
            yield Chunk(rows, local, columns)
            continue
        row_scale = None if graph.row_scale is None else graph.row_scale[rows]
        column_scale = graph.column_scale
        if columns is not None and column_scale is not None:
            column_scale = column_scale[columns]
        yield Chunk(rows, Adjacency(local, local, row_scale, column_scale), columns)
