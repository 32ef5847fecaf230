"""The operators of the graphs that a model is called with, made once for each.

Shapes: N nodes, E edges.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary
from torch_geometric.nn.conv.gcn_conv import gcn_norm
from torch_geometric.utils import is_torch_sparse_tensor, to_edge_index

from iexact_runner.data.graph import Adjacency, edge_positions, edges_of, gcn_adjacency, mean_scale, with_self_loops
from iexact_runner.data.sparse import CSR


@dataclass
class _Made:
    """What was made from a tensor, by key, and from it together with a second one."""

    made: dict[Any, tuple[Any, Any]] = field(default_factory=dict)
    with_second: WeakIdKeyDictionary = field(default_factory=WeakIdKeyDictionary)


class GraphCache:
    """Operators by the tensor they were made from: an ``edge_index`` (2, E), or a sparse (N, N) matrix, row = target.

    They live as long as that tensor, and are made anew once it is written to. Copies and pickles start empty.
    """

    def __init__(self) -> None:
        self._made = WeakIdKeyDictionary()

    def __reduce__(self) -> tuple[type[GraphCache], tuple[()]]:
        return GraphCache, ()

    def edges(self, graph: Tensor, nodes: int, *, self_loops: bool = False) -> CSR:
        """The pattern, with one self-loop a node if asked for."""

        def make() -> CSR:
            edge_index = _read(graph)
            return edges_of(with_self_loops(edge_index, nodes) if self_loops else edge_index, nodes)

        edges: CSR = self._get(("edges", nodes, self_loops), make, graph)
        return edges

    def weights(self, graph: Tensor, nodes: int, weight: Tensor) -> Tensor:
        """Numbers by edge (E,) in the order of the pattern's entries; differentiable."""
        positions = self._get(("positions", nodes), lambda: edge_positions(_read(graph), nodes), graph)
        return weight.flatten().float()[positions]

    def adjacency(self, graph: Tensor, nodes: int, weight: Tensor | None, *, mean: bool) -> Adjacency:
        """Sum or mean over the in-neighbours with fixed edge weights, or none."""

        def make() -> Adjacency:
            matrix = self.edges(graph, nodes)
            scale = mean_scale(matrix) if mean else None
            if weight is not None:
                matrix = matrix.with_values(self.weights(graph, nodes, weight.detach()))
            return _operator(matrix, scale)

        adjacency: Adjacency = self._get(("adjacency", nodes, mean), make, graph, weight)
        return adjacency

    def normalised(
        self, graph: Tensor, nodes: int, weight: Tensor | None, *, self_loops: bool, improved: bool
    ) -> Adjacency:
        """PyG's ``gcn_norm`` of a graph with fixed edge weights, or none (Kipf and Welling, 2017)."""

        def make() -> Adjacency:
            if self_loops and not improved and weight is None and not is_torch_sparse_tensor(graph):
                return gcn_adjacency(_read(graph), nodes)
            known = None if weight is None else weight.detach()
            normalised, values = gcn_norm(_plain(graph), known, nodes, improved, self_loops, dtype=torch.float32)
            edge_index = _read(normalised)
            values = to_edge_index(normalised)[1] if values is None else values
            ordered = values.float()[edge_positions(edge_index, nodes)]
            return _operator(edges_of(edge_index, nodes).with_values(ordered), None)

        adjacency: Adjacency = self._get(("normalised", nodes, self_loops, improved), make, graph, weight)
        return adjacency

    def values(self, graph: Tensor) -> Tensor | None:
        """The entries of a sparse matrix if they are not all ones."""

        def make() -> Tensor | None:
            values = to_edge_index(graph)[1]
            return None if bool((values == 1).all()) else values.clone()

        values: Tensor | None = self._get(("values",), make, graph) if is_torch_sparse_tensor(graph) else None
        return values

    def fits(self, graph: Tensor, nodes: int) -> bool:
        """Whether the graph is one of so many nodes on both ends of its edges."""

        def make() -> bool:
            if is_torch_sparse_tensor(graph):
                return tuple(graph.shape) == (nodes, nodes)
            if graph.dim() != 2 or graph.size(0) != 2 or graph.is_floating_point():
                return False
            edge_index = _plain(graph)
            return edge_index.numel() == 0 or bool(edge_index.min() >= 0 and edge_index.max() < nodes)

        fitting: bool = self._get(("fits", nodes), make, graph)
        return fitting

    def _get(self, key: Any, make: Callable[[], Any], first: Tensor, second: Tensor | None = None) -> Any:
        entry = self._made.setdefault(first, _Made())
        if second is not None:
            entry = entry.with_second.setdefault(second, _Made())
        versions = (written(first), written(second))
        known = entry.made.get(key)
        if known is None or known[0] != versions:
            known = entry.made[key] = (versions, make())
        return known[1]


def written(x: Tensor | None) -> int | None:
    """How often a tensor was written to; inference tensors do not count."""
    return None if x is None or x.is_inference() else x._version


def _plain(graph: Tensor) -> Tensor:
    """The tensor itself of one with a class of its own, as PyG's ``EdgeIndex``."""
    return graph if is_torch_sparse_tensor(graph) else graph.as_subclass(Tensor)


def _read(graph: Tensor) -> Tensor:
    """Edges (2, E) as source and target."""
    edge_index: Tensor = to_edge_index(graph)[0].flip(0) if is_torch_sparse_tensor(graph) else _plain(graph)
    return edge_index


def _operator(matrix: CSR, row_scale: Tensor | None) -> Adjacency:
    """The operator of a matrix; one that is symmetric is held once."""
    adjoint, _ = matrix.transposed()
    symmetric = all(torch.equal(*parts) for parts in zip(matrix.tensors(), adjoint.tensors(), strict=True))
    return Adjacency(matrix, matrix if symmetric else adjoint, row_scale)
