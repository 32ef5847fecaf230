"""Graphs of one's own: every format gives the same dataset, and what is wrong in a file is one line that names it."""

from __future__ import annotations

import gzip
import importlib.util
import io
import pickle
import random

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.sparse import coo_matrix, csr_matrix
from torch_geometric.data import Data

from conftest import tiny_dataset
from iexact_runner.cli import compose_config
from iexact_runner.data import load_dataset
from iexact_runner.errors import ConfigError, DatasetError

NODES = 101
PARQUET = pytest.mark.skipif(importlib.util.find_spec("pyarrow") is None, reason="needs pyarrow")


def load(path, *overrides):
    return load_dataset(compose_config("dataset=file", f"dataset.path={path}", *overrides).dataset)


@pytest.fixture(scope="module")
def graph():
    return tiny_dataset(nodes=NODES, symmetric=False)


def masks(graph):
    return {
        f"{part}_mask": torch.zeros(NODES, dtype=torch.bool).index_fill_(0, nodes, True) for part, nodes in parts(graph)
    }


def parts(graph):
    return ("train", graph.train), ("val", graph.val), ("test", graph.test)


def write_pt(folder, graph):
    torch.save(Data(x=graph.x, y=graph.y, edge_index=graph.edge_index.long(), **masks(graph)), folder / "graph.pt")
    return folder / "graph.pt"


def write_dict(folder, graph):
    index = dict(train_idx=graph.train, valid_idx=graph.val, test_idx=graph.test)
    torch.save(
        dict(features=graph.x.double(), labels=graph.y.int(), edges=graph.edge_index.T, **index), folder / "d.pth"
    )
    return folder / "d.pth"


def write_npz(folder, graph):
    arrays = {name: mask.numpy() for name, mask in masks(graph).items()}
    np.savez_compressed(folder / "graph.npz", feat=graph.x.numpy(), label=graph.y.numpy().astype(np.uint8), **arrays)
    with np.load(folder / "graph.npz") as held:
        np.savez(folder / "graph.npz", edge_index=graph.edge_index.numpy().astype(">i4"), **held)
    return folder / "graph.npz"


def write_csr_npz(folder, graph):
    source, target = graph.edge_index.numpy()
    adjacency = coo_matrix((np.ones(len(source)), (source, target)), (NODES, NODES)).tocsr()
    found = {}
    for name, matrix in (("adj", adjacency), ("attr", csr_matrix(graph.x.numpy()))):
        found |= {f"{name}_{part}": getattr(matrix, part) for part in ("data", "indices", "indptr", "shape")}
    index = {f"idx_{part}": nodes.numpy() for part, nodes in parts(graph)}
    np.savez(folder / "sparse.npz", labels=graph.y.numpy(), **found, **index)
    return folder / "sparse.npz"


def write_npy(folder, graph):
    for name, value in dict(edge_index=graph.edge_index, x=graph.x, y=graph.y, **masks(graph)).items():
        np.save(folder / f"{name}.npy", value.numpy())
    return folder


def tables(graph, *, names=lambda node: f"paper {node:03}"):
    split = pd.Series([""] * NODES)
    for part, nodes in parts(graph):
        split[nodes.numpy()] = part
    ids = [names(node) for node in range(NODES)]
    nodes = pd.DataFrame(graph.x.numpy()).rename(columns="word {}".format)
    nodes.insert(0, "node_id", ids)
    nodes["label"], nodes["split"] = [f"class {label}" for label in graph.y.tolist()], split
    source, target = ([ids[node] for node in ends] for ends in graph.edge_index.tolist())
    return pd.DataFrame({"source": source, "target": target}), nodes


def write_csv(folder, graph):
    edges, nodes = tables(graph)
    edges.to_csv(folder / "edges.csv.gz", index=False)
    nodes.to_csv(folder / "nodes.tsv", index=False, sep="\t")
    return folder


def write_parquet(folder, graph):
    for name, table in zip(("edges", "nodes"), tables(graph, names=lambda node: 7 * node - 20), strict=True):
        table.to_parquet(folder / f"{name}.parquet")
    return folder


def write_ogb(folder, graph):
    files = {"raw/edge": graph.edge_index.T, "raw/node-feat": graph.x, "raw/node-label": graph.y[:, None]}
    files |= {f"split/time/{'valid' if part == 'val' else part}": nodes[:, None] for part, nodes in parts(graph)}
    for name, value in files.items():
        path = folder / f"{name}.csv.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        pd.DataFrame(value.numpy()).to_csv(path, header=False, index=False)
    return folder


WRITERS = {
    "Data": write_pt,
    "dict": write_dict,
    "npz": write_npz,
    "csr": write_csr_npz,
    "npy": write_npy,
    "csv": write_csv,
    "parquet": pytest.param(write_parquet, marks=PARQUET),
    "ogb": write_ogb,
}
FORMATS = pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS.keys())


@FORMATS
def test_every_format_gives_the_same_dataset(write, tmp_path, graph):
    before = sorted(tmp_path.rglob("*"))
    path = write(tmp_path, graph)
    written = sorted(tmp_path.rglob("*"))
    found = load(path)
    assert sorted(tmp_path.rglob("*")) == written != before  # nothing is put beside it
    torch.testing.assert_close(found.x, graph.x, rtol=1e-6, atol=1e-7)
    assert torch.equal(found.y, graph.y) and found.num_classes == graph.num_classes
    assert torch.equal(found.edge_index, torch.unique(graph.edge_index, dim=1))
    assert all(torch.equal(getattr(found, part).sort().values, nodes.sort().values) for part, nodes in parts(graph))


def test_a_missing_split_is_drawn_by_its_seed_and_features_are_made(tmp_path, graph):
    np.savez(tmp_path / "g.npz", edge_index=graph.edge_index.numpy(), y=graph.y.numpy())
    with pytest.raises(DatasetError, match=r"g.npz has no features \(it has edge_index, y\): name them x, .*=degree"):
        load(tmp_path / "g.npz")
    first, again, other = (
        load(tmp_path / "g.npz", "dataset.features=degree", f"dataset.split_seed={seed}") for seed in (0, 0, 1)
    )
    assert torch.equal(first.train, again.train) and not torch.equal(first.train, other.train)
    assert [len(nodes) for nodes in (first.train, first.val, first.test)] == [61, 20, 20]
    source, target = graph.edge_index.long()
    assert torch.equal(first.x[:, 0], torch.bincount(target, minlength=NODES).float().log1p())
    assert torch.equal(first.x[:, 1], torch.bincount(source, minlength=NODES).float().log1p())
    one_hot = load(tmp_path / "g.npz", "dataset.features=one_hot").x
    assert torch.equal(one_hot.argmax(1), torch.bincount(target, minlength=NODES)) and (one_hot.sum(1) == 1).all()


def test_a_run_names_the_graph_and_a_file_from_elsewhere_may_not_leave_the_folder():
    assert compose_config("dataset=file", "dataset.path=/a/citations.v2.npz").dataset.name == "file_citations"
    named = compose_config("dataset=file", "dataset.path=/a/b.npz", "dataset.name=file_mine")
    assert named.dataset.name == "file_mine"
    for path, valid in (("/nowhere", "does not exist"), (__file__, "must be a folder, or a file of .pt, .pth, .npz")):
        with pytest.raises(ConfigError, match=f"dataset.path={path}: {valid}"):
            load(path)


ARRAYS = {
    "edge_index is 3 wide": (dict(edge_index=np.zeros((3, 5), int)), "edge_index has shape (3, 5): must be (2, E)"),
    "edges of floats": (dict(edge_index=np.zeros((2, 5))), "edge_index holds float64: must be node numbers"),
    "edge beyond": (dict(edge_index=np.full((2, 4), 101)), "the edge list names node 101 of 101 in entry 0"),
    "edge below": (dict(edge_index=np.full((2, 4), -1)), "the edge list names node -1 of 101 in entry 0"),
    "no edges": (dict(edge_index=None), "has no edges (it has test_mask"),
    "no labels": (dict(y=None), "has no labels (it has edge_index"),
    "labels of text": (dict(y=np.array(["a"] * NODES)), "y holds <U1: must be numbers"),
    "label of a half": (dict(y=np.full(NODES, 0.5)), "a label of node 0 is 0.5: must be a whole number"),
    "features of another graph": (dict(x=np.zeros((100, 3))), "features (100, 3) and labels (101,) disagree"),
    "infinite feature": (dict(x=np.full((NODES, 2), np.inf)), "a feature is not finite: column 0 of node 0 is inf"),
    "part of a split": (dict(val_mask=None), "has a split without validation nodes: give all three parts or none"),
    "short mask": (dict(val_mask=np.ones(3, bool)), "val_mask is of 3 nodes, and the labels of 101"),
    "overlapping split": (dict(val_mask=np.ones(NODES, bool)), "is in the train and in the validation split"),
    "twice": (dict(train_mask=None, train_idx=np.array([1, 1])), "train_idx names a node twice"),
    "objects": (dict(x=np.array([{}] * NODES)), "x.npy: holds Python objects, which are a pickle"),
}


@pytest.mark.parametrize(("changed", "line"), ARRAYS.values(), ids=ARRAYS.keys())
def test_what_is_wrong_in_arrays_is_one_line(changed, line, tmp_path, graph):
    arrays = {"edge_index": graph.edge_index, "x": graph.x, "y": graph.y, **masks(graph)}
    arrays = {name: value.numpy() for name, value in arrays.items()} | changed
    np.savez(tmp_path / "g.npz", **{name: value for name, value in arrays.items() if value is not None})
    with pytest.raises(DatasetError) as error:
        load(tmp_path / "g.npz")
    assert line in str(error.value) and str(tmp_path / "g.npz") in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def without(table, name):
    return table.drop(columns=name)


def holding(table, name, row, value):
    return table.assign(**{name: [*table[name][:row], value, *table[name][row + 1 :]]})


TABLES = {
    "unknown node": (
        lambda edges, nodes: (holding(edges, "target", 4, "nobody"), nodes),
        "edges.csv: row 5 names node nobody in column target, which is not in nodes.csv",
    ),
    "node twice": (
        lambda edges, nodes: (edges, holding(nodes, "node_id", 1, nodes["node_id"][0])),
        "nodes.csv: row 2 names node paper 000 in column node_id: once each, and none empty",
    ),
    "feature of text": (
        lambda edges, nodes: (edges, holding(nodes, "word 2", 1, "red")),
        "nodes.csv: column word 2 holds red in row 2: a feature must be a number",
    ),
    "split": (
        lambda edges, nodes: (edges, holding(nodes, "split", 0, "holdout")),
        "nodes.csv: column split holds holdout in row 1: must be train, val, test or empty",
    ),
    "no label": (
        lambda edges, nodes: (edges, without(nodes, "label")),
        "nodes.csv has no column of labels (it has node_id, word 0",
    ),
    "three columns": (
        lambda edges, nodes: (edges.rename(columns={"source": "a", "target": "b"}).assign(c=1), nodes),
        "edges.csv has columns a, b, c: name two of them source and target",
    ),
}


@pytest.mark.parametrize(("change", "line"), TABLES.values(), ids=TABLES.keys())
def test_what_is_wrong_in_tables_is_one_line(change, line, tmp_path, graph):
    for name, table in zip(("edges", "nodes"), change(*tables(graph)), strict=True):
        table.to_csv(tmp_path / f"{name}.csv", index=False)
    with pytest.raises(DatasetError) as error:
        load(tmp_path)
    assert line in str(error.value) and len(str(error.value).splitlines()) == 1


def test_numbers_name_nodes_as_text_does(tmp_path, graph):
    """A column of numbers on one side, of text on the other."""
    edges, nodes = tables(graph, names=lambda node: "x" if node == 0 else str(node))
    edges = edges[(edges != "x").all(axis=1)]
    edges.to_csv(tmp_path / "edges.csv", index=False)
    nodes.to_csv(tmp_path / "nodes.csv", index=False)
    proper = graph.edge_index[:, (graph.edge_index != 0).all(0)]
    assert torch.equal(load(tmp_path).edge_index, torch.unique(proper, dim=1))


class Touches:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_nothing_of_a_file_is_run(tmp_path):
    ran = tmp_path / "ran"
    torch.save(Touches(ran), tmp_path / "a.pt")
    (tmp_path / "b.pt").write_bytes(pickle.dumps(Touches(ran)))
    np.savez(tmp_path / "c.npz", x=np.array([Touches(ran)]))
    torch.save({"x": torch.ones(3), "y": Touches(ran)}, tmp_path / "d.pt")
    for name in ("a.pt", "b.pt", "c.npz", "d.pt"):
        with pytest.raises(DatasetError) as error:
            load(tmp_path / name)
        assert len(str(error.value).splitlines()) == 1
    assert not ran.exists()


@FORMATS
def test_damaged_files_are_refused_in_one_line_or_read_whole(write, tmp_path, graph):
    """Cut, flipped, swapped and doubled bytes: a graph that fits together, or one line that names a file."""
    path = write(tmp_path, graph)
    config = compose_config("dataset=file", f"dataset.path={path}").dataset
    files = [file for file in sorted(tmp_path.rglob("*")) if file.is_file()]
    draw, refused = random.Random(0), 0
    for _ in range(20):
        file = draw.choice(files)
        content = file.read_bytes()
        file.write_bytes(damaged(content, draw))
        try:
            found = load_dataset(config)
            assert found.edge_index.max() < found.num_nodes and found.x.isfinite().all()
        except (DatasetError, ConfigError) as error:
            assert len(str(error).splitlines()) == 1 and str(tmp_path) in str(error)
            refused += 1
        file.write_bytes(content)
    assert refused >= 5


def damaged(content, draw):
    place = draw.randrange(len(content))
    kind = draw.choice(("cut", "flip", "double", "noise", "empty"))
    if kind == "cut":
        return content[:place]
    if kind == "flip":
        return content[:place] + bytes([content[place] ^ 1 << draw.randrange(8)]) + content[place + 1 :]
    if kind == "double":
        return content[:place] + content
    return b"" if kind == "empty" else content[:place] + draw.randbytes(64) + content[place + 64 :]


def test_a_table_that_would_unpack_to_more_than_is_meant(tmp_path, graph):
    write_csv(tmp_path, graph)
    with gzip.open(tmp_path / "edges.csv.gz", "wb") as bomb:
        for _ in range(300):
            bomb.write(b"\n" * (1 << 20))
    with pytest.raises(DatasetError, match=r"edges.csv.gz is damaged or unreadable \(.* bytes unpack to"):
        load(tmp_path)


def test_a_table_is_read_as_text_and_no_formula(tmp_path, graph):
    buffer = io.StringIO()
    edges, nodes = tables(graph, names=lambda node: f"=cmd|' /C calc'!A{node}")
    edges.to_csv(tmp_path / "edges.csv", index=False)
    nodes.to_csv(buffer, index=False)
    (tmp_path / "nodes.csv").write_text(buffer.getvalue())
    assert load(tmp_path).num_nodes == NODES
