"""Files that would run something when read, or be larger than they are: every loader refuses them in one line."""

from __future__ import annotations

import gzip
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch_geometric.data import Data
from torch_geometric.io import read_planetoid_data

from iexact_runner.config import DatasetConfig
from iexact_runner.data import load_dataset, preflight
from iexact_runner.errors import DatasetError
from iexact_runner.untrusted import archives

MakeConfig = Callable[..., DatasetConfig]
# Where the processed file of a dataset lies.
PROCESSED = {
    "arxiv": "ogbn_arxiv/processed/geometric_data_processed.pt",
    "amazon_computers": "Computers/processed/data.pt",
    "flickr": "processed/data.pt",
    "cora": "Cora/processed/data.pt",
}


def write(name: str, root: Path, tiny: SimpleNamespace) -> None:
    if name == "arxiv":
        tiny.ogb(root / "ogbn_arxiv", "arxiv")
    elif name == "cora":
        tiny.planetoid(root / "Cora" / "raw")
    elif name == "flickr":
        tiny.saint(root / "raw")
    else:
        tiny.amazon(root / "Computers" / "raw")


def source_of(name: str) -> str:
    return "ogb" if name == "arxiv" else "pyg"


@pytest.mark.parametrize(("subset", "isolated"), [("cora", False), ("citeseer", True)])
def test_planetoid_is_read_as_torch_geometric_reads_it(
    subset: str, isolated: bool, tmp_path: Path, tiny: SimpleNamespace, config: MakeConfig
) -> None:
    folder = tmp_path / {"cora": "Cora", "citeseer": "CiteSeer"}[subset]
    raw = tiny.planetoid(folder / "raw", subset, isolated=isolated)
    expected = read_planetoid_data(str(raw), subset)
    dataset = load_dataset(config(subset, tmp_path))
    assert dataset.x.shape == ((622 if isolated else 620), 30)
    torch.testing.assert_close(dataset.x, expected.x, atol=0, rtol=0)
    assert torch.equal(dataset.y, expected.y)
    assert set(map(tuple, dataset.edge_index.T.tolist())) == set(map(tuple, expected.edge_index.T.tolist()))
    for split in ("train", "val", "test"):
        assert getattr(dataset, split).tolist() == expected[f"{split}_mask"].nonzero().flatten().tolist(), split
    processed = torch.load(folder / "processed" / "data.pt", weights_only=True)
    assert processed[2] is Data and set(processed[0]) >= {"x", "y", "edge_index", "train_mask"}


@pytest.mark.parametrize("part", ["x", "tx", "allx", "y", "ty", "ally", "graph"])
def test_planetoid_pickle_runs_only_when_trusted(
    part: str, tmp_path: Path, tiny: SimpleNamespace, config: MakeConfig
) -> None:
    raw = tiny.planetoid(tmp_path / "Cora" / "raw")
    (raw / f"ind.cora.{part}").write_bytes(pickle.dumps(tiny.payload(tmp_path / "ran"), protocol=2))
    if part == "x":  # nothing of it is needed
        load_dataset(config("cora", tmp_path))
    else:
        with pytest.raises(DatasetError, match=r"names posix.mkdir.*dataset\.trust_pickle=true") as caught:
            load_dataset(config("cora", tmp_path))
        assert "\n" not in str(caught.value) and str(raw / f"ind.cora.{part}") in str(caught.value)
        assert not list((raw.parent / "processed").iterdir())
    assert not (tmp_path / "ran").exists()
    shutil.rmtree(raw.parent / "processed")
    with pytest.raises(DatasetError):  # what it made is no matrix
        load_dataset(config("cora", tmp_path, trust_pickle=True))
    assert (tmp_path / "ran").exists()


def test_trusted_planetoid_is_torch_geometrics_own(tmp_path: Path, tiny: SimpleNamespace, config: MakeConfig) -> None:
    tiny.planetoid(tmp_path / "Cora" / "raw")
    trusted = load_dataset(config("cora", tmp_path, trust_pickle=True))
    shutil.rmtree(tmp_path / "Cora" / "processed")
    own = load_dataset(config("cora", tmp_path))
    for name in ("x", "y", "edge_index", "train", "val", "test"):
        assert torch.equal(getattr(trusted, name), getattr(own, name)), name


@pytest.mark.parametrize("name", PROCESSED)
def test_processed_file_runs_only_when_trusted(
    name: str, tmp_path: Path, tiny: SimpleNamespace, config: MakeConfig
) -> None:
    write(name, tmp_path, tiny)
    load_dataset(config(name, tmp_path, source_of(name)))
    path = tmp_path / PROCESSED[name]
    content = torch.load(path, weights_only=False)
    content[0]["more"] = tiny.payload(tmp_path / "ran")
    torch.save(content, path)
    with pytest.raises(DatasetError, match=r"names posix.mkdir.*dataset\.trust_pickle=true") as caught:
        load_dataset(config(name, tmp_path, source_of(name)))
    assert "\n" not in str(caught.value) and not (tmp_path / "ran").exists()
    load_dataset(config(name, tmp_path, source_of(name), trust_pickle=True))
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", PROCESSED)
def test_files_about_transforms_are_not_read(
    name: str, tmp_path: Path, tiny: SimpleNamespace, config: MakeConfig
) -> None:
    write(name, tmp_path, tiny)
    for file in ("pre_transform.pt", "pre_filter.pt"):
        path = (tmp_path / PROCESSED[name]).with_name(file)
        path.parent.mkdir(exist_ok=True)
        torch.save(tiny.payload(tmp_path / "ran"), path)
    for _ in range(2):  # made, then read
        load_dataset(config(name, tmp_path, source_of(name)))
    assert not (tmp_path / "ran").exists()


def test_split_of_ogb_runs_nothing(tmp_path: Path, tiny: SimpleNamespace, config: MakeConfig) -> None:
    folder = tiny.ogb(tmp_path / "ogbn_arxiv", "arxiv")
    split = dict(zip(("train", "valid", "test"), map(torch.tensor, tiny.parts()), strict=True))
    path = folder / "split" / "time" / "split_dict.pt"
    torch.save(split, path)
    dataset = load_dataset(config("arxiv", tmp_path, "ogb"))
    assert (dataset.train.tolist(), dataset.val.tolist(), dataset.test.tolist()) == tiny.parts()
    torch.save({**split, "more": tiny.payload(tmp_path / "ran")}, path)
    with pytest.raises(DatasetError, match=r"split_dict\.pt is a pickle that names posix\.mkdir"):
        load_dataset(config("arxiv", tmp_path, "ogb"))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(("name", "file"), [("flickr", "adj_full.npz"), ("flickr", "feats.npy"), ("cora", "")])
def test_arrays_of_objects_run_nothing(
    name: str, file: str, tmp_path: Path, tiny: SimpleNamespace, config: MakeConfig
) -> None:
    write(name, tmp_path, tiny)
    array = np.empty(3, dtype=object)
    array[:] = [tiny.payload(tmp_path / "ran")] * 3
    if name == "cora":
        (tmp_path / "Cora" / "raw" / "ind.cora.ally").write_bytes(pickle.dumps(array, protocol=2))
    elif file.endswith("npy"):
        np.save(tmp_path / "raw" / file, array)
    else:
        np.savez(tmp_path / "raw" / file, data=array)
    with pytest.raises(DatasetError, match="Python objects|posix.mkdir"):
        load_dataset(config(name, tmp_path))
    assert not (tmp_path / "ran").exists()


def test_older_files_of_torch_geometric_hold_the_object(
    tmp_path: Path, tiny: SimpleNamespace, config: MakeConfig
) -> None:
    write("amazon_computers", tmp_path, tiny)
    expected = load_dataset(config("amazon_computers", tmp_path))
    path = tmp_path / PROCESSED["amazon_computers"]
    fields = torch.load(path, weights_only=True)[0]
    torch.save((Data(**fields), None), path)
    assert torch.equal(load_dataset(config("amazon_computers", tmp_path)).x, expected.x)


@pytest.mark.parametrize(
    ("name", "file"),
    [("flickr", "raw/adj_full.npz"), ("arxiv", "ogbn_arxiv/raw/node-feat.csv.gz")],
)
def test_bombs_are_refused(
    name: str,
    file: str,
    tmp_path: Path,
    tiny: SimpleNamespace,
    config: MakeConfig,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write(name, tmp_path, tiny)
    if name == "flickr":
        np.savez_compressed(tmp_path / file, data=np.zeros(10**6))
    else:
        (tmp_path / file).write_bytes(gzip.compress(b"0,0,0,0,0\n" * 10**6))
    monkeypatch.setattr(archives, "FREE_BYTES", 2**20)
    with pytest.raises(DatasetError, match=f"{Path(file).name} is damaged or unreadable .* bytes unpack to"):
        load_dataset(config(name, tmp_path, source_of(name)))


def test_downloaded_archive_cannot_write_elsewhere(
    tmp_path: Path, tiny: SimpleNamespace, config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.zip(tiny.ogb(tmp_path / "server", "arxiv"), tmp_path / "arxiv.zip", top="arxiv")
    with zipfile.ZipFile(tmp_path / "arxiv.zip", "a") as archive:
        archive.writestr("../../../escaped", "x")
        archive.writestr(f"{tmp_path}/absolute", "x")
    monkeypatch.setattr(preflight, "connect", lambda url: None)
    monkeypatch.setattr("ogb.utils.url.download_url", lambda url, to: shutil.copy(tmp_path / "arxiv.zip", to))
    load_dataset(config("arxiv", tmp_path / "data", "ogb"))
    assert not [path for path in tmp_path.rglob("*") if path.name in ("escaped", "absolute")]


def test_sizes_of_a_dense_matrix_are_checked_first(tmp_path: Path, tiny: SimpleNamespace, config: MakeConfig) -> None:
    path = tiny.amazon(tmp_path / "Computers" / "raw")
    arrays = dict(np.load(path))
    np.savez(path, **{**arrays, "attr_shape": np.array([tiny.nodes, 10**15])})
    with pytest.raises(DatasetError, match="this machine has"):
        load_dataset(config("amazon_computers", tmp_path))


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("x", torch.full((30, 5), float("nan")), "a feature is not finite"),
        ("x", torch.full((30, 5), 1e300, dtype=torch.float64), "a feature is not finite"),
        ("x", torch.zeros(0, 5), "disagree"),
        ("x", torch.zeros(30), "disagree"),
        ("x", None, "features are missing"),
        ("x", torch.zeros(30, 5).index_fill(1, torch.tensor(3), -float("inf")), "column 3 of node 0 is -inf"),
        ("y", torch.arange(30) / 2, "a label of node 1 is 0.5: must be a whole number"),
        ("y", torch.full((30,), 10**12), "a label is beyond the 30 classes"),
        ("y", torch.full((30,), -1), "split has no labelled node"),
        ("edge_index", torch.zeros(3, 4, dtype=torch.int64), "edge list has shape"),
        ("edge_index", torch.full((2, 4), 30), "names node 30 of 30 in entry 0: must be 0 to 29"),
        ("edge_index", torch.full((2, 4), -7), "names node -7 of 30"),
        ("edge_index", torch.zeros(2, 4), "not one of node numbers"),
        ("edge_index", "words", "edges are missing"),
    ],
)
def test_tensors_that_make_no_graph_are_one_line(
    field: str, value: object, reason: str, tmp_path: Path, tiny: SimpleNamespace, config: MakeConfig
) -> None:
    write("amazon_computers", tmp_path, tiny)
    load_dataset(config("amazon_computers", tmp_path))
    path = tmp_path / PROCESSED["amazon_computers"]
    fields = torch.load(path, weights_only=True)[0]
    torch.save(({**fields, field: value}, None, Data), path)
    with pytest.raises(DatasetError, match=reason) as caught:
        load_dataset(config("amazon_computers", tmp_path))
    assert "\n" not in str(caught.value)
