"""A graph whose nodes stand part by part, and the rows of it that one process has.

Shapes: N nodes of the whole graph, n rows of one process, D features, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from iexact_runner.data.dataset import NodeDataset
from iexact_runner.data.graph import pattern_of
from iexact_runner.data.sparse import CSR


@dataclass(frozen=True)
class Rows:
    """What one process has of a graph.

    Args:
        x: features (n, D), float32.
        y: classes (n,) or labels (n, C).
        sources: of the edges that end in each row, numbered in the whole graph, ascending.
        targets: of the edges that begin there, likewise; None where every edge has its reverse.
        splits: places among the rows of the training, validation and test nodes, ascending.
    """

    x: Tensor
    y: Tensor
    sources: CSR
    targets: CSR | None
    splits: tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Facts:
    """What every process knows of the whole graph.

    Args:
        cuts: first row of each part, and N.
        num_edges: directed.
        num_features: D.
        num_classes: C.
        num_train: training nodes.
        symmetric: whether every edge has its reverse.
        multilabel: whether a node may carry several labels.
        partition: how the parts were found, for the record.
    """

    cuts: tuple[int, ...]
    num_edges: int
    num_features: int
    num_classes: int
    num_train: int
    symmetric: bool
    multilabel: bool
    partition: dict[str, Any]

    @property
    def num_nodes(self) -> int:
        """N."""
        return self.cuts[-1]

    @property
    def features_bytes(self) -> int:
        """Size of the features of the whole graph."""
        return 4 * self.num_nodes * self.num_features

    @property
    def num_parts(self) -> int:
        """Parts of the partition."""
        return len(self.cuts) - 1


class GraphInParts(Protocol):
    """A graph of which runs of parts can be read, and that of its training nodes, if these are trained on alone."""

    facts: Facts
    training: GraphInParts | None

    def rows(self, first: int, last: int) -> Rows:
        """Rows of the parts from ``first`` to before ``last``."""


class OrderedGraph:
    """A whole graph in memory, its nodes in the order of their parts.

    Args:
        dataset: the graph.
        nodes: old number (N,) of the node at each place.
        cuts: first place of each part, and N.
        partition: how the parts were found.
        training: the graph of the training nodes, if these are trained on alone.
    """

    def __init__(
        self,
        dataset: NodeDataset,
        nodes: Tensor,
        cuts: Sequence[int],
        *,
        partition: dict[str, Any] | None = None,
        training: GraphInParts | None = None,
    ) -> None:
        self.training = training
        self._dataset, self._nodes = dataset, nodes
        self._place = torch.empty_like(nodes)
        self._place[nodes] = torch.arange(dataset.num_nodes)
        self._sources, self._targets = pattern_of(self._place[dataset.edge_index.long()], dataset.num_nodes)
        self.facts = Facts(
            cuts=tuple(cuts),
            num_edges=dataset.edge_index.size(1),
            num_features=dataset.x.size(1),
            num_classes=dataset.num_classes,
            num_train=dataset.train.numel(),
            symmetric=self._targets is self._sources,
            multilabel=dataset.multilabel,
            partition=partition or {},
        )

    def rows(self, first: int, last: int) -> Rows:
        """Rows of the parts from ``first`` to before ``last``."""
        start, stop = self.facts.cuts[first], self.facts.cuts[last]
        nodes, dataset = self._nodes[start:stop], self._dataset

        def own(split: Tensor) -> Tensor:
            places = self._place[split]
            inside: Tensor = places[(places >= start) & (places < stop)].sort().values
            return inside - start

        def edges(whole: CSR) -> CSR:
            begin, end = int(whole.offsets[start]), int(whole.offsets[stop])
            return CSR(whole.offsets[start : stop + 1] - begin, whole.columns[begin:end].clone())

        targets = None if self.facts.symmetric else edges(self._targets)
        splits = (own(dataset.train), own(dataset.val), own(dataset.test))
        return Rows(dataset.x[nodes], dataset.y[nodes], edges(self._sources), targets, splits)
