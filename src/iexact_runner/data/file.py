"""A graph of one's own: ``dataset=file dataset.path=PATH``.

=======================  =====================================================================================
path                     what is read
=======================  =====================================================================================
``graph.pt``             a ``torch_geometric.data.Data``, or a dict of tensors, written by ``torch.save``
``graph.npz``            arrays, or the parts of SciPy's CSR matrices
a folder of ``.npy``     one array a file
a folder of tables       ``edges.csv`` and ``nodes.csv``, or ``.csv.gz``, ``.tsv``, ``.parquet`` (:mod:`.tables`)
an OGB folder            ``raw/edge.csv.gz``, ``raw/node-feat.csv.gz``, ...; ``split/*/train.csv.gz``, ...
=======================  =====================================================================================

Nothing of a file is run, and nothing is written beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from iexact_runner.config import FileConfig
from iexact_runner.data import preflight
from iexact_runner.data.dataset import NodeDataset
from iexact_runner.data.prepare import prepare
from iexact_runner.data.splits import Split
from iexact_runner.data.tables import EDGE_TABLES, read_tables
from iexact_runner.errors import ConfigError, DatasetError
from iexact_runner.untrusted import archives

# What each part may be called, best first.
EDGES = ("edge_index", "edges", "edge", "edge_list", "adj_t")
FEATURES = ("x", "features", "feature", "feat", "feats", "node_feat", "node_features")
LABELS = ("y", "labels", "label", "node_label", "node_labels", "targets")
SPLITS = {
    "train": ("train_mask", "train_idx", "train_index", "train_indices", "idx_train", "train"),
    "validation": (
        "val_mask",
        "valid_mask",
        "val_idx",
        "valid_idx",
        "val_index",
        "val_indices",
        "idx_val",
        "val",
        "valid",
    ),
    "test": ("test_mask", "test_idx", "test_index", "test_indices", "idx_test", "test"),
}
# Columns of the features that ``features=one_hot`` makes of degrees; the last is that of all larger ones.
DEGREE_COLUMNS = 64
_CSR_PARTS = ("data", "indices", "indptr", "shape")
_OGB_EDGES = Path("raw", "edge.csv.gz")
Arrays = Mapping[str, Any]


def load_file(config: FileConfig) -> NodeDataset:
    """Reads a graph, draws a 60/20/20 split where the file has none, and makes features where they are asked for.

    Raises:
        DatasetError: naming the file and what is wrong in it.
    """
    path = Path(config.path).expanduser()
    found = _reader(path, config)(path, config)
    edge_index = _edges(path, found)
    labels, features = _first(found, LABELS), _first(found, FEATURES)
    if labels is None:
        raise _missing(path, found, "labels", LABELS)
    y = _tensor(path, *labels)
    if config.features != "given":
        x = degree_features(edge_index, len(y), kind=config.features)
    elif features is None:
        raise DatasetError(
            f"{path} has no features ({_named(found)}): name them {', '.join(FEATURES[:3])}, or make some with "
            "dataset.features=degree or dataset.features=one_hot"
        )
    else:
        x = _tensor(path, *features)
    return prepare(config, x=x, y=y, edge_index=edge_index, split=_split(path, found, len(y)))


def degree_features(edge_index: Tensor, nodes: int, *, kind: str) -> Tensor:
    """Features (N, D) of the degrees: log(1 + in), log(1 + out), or the in-degree as one of ``DEGREE_COLUMNS``."""
    inside = (edge_index >= 0) & (edge_index < nodes)
    source, target = edge_index.long()[:, inside.all(0)]  # what is outside is named when the edges are checked
    incoming, outgoing = (torch.bincount(ends, minlength=nodes) for ends in (target, source))
    if kind == "degree":
        return torch.stack([incoming, outgoing], dim=1).float().log1p()
    return torch.nn.functional.one_hot(incoming.clamp(max=DEGREE_COLUMNS - 1), DEGREE_COLUMNS).float()


def _reader(path: Path, config: FileConfig) -> Callable[[Path, FileConfig], Arrays]:
    if path.is_dir():
        if (path / _OGB_EDGES).exists():
            return _read_ogb_folder
        if any((path / name).exists() for name in EDGE_TABLES):
            return read_tables
        if any(path.glob("*.npy")):
            return _read_npy_folder
        raise ConfigError.of(
            "dataset.path", config.path, f"holds neither *.npy nor {EDGE_TABLES[0]} nor {_OGB_EDGES.as_posix()}"
        )
    if not path.exists():
        raise ConfigError.of("dataset.path", config.path, "does not exist")
    kinds = {".pt": _read_torch, ".pth": _read_torch, ".npz": _read_npz}
    if path.suffix not in kinds:
        valid = f"must be a folder, or a file of {', '.join(kinds)}; tables lie in a folder as {EDGE_TABLES[0]}"
        raise ConfigError.of("dataset.path", config.path, valid)
    return kinds[path.suffix]


def _read_torch(path: Path, config: FileConfig) -> Arrays:
    # Importing it lets torch read its class; what is let in below is not let in afterwards.
    from torch_geometric.data.data import DataEdgeAttr, DataTensorAttr
    from torch_geometric.data.storage import GlobalStorage

    with preflight.reading(path):
        if not config.trust_pickle:
            preflight.check_torch_file(path)
        with torch.serialization.safe_globals([DataEdgeAttr, DataTensorAttr, GlobalStorage]):
            held = torch.load(path, map_location="cpu", weights_only=not config.trust_pickle)
        held = held[0] if isinstance(held, (tuple, list)) and held else held
        found = held if isinstance(held, dict) else held.to_dict()
        # Data keeps its tensors one level down.
        inner = found.get("_mapping", found)
        return {str(name): value for name, value in inner.items()}


def _read_npz(path: Path, config: FileConfig) -> Arrays:
    with preflight.reading(path):
        archives.check_npz(path)
        with np.load(path, allow_pickle=False) as arrays:
            found = {name: arrays[name] for name in arrays.files}
    for prefix, part in (("adj_", "edge_index"), ("attr_", "x"), ("", "edge_index")):
        parts = {name: found.pop(prefix + name) for name in _CSR_PARTS if prefix + name in found}
        if len(parts) == len(_CSR_PARTS):
            found.setdefault(part, _dense(path, parts) if part == "x" else _csr_edges(parts))
        elif parts:
            found |= {prefix + name: value for name, value in parts.items()}
    return found


def _csr_edges(parts: Arrays) -> Any:
    """Edges (2, E) of an adjacency whose row is the source, as SciPy's users write it."""
    rows = np.repeat(np.arange(len(parts["indptr"]) - 1), np.diff(parts["indptr"]))
    return np.stack([rows, parts["indices"].astype(np.int64)])


def _dense(path: Path, parts: Arrays) -> Any:
    from scipy.sparse import csr_matrix

    with preflight.reading(path):
        archives.check_csr(parts, dense=True)
        return csr_matrix((parts["data"], parts["indices"], parts["indptr"]), shape=parts["shape"]).toarray()


def _read_npy_folder(path: Path, config: FileConfig) -> Arrays:
    found = {}
    for file in sorted(path.glob("*.npy")):
        with preflight.reading(file):
            archives.check_npy(file)
            found[file.stem] = np.load(file, allow_pickle=False)
    return found


def _read_ogb_folder(path: Path, config: FileConfig) -> Arrays:
    """A node property dataset with one graph, as OGB's own converter writes it."""

    def table(file: Path, dtype: Any) -> Any:
        with preflight.reading(file):
            archives.check_gzip(file)
            return pd.read_csv(file, header=None, dtype=dtype, compression="gzip").to_numpy()

    found: dict[str, Any] = {"edge_index": table(path / _OGB_EDGES, np.int64)}
    for name, file, dtype in (("x", "node-feat.csv.gz", np.float32), ("y", "node-label.csv.gz", np.float64)):
        if (path / "raw" / file).exists():
            found[name] = table(path / "raw" / file, dtype)
    folders = sorted(each.parent for each in path.glob("split/*/train.csv.gz"))
    if len(folders) > 1:
        names = ", ".join(folder.name for folder in folders)
        raise DatasetError(f"{path / 'split'} has several splits ({names}): leave one")
    for folder in folders:
        for split, file in (("train_idx", "train"), ("val_idx", "valid"), ("test_idx", "test")):
            found[split] = table(folder / f"{file}.csv.gz", np.int64).ravel()
    return found


def _edges(path: Path, found: Arrays) -> Tensor:
    named = _first(found, EDGES)
    if named is None:
        raise _missing(path, found, "edges", EDGES)
    name, value = named
    if isinstance(value, Tensor) and value.layout in (torch.sparse_csr, torch.sparse_coo):
        indices: Tensor = value.to_sparse_coo().coalesce().indices()
        return indices.flip(0) if name == "adj_t" else indices
    edges = _tensor(path, name, value)
    if edges.dim() == 2 and edges.size(1) == 2 and edges.size(0) != 2:
        edges = edges.T
    if edges.dim() != 2 or edges.size(0) != 2:
        raise DatasetError(
            f"{path}: {name} has shape {tuple(edges.shape)}: must be (2, E) or (E, 2), source and target"
        )
    if edges.is_floating_point() or edges.dtype == torch.bool:
        raise DatasetError(f"{path}: {name} holds {str(edges.dtype).removeprefix('torch.')}: must be node numbers")
    return edges.long()


def _split(path: Path, found: Arrays, nodes: int) -> Split | None:
    """Indices of each part, from masks (N,) or (N, K) of K splits, of which the first counts, or from node numbers."""
    named = {part: _first(found, names) for part, names in SPLITS.items()}
    missing = [part for part, value in named.items() if value is None]
    if len(missing) == len(named):
        return None
    if missing:
        raise DatasetError(f"{path} has a split without {' and '.join(missing)} nodes: give all three parts or none")
    parts: dict[str, Tensor] = {}
    for part, value in named.items():
        assert value is not None
        index = _tensor(path, *value)
        if index.dtype == torch.bool or value[0].endswith("_mask"):
            mask = index[:, 0] if index.dim() == 2 else index
            if mask.size(0) != nodes:
                raise DatasetError(f"{path}: {value[0]} is of {mask.size(0)} nodes, and the labels of {nodes}")
            index = mask.bool().nonzero().squeeze(1)
        parts[part] = index
        unique = torch.unique(index)
        if unique.numel() < index.numel():
            raise DatasetError(f"{path}: {value[0]} names a node twice")
    for first, second in (("train", "validation"), ("train", "test"), ("validation", "test")):
        shared = parts[first][torch.isin(parts[first], parts[second])]
        if shared.numel():
            raise DatasetError(f"{path}: node {int(shared[0])} is in the {first} and in the {second} split")
    return parts["train"], parts["validation"], parts["test"]


def _first(found: Arrays, names: tuple[str, ...]) -> tuple[str, Any] | None:
    """The part that is called by the best of some names."""
    return next(((name, found[name]) for name in names if found.get(name) is not None), None)


def _tensor(path: Path, name: str, value: Any) -> Tensor:
    if isinstance(value, np.ndarray):
        if value.dtype.kind not in "biuf":
            raise DatasetError(f"{path}: {name} holds {value.dtype}: must be numbers")
        native = value.astype(value.dtype.newbyteorder("="), copy=False)
        # torch has few operations for unsigned integers.
        native = native.astype(np.int64) if native.dtype.kind == "u" else native
        tensor: Tensor = torch.from_numpy(np.ascontiguousarray(native))
        return tensor
    if not isinstance(value, Tensor) or value.is_complex():
        raise DatasetError(f"{path}: {name} is a {type(value).__name__}: must be a tensor of numbers")
    dense: Tensor = value.detach() if value.layout == torch.strided else value.detach().to_dense()
    return dense


def _named(found: Arrays) -> str:
    return f"it has {', '.join(sorted(map(str, found))[:12]) or 'nothing'}"


def _missing(path: Path, found: Arrays, what: str, names: tuple[str, ...]) -> DatasetError:
    return DatasetError(f"{path} has no {what} ({_named(found)}): name them {' or '.join(names[:3])}")
