"""ogb's own loader on tiny folders in its layout."""

from __future__ import annotations

import shutil
import urllib.error
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from iexact_runner.config import DatasetConfig
from iexact_runner.data import load_dataset, preflight
from iexact_runner.errors import ConfigError, DatasetError

MakeConfig = Callable[..., DatasetConfig]


def one_line(error: BaseException) -> str:
    text = str(error)
    assert "\n" not in text
    return text


def test_arxiv_from_raw_then_from_processed(tmp_path: Path, tiny: SimpleNamespace, config: MakeConfig) -> None:
    folder = tiny.ogb(tmp_path / "ogbn_arxiv", "arxiv")
    raw = {path for path in folder.rglob("*.csv.gz")}
    first = load_dataset(config("arxiv", tmp_path, "ogb", undirected=True))
    assert (folder / "processed" / "geometric_data_processed.pt").exists()
    second = load_dataset(config("arxiv", tmp_path, "ogb", undirected=True))
    assert {path for path in folder.rglob("*.csv.gz")} == raw

    torch.testing.assert_close(first.x, torch.from_numpy(tiny.features()))
    assert first.y.tolist() == tiny.labels().tolist()
    assert (first.train.tolist(), first.val.tolist(), first.test.tolist()) == tiny.parts()
    assert first.num_classes == 40
    for name in ("x", "y", "edge_index", "train", "val", "test"):
        assert torch.equal(getattr(first, name), getattr(second, name)), name
    pairs = set(map(tuple, first.edge_index.T.tolist()))
    assert len(pairs) == first.edge_index.size(1) == 2 * tiny.nodes + 1
    assert pairs == {(target, source) for source, target in pairs}
    assert (7, 7) in pairs


def test_directed_edges_stay_directed(tmp_path: Path, tiny: SimpleNamespace, config: MakeConfig) -> None:
    tiny.ogb(tmp_path / "ogbn_arxiv", "arxiv")
    dataset = load_dataset(config("arxiv", tmp_path, "ogb"))
    assert set(map(tuple, dataset.edge_index.T.tolist())) == set(map(tuple, tiny.edges().T.tolist()))


def test_products_has_inverse_edges(tmp_path: Path, tiny: SimpleNamespace, config: MakeConfig) -> None:
    tiny.ogb(tmp_path / "ogbn_products", "products")
    dataset = load_dataset(config("products", tmp_path, "ogb"))
    assert dataset.edge_index.size(1) == 2 * tiny.nodes + 1
    assert dataset.num_classes == 47


@pytest.mark.parametrize("folder", ["ogbn_arxiv", "ogbn_arxiv_pyg"])
@pytest.mark.parametrize("inside", [False, True], ids=["parent", "folder itself"])
def test_accepted_roots(folder: str, inside: bool, tmp_path: Path, tiny: SimpleNamespace, config: MakeConfig) -> None:
    tiny.ogb(tmp_path / folder, "arxiv")
    root = tmp_path / folder if inside else tmp_path
    assert load_dataset(config("arxiv", root, "ogb")).num_nodes == tiny.nodes


def test_unlabelled_nodes_leave_the_split(tmp_path: Path, tiny: SimpleNamespace, config: MakeConfig) -> None:
    labels = tiny.labels().astype(float)
    labels[[3, 16, 29]] = np.nan
    tiny.ogb(tmp_path / "ogbn_products", "products", labels)
    dataset = load_dataset(config("products", tmp_path, "ogb"))
    assert dataset.y.dtype == torch.int64
    assert [len(dataset.train), len(dataset.val), len(dataset.test)] == [14, 6, 7]
    assert not {3, 16, 29} & set(torch.cat([dataset.train, dataset.val, dataset.test]).tolist())


def test_missing_files_without_network(tmp_path: Path, config: MakeConfig) -> None:
    with pytest.raises(DatasetError) as caught:
        load_dataset(config("arxiv", tmp_path, "ogb"))
    text = one_line(caught.value)
    assert "edge.csv.gz" in text and "train.csv.gz" in text
    assert "http://snap.stanford.edu/ogb/data/nodeproppred/arxiv.zip" in text
    assert str(tmp_path / "ogbn_arxiv" / "raw") in text and "dataset.root" in text
    assert list(tmp_path.iterdir()) == []


def test_one_missing_file_is_named(tmp_path: Path, tiny: SimpleNamespace, config: MakeConfig) -> None:
    folder = tiny.ogb(tmp_path / "ogbn_arxiv", "arxiv")
    (folder / "raw" / "node-label.csv.gz").unlink()
    with pytest.raises(DatasetError, match=r"^missing node-label\.csv\.gz, and"):
        load_dataset(config("arxiv", tmp_path, "ogb"))
    assert (folder / "raw" / "edge.csv.gz").exists()


@pytest.mark.parametrize("name", ["raw/edge.csv.gz", "raw/node-feat.csv.gz", "split/time/valid.csv.gz"])
def test_truncated_csv(name: str, tmp_path: Path, tiny: SimpleNamespace, config: MakeConfig) -> None:
    folder = tiny.ogb(tmp_path / "ogbn_arxiv", "arxiv")
    tiny.truncate(folder / name)
    with pytest.raises(DatasetError, match="copy or download it again") as caught:
        load_dataset(config("arxiv", tmp_path, "ogb"))
    assert str(folder / name) in one_line(caught.value)
    assert caught.value.__cause__ is not None
    assert not (folder / "processed").exists()


def test_truncated_processed_file(tmp_path: Path, tiny: SimpleNamespace, config: MakeConfig) -> None:
    folder = tiny.ogb(tmp_path / "ogbn_arxiv", "arxiv")
    load_dataset(config("arxiv", tmp_path, "ogb"))
    processed = folder / "processed" / "geometric_data_processed.pt"
    tiny.truncate(processed)
    with pytest.raises(DatasetError, match="delete it, and it is made again") as caught:
        load_dataset(config("arxiv", tmp_path, "ogb"))
    assert str(processed) in one_line(caught.value)
    processed.unlink()
    assert load_dataset(config("arxiv", tmp_path, "ogb")).num_nodes == tiny.nodes


def test_edge_past_the_last_node(tmp_path: Path, tiny: SimpleNamespace, config: MakeConfig) -> None:
    folder = tiny.ogb(tmp_path / "ogbn_arxiv", "arxiv")
    edges = tiny.edges()
    edges[0, 0] = tiny.nodes
    tiny.csv(folder / "raw" / "edge.csv.gz", edges.T)
    with pytest.raises(DatasetError, match=f"edge list names node {tiny.nodes} of {tiny.nodes}"):
        load_dataset(config("arxiv", tmp_path, "ogb"))


def test_folder_that_cannot_be_written(tmp_path: Path, tiny: SimpleNamespace, config: MakeConfig) -> None:
    folder = tiny.ogb(tmp_path / "ogbn_arxiv", "arxiv")
    (folder / "processed").write_text("in the way")
    with pytest.raises(DatasetError, match="writable") as caught:
        load_dataset(config("arxiv", tmp_path, "ogb"))
    assert "dataset.root" in one_line(caught.value)


def test_download_fills_in_what_is_missing(
    tmp_path: Path, tiny: SimpleNamespace, config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = tmp_path / "arxiv.zip"
    tiny.zip(tiny.ogb(tmp_path / "server", "arxiv"), archive, top="arxiv")
    root = tmp_path / "data"
    folder = tiny.ogb(root / "ogbn_arxiv", "arxiv")
    (folder / "raw" / "node-feat.csv.gz").unlink()
    (folder / "raw" / "edge.csv.gz").write_bytes(kept := (folder / "raw" / "edge.csv.gz").read_bytes())

    monkeypatch.setattr(preflight, "connect", lambda url: None)
    monkeypatch.setattr("ogb.utils.url.download_url", lambda url, to: shutil.copy(archive, to))
    dataset = load_dataset(config("arxiv", root, "ogb"))
    assert dataset.num_nodes == tiny.nodes
    assert (folder / "raw" / "edge.csv.gz").read_bytes() == kept
    assert not list(folder.glob(".download-*"))


@pytest.mark.parametrize("content", [b"not a zip", None], ids=["damaged archive", "connection lost"])
def test_failed_download_leaves_nothing(
    content: bytes | None, tmp_path: Path, config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(url: str, to: str) -> str:
        path = Path(to, "arxiv.zip")
        path.write_bytes(content or b"half")
        if content is None:
            raise urllib.error.URLError("connection lost")
        return str(path)

    monkeypatch.setattr(preflight, "connect", lambda url: None)
    monkeypatch.setattr("ogb.utils.url.download_url", download)
    with pytest.raises(DatasetError, match="download failed"):
        load_dataset(config("arxiv", tmp_path, "ogb"))
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_nothing_is_printed(
    tmp_path: Path, tiny: SimpleNamespace, config: MakeConfig, capfd: pytest.CaptureFixture[str]
) -> None:
    tiny.ogb(tmp_path / "ogbn_arxiv", "arxiv")
    load_dataset(config("arxiv", tmp_path, "ogb"))
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""


def test_unknown_name(tmp_path: Path, config: MakeConfig) -> None:
    with pytest.raises(ConfigError, match="arxiv, products"):
        load_dataset(config("arXiv", tmp_path, "ogb"))
