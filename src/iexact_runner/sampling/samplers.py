"""Samplers of mini-batches: each is drawn from (seed, epoch, batch) alone, so that a resumed run draws it again.

Shapes: N nodes.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Protocol

import numpy as np

from iexact_runner.compression.seeds import mix
from iexact_runner.config import (
    NeighborConfig,
    SaintConfig,
    SaintEdgeConfig,
    SaintNodeConfig,
    SaintWalkConfig,
)
from iexact_runner.sampling.subgraph import Array, Part, Pattern, generator

# Draws that say how many nodes a batch of GraphSAINT has on average.
_PROBES = 5


class Sampler(Protocol):
    """What draws the batches of an epoch."""

    def __len__(self) -> int:
        """Batches of an epoch."""

    def draw(self, batch: int, *, seed: int, epoch: int) -> Part:
        """A batch, counted from 0."""


class ClusterSampler:
    """Parts of a partition, in a new order each epoch; edges between the parts of a batch are in it.

    Args:
        pattern: of the graph.
        parts: part (N,) of each node.
        batch_parts: parts of a batch.
    """

    def __init__(self, pattern: Pattern, parts: Array, *, batch_parts: int) -> None:
        self._pattern = pattern
        self._nodes = np.argsort(parts, kind="stable")
        counts = np.bincount(parts)
        ends = np.cumsum(counts)
        self._runs = [slice(end - count, end) for count, end in zip(counts, ends, strict=True) if count]
        self._batch_parts = batch_parts

    def __len__(self) -> int:
        return math.ceil(len(self._runs) / self._batch_parts)

    def draw(self, batch: int, *, seed: int, epoch: int) -> Part:
        """The subgraph of the batch's parts."""
        order = _permutation(mix(seed, epoch), len(self._runs))
        chosen = order[batch * self._batch_parts : (batch + 1) * self._batch_parts]
        return self._pattern.induced(np.sort(np.concatenate([self._nodes[self._runs[part]] for part in chosen])))


class SaintSampler:
    """The subgraph of the nodes that walks visit, or of nodes or edges that are drawn.

    Args:
        pattern: of the graph.
        config: which of them, and how many.
    """

    def __init__(self, pattern: Pattern, config: SaintConfig) -> None:
        self._pattern = pattern
        self._config = config
        sizes = [len(self._drawn(generator(mix(probe)))) for probe in range(_PROBES)]
        self.mean_nodes = sum(sizes) / len(sizes)
        self._steps = config.steps or max(1, round(pattern.num_nodes / self.mean_nodes))

    def __len__(self) -> int:
        return self._steps

    def draw(self, batch: int, *, seed: int, epoch: int) -> Part:
        """The subgraph of the nodes that are drawn."""
        return self._pattern.induced(self._drawn(generator(mix(seed, epoch, batch))))

    def _drawn(self, random: np.random.Generator) -> Array:
        """Nodes, in ascending order."""
        pattern, config = self._pattern, self._config
        if isinstance(config, SaintWalkConfig):
            return pattern.walked(random.integers(pattern.num_nodes, size=config.roots), config.walk_length, random)
        if isinstance(config, SaintEdgeConfig):
            # A node, then one of its edges: an edge is drawn from both ends, in proportion to 1 / deg(u) + 1 / deg(v).
            targets = random.integers(pattern.num_nodes, size=config.edges)
            return np.unique(np.concatenate([targets, pattern.random_neighbors(targets, random)]))
        assert isinstance(config, SaintNodeConfig)
        if not pattern.num_edges:
            return np.unique(random.integers(pattern.num_nodes, size=config.nodes))
        # The target of an edge is a node in proportion to its degree.
        entries = random.integers(pattern.num_edges, size=config.nodes)
        return np.unique(np.searchsorted(pattern.offsets, entries, side="right") - 1)


class NeighborSampler:
    """Training nodes, each once an epoch, with neighbours that are drawn hop by hop.

    Args:
        pattern: of the graph.
        nodes: those of the loss.
        config: how many of them make a batch, and how many neighbours are drawn.
    """

    def __init__(self, pattern: Pattern, nodes: Array, config: NeighborConfig) -> None:
        self._pattern = pattern
        self._nodes = nodes
        self._config = config

    def __len__(self) -> int:
        return math.ceil(len(self._nodes) / self._config.batch_size)

    def draw(self, batch: int, *, seed: int, epoch: int) -> Part:
        """The batch's nodes, and what reaches them."""
        size = self._config.batch_size
        order = _permutation(mix(seed, epoch), len(self._nodes))
        seeds = self._nodes[order[batch * size : (batch + 1) * size]]
        return self._pattern.sampled(seeds, list(self._config.num_neighbors), generator(mix(seed, epoch, batch)))


@lru_cache(maxsize=2)
def _permutation(seed: int, count: int) -> Array:
    """Numbers 0 to count - 1 in the order of an epoch."""
    return generator(seed).permutation(count)
