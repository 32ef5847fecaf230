"""A graph in parts: the rows of one process, whose products fetch the rows of other processes that they read.

Shapes: N rows of this process, H rows of its halo, D columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from iexact_runner.data.graph import Adjacency, EdgePattern, Graph, ScaledAdjacency
from iexact_runner.data.sparse import COLUMNS, CSR
from iexact_runner.parallel.halo import Draws, Halo, Known, Traffic
from iexact_runner.parallel.messages import Format, Plain
from iexact_runner.parallel.shard import WHOLE, DistributedShard, Shard


@dataclass(frozen=True)
class PartitionedMatrix(CSR):
    """Rows of a sparse matrix, entries in columns of this process apart from those in columns of others.

    The parts of :class:`CSR` are those of the (N, N) square of own columns. ``far`` (N, H) are the other entries.
    """

    far: CSR | None = None
    halo: Halo | None = None

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
        incoming = self.halo.exchange(x, column_scale)
        scales = dict(column_scale=column_scale, row_scale=row_scale)
        out = super().matmul(x, **scales, bias=bias, out=out, add=add)
        for part, rows in incoming:
            self.far.matmul(rows, row_scale=row_scale, out=out[:, part], add=True)
        return out

    def matmul_(
        self,
        x: Tensor,
        *,
        column_scale: Tensor | None = None,
        row_scale: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        """:meth:`matmul` written over ``x``, a few columns at a time."""
        assert self.far is not None and self.halo is not None
        for run, rows in self.halo.exchange(x, column_scale):
            columns = rows.size(1) if x.is_cuda else COLUMNS
            for start in range(0, rows.size(1), columns):
                few = slice(start, start + columns)
                part = slice(run.start + start, min(run.start + start + columns, run.stop))
                own_bias = None if bias is None else bias[part]
                product = super().matmul(x[:, part], column_scale=column_scale, row_scale=row_scale, bias=own_bias)
                x[:, part] = self.far.matmul(rows[:, few], row_scale=row_scale, out=product, add=True)
        return x

    def tensors(self) -> list[Tensor]:
        """The parts."""
        assert self.far is not None and self.halo is not None
        return [*super().tensors(), *self.far.tensors(), *self.halo.tensors()]

    def map(self, function: Callable[[Tensor], Tensor]) -> PartitionedMatrix:
        """The matrix with a function applied to its parts, for example to move them to a device."""
        assert self.far is not None and self.halo is not None
        values = None if self.values is None else function(self.values)
        halo = replace(self.halo, rows=function(self.halo.rows))
        return PartitionedMatrix(function(self.offsets), function(self.columns), values, self.far.map(function), halo)


@dataclass(frozen=True)
class PartitionedEdges(CSR):
    """The pattern of the edges that end in rows of this process: a square of N + H, its last H rows empty.

    Args:
        halo: how the H rows of other processes come.
        back: how their gradients return.
    """

    halo: Halo | None = None
    back: Halo | None = None

    def masked(self, mask: Tensor) -> PartitionedEdges:
        """The entries where ``mask`` (E,) is set."""
        left = super().masked(mask)
        return PartitionedEdges(left.offsets, left.columns, left.values, self.halo, self.back)

    def tensors(self) -> list[Tensor]:
        """The parts."""
        assert self.halo is not None
        return [*super().tensors(), *self.halo.tensors()]

    def map(self, function: Callable[[Tensor], Tensor]) -> PartitionedEdges:
        """The pattern with a function applied to its parts."""
        assert self.halo is not None and self.back is not None
        rows, moved = function(self.halo.rows), super().map(function)
        halos = (replace(halo, rows=rows) for halo in (self.halo, self.back))
        return PartitionedEdges(moved.offsets, moved.columns, moved.values, *halos)


def halo_of(graph: Graph) -> Halo | None:
    """What a graph fetches of other processes; None where it is not partitioned."""
    matrix = graph.matrix if isinstance(graph, Adjacency) else graph
    return matrix.halo if isinstance(matrix, (PartitionedMatrix, PartitionedEdges)) else None


def shard_of(graph: Graph) -> Shard:
    """Which rows of the whole graph a graph has; all, where it is not partitioned."""
    halo = halo_of(graph)
    return WHOLE if halo is None else halo.shard


def begin_pass(graph: Graph, seed: int | Tensor) -> Shard:
    """:func:`shard_of` for a pass whose messages are rounded by this seed."""
    halo = halo_of(graph)
    if halo is None:
        return WHOLE
    assert isinstance(seed, int)
    halo.begin_pass(seed)
    return halo.shard


def begin_epoch(graph: Graph, epoch: int) -> None:
    """An epoch begins, counted from 1, in which rows may have to travel whole."""
    halo = halo_of(graph)
    if halo is not None and halo.known is not None:
        halo.known.begin_epoch(epoch)


@contextmanager
def frozen_messages(graph: Graph) -> Iterator[None]:
    """A context whose passes leave what processes have of each other's rows as it is, to be taken again."""
    halo = halo_of(graph)
    known = None if halo is None else halo.known
    if known is None:
        yield
        return
    known.frozen = True
    try:
        yield
    finally:
        known.frozen = False


def with_exact_messages(graph: Graph) -> Graph:
    """The same graph, whose rows travel as they are; one that is not partitioned as it is."""

    def exact(matrix: CSR) -> CSR:
        if isinstance(matrix, PartitionedMatrix) and matrix.halo is not None:
            return replace(matrix, halo=replace(matrix.halo, form=Plain(), known=None))
        if isinstance(matrix, PartitionedEdges) and matrix.halo is not None and matrix.back is not None:
            halo = replace(matrix.halo, form=Plain(), known=None)
            return replace(matrix, halo=halo, back=replace(matrix.back, form=Plain()))
        return matrix

    if halo_of(graph) is None:
        return graph
    if isinstance(graph, Adjacency):
        matrix = exact(graph.matrix)
        return replace(graph, matrix=matrix, adjoint=matrix if graph.adjoint is graph.matrix else exact(graph.adjoint))
    return exact(graph) if isinstance(graph, CSR) else graph


def partitioned(
    build: ScaledAdjacency | EdgePattern,
    sources: CSR,
    targets: CSR | None,
    shard: DistributedShard,
    *,
    forward: Format,
    backward: Format,
    delta_interval: int | None = None,
) -> Graph:
    """The rows of one process of what a model applies; every process must call it.

    Args:
        build: what the model makes of edges.
        sources: of the edges that end in each row of this process, numbered in the whole graph, ascending.
        targets: of the edges that begin there, likewise; None where every edge has its reverse.
        shard: the rows of this process.
        forward: how rows of maps travel.
        backward: how rows of gradients travel.
        delta_interval: epochs between two in which rows of maps travel whole, and as differences in the others; None
            has them always travel whole.
    """
    known = None if delta_interval is None else Known(delta_interval)
    if build.self_loops:
        sources = sources.with_diagonal(first=shard.start)
        targets = None if targets is None else targets.with_diagonal(first=shard.start)
    options: dict[str, Any] = {"draws": Draws(shard.rank), "traffic": Traffic()}
    if isinstance(build, EdgePattern):
        return _edges_of(sources, shard, forward, backward, options, known)
    matrix = _rows_of(sources, shard, forward, options | {"known": known})
    if targets is not None:
        adjoint = _rows_of(targets, shard, backward, options)
    elif backward == forward and known is None:
        adjoint = matrix
    else:
        assert matrix.halo is not None
        adjoint = replace(matrix, halo=replace(matrix.halo, form=backward, known=None))
    return Adjacency(matrix, adjoint, *build.scales(sources))


def _rows_of(rows: CSR, shard: DistributedShard, form: Format, options: dict[str, Any]) -> PartitionedMatrix:
    near = (rows.columns >= shard.start) & (rows.columns < shard.stop)
    own, far = rows.masked(near), rows.masked(~near)
    needed, columns = _halo_columns(far.columns, shard)
    halo = Halo.of(shard, needed, form=form, **options)
    return PartitionedMatrix(own.offsets, own.columns - shard.start, None, CSR(far.offsets, columns), halo)


def _edges_of(
    rows: CSR,
    shard: DistributedShard,
    forward: Format,
    backward: Format,
    options: dict[str, Any],
    known: Known | None,
) -> PartitionedEdges:
    near = (rows.columns >= shard.start) & (rows.columns < shard.stop)
    needed, far = _halo_columns(rows.columns[~near], shard)
    back = Halo.of(shard, needed, form=backward, **options)
    columns = rows.columns - shard.start
    columns[~near] = shard.rows + far
    offsets = torch.cat([rows.offsets, rows.offsets[-1:].expand(needed.numel())])
    return PartitionedEdges(offsets, columns, None, replace(back, form=forward, known=known), back)


def _halo_columns(columns: Tensor, shard: DistributedShard) -> tuple[Tensor, Tensor]:
    """The rows (H,) that columns (E,) name, ascending, and the place of each column among them."""
    named = torch.zeros(shard.total, dtype=torch.bool)
    named[columns.long()] = True
    place = named.cumsum(0, dtype=columns.dtype).sub_(1)
    return named.nonzero().squeeze(1), place[columns.long()]
