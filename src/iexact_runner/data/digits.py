"""Handwritten digits as a graph: bundled with scikit-learn, so it needs neither files nor a network.

1,797 images of 8 x 8 pixels, 10 classes. Each image is joined to its k nearest others by Euclidean distance;
an edge holds in both directions if either end chose the other. Pixels are scaled to [0, 1].
"""

from __future__ import annotations

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.neighbors import kneighbors_graph

from iexact_runner.config import DigitsConfig
from iexact_runner.data.dataset import NodeDataset
from iexact_runner.data.prepare import prepare

_MAX_PIXEL = 16.0


def load_digits_graph(config: DigitsConfig) -> NodeDataset:
    """Builds the graph; the split is 60/20/20 drawn from ``split_seed``."""
    pixels, labels = load_digits(return_X_y=True)
    adjacency = kneighbors_graph(pixels, config.neighbors, include_self=False)
    edges = (adjacency + adjacency.T).tocoo()
    return prepare(
        config,
        x=torch.from_numpy(pixels / _MAX_PIXEL),
        y=torch.from_numpy(labels),
        edge_index=torch.from_numpy(np.stack([edges.row, edges.col])),
        split=None,
    )
