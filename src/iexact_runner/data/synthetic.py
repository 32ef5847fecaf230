"""Synthetic graphs of any size: a degree-corrected planted partition with label-dependent features.

Each node has a uniformly drawn class c and a weight w from a power law of exponent ``degree_exponent``. A share
``homophily`` of the edges joins two nodes of one class, the rest two nodes of different classes; either end is drawn
with probability proportional to w. The graph is symmetric, has no self-loops and no repeated edges, and exactly
``2 * round(num_nodes * average_degree / 2)`` directed edges. Features are x = m_c + noise, noise ~ N(0, I), with class
centres m_c of expected norm 2: a node's own features tell its class only in part, its neighbours' add the rest.

The model is that of Karrer and Newman, "Stochastic blockmodels and community structure in networks" (2011).
N nodes, E undirected edges, C classes, D features. Randomness is a PCG64 stream of ``graph_seed``.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from iexact_runner.config import SyntheticConfig
from iexact_runner.data.dataset import NodeDataset
from iexact_runner.data.prepare import index_dtype, standardized
from iexact_runner.data.splits import random_split, split_nodes
from iexact_runner.errors import ConfigError

_CENTER_NORM = 2.0
_CHUNK = 1 << 22
_MAX_ROUNDS = 200

Integers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


def generate(config: SyntheticConfig) -> NodeDataset:
    """Generates the graph, features and split that ``config`` describes."""
    nodes = config.num_nodes
    labels = _labels(config, _generator(config, 0))
    edge_index = _edges(config, labels, _generator(config, 1))
    x = _features(config, labels, _generator(config, 2))
    everyone = torch.arange(nodes)
    if config.num_train is None or config.num_val is None or config.num_test is None:
        train, val, test = random_split(everyone, config.split_seed)
    else:
        sizes = (config.num_train, config.num_val, config.num_test)
        train, val, test = split_nodes(everyone, sizes, config.split_seed)
    return NodeDataset(
        x=standardized(x, train, config) if config.standardize else x,
        y=torch.from_numpy(labels),
        edge_index=edge_index,
        train=train,
        val=val,
        test=test,
        num_classes=config.num_classes,
    )


def _generator(config: SyntheticConfig, part: int) -> np.random.Generator:
    """A stream of its own for each part, so that, say, more features leave the edges as they are."""
    return np.random.Generator(np.random.PCG64([config.graph_seed, part]))


def _labels(config: SyntheticConfig, rng: np.random.Generator) -> Integers:
    """(N,) classes; every class has at least one node."""
    labels = rng.integers(config.num_classes, size=config.num_nodes)
    labels[: config.num_classes] = np.arange(config.num_classes)
    return rng.permutation(labels)


def _features(config: SyntheticConfig, labels: Integers, rng: np.random.Generator) -> torch.Tensor:
    """(N, D) float32."""
    width = config.num_features
    scale = _CENTER_NORM / np.sqrt(width)
    centers = (rng.standard_normal((config.num_classes, width)) * scale).astype(np.float32)
    x = np.empty((config.num_nodes, width), dtype=np.float32)
    rows = max(1, _CHUNK // width)
    for start in range(0, config.num_nodes, rows):
        chunk = x[start : start + rows]
        rng.standard_normal(dtype=np.float32, out=chunk)
        chunk += centers[labels[start : start + rows]]
    return torch.from_numpy(x)


def _edges(config: SyntheticConfig, labels: Integers, rng: np.random.Generator) -> torch.Tensor:
    """(2, 2E) edges in both directions, sorted by source, then target."""
    nodes = config.num_nodes
    total = round(nodes * config.average_degree / 2)
    within = round(config.homophily * total)
    sizes = np.bincount(labels, minlength=config.num_classes)
    pairs_within = int((sizes * (sizes - 1) // 2).sum())
    _check_room(config, within, pairs_within, "within classes")
    _check_room(config, total - within, nodes * (nodes - 1) // 2 - pairs_within, "between classes")

    ends = _Ends(config, labels, rng)
    keys = np.empty(2 * total, dtype=np.int64)
    keys[:within] = _distinct_pairs(config, ends, within, same_class=True)
    keys[within:total] = _distinct_pairs(config, ends, total - within, same_class=False)
    edge_index = torch.empty((2, 2 * total), dtype=index_dtype(nodes))
    out = edge_index.numpy()
    # Chunks keep the temporaries of the divisions small beside the edges themselves.
    for start in range(0, total, _CHUNK):
        low, high = np.divmod(keys[start : min(start + _CHUNK, total)], nodes)
        keys[total + start : total + start + len(low)] = high * nodes + low
    keys.sort()
    for start in range(0, 2 * total, _CHUNK):
        stop = min(start + _CHUNK, 2 * total)
        out[0, start:stop], out[1, start:stop] = np.divmod(keys[start:stop], nodes)
    return edge_index


class _Ends:
    """Draws nodes in proportion to their weight, from all classes or from a given one.

    Args:
        config: the graph.
        labels: (N,) classes.
        rng: source of the weights and of every draw.
    """

    def __init__(self, config: SyntheticConfig, labels: Integers, rng: np.random.Generator) -> None:
        self.rng = rng
        self.labels = labels
        weights = (1.0 - rng.random(config.num_nodes)) ** (-1.0 / (config.degree_exponent - 1.0))
        # Above an expected degree of sqrt(N * average degree), two hubs would have to share several edges.
        limit = max(1.0, np.sqrt(config.num_nodes / config.average_degree))
        weights = np.minimum(weights, limit * weights.mean())
        # Sorted by class, a class is one interval of the cumulative weights.
        self.order = np.argsort(labels, kind="stable")
        self.cumulative: Floats = np.concatenate([[0.0], np.cumsum(weights[self.order])])
        edges = np.searchsorted(labels[self.order], np.arange(config.num_classes + 1))
        self.bounds: Floats = self.cumulative[edges]

    def draw(self, count: int) -> Integers:
        """Nodes from all classes."""
        return self._at(self.rng.random(count) * self.cumulative[-1])

    def draw_like(self, nodes: Integers) -> Integers:
        """For each of ``nodes`` one of its class, possibly itself."""
        classes = self.labels[nodes]
        low, high = self.bounds[classes], self.bounds[classes + 1]
        drawn = self._at(low + self.rng.random(len(nodes)) * (high - low))
        # Rounding can push a draw onto the next class's first node: call it a draw of the node itself, to be dropped.
        return np.where(self.labels[drawn] == classes, drawn, nodes)

    def _at(self, position: Floats) -> Integers:
        index = np.searchsorted(self.cumulative, position, side="right") - 1
        nodes: Integers = self.order[np.minimum(index, len(self.order) - 1)]
        return nodes


def _distinct_pairs(config: SyntheticConfig, ends: _Ends, count: int, *, same_class: bool) -> Integers:
    """``count`` distinct keys i * N + j with i < j, sorted; draws again what repeats, a bounded number of times."""
    found = np.empty(0, dtype=np.int64)
    for _ in range(_MAX_ROUNDS):
        missing = count - len(found)
        if missing == 0:
            return found
        fresh = [_draw_keys(config, ends, size, same_class) for size in _chunks(missing)]
        # Sorting in place and masking needs half the memory of np.unique.
        merged = np.concatenate([found, *fresh])
        del found, fresh
        merged.sort()
        found = merged[np.flatnonzero(np.diff(merged, prepend=-1))]
        del merged
        if len(found) > count:
            found = np.delete(found, ends.rng.choice(len(found), len(found) - count, replace=False))
    where = "within" if same_class else "between"
    raise ConfigError.of(
        "dataset.average_degree",
        config.average_degree,
        f"found only {len(found):,} of {count:,} edges {where} classes; lower it, or change dataset.homophily, "
        "dataset.num_classes or dataset.degree_exponent",
    )


def _draw_keys(config: SyntheticConfig, ends: _Ends, size: int, same_class: bool) -> Integers:
    first = ends.draw(size)
    second = ends.draw_like(first) if same_class else ends.draw(size)
    keep = first != second if same_class else ends.labels[first] != ends.labels[second]
    first, second = first[keep], second[keep]
    keys: Integers = np.minimum(first, second) * config.num_nodes + np.maximum(first, second)
    return keys


def _chunks(missing: int) -> list[int]:
    """Sizes of the draws of one round: a little more than is missing, as some pairs repeat."""
    wanted = missing + missing // 16 + 256
    return [_CHUNK] * (wanted // _CHUNK) + [wanted % _CHUNK]


def _check_room(config: SyntheticConfig, edges: int, pairs: int, where: str) -> None:
    if edges > pairs:
        raise ConfigError.of(
            "dataset.homophily",
            config.homophily,
            f"asks for {edges:,} edges {where}, where only {pairs:,} pairs of nodes exist; "
            "change it, dataset.num_classes or dataset.average_degree",
        )
