"""Partitions of a graph's nodes into parts of about one size that few edges cross, kept in a file.

METIS finds them where pymetis is installed. Without it clusters are found by label propagation under a limit of their
size (Raghavan et al., 2007), laid side by side where edges join them, and cut into runs of one length.

A file is one line, ``iexact partition 1 SHA256``, and below it a NumPy array, which is what the digest is of.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import logging
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp

from iexact_runner.errors import ConfigError
from iexact_runner.runs.files import write_atomically
from iexact_runner.sampling.subgraph import Array, Pattern, generator

logger = logging.getLogger(__name__)

FOLDER = "partitions"
MAGIC = b"iexact partition 1 "
# Rounds of label propagation; labels hardly move after these.
ROUNDS = 12
_METIS_SEED = 0


@dataclass(frozen=True)
class Partition:
    """Part (N,) of each node, and how it was found.

    Args:
        parts: int32 numbers from 0.
        method: ``metis`` or ``label_propagation``.
        edge_cut: share of the edges whose ends lie in different parts.
        seconds: that finding or reading it took.
    """

    parts: Array
    method: str
    edge_cut: float
    seconds: float

    def record(self) -> dict[str, Any]:
        """For ``summary.json``."""
        return {name: value for name, value in asdict(self).items() if name != "parts"}


def find_partition(
    pattern: Pattern, count: int, *, method: str, folder: Path | None, field: str = "sampler"
) -> Partition:
    """A partition of a graph, read from ``folder`` if one of this graph and these options is there, else written to it.

    Args:
        pattern: of the graph; directions and self-loops do not count.
        count: parts.
        method: ``auto``, ``metis`` or ``label_propagation``.
        folder: for files; None keeps none.
        field: whose ``parts`` and ``partition`` these options are.

    Raises:
        ConfigError: if there are more parts than nodes, or METIS is asked for and not installed.
    """
    if count > pattern.num_nodes:
        raise ConfigError.of(f"{field}.parts", count, f"must be at most the {pattern.num_nodes} nodes trained on")
    installed = importlib.util.find_spec("pymetis") is not None
    if method == "metis" and not installed:
        valid = "needs pymetis: pip install 'iexact-runner[metis]'; or use label_propagation"
        raise ConfigError.of(f"{field}.partition", method, valid)
    if method == "auto":
        method = "metis" if installed else "label_propagation"
        if not installed:
            logger.info(
                f"{field}.partition=auto: by label propagation; pip install 'iexact-runner[metis]' cuts fewer edges"
            )
    start = time.perf_counter()
    path = None if folder is None else folder / FOLDER / f"{_key(pattern, count, method)}.partition"
    parts = _read(path, nodes=pattern.num_nodes, count=count)
    if parts is None:
        parts = (_metis if method == "metis" else _label_propagation)(_undirected(pattern), count)
        _write(path, parts)
    return Partition(parts, method, edge_cut(pattern, parts), time.perf_counter() - start)


def edge_cut(pattern: Pattern, parts: Array) -> float:
    """Share of the edges that join two parts."""
    targets = np.repeat(np.arange(pattern.num_nodes), np.diff(pattern.offsets))
    crossing = int(np.count_nonzero(parts[targets] != parts[pattern.columns]))
    return crossing / max(1, pattern.num_edges)


def _undirected(pattern: Pattern) -> sp.csr_matrix:
    """The graph with every edge in both directions, once, and without self-loops."""
    ones = np.ones(pattern.num_edges, dtype=np.int8)
    matrix = sp.csr_matrix((ones, pattern.columns, pattern.offsets), shape=(pattern.num_nodes,) * 2)
    matrix = matrix.maximum(matrix.T.tocsr())
    matrix.setdiag(0)
    matrix.eliminate_zeros()
    return matrix


def _metis(graph: sp.csr_matrix, count: int) -> Array:
    import pymetis

    if count == 1:
        return np.zeros(graph.shape[0], dtype=np.int32)
    adjacency = pymetis.CSRAdjacency(graph.indptr, graph.indices)
    found = pymetis.part_graph(count, adjacency=adjacency, options=pymetis.Options(seed=_METIS_SEED))
    return np.asarray(found[1], dtype=np.int32)


def _label_propagation(graph: sp.csr_matrix, count: int) -> Array:
    nodes = graph.shape[0]
    labels = np.arange(nodes)
    limit = max(1, nodes // count)
    random = generator(0)
    for _ in range(ROUNDS):
        # Half of the nodes at a time: two neighbours that take each other's label would swap them for ever.
        moving = random.random(nodes) < 0.5
        labels = _propagated(graph, labels, moving, limit, random)
    clusters, labels = np.unique(labels, return_inverse=True)
    joined = sp.csr_matrix(
        (graph.data.astype(np.int64), (np.repeat(labels, np.diff(graph.indptr)), labels[graph.indices])),
        shape=(len(clusters),) * 2,
    )
    place = np.empty(len(clusters), dtype=np.int64)
    place[sp.csgraph.reverse_cuthill_mckee(joined.tocsr(), symmetric_mode=True)] = np.arange(len(clusters))
    parts = np.empty(nodes, dtype=np.int32)
    parts[np.argsort(place[labels], kind="stable")] = np.arange(nodes) * count // nodes
    return parts


def _propagated(graph: sp.csr_matrix, labels: Array, moving: Array, limit: int, random: np.random.Generator) -> Array:
    """Labels after some nodes took the one that most of their neighbours have, in clusters of at most ``limit``."""
    nodes = graph.shape[0]
    rows = np.repeat(np.arange(nodes), np.diff(graph.indptr))
    votes = sp.csr_matrix((np.ones(len(rows), np.int32), (rows, labels[graph.indices])), shape=(nodes, nodes))
    wanted, most = labels.copy(), np.zeros(nodes)
    # Ties fall by a draw, not to the smallest number.
    counts = votes.data + random.random(len(votes.data)) / 2
    voted = np.repeat(np.arange(nodes), np.diff(votes.indptr))
    np.maximum.at(most, voted, counts)
    first = counts == most[voted]
    wanted[voted[first]] = votes.indices[first]
    movers = np.flatnonzero(moving & (wanted != labels))
    order = movers[np.lexsort((random.random(len(movers)), wanted[movers]))]
    target = wanted[order]
    rank = np.arange(len(order)) - np.searchsorted(target, target)
    room = limit - np.bincount(labels, minlength=nodes)
    accepted = order[rank < room[target]]
    moved = labels.copy()
    moved[accepted] = wanted[accepted]
    return moved


def _key(pattern: Pattern, count: int, method: str) -> str:
    """Names the partition of a graph: changes with every edge and option."""
    digest = hashlib.sha256(f"{method} {count} {pattern.num_nodes}".encode())
    for part in (pattern.offsets, pattern.columns):
        digest.update(np.ascontiguousarray(part.astype(part.dtype.newbyteorder("<"), copy=False)).data)
    return f"{method}_{count}_{digest.hexdigest()[:16]}"


def _read(path: Path | None, *, nodes: int, count: int) -> Array | None:
    """The parts in a file; None if there is none, or it is damaged, which is told."""
    if path is None or not path.exists():
        return None
    try:
        if not path.is_file():
            raise ValueError("is not a regular file")
        head, _, data = path.read_bytes().partition(b"\n")
        if head != MAGIC + hashlib.sha256(data).hexdigest().encode():
            raise ValueError("is damaged: its digest differs")
        parts = np.load(io.BytesIO(data), allow_pickle=False)
        if parts.shape != (nodes,) or parts.dtype != np.int32 or parts.min() < 0 or parts.max() >= count:
            raise ValueError(f"does not hold a part below {count} for each of {nodes} nodes")
    except (OSError, ValueError, EOFError) as error:
        logger.warning(f"{path}: {str(error).partition(chr(10))[0]}; the partition is found anew")
        return None
    found: Array = parts
    return found


def _write(path: Path | None, parts: Array) -> None:
    """Writes parts to a file; a folder that cannot be written costs the next run the search, and is told of."""
    if path is None:
        return
    buffer = io.BytesIO()
    np.save(buffer, parts, allow_pickle=False)
    data = buffer.getvalue()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, MAGIC + hashlib.sha256(data).hexdigest().encode() + b"\n" + data)
    except OSError as error:
        logger.warning(f"{path.parent}: {error.strerror}; the partition is not kept")
