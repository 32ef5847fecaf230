"""What a library would take from raw files in silence: labels that are none, features without end, sizes that differ.

Each is an error that names the file, the row or key, the value, and what is valid.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from iexact_runner.data import preflight
from iexact_runner.untrusted.archives import Array

# Names of arrays in the archives of torch_geometric's datasets.
_FEATURES = ("attr_data", "feature", "node_features")
_LABELS = ("label", "labels", "node_labels")
_ROWS = ("feature", "node_features", *_LABELS)
_SHAPES = ("shape", "adj_shape", "attr_shape")
_CHUNK = 1 << 16


def check_raw(paths: Sequence[Path]) -> None:
    """Refuses raw files of one dataset that contradict each other or themselves.

    Args:
        paths: whole files, those that tell the number of nodes before those that name nodes.

    Raises:
        DatasetError: naming the file.
    """
    rows: dict[str, int] = {}
    for path in paths:
        with preflight.reading(path):
            rows |= _rows_of(path, nodes=min(rows.values(), default=0))
            _check_equal({name: count for name, count in rows.items() if "edge" not in name})
            _check_equal({name: count for name, count in rows.items() if "edge" in name})


def check_labels(labels: Array, what: str = "the label of row") -> None:
    """Refuses labels (N,) or (N, C) that are no whole numbers; NaN is a missing one."""
    if labels.dtype.kind not in "biuf":
        value = labels.flat[0] if labels.dtype.kind == "c" and labels.size else f"of type {labels.dtype}"
        raise ValueError(f"{what} 0 is {value}: must be a whole number")
    wrong = ~(np.isnan(labels) | (np.isfinite(labels) & (labels == np.floor(labels)))).reshape(len(labels), -1)
    if wrong.any():
        row, column = np.argwhere(wrong)[0]
        raise ValueError(f"{what} {row} is {labels.reshape(len(labels), -1)[row, column]}: must be a whole number")


def _rows_of(path: Path, *, nodes: int) -> dict[str, int]:
    """Rows of what a file holds, by a name to be shown."""
    if path.suffix == ".npz":
        return _rows_of_npz(path)
    if path.suffix == ".npy":
        features = np.load(path, mmap_mode="r")
        _check_finite(features, "the features")
        return {f"rows in {path.name}": len(features)}
    if path.name == "class_map.json":
        _check_class_map(json.loads(path.read_bytes()), nodes)
    elif path.name == "role.json":
        _check_roles(json.loads(path.read_bytes()), nodes)
    elif path.name in ("edge.csv.gz", "node-feat.csv.gz"):
        with gzip.open(path) as lines:
            return {f"rows in {path.name}": sum(bool(line.strip()) for line in lines)}
    elif path.name in ("node-label.csv.gz", "num-node-list.csv.gz", "num-edge-list.csv.gz"):
        numbers = pd.read_csv(path, header=None).to_numpy()
        check_labels(numbers, "the number of row" if path.name.startswith("num") else "the label of row")
        rows = len(numbers) if path.name.startswith("node") else int(numbers[0, 0])
        return {f"{'rows in' if path.name.startswith('node') else 'said in'} {path.name}": rows}
    return {}


def _rows_of_npz(path: Path) -> dict[str, int]:
    rows = {}
    with np.load(path, allow_pickle=False) as arrays:
        for name in arrays.files:
            if name in _FEATURES:
                _check_finite(arrays[name], name)
            if name in _LABELS:
                check_labels(arrays[name], f"{name}, row")
            if name in _ROWS:
                rows[f"rows of {name} in {path.name}"] = len(arrays[name])
            if name in _SHAPES:
                rows[f"nodes by {name} in {path.name}"] = int(arrays[name][0])
    return rows


def _check_equal(rows: dict[str, int]) -> None:
    if len(set(rows.values())) > 1:
        raise ValueError(", ".join(f"{count} {name}" for name, count in rows.items()) + ": must be as many")


def _check_finite(features: Array, what: str) -> None:
    """Refuses features (..., ) of which one is no finite real number."""
    if features.dtype.kind not in "biuf":
        raise ValueError(f"{what} are of type {features.dtype}: must be real numbers")
    for start in range(0, len(features), _CHUNK):
        wrong = np.argwhere(~np.isfinite(features[start : start + _CHUNK]))
        if len(wrong):
            place = (start + int(wrong[0][0]), *map(int, wrong[0][1:]))
            raise ValueError(f"{what}, row {', column '.join(map(str, place))} is {features[place]}: must be finite")


def _check_class_map(labels: Any, nodes: int) -> None:
    if not isinstance(labels, dict) or not labels:
        raise ValueError("is not a mapping of nodes to labels")
    for key in labels:
        if not key.isdecimal() or int(key) >= nodes:
            raise ValueError(f"key {key!r} is not a node: must be 0 to {nodes - 1}")
    try:
        check_labels(np.array(list(labels.values())))
    except ValueError as error:
        key = next((key for key in labels if not _is_label(labels[key])), key)
        valid = "must be a whole number, or as many for each"
        raise ValueError(f"the label of key {key!r} is {labels[key]!r:.60}: {valid}") from error


def _is_label(label: Any) -> bool:
    return all(isinstance(part, int) or part != part for part in (label if isinstance(label, list) else [label]))


def _check_roles(roles: Any, nodes: int) -> None:
    for part in ("tr", "va", "te"):
        for position, node in enumerate(roles[part]):
            if not isinstance(node, int) or not 0 <= node < nodes:
                raise ValueError(f"entry {position} of {part!r} is {node!r:.60}: must be a node, 0 to {nodes - 1}")
