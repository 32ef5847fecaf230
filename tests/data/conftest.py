"""Tiny datasets in the exact on-disk layout that the libraries read."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import zipfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp

from iexact_runner.config import DatasetConfig
from iexact_runner.data import preflight

NODES, FEATURES, CLASSES = 30, 5, 4


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reaches the network, and none is asked a question."""

    def refuse(*_: object) -> None:
        raise OSError("Network is unreachable")

    def ask(*_: object) -> str:
        raise AssertionError("input() was called")

    monkeypatch.setattr(preflight, "connect", refuse)
    monkeypatch.setattr("builtins.input", ask)


@pytest.fixture
def config() -> Callable[..., DatasetConfig]:
    def make(name: str, root: Path, source: str = "pyg", **fields: object) -> DatasetConfig:
        return DatasetConfig(name=name, source=source, root=str(root), **fields)  # type: ignore[arg-type]

    return make


def edges() -> np.ndarray:
    """(2, E): a ring, one repeated edge and one self-loop."""
    ring = np.stack([np.arange(NODES), (np.arange(NODES) + 1) % NODES])
    return np.concatenate([ring, [[0], [1]], [[7], [7]]], axis=1)


def features() -> np.ndarray:
    x = np.random.default_rng(0).normal(3.0, 2.0, size=(NODES, FEATURES)).astype(np.float32)
    x[:, 2] = 0.1  # a constant column
    return x


def labels() -> np.ndarray:
    return np.arange(NODES) % CLASSES


def parts() -> tuple[list[int], list[int], list[int]]:
    return list(range(15)), list(range(15, 22)), list(range(22, NODES))


def write_csv(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [",".join(str(value) for value in np.atleast_1d(row)) for row in values]
    path.write_bytes(gzip.compress(("\n".join(rows) + "\n").encode()))


def write_ogb(folder: Path, name: str, node_labels: np.ndarray | None = None) -> Path:
    """An ogb folder as its archive unpacks, but without the release file and processed/."""
    raw = folder / "raw"
    write_csv(raw / "edge.csv.gz", edges().T)
    write_csv(raw / "node-feat.csv.gz", features())
    write_csv(raw / "node-label.csv.gz", labels() if node_labels is None else node_labels)
    write_csv(raw / "num-node-list.csv.gz", np.array([NODES]))
    write_csv(raw / "num-edge-list.csv.gz", np.array([edges().shape[1]]))
    write_csv(folder / "mapping" / "nodeidx2paperid.csv.gz", np.arange(NODES))
    if name == "arxiv":
        write_csv(raw / "node_year.csv.gz", 2000 + np.arange(NODES))
    split = folder / "split" / {"arxiv": "time", "products": "sales_ranking"}[name]
    for file, nodes in zip(("train", "valid", "test"), parts(), strict=True):
        write_csv(split / f"{file}.csv.gz", np.array(nodes))
    return folder


def write_saint(raw: Path, multilabel: bool = False) -> Path:
    """The raw folder of Flickr, Reddit2 and Yelp."""
    raw.mkdir(parents=True)
    source, target = edges()
    adjacency = sp.csr_matrix((np.ones(len(source)), (source, target)), shape=(NODES, NODES))
    np.savez(
        raw / "adj_full.npz",
        data=adjacency.data,
        indices=adjacency.indices,
        indptr=adjacency.indptr,
        shape=adjacency.shape,
    )
    np.save(raw / "feats.npy", features().astype(np.float64))
    classes: dict[str, object] = {str(node): int(label) for node, label in enumerate(labels())}
    if multilabel:
        classes = {str(node): [int(node % 2 == 0), 1, 0] for node in range(NODES)}
    (raw / "class_map.json").write_text(json.dumps(classes))
    train, val, test = parts()
    (raw / "role.json").write_text(json.dumps({"tr": train, "va": val, "te": test}))
    return raw


def write_amazon(raw: Path, file: str = "amazon_electronics_computers.npz") -> Path:
    """The npz of Amazon and Coauthor."""
    raw.mkdir(parents=True)
    source, target = edges()
    adjacency = sp.csr_matrix((np.ones(len(source)), (source, target)), shape=(NODES, NODES))
    attributes = sp.csr_matrix((features() > 3).astype(np.float32))
    np.savez(
        raw / file,
        adj_data=adjacency.data,
        adj_indices=adjacency.indices,
        adj_indptr=adjacency.indptr,
        adj_shape=adjacency.shape,
        attr_data=attributes.data,
        attr_indices=attributes.indices,
        attr_indptr=attributes.indptr,
        attr_shape=attributes.shape,
        labels=labels(),
    )
    return raw / file


def write_planetoid(raw: Path, subset: str = "cora", *, isolated: bool = False) -> Path:
    """The pickles of Planetoid: 600 known nodes and 20 test nodes, among which ``isolated`` leaves out two."""
    raw.mkdir(parents=True)
    rng = np.random.default_rng(0)
    test = rng.permutation(600 + np.setdiff1d(np.arange(22 if isolated else 20), [3, 9] if isolated else []))
    x = sp.random_array((620, 30), density=0.2, rng=rng, dtype=np.float32).tocsr()
    y = np.eye(CLASSES, dtype=np.int32)[rng.integers(CLASSES, size=620)]
    nodes = int(test.max()) + 1
    graph = defaultdict(list, {node: rng.integers(nodes, size=3).tolist() + [node] for node in range(nodes)})
    parts: dict[str, Any] = {"x": x[:20], "tx": x[600:], "allx": x[:600], "y": y[:20], "ty": y[600:], "ally": y[:600]}
    for name, part in {**parts, "graph": graph}.items():
        part = sp.csr_matrix(part) if sp.issparse(part) else part
        (raw / f"ind.{subset}.{name}").write_bytes(pickle.dumps(part, protocol=2))
    (raw / f"ind.{subset}.test.index").write_text("".join(f"{node}\n" for node in test))
    return raw


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


def truncate(path: Path) -> None:
    size = path.stat().st_size
    os.chmod(path, 0o644)
    path.write_bytes(path.read_bytes()[: size // 2])


def zip_folder(folder: Path, archive: Path, top: str) -> None:
    with zipfile.ZipFile(archive, "w") as stream:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                stream.write(path, Path(top) / path.relative_to(folder))


@pytest.fixture
def tiny() -> SimpleNamespace:
    """The helpers above, as a fixture: test modules cannot import from a conftest."""
    return SimpleNamespace(
        nodes=NODES,
        edges=edges,
        features=features,
        labels=labels,
        parts=parts,
        ogb=write_ogb,
        saint=write_saint,
        amazon=write_amazon,
        planetoid=write_planetoid,
        payload=Payload,
        csv=write_csv,
        truncate=truncate,
        zip=zip_folder,
    )
