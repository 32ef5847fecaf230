"""A graph as tables: ``edges.csv`` with a row for each edge, and ``nodes.csv`` with one for each node.

Nodes may be called anything. The columns of ``edges`` are the source and the target; those of ``nodes`` the id, the
label, optionally the split (``train``, ``val`` or ``test``), and the features, which are all the others.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from iexact_runner.config import FileConfig
from iexact_runner.data import preflight
from iexact_runner.errors import DatasetError
from iexact_runner.untrusted import archives

KINDS = (".csv", ".csv.gz", ".tsv", ".parquet")
EDGE_TABLES = tuple(f"edges{kind}" for kind in KINDS)
NODE_TABLES = tuple(f"nodes{kind}" for kind in KINDS)
SOURCE = ("source", "src", "from", "u", "head", "citing")
TARGET = ("target", "dst", "to", "v", "tail", "cited")
ID = ("id", "node", "node_id", "name")
LABEL = ("label", "y", "class", "target")
SPLIT = ("split", "set")
PARTS = {"train": "train_idx", "val": "val_idx", "valid": "val_idx", "validation": "val_idx", "test": "test_idx"}


def read_tables(folder: Path, config: FileConfig) -> dict[str, Any]:
    """Edges (2, E) as node numbers, and of the nodes in their order: features, labels and the split.

    Raises:
        DatasetError: naming the file, the column and the row.
    """
    edges = next(folder / name for name in EDGE_TABLES if (folder / name).exists())
    nodes = next((folder / name for name in NODE_TABLES if (folder / name).exists()), None)
    if nodes is None:
        raise DatasetError(f"{folder} has {edges.name} and no {NODE_TABLES[0]}, in which the labels are")
    node_table, edge_table = _read(nodes), _read(edges)
    found, ids = _of_nodes(nodes, node_table)
    return found | {"edge_index": _of_edges(edges, edge_table, ids, nodes)}


def _read(path: Path) -> pd.DataFrame:
    with preflight.reading(path):
        if path.suffix == ".parquet":
            try:
                return pd.read_parquet(path)
            except ImportError as error:
                raise DatasetError(f"{path} needs pyarrow: pip install pyarrow, or write it as CSV") from error
        if path.suffix == ".gz":
            archives.check_gzip(path)
        return pd.read_csv(path, sep="\t" if path.suffix == ".tsv" else ",")


def _of_nodes(path: Path, table: pd.DataFrame) -> tuple[dict[str, Any], pd.Index]:
    """What stands about the nodes, and their names."""
    table = table.rename(columns=str)
    key = _column(table, ID) or str(table.columns[0])
    label = _column(table, LABEL)
    if label is None or label == key:
        raise DatasetError(f"{path} has no column of labels (it has {_listed(table)}): name it {LABEL[0]}")
    ids = pd.Index(table[key])
    if ids.hasnans or ids.has_duplicates:
        row = int(np.flatnonzero(ids.isna() | ids.duplicated())[0])
        raise DatasetError(
            f"{path}: row {row + 1} names node {ids[row]!s:.60} in column {key}: once each, and none empty"
        )
    split = _column(table, SPLIT)
    rest = table.drop(columns=[name for name in (key, label, split) if name is not None])
    for name in rest:
        if not (pd.api.types.is_numeric_dtype(rest[name]) or pd.api.types.is_bool_dtype(rest[name])):
            row = int(np.flatnonzero(pd.to_numeric(rest[name], errors="coerce").isna())[0])
            value = f"{rest[name].iloc[row]!s:.60}"
            raise DatasetError(f"{path}: column {name} holds {value} in row {row + 1}: a feature must be a number")
    found: dict[str, Any] = {"y": _labels(table[label])}
    if rest.shape[1]:
        found["x"] = rest.to_numpy(np.float32)
    if split is not None:
        found |= _split(path, table[split])
    return found, ids


def _labels(column: pd.Series) -> Any:
    """Class numbers, -1 where there is none; names are numbered in alphabetical order."""
    if pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_bool_dtype(column):
        return column.to_numpy(np.float64, na_value=np.nan)
    return pd.Categorical(column.astype("string")).codes.astype(np.int64)


def _split(path: Path, column: pd.Series) -> dict[str, Any]:
    names = column.astype("string").str.lower().str.strip().fillna("")
    unknown = ~names.isin([*PARTS, ""])
    if unknown.any():
        row = int(np.flatnonzero(unknown)[0])
        raise DatasetError(
            f"{path}: column {column.name} holds {column.iloc[row]!s:.60} in row {row + 1}: "
            "must be train, val, test or empty"
        )
    parts = names.map(PARTS)
    return {part: np.flatnonzero(parts == part) for part in dict.fromkeys(PARTS.values())}


def _of_edges(path: Path, table: pd.DataFrame, ids: pd.Index, nodes: Path) -> Any:
    table = table.rename(columns=str)
    source, target = _column(table, SOURCE), _column(table, TARGET)
    if source is None or target is None:
        if table.shape[1] != 2:
            raise DatasetError(f"{path} has columns {_listed(table)}: name two of them source and target")
        source, target = table.columns
    ends = []
    for name in (source, target):
        # A column of one type is not a copy; names that look like numbers on one side only are compared as text.
        values = pd.Index(table[name])
        known = ids if ids.dtype == values.dtype or _both_numeric(ids, values) else ids.astype(str)
        index = known.get_indexer(values if known is ids else values.astype(str))
        if (index < 0).any():
            row = int(np.flatnonzero(index < 0)[0])
            raise DatasetError(
                f"{path}: row {row + 1} names node {values[row]!s:.60} in column {name}, which is not in {nodes.name}"
            )
        ends.append(index.astype(np.int64))
    return np.stack(ends)


def _both_numeric(first: pd.Index, second: pd.Index) -> bool:
    return all(pd.api.types.is_numeric_dtype(index.dtype) for index in (first, second))


def _column(table: pd.DataFrame, names: tuple[str, ...]) -> str | None:
    """The column that is called by the best of some names, in any case."""
    lower = {str(name).lower().strip(): str(name) for name in reversed(list(table.columns))}
    return next((lower[name] for name in names if name in lower), None)


def _listed(table: pd.DataFrame) -> str:
    return ", ".join(f"{name!s:.40}" for name in list(table.columns)[:12])
