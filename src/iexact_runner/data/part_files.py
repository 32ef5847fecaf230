"""A graph in parts, in the files of a folder: each process reads the parts that it has, and no other.

A folder has a file ``part_NNNNN.npz`` for each part, and ``graph.json``, which is written last: without it nothing
counts. Shapes: n rows of a part.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from iexact_runner.config import DatasetConfig
from iexact_runner.data.parts import Facts, GraphInParts, OrderedGraph, Rows
from iexact_runner.data.sparse import CSR
from iexact_runner.errors import ConfigError, DatasetError, first_line
from iexact_runner.runs.files import replacing, write_atomically
from iexact_runner.untrusted import archives
from iexact_runner.untrusted.documents import parse_json, read_bounded

FORMAT = 1
GRAPH = "graph.json"
SPLITS = ("train", "val", "test")
# Where the files of a dataset lie does not make it another one.
PLACES = ("root", "path")
_GRAPH_LIMIT = 16 << 20


class PartFolder:
    """A graph in the files of a folder.

    Args:
        folder: that ``task=partition`` wrote.
        dataset: that the run names. ``fingerprint`` tells two graphs apart.

    Raises:
        ConfigError: if there is no graph, or that of another dataset.
        DatasetError: if ``graph.json`` is damaged.
    """

    training: GraphInParts | None = None

    def __init__(self, folder: Path, dataset: DatasetConfig) -> None:
        self._folder = folder
        path = folder / GRAPH
        if not path.is_file():
            valid = f"has no {GRAPH}; the same command with task=partition, in one process, writes it"
            raise ConfigError.of("parallel.folder", folder, valid)
        with _damage(path):
            data = read_bounded(path, limit=_GRAPH_LIMIT)
            record = parse_json(data)
            if record["format"] != FORMAT:
                raise ValueError(f"has format {record['format']}, this version reads {FORMAT}")
            self.facts = _facts_of(record["facts"])
            recorded = dict(record["dataset"])
        for name, value in described(dataset).items():
            if recorded.get(name) != value:
                valid = f"{folder} was written for dataset.{name}={recorded.get(name)}"
                raise ConfigError.of(f"dataset.{name}", value, valid)
        self.fingerprint = hashlib.sha256(data).hexdigest()

    def rows(self, first: int, last: int) -> Rows:
        """Rows of the parts from ``first`` to before ``last``.

        Raises:
            DatasetError: if a file is missing or damaged.
        """
        parts = [self._part(number) for number in range(first, last)]
        if len(parts) == 1:  # as it is, for a copy would double the peak of loading
            return parts[0]
        bases = [cut - self.facts.cuts[first] for cut in self.facts.cuts[first:last]]
        targets = [part.targets for part in parts if part.targets is not None]
        train, val, test = (
            torch.cat([part.splits[index] + base for part, base in zip(parts, bases, strict=True)])
            for index in range(len(SPLITS))
        )
        return Rows(
            torch.cat([part.x for part in parts]),
            torch.cat([part.y for part in parts]),
            _stacked([part.sources for part in parts]),
            _stacked(targets) if targets else None,
            (train, val, test),
        )

    def _part(self, number: int) -> Rows:
        path, facts = part_path(self._folder, number), self.facts
        rows = facts.cuts[number + 1] - facts.cuts[number]
        with _damage(path):
            archives.check_npz(path)
            with np.load(path, allow_pickle=False) as arrays:
                x, y = (torch.from_numpy(arrays[name]) for name in "xy")
                edges = [
                    CSR(*(torch.from_numpy(arrays[f"{name}_{part}"]) for part in ("offsets", "columns")))
                    for name in (("sources",) if facts.symmetric else ("sources", "targets"))
                ]
                train, val, test = (torch.from_numpy(arrays[name]) for name in SPLITS)
            part = Rows(x, y, edges[0], None if facts.symmetric else edges[1], (train, val, test))
            _check(part, rows, facts)
        return part


def check_free(folder: Path) -> None:
    """Refuses a folder that has a graph already."""
    if (folder / GRAPH).exists():
        raise ConfigError.of("parallel.folder", folder, "has a graph already; name another folder, or remove it")


def write_parts(graph: OrderedGraph, folder: Path, dataset: DatasetConfig) -> Iterator[dict[str, Any]]:
    """Writes a graph part by part, and yields the nodes, the halo, the edges and the bytes of each.

    Args:
        graph: what to write.
        folder: is made where it is missing.
        dataset: what the graph is of.

    Raises:
        ConfigError: if the folder cannot be written.
    """
    facts = graph.facts
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(facts.num_parts):
            part = graph.rows(number, number + 1)
            arrays = {"x": part.x, "y": part.y, **dict(zip(SPLITS, part.splits, strict=True))}
            edges = {"sources": part.sources} | ({} if part.targets is None else {"targets": part.targets})
            for name, rows in edges.items():
                arrays |= {f"{name}_offsets": rows.offsets, f"{name}_columns": rows.columns}
            path = part_path(folder, number)
            with replacing(path) as file:
                np.savez(file, allow_pickle=False, **{name: array.numpy() for name, array in arrays.items()})
            start, stop = facts.cuts[number : number + 2]
            columns = torch.cat([rows.columns for rows in edges.values()])
            far = torch.zeros(facts.num_nodes, dtype=torch.bool)
            far[columns.long()] = True
            far[start:stop] = False
            yield {
                "nodes": stop - start,
                "halo": int(far.sum()),
                "edges": part.sources.num_entries,
                "bytes": path.stat().st_size,
            }
        record = {"format": FORMAT, "dataset": described(dataset), "facts": asdict(facts)}
        write_atomically(folder / GRAPH, json.dumps(record, indent=2, allow_nan=False) + "\n")
    except OSError as error:
        raise ConfigError.of("parallel.folder", folder, f"cannot be written: {error.strerror or error}") from error


def described(dataset: DatasetConfig) -> dict[str, Any]:
    """The fields that say which graph a dataset is."""
    return {name: value for name, value in asdict(dataset).items() if name not in PLACES}


def part_path(folder: Path, number: int) -> Path:
    """The file of a part."""
    return folder / f"part_{number:05d}.npz"


def _facts_of(record: dict[str, Any]) -> Facts:
    facts = Facts(**record | {"cuts": tuple(record["cuts"])})
    counts = (*facts.cuts, facts.num_edges, facts.num_features, facts.num_classes, facts.num_train)
    if not all(type(count) is int for count in counts) or type(facts.symmetric) is not bool:
        raise ValueError("a count is no whole number")
    if len(facts.cuts) < 2 or facts.cuts[0] or any(one > other for one, other in itertools.pairwise(facts.cuts)):
        raise ValueError("its cuts do not ascend from 0")
    return facts


def _stacked(parts: Sequence[CSR]) -> CSR:
    """Rows below rows."""
    columns = torch.cat([part.columns for part in parts])
    dtype = torch.int32 if max(columns.numel(), 1) < 2**31 else torch.int64
    counts = torch.cat([part.offsets.diff().long() for part in parts])
    return CSR(torch.cat([counts.new_zeros(1), counts.cumsum(0)]).to(dtype), columns)


def _check(part: Rows, rows: int, facts: Facts) -> None:
    """Refuses what kernels would read beyond a tensor for."""
    labels = (rows, facts.num_classes) if facts.multilabel else (rows,)
    kind = torch.float32 if facts.multilabel else torch.int64
    found = {"x": (part.x, (rows, facts.num_features), torch.float32), "y": (part.y, labels, kind)}
    for name, (tensor, shape, dtype) in found.items():
        if tuple(tensor.shape) != shape or tensor.dtype != dtype:
            raise ValueError(f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)}, not {dtype} of {shape}")
    if not facts.multilabel and rows and not -1 <= int(part.y.min()) <= int(part.y.max()) < facts.num_classes:
        raise ValueError(f"a class is not below {facts.num_classes}")
    for name, nodes in zip(SPLITS, part.splits, strict=True):
        _check_numbers(name, nodes, rows)
    for edges in (part.sources, part.targets):
        if edges is None:
            continue
        _check_numbers("an edge", edges.columns, facts.num_nodes)
        offsets = edges.offsets
        fits = offsets.dim() == 1 and offsets.numel() == rows + 1 and offsets.dtype in (torch.int32, torch.int64)
        ends = fits and int(offsets[0]) == 0 and int(offsets[-1]) == edges.num_entries
        if not ends or bool((offsets.diff() < 0).any()):
            raise ValueError("the offsets of its rows are not those of its edges")


def _check_numbers(name: str, numbers: Tensor, below: int) -> None:
    whole = numbers.dim() == 1 and numbers.dtype in (torch.int32, torch.int64)
    if not whole or (numbers.numel() and not 0 <= int(numbers.min()) <= int(numbers.max()) < below):
        raise ValueError(f"{name} names a node that is not below {below}")


@contextmanager
def _damage(path: Path) -> Iterator[None]:
    """A context that tells of a file that is missing or damaged in one line."""
    try:
        yield
    except ConfigError:
        raise
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or first_line(error)
        valid = "remove the folder and write it again with task=partition"
        raise DatasetError(f"{path}: {reason}; {valid}") from error
