"""Facts about a graph that decide how it trains: sizes, degrees, classes, splits.

Shapes: N nodes, E directed edges, C classes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from iexact_runner.data.dataset import NodeDataset

PERCENTILES = (0, 25, 50, 75, 90, 99, 100)


def inspect_dataset(dataset: NodeDataset) -> dict[str, Any]:
    """Figures of a dataset by name, as ``summary.json`` holds them.

    Degrees are in-degrees. An edge counts as reciprocal if its reverse is there, and as homophilous if both ends have
    the same label (edge homophily; Zhu et al., NeurIPS 2020), self-loops aside. Unlabelled nodes have no class.
    """
    source, target = dataset.edge_index.long()
    nodes = dataset.num_nodes
    incoming, outgoing = (torch.bincount(ends, minlength=nodes) for ends in (target, source))
    proper = source != target
    keys = source[proper] * nodes + target[proper]
    reverse = target[proper] * nodes + source[proper]
    degrees = torch.quantile(_sampled(incoming).double(), torch.tensor(PERCENTILES, dtype=torch.float64) / 100)
    return {
        "nodes": nodes,
        "edges": source.numel(),
        "self_loops": int((~proper).sum()),
        "reciprocal": _share(torch.isin(reverse, keys)),
        "isolated": int(((incoming + outgoing) == 0).sum()),
        "degree": dict(zip(map(str, PERCENTILES), map(round, degrees.tolist()), strict=True)),
        "features": dataset.x.size(1),
        "feature_zeros": _share(dataset.x == 0),
        "constant_features": int((dataset.x == dataset.x[0]).all(0).sum()),
        "labels_a_node": "several" if dataset.multilabel else "one",
        **_labels(dataset, source[proper], target[proper]),
        "train": dataset.train.numel(),
        "val": dataset.val.numel(),
        "test": dataset.test.numel(),
    }


def _labels(dataset: NodeDataset, source: Tensor, target: Tensor) -> dict[str, Any]:
    y = dataset.y
    if dataset.multilabel:
        counts, unlabelled, same = y.nan_to_num().sum(0).long(), y.isnan().any(1).sum(), None
    else:
        counts, unlabelled = torch.bincount(y[y >= 0], minlength=dataset.num_classes), (y < 0).sum()
        both = (y[source] >= 0) & (y[target] >= 0)
        same = _share(y[source[both]] == y[target[both]])
    return {
        "classes": dataset.num_classes,
        "largest_class": int(counts.max()),
        "smallest_class": int(counts.min()),
        "unlabelled": int(unlabelled),
        "homophily": same,
    }


def _share(mask: Tensor) -> float | None:
    return mask.float().mean().item() if mask.numel() else None


def _sampled(values: Tensor) -> Tensor:
    """Evenly spaced values, and the extremes, of more than torch sorts at once for percentiles."""
    most = 1 << 23
    if values.numel() <= most:
        return values
    return torch.cat([values[:: values.numel() // most][: most - 2], values.min()[None], values.max()[None]])
