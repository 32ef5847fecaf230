"""Exact scores of the whole graph, one layer after the other, a few rows at a time.

The maps between layers lie on the host, in memory or in files. On a CPU a layer reads them there; a GPU gets the rows
of a chunk and those of their neighbours. Shapes: N nodes, R rows of a chunk, D features.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from iexact_runner.compression.host import HostMap, cannot_hold
from iexact_runner.data.graph import Adjacency, Graph
from iexact_runner.data.sparse import CSR
from iexact_runner.nn import GCN2, GNN, Model
from iexact_runner.schemes.activation import Activation, Kept
from iexact_runner.schemes.rows import RowEvaluation

# Models that are chains of layers, each of which reads the map before it, and perhaps a first one.
CHAINS = (GNN, GCN2)
# Edges that end in the rows of a chunk; a chunk is at least one row.
CHUNK_ENTRIES = 1 << 18
# Bytes of mapped files that layers read and write before their memory is given back.
TOUCHED_BYTES = 1 << 30


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
    model: Model,
    features: Tensor,
    graph: Graph,
    *,
    device: torch.device,
    maps_folder: str | None = None,
    entries: int = CHUNK_ENTRIES,
    gathers: bool | None = None,
) -> Tensor:
    """Scores (N, classes) of a model in evaluation, where the features (N, D) lie.

    Args:
        model: on ``device``; one of ``CHAINS``.
        features: the model's input.
        graph: as the model takes it, where the features lie.
        device: what computes.
        maps_folder: for files that hold the maps between layers; None holds them in memory.
        entries: about how many edges end in the rows that are computed at once.
        gathers: whether rows are copied for each chunk; None does so where the device is another one.

    Raises:
        ConfigError: if the folder cannot hold the maps.
    """
    assert isinstance(model, CHAINS)
    first, layers = model.layers()
    gathers = device != features.device if gathers is None else gathers
    layerwise = _Layerwise(graph, device, maps_folder, entries, gathers)
    factor: float = model.input_factor
    x = HostMap(features if factor == 1.0 else features * factor)
    initial: HostMap | None = None
    if first is not None:
        x = initial = layerwise.applied(first, x, None)
        if isinstance(model, GCN2) and model.factor != 1.0:
            x = layerwise.applied(lambda x, _, ops: ops.scaled(x, model.factor), initial, None)
    for layer in layers:
        x = layerwise.applied(layer, x, initial)
    return x.tensor


@dataclass(frozen=True)
class _Layerwise:
    """What the layers of one evaluation share; the fields are arguments of :func:`layerwise_scores`."""

    graph: Graph
    device: torch.device
    maps_folder: str | None
    entries: int
    gathers: bool
    ops: RowEvaluation = field(default_factory=RowEvaluation)

    def applied(self, layer: Callable[..., Any], x: HostMap, initial: HostMap | None) -> HostMap:
        """What a layer makes of a map (N, D), and of the first one if it reads that."""
        out: HostMap | None = None
        touched = 0
        self.ops.begin_layer(remembers=not self.gathers)
        for rows, part, columns in _chunks(self.graph, self.entries, gathers=self.gathers):
            local, self.ops.rows = x.tensor, rows
            if columns is not None:
                local, self.ops.rows = x.tensor[columns].to(self.device), slice(0, rows.stop - rows.start)
            beginning = [] if initial is None else [Activation(initial.tensor[rows].to(self.device), Kept())]
            part = part.map(lambda tensor: tensor.to(self.device))
            made = layer(Activation(local, Kept()), part, self.ops, *beginning)
            value = made.value if isinstance(made, Activation) else made
            if out is None:
                shape = (x.tensor.size(0), value.size(1))
                out = self._new(shape, value.dtype, x.tensor.device)
            out.tensor[rows] = value
            touched += x.tensor[0].nbytes * self.entries + value.nbytes
            if touched > TOUCHED_BYTES:
                touched = 0
                for held in (x, out, initial):
                    if held is not None:
                        held.release()
        self.ops.begin_layer(remembers=False)
        assert out is not None
        return out

    def _new(self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> HostMap:
        try:
            return HostMap.new(shape, dtype, device, folder=self.maps_folder)
        except OSError as error:
            size = math.prod(shape) * dtype.itemsize
            raise cannot_hold("sampler.maps_folder", str(self.maps_folder), size, error) from error


def _chunks(graph: Graph, entries: int, *, gathers: bool) -> Iterator[Chunk]:
    """Runs of rows, and their part of the graph."""
    assert isinstance(graph, (Adjacency, CSR))
    matrix = graph.matrix if isinstance(graph, Adjacency) else graph
    for rows, part, local in matrix.row_chunks(entries):
        if matrix.values is not None:
            local = local.with_values(matrix.values[part])
        columns = None
        if gathers:
            own = (local.columns >= rows.start) & (local.columns < rows.stop)
            others = torch.unique(local.columns[~own])
            columns = torch.cat([torch.arange(rows.start, rows.stop, device=others.device), others.long()])
            behind = torch.searchsorted(others, local.columns) + (rows.stop - rows.start)
            positions = torch.where(own, local.columns - rows.start, behind)
            local = replace(local, columns=positions.to(local.columns.dtype))
        if not isinstance(graph, Adjacency):
            yield Chunk(rows, local, columns)
            continue
        row_scale = None if graph.row_scale is None else graph.row_scale[rows]
        column_scale = graph.column_scale
        if columns is not None and column_scale is not None:
            column_scale = column_scale[columns]
        yield Chunk(rows, Adjacency(local, local, row_scale, column_scale), columns)
