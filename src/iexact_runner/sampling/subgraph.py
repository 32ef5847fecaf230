"""Parts of a graph: the subgraph of some nodes, walks, and neighbours that are drawn.

All of it is NumPy, which lets go of the interpreter while it works: batches are prepared beside the training step.
Shapes: N nodes, E edges; n nodes and e edges of a part. A row of the pattern holds the sources of a node's edges.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from iexact_runner.data.sparse import CSR

Array = NDArray[Any]
# So that what a batch draws depends on all 64 bits of its seed.
_MASK = (1 << 64) - 1


class Part(NamedTuple):
    """A part of a graph.

    Args:
        nodes: their numbers (n,), in ascending order.
        edge_index: source and target (2, e) as positions in ``nodes``, by target, then source.
        entries: position (e,) of each edge among the entries of the whole pattern.
        seeds: positions in ``nodes`` of those whose scores count; None for all.
    """

    nodes: Array
    edge_index: Array
    entries: Array
    seeds: Array | None = None


def generator(seed: int) -> np.random.Generator:
    """NumPy's generator of a signed 64-bit seed."""
    return np.random.Generator(np.random.Philox(key=seed & _MASK))


class Pattern:
    """The pattern of a graph on the host.

    Args:
        csr: rows are targets.
    """

    def __init__(self, csr: CSR) -> None:
        self.csr = csr
        self.offsets: Array = csr.offsets.numpy()
        self.columns: Array = csr.columns.numpy()

    @property
    def num_nodes(self) -> int:
        """N."""
        return len(self.offsets) - 1

    @property
    def num_edges(self) -> int:
        """E."""
        return len(self.columns)

    def degrees(self, nodes: Array) -> Array:
        """Edges that end in each node, int64."""
        degrees: Array = self.offsets[nodes + 1].astype(np.int64) - self.offsets[nodes]
        return degrees

    def entries_of(self, nodes: Array) -> tuple[Array, Array]:
        """Positions of the entries of some rows, row after row, and how many each has."""
        counts = self.degrees(nodes)
        return _runs(self.offsets[nodes].astype(np.int64), counts), counts

    def induced(self, nodes: Array) -> Part:
        """The subgraph of some nodes (n,), in ascending order."""
        local = self._positions(nodes)
        entries, counts = self.entries_of(nodes)
        sources = local[self.columns[entries]]
        inside = sources >= 0
        targets = np.repeat(np.arange(len(nodes), dtype=local.dtype), counts)[inside]
        return Part(nodes, np.stack([sources[inside], targets]), entries[inside])

    def walked(self, roots: Array, length: int, random: np.random.Generator) -> Array:
        """Nodes, in ascending order, of random walks against the edges; a walk rests where no edge ends."""
        visited, here = [roots], roots
        for _ in range(length):
            here = self.random_neighbors(here, random)
            visited.append(here)
        return np.unique(np.concatenate(visited))

    def random_neighbors(self, nodes: Array, random: np.random.Generator) -> Array:
        """A neighbour of each node, uniformly; the node itself if it has none."""
        degrees = self.degrees(nodes)
        chosen = (random.random(len(nodes)) * degrees).astype(np.int64)
        places = np.minimum(self.offsets[nodes] + chosen, max(0, self.num_edges - 1))
        neighbors = self.columns[places] if self.num_edges else nodes
        return np.where(degrees > 0, neighbors, nodes).astype(nodes.dtype)

    def sampled(self, seeds: Array, counts: list[int], random: np.random.Generator) -> Part:
        """Some nodes with neighbours that are drawn, neighbours of these, and so on: as many a node as ``counts`` says.

        A node's neighbours are drawn once, at the first hop that reaches it.
        """
        reached = np.zeros(self.num_nodes, dtype=bool)
        reached[seeds] = True
        frontier, entries, targets = np.sort(seeds), [], []
        for count in counts:
            drawn, numbers = self._drawn_entries(frontier, count, random)
            entries.append(drawn)
            targets.append(np.repeat(frontier, numbers))
            sources = self.columns[drawn]
            frontier = np.unique(sources[~reached[sources]]).astype(np.int64)
            reached[frontier] = True
        nodes = reached.nonzero()[0]
        local = self._positions(nodes)
        joined = np.concatenate(entries)
        order = np.argsort(joined)  # by row, and within it by column
        edge_index = local[np.stack([self.columns[joined], np.concatenate(targets)])][:, order]
        return Part(nodes, edge_index, joined[order], seeds=local[np.sort(seeds)].astype(np.int64))

    def _drawn_entries(self, rows: Array, count: int, random: np.random.Generator) -> tuple[Array, Array]:
        """Positions of ``count`` entries of each row, or of all where it has no more, and how many each has."""
        degrees, firsts = self.degrees(rows), self.offsets[rows].astype(np.int64)
        numbers = degrees if count < 0 else np.minimum(degrees, count)
        entries = _runs(firsts, numbers)
        many = degrees > numbers
        if many.any():
            chosen = _combinations(degrees[many], count, random)
            entries[np.repeat(many, numbers)] = (firsts[many, None] + chosen).ravel()
        return entries, numbers

    def _positions(self, nodes: Array) -> Array:
        """Position of each of the N nodes in ``nodes``; -1 where it is not among them."""
        positions = np.full(self.num_nodes, -1, dtype=np.int32)
        positions[nodes] = np.arange(len(nodes), dtype=np.int32)
        return positions


def _runs(firsts: Array, counts: Array) -> Array:
    """Numbers first, first + 1, ... of each run, one run after the other."""
    before = np.cumsum(counts) - counts
    numbers: Array = np.arange(int(counts.sum()), dtype=np.int64) + np.repeat(firsts - before, counts)
    return numbers


def _combinations(sizes: Array, count: int, random: np.random.Generator) -> Array:
    """For each size d > count, ``count`` different numbers below it, all subsets alike (Floyd's algorithm)."""
    chosen = np.empty((len(sizes), count), dtype=np.int64)
    for step in range(count):
        last = sizes - count + step
        number = (random.random(len(sizes)) * (last + 1)).astype(np.int64)
        taken = (chosen[:, :step] == number[:, None]).any(axis=1)
        chosen[:, step] = np.where(taken, last, number)
    return chosen
