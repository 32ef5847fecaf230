"""Handwritten digits as a graph: bundled with scikit-learn, so it needs neither files nor a network.

1,797 images of 8 x 8 pixels, 10 classes. Each image is joined to its k nearest others by Euclidean distance, the first
ones where several are as near; an edge holds in both directions if either end chose the other. Pixels are scaled to
[0, 1].
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits

from iexact_runner.config import DigitsConfig
from iexact_runner.data.dataset import NodeDataset
from iexact_runner.data.prepare import prepare

_MAX_PIXEL = 16.0


def load_digits_graph(config: DigitsConfig) -> NodeDataset:
    """Builds the graph; the split is 60/20/20 drawn from ``split_seed``."""
    pixels, labels = load_digits(return_X_y=True)
    count = len(pixels)
    chosen = np.zeros((count, count), dtype=bool)
    np.put_along_axis(chosen, _nearest(pixels, config.neighbors), True, axis=1)
    return prepare(
        config,
        x=torch.from_numpy(pixels / _MAX_PIXEL),
        y=torch.from_numpy(labels),
        edge_index=torch.from_numpy(np.stack(np.nonzero(chosen | chosen.T))),
        split=None,
    )


def _nearest(pixels: NDArray[np.float64], neighbors: int) -> NDArray[np.int64]:
    """Indices (N, k) of the nearest others, in no order; of those as near as each other the first.

    Not by scikit-learn, whose choice among these depends on its number of threads.
    """
    squares = np.square(pixels).sum(axis=1)
    # Of whole numbers, and so exact.
    distances = (squares[:, None] + squares - 2 * pixels @ pixels.T).astype(np.int64)
    np.fill_diagonal(distances, distances.max() + 1)
    ranks = distances * len(pixels) + np.arange(len(pixels))
    return np.argpartition(ranks, neighbors, axis=1)[:, :neighbors]
