"""Raw files that a library would take in silence: each is one line that names file, place, value and what is valid."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from iexact_runner.config import DatasetConfig
from iexact_runner.data import load_dataset, preflight
from iexact_runner.data.agreement import check_raw
from iexact_runner.data.planetoid import PARTS, read_planetoid
from iexact_runner.errors import DatasetError

MakeConfig = Callable[..., DatasetConfig]
NODES = 30


def edit_npz(path: Path, **changes: Any) -> None:
    arrays = dict(np.load(path))
    np.savez(path, **(arrays | {name: change(arrays[name].copy()) for name, change in changes.items()}))


def put(position: Any, value: Any, dtype: Any = None) -> Callable[[Any], Any]:
    """Changes one element, in an array of another type if need be."""

    def change(array: Any) -> Any:
        array = array.astype(dtype or array.dtype)
        array[position] = value
        return array

    return change


def refused(config: DatasetConfig) -> str:
    with pytest.raises(DatasetError) as caught:
        load_dataset(config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"labels": put(7, 0.5, float)}, "labels, row 7 is 0.5: must be a whole number"),
        ({"labels": put(0, 1j, complex)}, "labels, row 0 is 1j: must be a whole number"),
        ({"labels": put(3, np.inf, float)}, "labels, row 3 is inf: must be a whole number"),
        (
            {"labels": lambda labels: labels[:20]},
            "20 rows of labels in amazon_electronics_computers.npz: must be as many",
        ),
        ({"attr_data": put(5, np.inf)}, "attr_data, row 5 is inf: must be finite"),
        (
            {"adj_shape": put(slice(None), 40), "adj_indptr": lambda offsets: np.pad(offsets, (0, 10), mode="edge")},
            "40 nodes by adj_shape in amazon_electronics_computers.npz",
        ),
        ({"adj_indices": put(4, -1)}, " of a sparse matrix names column -1: must be 0 to 29"),
    ],
    ids=["fraction", "complex", "infinite label", "few labels", "infinite", "adjacency", "edge"],
)
def test_amazon(
    changes: dict[str, Any], reason: str, tmp_path: Path, tiny: SimpleNamespace, config: MakeConfig
) -> None:
    path = tiny.amazon(tmp_path / "Computers" / "raw")
    edit_npz(path, **changes)
    message = refused(config("amazon_computers", tmp_path))
    assert reason in message and path.name in message
    assert not list((tmp_path / "Computers" / "processed").iterdir())


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("file", "changes", "reason"),
    [
        ("class_map.json", {"4": 0.5}, "the label of key '4' is 0.5: must be a whole number"),
        ("class_map.json", {"4": "1"}, "the label of key '4' is '1': must be a whole number"),
        ("class_map.json", {"4": [1, 0]}, "must be a whole number, or as many for each"),
        ("class_map.json", {"-1": 1}, "key '-1' is not a node: must be 0 to 29"),
        ("class_map.json", {"30": 1}, "key '30' is not a node: must be 0 to 29"),
        ("role.json", {"tr": [0, 1, -1]}, "entry 2 of 'tr' is -1: must be a node, 0 to 29"),
        ("role.json", {"va": [2.5]}, "entry 0 of 'va' is 2.5: must be a node, 0 to 29"),
    ],
)
def test_saint_tables(
    file: str, changes: dict[str, Any], reason: str, tmp_path: Path, tiny: SimpleNamespace, config: MakeConfig
) -> None:
    path = tiny.saint(tmp_path / "raw") / file
    edit_json(path, **changes)
    message = refused(config("flickr", tmp_path))
    assert reason in message and file in message


def test_saint_arrays(tmp_path: Path, tiny: SimpleNamespace, config: MakeConfig) -> None:
    raw = tiny.saint(tmp_path / "raw")
    features = np.load(raw / "feats.npy")
    np.save(raw / "feats.npy", put((9, 2), -np.inf)(features))
    assert "feats.npy" in (message := refused(config("flickr", tmp_path)))
    assert "the features, row 9, column 2 is -inf: must be finite" in message
    np.save(raw / "feats.npy", np.concatenate([features, features]))
    assert "30 nodes by shape in adj_full.npz, 60 rows in feats.npy: must be as many" in refused(
        config("flickr", tmp_path)
    )
    np.save(raw / "feats.npy", features.astype(complex))
    assert "of type complex128: must be real numbers" in refused(config("flickr", tmp_path))


@pytest.mark.parametrize(
    ("file", "values", "reason"),
    [
        ("node-label", put(3, 0.5, float), "the label of row 3 is 0.5: must be a whole number"),
        ("num-node-list", put(0, 20), "20 said in num-node-list.csv.gz: must be as many"),
        ("num-edge-list", put(0, 20), "20 said in num-edge-list.csv.gz: must be as many"),
        ("node-feat", lambda x: x[:20], "20 rows in node-feat.csv.gz, 30 rows in node-label.csv.gz: must be as many"),
        ("edge", put((4, 1), -1), "the edge list names node -1 of 30 in entry 4: must be 0 to 29"),
        ("node-feat", put((4, 1), np.inf), "a feature is not finite: column 1 of node 4 is inf"),
    ],
)
def test_ogb(
    file: str,
    values: Callable[[Any], Any],
    reason: str,
    tmp_path: Path,
    tiny: SimpleNamespace,
    config: MakeConfig,
) -> None:
    folder = tiny.ogb(tmp_path / "ogbn_arxiv", "arxiv")
    known = {
        "node-label": tiny.labels(),
        "num-node-list": np.array([NODES]),
        "num-edge-list": np.array([tiny.edges().shape[1]]),
        "node-feat": tiny.features(),
        "edge": tiny.edges().T,
    }
    tiny.csv(folder / "raw" / f"{file}.csv.gz", values(known[file]))
    assert reason in refused(config("arxiv", tmp_path, "ogb"))


@pytest.mark.parametrize(
    ("part", "change", "reason"),
    [
        ("ally", put((5, slice(None)), 0.5, float), r"row 5 is \[0.5, .*must be a 1 in the place of the label"),
        ("ty", put((5, slice(None)), 1), r"row 5 is \[1.0, .*must be a 1 in the place of the label"),
        ("graph", lambda graph: {node: graph[node] for node in list(graph)[:-1]}, "619 nodes, and there are 620 rows"),
    ],
)
def test_planetoid(part: str, change: Callable[[Any], Any], reason: str, tmp_path: Path, tiny: SimpleNamespace) -> None:
    import pickle

    raw = tiny.planetoid(tmp_path / "raw")
    path = raw / f"ind.cora.{part}"
    path.write_bytes(pickle.dumps(change(pickle.loads(path.read_bytes())), protocol=2))
    with pytest.raises(DatasetError, match=reason) as caught:
        read_planetoid([raw / f"ind.cora.{name}" for name in PARTS])
    assert path.name in str(caught.value)


def test_labels_of_several_columns_are_0_or_1(tmp_path: Path, tiny: SimpleNamespace, config: MakeConfig) -> None:
    path = tiny.saint(tmp_path / "raw", multilabel=True) / "class_map.json"
    edit_json(path, **{"4": [2, 0, 1]})
    assert "a label of node 4 is 2: must be 0 or 1" in refused(config("yelp", tmp_path))


def test_whole_files_are_not_refused(tmp_path: Path, tiny: SimpleNamespace) -> None:
    """Labels may be missing, and whole numbers that are written as others."""
    path = tiny.amazon(tmp_path / "amazon")
    edit_npz(path, labels=put(2, np.nan, float))
    check_raw([path])
    raw = tiny.saint(tmp_path / "saint")
    edit_json(raw / "class_map.json", **{"3": -1, "5": 2.0})
    check_raw([raw / name for name in ("adj_full.npz", "feats.npy", "class_map.json", "role.json")])
    assert preflight.missing_files([path]) == []
