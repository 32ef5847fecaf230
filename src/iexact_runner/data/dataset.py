"""What every loader returns: one graph with node features, labels and split indices."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass
class NodeDataset:
    """A node classification task on one graph.

    Args:
        x: (N, D) float32 features.
        y: (N,) int64 class indices, or (N, C) float32 zeros and ones for multi-label tasks.
        edge_index: (2, E) int32 or int64, row 0 source and row 1 target, without repeated edges.
        train: int64 node indices; likewise ``val`` and ``test``.
        num_classes: number of classes (labels, for multi-label tasks).
    """

    x: Tensor
    y: Tensor
    edge_index: Tensor
    train: Tensor
    val: Tensor
    test: Tensor
    num_classes: int

    @property
    def num_nodes(self) -> int:
        """N."""
        return self.x.size(0)

    @property
    def multilabel(self) -> bool:
        """Whether a node may carry several labels."""
        return self.y.dim() == 2
