"""A graph in parts: the rows of one process, whose products fetch the rows of other processes that they read.

Shapes: N rows of this process, H rows of its halo, D columns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from iexact_runner.data.graph import Adjacency, Graph
from iexact_runner.data.sparse import COLUMNS, CSR
from iexact_runner.parallel.halo import Draws, Halo, Traffic
from iexact_runner.parallel.shard import WHOLE, DistributedShard, Shard


@dataclass(frozen=True)
class PartitionedMatrix(CSR):
    """Rows of a sparse matrix, entries in columns of this process apart from those in columns of others.

    The parts of :class:`CSR` are those of the (N, N) square of own columns. ``far`` (N, H) are the other entries.
    """

    far: CSR | None = None
    halo: Halo | None = None

    @property
    def shard(self) -> DistributedShard:
        """The rows of this process."""
        assert self.halo is not None
        return self.halo.shard

    @property
    def num_entries(self) -> int:
        """Of these rows."""
        assert self.far is not None
        return self.columns.numel() + self.far.columns.numel()

    def matmul(
        self,
        x: Tensor,
        *,
        column_scale: Tensor | None = None,
        row_scale: Tensor | None = None,
        bias: Tensor | None = None,
        out: Tensor | None = None,
        add: bool = False,
    ) -> Tensor:
        """These rows of the product with a map of which ``x`` (N, D) are the rows of this process.

        Rows of others are on their way while own ones are multiplied.
        """
        assert self.far is not None and self.halo is not None
        incoming = self.halo.start(x, column_scale)
        scales = dict(column_scale=column_scale, row_scale=row_scale)
        out = super().matmul(x, **scales, bias=bias, out=out, add=add)
        return self.far.matmul(incoming.wait(), row_scale=row_scale, out=out, add=True)

    def matmul_(
        self,
        x: Tensor,
        *,
        column_scale: Tensor | None = None,
        row_scale: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        """:meth:`matmul` written over ``x``, a few columns at a time; the halo is exchanged at once."""
        assert self.far is not None and self.halo is not None
        rows = self.halo.start(x, column_scale).wait()
        columns = max(1, x.size(1)) if x.is_cuda else COLUMNS
        for start in range(0, x.size(1), columns):
            part = slice(start, start + columns)
            own_bias = None if bias is None else bias[part]
            product = super().matmul(x[:, part], column_scale=column_scale, row_scale=row_scale, bias=own_bias)
            x[:, part] = self.far.matmul(rows[:, part], row_scale=row_scale, out=product, add=True)
        return x

    def tensors(self) -> list[Tensor]:
        """The parts."""
        assert self.far is not None and self.halo is not None
        return [*super().tensors(), *self.far.tensors(), self.halo.rows]

    def map(self, function: Callable[[Tensor], Tensor]) -> PartitionedMatrix:
        """The matrix with a function applied to its parts, for example to move them to a device."""
        assert self.far is not None and self.halo is not None
        values = None if self.values is None else function(self.values)
        halo = replace(self.halo, rows=function(self.halo.rows))
        return PartitionedMatrix(function(self.offsets), function(self.columns), values, self.far.map(function), halo)


def shard_of(graph: Graph) -> Shard:
    """Which rows of the whole graph a graph has; all, where it is not partitioned."""
    matrix = graph.matrix if isinstance(graph, Adjacency) else None
    return matrix.shard if isinstance(matrix, PartitionedMatrix) else WHOLE


def begin_pass(graph: Graph, seed: int | Tensor) -> Shard:
    """:func:`shard_of` for a pass whose messages are rounded by this seed."""
    shard = shard_of(graph)
    if shard.distributed:
        assert isinstance(graph, Adjacency) and isinstance(graph.matrix, PartitionedMatrix) and isinstance(seed, int)
        assert graph.matrix.halo is not None
        graph.matrix.halo.draws.begin(seed)
    return shard


def traffic_of(graph: Graph) -> Traffic:
    """What products with a partitioned graph have sent."""
    assert isinstance(graph, Adjacency) and isinstance(graph.matrix, PartitionedMatrix)
    assert graph.matrix.halo is not None
    return graph.matrix.halo.traffic


def partitioned(adjacency: Adjacency, shard: DistributedShard, *, forward: str, backward: str) -> Adjacency:
    """The rows of one process of an operator on the whole graph; every process must call it.

    Args:
        adjacency: of the whole graph, on the CPU.
        shard: the rows of this process.
        forward: how rows of maps travel.
        backward: how rows of gradients travel.
    """
    draws, traffic = Draws(shard.rank), Traffic()
    matrix = _rows_of(adjacency.matrix, shard, forward, draws, traffic)
    if adjacency.adjoint is not adjacency.matrix:
        adjoint = _rows_of(adjacency.adjoint, shard, backward, draws, traffic)
    elif backward == forward:
        adjoint = matrix
    else:
        assert matrix.halo is not None
        adjoint = replace(matrix, halo=replace(matrix.halo, messages=backward))

    def own(scale: Tensor | None) -> Tensor | None:
        return None if scale is None else scale[shard.start : shard.stop].clone()

    row_scale = own(adjacency.row_scale)
    same = adjacency.column_scale is adjacency.row_scale
    return Adjacency(matrix, adjoint, row_scale, row_scale if same else own(adjacency.column_scale))


def _rows_of(matrix: CSR, shard: DistributedShard, messages: str, draws: Draws, traffic: Traffic) -> PartitionedMatrix:
    first, last = int(matrix.offsets[shard.start]), int(matrix.offsets[shard.stop])
    offsets, columns = matrix.offsets[shard.start : shard.stop + 1] - first, matrix.columns[first:last]
    rows = CSR(offsets, columns)
    near = (columns >= shard.start) & (columns < shard.stop)
    own, far = rows.masked(near), rows.masked(~near)
    needed, place = torch.unique(far.columns.long(), return_inverse=True)
    halo = Halo.of(shard, needed, messages=messages, draws=draws, traffic=traffic)
    far = CSR(far.offsets, place.to(columns.dtype))
    return PartitionedMatrix(own.offsets, own.columns - shard.start, None, far, halo)
