"""torch_geometric's own classes on tiny folders in their layout, and on real files where there are any."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from iexact_runner.config import DatasetConfig
from iexact_runner.config.dataset import NAMES
from iexact_runner.data import load_dataset, preflight
from iexact_runner.errors import ConfigError, DatasetError

MakeConfig = Callable[..., DatasetConfig]

REAL_DATA = Path(__file__).resolve().parents[3] / "shared" / "data"


@pytest.mark.parametrize("folder", ["Flickr/raw", "raw"])
def test_flickr_from_raw_then_from_processed(
    folder: str, tmp_path: Path, tiny: SimpleNamespace, config: MakeConfig
) -> None:
    raw = tiny.saint(tmp_path / folder)
    first = load_dataset(config("flickr", tmp_path))
    processed = raw.parent / "processed" / "data.pt"
    assert processed.exists()
    shutil.rmtree(raw)
    raw.mkdir()
    second = load_dataset(config("flickr", tmp_path))
    torch.testing.assert_close(first.x, torch.from_numpy(tiny.features()))
    assert first.x.dtype == torch.float32
    assert first.y.tolist() == tiny.labels().tolist()
    assert (first.train.tolist(), first.val.tolist(), first.test.tolist()) == tiny.parts()
    assert first.num_classes == 4
    assert set(map(tuple, first.edge_index.T.tolist())) == set(map(tuple, tiny.edges().T.tolist()))
    for name in ("x", "y", "edge_index", "train", "val", "test"):
        assert torch.equal(getattr(first, name), getattr(second, name)), name


def test_yelp_is_multilabel_and_standardized(tmp_path: Path, tiny: SimpleNamespace, config: MakeConfig) -> None:
    tiny.saint(tmp_path / "Yelp" / "raw", multilabel=True)
    dataset = load_dataset(config("yelp", tmp_path, standardize=True, standardize_over="train"))
    assert dataset.multilabel and dataset.num_classes == 3
    assert dataset.y.dtype == torch.float32 and dataset.y.shape == (tiny.nodes, 3)
    rows = dataset.x[dataset.train]
    varying = [column for column in range(rows.size(1)) if column != 2]
    torch.testing.assert_close(rows.mean(dim=0), torch.zeros(rows.size(1)), atol=1e-5, rtol=0)
    torch.testing.assert_close(rows.std(dim=0)[varying], torch.ones(len(varying)))
    # The constant column stays finite; the statistics are those of the training nodes, not of all.
    torch.testing.assert_close(dataset.x[:, 2], torch.zeros(tiny.nodes), atol=1e-6, rtol=0)
    assert dataset.x[:, varying].mean(dim=0).abs().max() > 1e-3


def test_another_dataset_in_the_folder(tmp_path: Path, tiny: SimpleNamespace, config: MakeConfig) -> None:
    tiny.saint(tmp_path / "raw")
    with pytest.raises(DatasetError, match="another dataset than yelp"):
        load_dataset(config("yelp", tmp_path))


def test_unlabelled_nodes_leave_the_split(tmp_path: Path, tiny: SimpleNamespace, config: MakeConfig) -> None:
    raw = tiny.saint(tmp_path / "Reddit2" / "raw")
    classes = {str(node): int(label) for node, label in enumerate(tiny.labels()) if node not in (0, 20)}
    (raw / "class_map.json").write_text(str(classes).replace("'", '"'))
    dataset = load_dataset(config("reddit2", tmp_path))
    assert dataset.y[0] == -1 and dataset.num_classes == 4
    assert [len(dataset.train), len(dataset.val), len(dataset.test)] == [14, 6, 8]


@pytest.mark.parametrize("folder", ["Computers/raw", "Amazon/Computers/raw"])
def test_amazon_gets_a_seeded_split(folder: str, tmp_path: Path, tiny: SimpleNamespace, config: MakeConfig) -> None:
    tiny.amazon(tmp_path / folder)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first, again, other = (load_dataset(config("amazon_computers", tmp_path, split_seed=seed)) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert [len(first.train), len(first.val), len(first.test)] == [18, 6, 6]
    assert torch.equal(first.train, again.train) and not torch.equal(first.train, other.train)
    assert torch.cat([first.train, first.val, first.test]).sort().values.tolist() == list(range(tiny.nodes))
    assert first.edge_index.size(1) == 2 * tiny.nodes


def test_root_may_be_the_folder_of_the_dataset_itself(
    tmp_path: Path, tiny: SimpleNamespace, config: MakeConfig
) -> None:
    tiny.amazon(tmp_path / "Computers" / "raw")
    assert load_dataset(config("amazon_computers", tmp_path / "Computers")).num_nodes == tiny.nodes


def test_tolokers_takes_the_first_split(tmp_path: Path, tiny: SimpleNamespace, config: MakeConfig) -> None:
    raw = tmp_path / "HeterophilousGraphDataset" / "tolokers" / "raw"
    raw.mkdir(parents=True)
    masks = np.zeros((3, 10, tiny.nodes), dtype=bool)
    for split in range(10):
        for mask, nodes in zip(masks, tiny.parts(), strict=True):
            mask[split, (np.array(nodes) + split) % tiny.nodes] = True
    np.savez(
        raw / "tolokers.npz",
        node_features=tiny.features(),
        node_labels=tiny.labels() % 2,
        edges=tiny.edges().T,
        train_masks=masks[0],
        val_masks=masks[1],
        test_masks=masks[2],
    )
    dataset = load_dataset(config("tolokers", tmp_path))
    assert (dataset.train.tolist(), dataset.val.tolist(), dataset.test.tolist()) == tiny.parts()


@pytest.mark.parametrize(
    ("name", "file", "url", "folder"),
    [
        ("flickr", "role.json", "drive.usercontent.google.com", "Flickr/raw"),
        ("reddit", "reddit_data.npz", "https://data.dgl.ai/dataset/reddit.zip", "Reddit/raw"),
        ("coauthor_cs", "ms_academic_cs.npz", "data/npz/ms_academic_cs.npz", "Coauthor/CS/raw"),
        ("pubmed", "ind.pubmed.test.index", "planetoid/raw/master/data/", "Planetoid/PubMed/raw"),
        ("tolokers", "tolokers.npz", "main/data/tolokers.npz", "HeterophilousGraphDataset/tolokers/raw"),
    ],
)
def test_missing_files_without_network(
    name: str, file: str, url: str, folder: str, tmp_path: Path, config: MakeConfig
) -> None:
    with pytest.raises(DatasetError) as caught:
        load_dataset(config(name, tmp_path))
    text = str(caught.value)
    assert "\n" not in text
    for part in (file, url, str(tmp_path / folder), "dataset.root", "Network is unreachable"):
        assert part in text
    assert list(tmp_path.iterdir()) == []


def test_file_names_agree_with_torch_geometric(tmp_path: Path) -> None:
    from iexact_runner.data import pyg

    for name, source in pyg._DATASETS.items():
        probe = source.dataset_class.__new__(source.dataset_class)
        probe.root, probe.name, probe.split = str(tmp_path), source.subset, "public"
        assert [Path(path) for path in probe.raw_paths] == [
            tmp_path / source.subset / "raw" / file for file in source.files
        ], name


@pytest.mark.parametrize("name", ["adj_full.npz", "feats.npy", "class_map.json", "role.json"])
@pytest.mark.parametrize("empty", [False, True], ids=["truncated", "empty"])
def test_damaged_raw_file(name: str, empty: bool, tmp_path: Path, tiny: SimpleNamespace, config: MakeConfig) -> None:
    raw = tiny.saint(tmp_path / "raw")
    if empty:
        (raw / name).write_bytes(b"")
    else:
        tiny.truncate(raw / name)
    with pytest.raises(DatasetError, match="delete it and copy or download it again") as caught:
        load_dataset(config("flickr", tmp_path))
    assert str(raw / name) in str(caught.value) and "\n" not in str(caught.value)
    assert caught.value.__cause__ is not None
    assert not [path for path in (tmp_path / "processed").glob("*")]


def test_damaged_processed_file(tmp_path: Path, tiny: SimpleNamespace, config: MakeConfig) -> None:
    tiny.amazon(tmp_path / "Computers" / "raw")
    load_dataset(config("amazon_computers", tmp_path))
    processed = tmp_path / "Computers" / "processed" / "data.pt"
    tiny.truncate(processed)
    with pytest.raises(DatasetError, match="delete it, and it is made again") as caught:
        load_dataset(config("amazon_computers", tmp_path))
    assert str(processed) in str(caught.value)
    processed.unlink()
    assert load_dataset(config("amazon_computers", tmp_path)).num_nodes == tiny.nodes


def test_interrupted_processing_leaves_nothing(
    tmp_path: Path, tiny: SimpleNamespace, config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.saint(tmp_path / "raw")

    def interrupted(_: object, path: str) -> None:
        Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("torch_geometric.io.fs.torch_save", interrupted)
        with pytest.raises(KeyboardInterrupt):
            load_dataset(config("flickr", tmp_path))
    assert not list((tmp_path / "processed").iterdir())
    assert load_dataset(config("flickr", tmp_path)).num_nodes == tiny.nodes


def test_interrupted_download_leaves_nothing(
    tmp_path: Path, config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def half(url: str, folder: str) -> None:
        (tmp_path / "Reddit" / "raw" / "reddit.zip").write_bytes(b"half")
        (tmp_path / "Reddit" / "raw" / "reddit_data.npz").write_bytes(b"half")
        raise ConnectionResetError("Connection reset by peer")

    monkeypatch.setattr(preflight, "connect", lambda url: None)
    monkeypatch.setattr("iexact_runner.data.pyg.download_url", half)
    with pytest.raises(DatasetError, match=r"reddit_graph\.npz, and the download failed \(Connection reset by peer\)"):
        load_dataset(config("reddit", tmp_path))
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_folder_that_cannot_be_written(tmp_path: Path, tiny: SimpleNamespace, config: MakeConfig) -> None:
    tiny.amazon(tmp_path / "Computers" / "raw")
    (tmp_path / "Computers" / "processed").write_text("in the way")
    with pytest.raises(DatasetError, match="writable") as caught:
        load_dataset(config("amazon_computers", tmp_path))
    assert "dataset.root" in str(caught.value) and "\n" not in str(caught.value)


def test_read_only_folder(
    tmp_path: Path, tiny: SimpleNamespace, config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.amazon(tmp_path / "Computers" / "raw")
    # Root may write anywhere, so the answer of the file system is simulated.
    monkeypatch.setattr(preflight.os, "access", lambda path, mode: False)
    with pytest.raises(DatasetError, match="read-only"):
        load_dataset(config("amazon_computers", tmp_path))


def test_unknown_name(tmp_path: Path, config: MakeConfig) -> None:
    with pytest.raises(ConfigError, match="dataset.name=flicker: must be one of flickr"):
        load_dataset(config("flicker", tmp_path))


def test_every_name_of_the_schema_has_a_loader() -> None:
    from iexact_runner.data import ogb, pyg

    assert {"ogb": tuple(ogb._DATASETS), "pyg": tuple(pyg._DATASETS)} == NAMES


def test_unknown_source(tmp_path: Path, config: MakeConfig) -> None:
    with pytest.raises(ConfigError, match="must be one of ogb, pyg, digits, synthetic"):
        load_dataset(config("flickr", tmp_path, "dgl"))


@pytest.mark.skipif(not (REAL_DATA / "Amazon").is_dir(), reason="the real files are not here")
def test_real_amazon_computers(tmp_path: Path, config: MakeConfig) -> None:
    shutil.copytree(REAL_DATA / "Amazon", tmp_path / "Amazon")
    dataset = load_dataset(config("amazon_computers", tmp_path))
    assert dataset.x.shape == (13_752, 767)
    assert dataset.edge_index.shape == (2, 491_722)
    assert dataset.num_classes == 10
    assert [len(dataset.train), len(dataset.val), len(dataset.test)] == [8_251, 2_750, 2_751]
