"""Seeded node splits for datasets that publish none. The global random state is never touched."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

TRAIN_SHARE, VAL_SHARE = 0.6, 0.2

Split = tuple[Tensor, Tensor, Tensor]


def split_nodes(nodes: Tensor, sizes: Sequence[int], seed: int) -> Split:
    """Draws disjoint train, validation and test sets of the given sizes.

    Args:
        nodes: int64 indices to draw from.
        sizes: three counts, at most ``len(nodes)`` in all.
        seed: the same seed gives the same split on every machine.
    """
    train, val, test = sizes
    order = torch.from_numpy(np.random.Generator(np.random.PCG64(seed)).permutation(len(nodes)))
    parts = torch.split(nodes[order[: train + val + test]], [train, val, test])
    return parts[0].sort().values, parts[1].sort().values, parts[2].sort().values


def random_split(nodes: Tensor, seed: int) -> Split:
    """Splits ``nodes`` 60/20/20."""
    train, val = round(TRAIN_SHARE * len(nodes)), round(VAL_SHARE * len(nodes))
    return split_nodes(nodes, (train, val, len(nodes) - train - val), seed)
