"""Datasets of torch_geometric, loaded by its own classes.

``dataset.root`` may be the folder that torch_geometric's class takes as its root, or the folder above it:

==================================  ======================================  ===========================================
dataset                             files under the class's root            also found under
==================================  ======================================  ===========================================
flickr, reddit, reddit2, yelp       ``raw/``                                ``Flickr/raw/``, ``Reddit/raw/``, ...
amazon_computers, amazon_photo      ``Computers/raw/``, ``Photo/raw/``      ``Amazon/Computers/raw/``, ...
coauthor_cs, coauthor_physics       ``CS/raw/``, ``Physics/raw/``           ``Coauthor/CS/raw/``, ...
cora, citeseer, pubmed              ``Cora/raw/``, ``CiteSeer/raw/``, ...   ``Planetoid/Cora/raw/``, ...
tolokers                            ``tolokers/raw/``                       ``HeterophilousGraphDataset/tolokers/raw/``
==================================  ======================================  ===========================================

Where neither is there, the second is where files are downloaded to. The class writes ``processed/`` beside ``raw/``,
so that folder must be writable on the first load.

Splits are the published ones, the first of ten for tolokers; Amazon and Coauthor publish none and are split 60/20/20.
Self-loops stay as the classes leave them: they remove them from Amazon, Coauthor and Planetoid.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from aiohttp import ClientError
from torch import Tensor
from torch_geometric import datasets
from torch_geometric.data import Data, InMemoryDataset, download_url
from torch_geometric.data.data import DataEdgeAttr, DataTensorAttr
from torch_geometric.data.storage import GlobalStorage

from iexact_runner.config import DatasetConfig
from iexact_runner.data import preflight
from iexact_runner.data.agreement import check_raw
from iexact_runner.data.dataset import NodeDataset
from iexact_runner.data.planetoid import PARTS, read_planetoid
from iexact_runner.data.prepare import prepare
from iexact_runner.data.splits import Split
from iexact_runner.errors import DatasetError, first_line

log = logging.getLogger(__name__)

_SAINT_FILES = ("adj_full.npz", "feats.npy", "class_map.json", "role.json")


@dataclass(frozen=True)
class _Source:
    """One dataset: its class, the class's ``name`` argument (also a subfolder), and its raw files."""

    dataset_class: type[Any]
    files: tuple[str, ...]
    subset: str = ""


def _planetoid(subset: str) -> _Source:
    files = tuple(f"ind.{subset.lower()}.{part}" for part in PARTS)
    return _Source(datasets.Planetoid, files, subset)


_DATASETS = {
    "flickr": _Source(datasets.Flickr, _SAINT_FILES),
    "reddit": _Source(datasets.Reddit, ("reddit_data.npz", "reddit_graph.npz")),
    "reddit2": _Source(datasets.Reddit2, _SAINT_FILES),
    "yelp": _Source(datasets.Yelp, _SAINT_FILES),
    "amazon_computers": _Source(datasets.Amazon, ("amazon_electronics_computers.npz",), "Computers"),
    "amazon_photo": _Source(datasets.Amazon, ("amazon_electronics_photo.npz",), "Photo"),
    "coauthor_cs": _Source(datasets.Coauthor, ("ms_academic_cs.npz",), "CS"),
    "coauthor_physics": _Source(datasets.Coauthor, ("ms_academic_phy.npz",), "Physics"),
    "cora": _planetoid("Cora"),
    "citeseer": _planetoid("CiteSeer"),
    "pubmed": _planetoid("PubMed"),
    "tolokers": _Source(datasets.HeterophilousGraphDataset, ("tolokers.npz",), "tolokers"),
}
_FIELDS = ("x", "y", "edge_index", "train_mask", "val_mask", "test_mask")
_MULTILABEL = ("yelp",)


def load_pyg(config: DatasetConfig) -> NodeDataset:
    """Loads one of torch_geometric's datasets with its published split, or 60/20/20 where there is none."""
    source = _DATASETS[config.name]
    root = _find_root(config, source)
    with preflight.exclusive(root / source.subset):
        data = _read(source, root, trust_pickle=config.trust_pickle)
    if isinstance(data.y, Tensor) and (data.y.dim() == 2) != (config.name in _MULTILABEL):
        raise DatasetError(f"{root} holds another dataset than {config.name}: set dataset.root to the right folder")
    return prepare(config, x=data.x, y=data.y, edge_index=data.edge_index, split=_published_split(data))


def _read(source: _Source, root: Path, *, trust_pickle: bool) -> Any:
    folder = root / source.subset
    processed = folder / "processed" / "data.pt"
    if not processed.exists():
        missing = preflight.missing_files([folder / "raw" / name for name in source.files])
        if missing:
            preflight.require_network(missing, _urls(source.dataset_class, missing))
        preflight.require_writable(processed.parent)
    guarded = type(source.dataset_class.__name__, (_Guarded, source.dataset_class), {"trust_pickle": trust_pickle})
    try:
        with preflight.quiet():
            return guarded(str(root), **({"name": source.subset} if source.subset else {}))[0]
    except DatasetError:
        raise
    except OSError as error:
        raise preflight.unwritable_error(folder, first_line(error)) from error


def _find_root(config: DatasetConfig, source: _Source) -> Path:
    root = Path(config.root).expanduser().absolute()
    family = root / source.dataset_class.__name__
    # Last, for those who name the folder of the files itself.
    for candidate in (root, family, root.parent) if root.name == source.subset else (root, family):
        folder = candidate / source.subset
        names = ["processed/data.pt", *(f"raw/{name}" for name in source.files)]
        if any(os.path.exists(folder / name) for name in names):
            return candidate
    return family


def _published_split(data: Any) -> Split | None:
    if "train_mask" not in data:
        return None
    return _indices(data.train_mask), _indices(data.val_mask), _indices(data.test_mask)


def _indices(mask: Tensor) -> Tensor:
    first = mask[:, 0] if mask.dim() == 2 else mask
    return first.nonzero().squeeze(1)


class _Guarded(InMemoryDataset):  # type: ignore[misc]  # torch_geometric has no types
    """Put before a dataset class, checks what it reads, and turns its failures into one line each."""

    trust_pickle = False

    def download(self) -> None:
        raw = _paths(self.raw_paths)
        missing = preflight.missing_files(raw)
        if os.path.exists(self.processed_paths[0]):
            return
        urls = _urls(type(self), missing)
        archives = [raw[0].with_name(Path(url).name) for url in urls if url.endswith(".zip")]
        log.info("downloading %s into %s", ", ".join(path.name for path in missing), missing[0].parent)
        try:
            with preflight.stall_limit(), preflight.removed_on_failure([*raw, *archives]):
                if archives:
                    preflight.unpack(Path(download_url(urls[0], self.raw_dir)), raw[0].parent)
                    archives[0].unlink()
                else:
                    super().download()
        except (*preflight.DOWNLOAD_ERRORS, ClientError) as error:
            raise preflight.download_error(missing, urls, error) from error

    def _process(self) -> None:
        # The class would also unpickle pre_transform.pt, to see that nothing was transformed.
        if not os.path.exists(self.processed_paths[0]):
            os.makedirs(self.processed_dir, exist_ok=True)
            self.process()

    def process(self) -> None:
        raw = _paths(self.raw_paths)
        preflight.check_files(raw)
        try:
            with preflight.removed_on_failure(_paths(self.processed_paths)):
                if isinstance(self, datasets.Planetoid) and not self.trust_pickle:
                    self.save([read_planetoid(raw)], self.processed_paths[0])
                else:
                    check_raw(raw)
                    super().process()
        except DatasetError:
            raise
        except preflight.READ_ERRORS as error:
            if preflight.cannot_write(error, raw):
                raise
            raise preflight.damaged_error(raw, error) from error

    def load(self, path: str, *args: Any) -> None:
        # The class would unpickle everything where torch refuses to.
        self.data, self.slices = _load_graph(Path(path), trust_pickle=self.trust_pickle), None


def _load_graph(path: Path, *, trust_pickle: bool) -> Data:
    with preflight.reading(path):
        if not trust_pickle:
            preflight.check_torch_file(path)
        with torch.serialization.safe_globals([DataEdgeAttr, DataTensorAttr, GlobalStorage]):
            graph = torch.load(path, weights_only=not trust_pickle)[0]
        # Older versions of torch_geometric saved the object.
        fields = graph if isinstance(graph, dict) else graph.to_dict()
        return Data(**{name: fields[name] for name in _FIELDS if name in fields})


def _urls(dataset_class: Any, missing: list[Path]) -> list[str]:
    """Where the class downloads the missing files from."""
    if hasattr(dataset_class, "adj_full_id"):
        ids = [getattr(dataset_class, f"{path.stem}_id") for path in missing]
        return [f"https://drive.usercontent.google.com/download?id={file_id}&confirm=t" for file_id in ids]
    if dataset_class.url.endswith(".zip"):
        return [dataset_class.url]
    return [f"{dataset_class.url.rstrip('/')}/{path.name}" for path in missing]


def _paths(names: list[str]) -> list[Path]:
    return [Path(name) for name in names]
