"""The graph as what models apply: a sparse matrix with its adjoint, or the pattern of one.

Shapes: N nodes, E directed edges. Row i of a matrix gathers from the sources of the edges that end in node i.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from iexact_runner.data.sparse import CSR


@dataclass(frozen=True)
class Adjacency:
    """diag(row_scale) @ matrix @ diag(column_scale), an (N, N) operator on node features, with its adjoint.

    Args:
        matrix: the matrix.
        adjoint: its transpose; the same object for a symmetric graph, so held once.
        row_scale: (N, 1) or None for all ones.
        column_scale: like ``row_scale``.
        known: features and their product with the operator, kept as data because they are the same in every pass.
    """

    matrix: CSR
    adjoint: CSR
    row_scale: Tensor | None = None
    column_scale: Tensor | None = None
    known: tuple[Tensor, Tensor] | None = None

    def knowing(self, x: Tensor) -> Adjacency:
        """The operator that keeps its product with features (N, D)."""
        return replace(self, known=(x, self.matmul(x)))

    def product_of(self, x: Tensor) -> Tensor | None:
        """The product with these very features, if it is known."""
        return self.known[1] if self.known is not None and self.known[0] is x else None

    def matmul(self, x: Tensor, *, bias: Tensor | None = None, out: Tensor | None = None, add: bool = False) -> Tensor:
        """The operator applied to (N, D) features, plus a bias (D,); written into ``out`` or added to it."""
        scales = dict(column_scale=self.column_scale, row_scale=self.row_scale)
        return self.matrix.matmul(x, **scales, bias=bias, out=out, add=add)

    def matmul_(self, x: Tensor, *, bias: Tensor | None = None) -> Tensor:
        """:meth:`matmul` written over ``x``."""
        return self.matrix.matmul_(x, column_scale=self.column_scale, row_scale=self.row_scale, bias=bias)

    def adjoint_matmul(self, grad: Tensor) -> Tensor:
        """The transposed operator applied to (N, D) gradients; no transpose is formed."""
        return self.adjoint.matmul(grad, column_scale=self.row_scale, row_scale=self.column_scale)

    def adjoint_matmul_(self, grad: Tensor) -> Tensor:
        """:meth:`adjoint_matmul` written over ``grad``."""
        return self.adjoint.matmul_(grad, column_scale=self.row_scale, row_scale=self.column_scale)

    def tensors(self) -> list[Tensor]:
        """Dense tensors that make up the operator, each once."""
        matrices = [self.matrix] if self.adjoint is self.matrix else [self.matrix, self.adjoint]
        scales = {id(scale): scale for scale in (self.row_scale, self.column_scale) if scale is not None}
        known = [] if self.known is None else [self.known[1]]
        return [*(part for matrix in matrices for part in matrix.tensors()), *scales.values(), *known]

    def map(self, function: Callable[[Tensor], Tensor]) -> Adjacency:
        """The operator with a function applied to its parts; what is held once stays held once.

        A product that was known belongs to features elsewhere, and is not any more.
        """
        matrix = self.matrix.map(function)
        adjoint = matrix if self.adjoint is self.matrix else self.adjoint.map(function)
        row_scale = None if self.row_scale is None else function(self.row_scale)
        column_scale = None if self.column_scale is None else function(self.column_scale)
        if self.column_scale is self.row_scale:
            column_scale = row_scale
        return Adjacency(matrix, adjoint, row_scale, column_scale)


@dataclass(frozen=True)
class Edges:
    """Edges (2, E), source and target, as PyG's layers take them."""

    edge_index: Tensor

    def tensors(self) -> list[Tensor]:
        """The one tensor."""
        return [self.edge_index]

    def map(self, function: Callable[[Tensor], Tensor]) -> Edges:
        """With a function applied to it."""
        return Edges(function(self.edge_index))


# A matrix without values is the pattern of a graph, for numbers that belong to its edges, such as attention.
Graph = Adjacency | CSR | Edges


def edge_count(graph: Graph) -> int:
    """Edges, self-loops included."""
    if isinstance(graph, Edges):
        return graph.edge_index.size(1)
    return (graph.matrix if isinstance(graph, Adjacency) else graph).num_entries


def edge_list(edge_index: Tensor, num_nodes: int) -> Edges:
    """The edges as they are, for a model that makes of them what it needs."""
    return Edges(edge_index.long())


@dataclass(frozen=True)
class ScaledAdjacency:
    """What a model makes of the edges: their matrix, scaled by the in-degrees, and its adjoint.

    Args:
        scales: row and column scale (N, 1) of a matrix, or None; the matrix may be a run of rows of the whole one.
        self_loops: whether each node gets exactly one.
    """

    scales: Callable[[CSR], tuple[Tensor | None, Tensor | None]]
    self_loops: bool = False

    def __call__(self, edge_index: Tensor, num_nodes: int) -> Adjacency:
        """Of a list of edges (2, E), source and target."""
        edge_index = with_self_loops(edge_index, num_nodes) if self.self_loops else edge_index
        matrix, adjoint = pattern_of(edge_index, num_nodes)
        return Adjacency(matrix, adjoint, *self.scales(matrix))


@dataclass(frozen=True)
class EdgePattern:
    """The pattern of the edges with one self-loop a node, as attention wants it (Velickovic et al., 2018)."""

    self_loops: bool = True

    def __call__(self, edge_index: Tensor, num_nodes: int) -> CSR:
        """Of a list of edges (2, E), source and target."""
        return edges_of(with_self_loops(edge_index, num_nodes), num_nodes)


def mean_scale(matrix: CSR) -> Tensor:
    """One over the number of entries of each row (N, 1), and 1 for an empty one."""
    return matrix.offsets.diff().clamp(min=1).float().reciprocal().unsqueeze(1)


def _symmetric_scales(matrix: CSR) -> tuple[Tensor, Tensor]:
    scale = matrix.offsets.diff().float().rsqrt().unsqueeze(1)
    return scale, scale


# Mean over the in-neighbours, without self-loops added (GraphSAGE); isolated nodes gather zero.
mean_adjacency = ScaledAdjacency(lambda matrix: (mean_scale(matrix), None))
# Sum over the in-neighbours, without self-loops added (GraphConv), and with the node itself, once (GENConv).
sum_adjacency = ScaledAdjacency(lambda matrix: (None, None))
sum_adjacency_with_self = ScaledAdjacency(lambda matrix: (None, None), self_loops=True)
# D^-1/2 (A + I) D^-1/2 with D the in-degree of A + I (Kipf and Welling, 2017).
gcn_adjacency = ScaledAdjacency(_symmetric_scales, self_loops=True)
attention_edges = EdgePattern()


def edges_of(edge_index: Tensor, num_nodes: int) -> CSR:
    """The pattern of a list of edges (2, E), sorted by target and then by source."""
    source, target = edge_index
    return _csr(torch.sort(target.long() * num_nodes + source).values, num_nodes)


def edge_positions(edge_index: Tensor, num_nodes: int) -> Tensor:
    """Position in ``edge_index`` (E,) of each entry of the pattern that :func:`edges_of` makes of it."""
    source, target = edge_index
    return torch.argsort(target.long() * num_nodes + source, stable=True)


def with_self_loops(edge_index: Tensor, num_nodes: int) -> Tensor:
    """Edges with exactly one self-loop a node, at the end."""
    proper = edge_index[:, edge_index[0] != edge_index[1]]
    loops = torch.arange(num_nodes, dtype=edge_index.dtype, device=edge_index.device)
    return torch.cat([proper, loops.expand(2, -1)], dim=1)


def training_subgraph(edge_index: Tensor, nodes: Tensor, num_nodes: int) -> Tensor:
    """Edges between ``nodes``, renumbered by their position in ``nodes``."""
    position = torch.full((num_nodes,), -1, dtype=edge_index.dtype, device=edge_index.device)
    position[nodes] = torch.arange(nodes.numel(), dtype=edge_index.dtype, device=edge_index.device)
    source, target = position[edge_index.long()]
    inside = (source >= 0) & (target >= 0)
    return torch.stack([source[inside], target[inside]])


def pattern_of(edge_index: Tensor, num_nodes: int) -> tuple[CSR, CSR]:
    """Matrices of ones for A (row = target) and its transpose; one object twice if the graph is symmetric."""
    source, target = edge_index
    keys = torch.sort(target.long() * num_nodes + source).values
    transposed = torch.sort(source.long() * num_nodes + target).values
    matrix = _csr(keys, num_nodes)
    return matrix, matrix if torch.equal(keys, transposed) else _csr(transposed, num_nodes)


def _csr(keys: Tensor, num_nodes: int) -> CSR:
    """Matrix of ones from sorted keys row * N + column."""
    # int32 halves the index memory, and the CPU product converts 64-bit indices on every call.
    index = torch.int32 if max(keys.numel(), num_nodes) < 2**31 else torch.int64
    rows = keys // num_nodes
    counts = torch.bincount(rows, minlength=num_nodes)
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).to(index)
    return CSR(offsets, (keys - rows * num_nodes).to(index))
