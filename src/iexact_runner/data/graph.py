"""The graph as the operators that models apply: a sparse matrix with its adjoint, or a list of edges.

Shapes: N nodes, E directed edges. Row i of a matrix gathers from the sources of the edges that end in node i.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class CSR:
    """A sparse (N, N) matrix: row offsets (N + 1,), column indices (E,), both int32 where they fit, and values (E,)."""

    offsets: Tensor
    columns: Tensor
    values: Tensor

    def tensor(self) -> Tensor:
        """The matrix as a torch CSR tensor that shares this one's memory."""
        nodes = self.offsets.numel() - 1
        return torch.sparse_csr_tensor(
            self.offsets, self.columns, self.values, size=(nodes, nodes), check_invariants=False
        )

    def matmul(self, x: Tensor) -> Tensor:
        """The product with (N, D) features."""
        product: Tensor = _spmm(self.offsets, self.columns, self.values, x)
        return product

    def tensors(self) -> list[Tensor]:
        """The parts."""
        return [self.offsets, self.columns, self.values]

    def map(self, function: Callable[[Tensor], Tensor]) -> CSR:
        """The matrix with a function applied to its parts, for example to move them to a device."""
        return CSR(*map(function, self.tensors()))


# An operator of its own, because torch.compile does not trace through sparse layouts.
@torch.library.custom_op("iexact::spmm", mutates_args=(), schema="(Tensor o, Tensor c, Tensor v, Tensor x) -> Tensor")
def _spmm(offsets: Tensor, columns: Tensor, values: Tensor, x: Tensor) -> Tensor:
    return CSR(offsets, columns, values).tensor() @ x


@_spmm.register_fake
def _(offsets: Tensor, columns: Tensor, values: Tensor, x: Tensor) -> Tensor:
    return x.new_empty(offsets.numel() - 1, x.size(1))


@dataclass(frozen=True)
class Adjacency:
    """diag(row_scale) @ matrix, an (N, N) sparse operator on node features, with its adjoint.

    Args:
        matrix: the matrix.
        adjoint: its transpose; the same object for a symmetric graph, so held once.
        row_scale: (N, 1) or None for all ones.
    """

    matrix: CSR
    adjoint: CSR
    row_scale: Tensor | None = None

    def matmul(self, x: Tensor) -> Tensor:
        """The operator applied to (N, D) features."""
        product = self.matrix.matmul(x)
        return product if self.row_scale is None else product.mul_(self.row_scale)

    def adjoint_matmul(self, grad: Tensor) -> Tensor:
        """The transposed operator applied to (N, D) gradients: no transpose is formed, A_mean^T g = A^T (D^-1 g)."""
        return self.adjoint.matmul(grad if self.row_scale is None else grad * self.row_scale)

    def tensors(self) -> list[Tensor]:
        """Dense tensors that make up the operator, each once."""
        matrices = [self.matrix] if self.adjoint is self.matrix else [self.matrix, self.adjoint]
        parts = [part for matrix in matrices for part in matrix.tensors()]
        return parts if self.row_scale is None else [*parts, self.row_scale]

    def map(self, function: Callable[[Tensor], Tensor]) -> Adjacency:
        """The operator with a function applied to its parts; a symmetric one stays held once."""
        matrix = self.matrix.map(function)
        adjoint = matrix if self.adjoint is self.matrix else self.adjoint.map(function)
        return Adjacency(matrix, adjoint, None if self.row_scale is None else function(self.row_scale))


@dataclass(frozen=True)
class EdgeList:
    """Source and target (E,), int64, of edges sorted by target; the last N are the self-loops 0..N-1 if ``loops``."""

    source: Tensor
    target: Tensor
    num_nodes: int
    loops: bool

    def tensors(self) -> list[Tensor]:
        """Dense tensors that make up the list."""
        return [self.source, self.target]

    def map(self, function: Callable[[Tensor], Tensor]) -> EdgeList:
        """The list with a function applied to its parts."""
        return EdgeList(function(self.source), function(self.target), self.num_nodes, self.loops)

    def keep(self, mask: Tensor) -> EdgeList:
        """The edges where ``mask`` (E,) is set; self-loops always stay, so that every node keeps a neighbour."""
        if self.loops:
            mask = mask.clone()
            mask[-self.num_nodes :] = True
        return EdgeList(self.source[mask], self.target[mask], self.num_nodes, self.loops)


Graph = Adjacency | EdgeList


def mean_adjacency(edge_index: Tensor, num_nodes: int) -> Adjacency:
    """Mean over the in-neighbours, without self-loops added (GraphSAGE); isolated nodes gather zero."""
    matrix, adjoint = _pattern(edge_index, num_nodes)
    degree = matrix.offsets.diff().clamp(min=1)
    return Adjacency(matrix, adjoint, degree.float().reciprocal().unsqueeze(1))


def gcn_adjacency(edge_index: Tensor, num_nodes: int) -> Adjacency:
    """D^-1/2 (A + I) D^-1/2 with D the in-degree of A + I (Kipf and Welling, 2017)."""
    matrix, adjoint = _pattern(with_self_loops(edge_index, num_nodes), num_nodes)
    scale = matrix.offsets.diff().float().rsqrt()
    normalised = _weighted(matrix, scale)
    return Adjacency(normalised, normalised if adjoint is matrix else _weighted(adjoint, scale))


def edge_list(edge_index: Tensor, num_nodes: int) -> EdgeList:
    """Edges with one self-loop a node, as attention wants them (Velickovic et al., 2018)."""
    source, target = with_self_loops(edge_index, num_nodes).long()
    real = source.numel() - num_nodes
    order = torch.argsort(target[:real], stable=True)
    loops = torch.arange(num_nodes, device=edge_index.device)
    return EdgeList(torch.cat([source[order], loops]), torch.cat([target[order], loops]), num_nodes, loops=True)


def with_self_loops(edge_index: Tensor, num_nodes: int) -> Tensor:
    """Edges with exactly one self-loop a node, at the end."""
    proper = edge_index[:, edge_index[0] != edge_index[1]]
    loops = torch.arange(num_nodes, dtype=edge_index.dtype, device=edge_index.device)
    return torch.cat([proper, loops.expand(2, -1)], dim=1)


def training_subgraph(edge_index: Tensor, nodes: Tensor, num_nodes: int) -> Tensor:
    """Edges between ``nodes``, renumbered by their position in ``nodes`` (inductive training)."""
    position = torch.full((num_nodes,), -1, dtype=edge_index.dtype, device=edge_index.device)
    position[nodes] = torch.arange(nodes.numel(), dtype=edge_index.dtype, device=edge_index.device)
    source, target = position[edge_index.long()]
    inside = (source >= 0) & (target >= 0)
    return torch.stack([source[inside], target[inside]])


def _pattern(edge_index: Tensor, num_nodes: int) -> tuple[CSR, CSR]:
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
    columns = (keys - rows * num_nodes).to(index)
    matrix = CSR(offsets, columns, torch.ones(keys.numel(), device=keys.device))
    with warnings.catch_warnings():  # torch calls CSR "in beta state" at its first use, which is no news to a user
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        matrix.tensor()
    return matrix


def _weighted(matrix: CSR, scale: Tensor) -> CSR:
    """diag(scale) @ matrix @ diag(scale)."""
    row_scale = torch.repeat_interleave(scale, matrix.offsets.diff().long())
    return CSR(matrix.offsets, matrix.columns, row_scale.mul_(scale[matrix.columns.long()]))
