"""Cora, CiteSeer and PubMed out of their raw files, which are pickles, without unpickling what they name.

The result is that of torch_geometric's own reader (Yang et al., "Revisiting semi-supervised learning with graph
embeddings", 2016, published the files): allx and tx are the features of all nodes but those that test.index reorders.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch_geometric.data import Data

from iexact_runner.data import preflight
from iexact_runner.untrusted.pickles import load_pickled

PARTS = ("x", "tx", "allx", "y", "ty", "ally", "graph", "test.index")
_VALIDATION_NODES = 500


def read_planetoid(paths: list[Path]) -> Data:
    """The graph with features, labels and masks.

    Args:
        paths: the raw files in the order of ``PARTS``.

    Raises:
        DatasetError: if a file is damaged or names what it does not need.
    """
    files = dict(zip(PARTS, paths, strict=True))
    with preflight.reading(files["test.index"]):
        test = np.array([int(line) for line in files["test.index"].read_text().split()], dtype=np.int64)
    parts = {}
    for name in ("allx", "tx", "ally", "ty", "y"):
        with preflight.reading(files[name]):
            parts[name] = _matrix(load_pickled(files[name]))
            if name in ("ally", "ty"):
                _check_one_hot(parts[name])
    with preflight.reading(files["graph"]):
        graph, size = load_pickled(files["graph"]), files["graph"].stat().st_size
        edge_index = _edges(graph, limit=size)
    with preflight.reading(files["test.index"]):
        x = _stack(parts["allx"], parts["tx"], test, limit=len(graph))
        scores = _stack(parts["ally"], parts["ty"], test, limit=len(graph))
        labelled = len(parts["y"])
        if len(x) != len(scores) or labelled + _VALIDATION_NODES > len(x):
            raise ValueError(f"features of {len(x)} nodes, labels of {len(scores)}, training labels of {labelled}")
    with preflight.reading(files["graph"]):
        if len(graph) != len(x):
            raise ValueError(f"has {len(graph)} nodes, and there are {len(x)} rows of features: must be as many")
    nodes = torch.arange(len(x))
    data = Data(x=x.float(), edge_index=edge_index, y=scores.max(dim=1).indices)
    data.train_mask = nodes < labelled
    data.val_mask = (nodes >= labelled) & (nodes < labelled + _VALIDATION_NODES)
    data.test_mask = torch.isin(nodes, torch.from_numpy(test))
    return data


def _matrix(value: Any) -> Tensor:
    if not isinstance(value, np.ndarray) or value.ndim != 2:
        raise ValueError("is not a matrix")
    return torch.from_numpy(value.astype(np.float32))


def _check_one_hot(scores: Tensor) -> None:
    """Refuses labels (N, C) that are not one 1 among zeros, or zeros for a node without a label."""
    wrong = ((scores != 0) & (scores != 1)).any(dim=1) | (scores.sum(dim=1) > 1)
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise ValueError(f"row {row} is {scores[row].tolist()}: must be a 1 in the place of the label, and zeros")


def _stack(known: Tensor, tested: Tensor, test: Any, *, limit: int) -> Tensor:
    """Rows of all nodes (N, D), those of the test nodes in their places; nodes that test.index leaves out have zeros.

    Args:
        known: rows of the first nodes.
        tested: a row a test node.
        test: (T,) the test nodes.
        limit: number of nodes of the graph.
    """
    first = len(known)
    if len(np.unique(test)) != len(tested) or len(test) != len(tested) or len(test) == 0:
        raise ValueError(f"names {len(test)} nodes, some of them twice or without a row")
    if test.min() < first or test.max() >= max(limit, first + len(tested)):
        raise ValueError(f"names node {int(test.max())} of {limit}, or one of the first {first}")
    rows = torch.zeros(int(test.max()) + 1, known.size(1))
    rows[:first] = known
    # The files have the rows of the test nodes in the order of test.index.
    rows[torch.from_numpy(test)] = tested
    return rows


def _edges(graph: Any, *, limit: int) -> Tensor:
    """(2, E) edges without self-loops; a shared list could mean more of them than the file has bytes."""
    if not isinstance(graph, dict) or not all(isinstance(ends, list) for ends in graph.values()):
        raise ValueError("is not a graph of lists")
    if sum(map(len, graph.values())) > limit:
        raise ValueError("has more edges than bytes")
    source = np.repeat(np.array(list(graph), dtype=np.int64), [len(ends) for ends in graph.values()])
    target = np.array([end for ends in graph.values() for end in ends], dtype=np.int64)
    edges = torch.from_numpy(np.stack([source, target]))
    return edges[:, edges[0] != edges[1]]
