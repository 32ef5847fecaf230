"""Open Graph Benchmark: arxiv and products, through ogb's own ``PygNodePropPredDataset``.

Files lie where ogb puts them, in ``<dataset.root>/ogbn_arxiv`` or ``ogbn_products`` (or the same with ``_pyg`` behind);
``dataset.root`` may also name that folder itself. It holds ``raw/*.csv.gz`` and ``split/<kind>/*.csv.gz``;
ogb adds ``processed/``, so the folder must be writable on the first load.

ogb asks questions on the terminal, about large downloads and about folders without its release file. Neither can come
up here: missing files are downloaded before ogb looks, and a complete folder gets the release file it lacks.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from pathlib import Path

import torch

from iexact_runner.config import DatasetConfig
from iexact_runner.data import preflight
from iexact_runner.data.agreement import check_raw
from iexact_runner.data.dataset import NodeDataset
from iexact_runner.data.prepare import prepare
from iexact_runner.errors import DatasetError, first_line

log = logging.getLogger(__name__)

# Short name -> folder of the split inside split/, and raw files past those that every dataset has.
_DATASETS = {"arxiv": ("time", ("node_year.csv.gz",)), "products": ("sales_ranking", ())}
_RAW = ("edge.csv.gz", "node-feat.csv.gz", "node-label.csv.gz", "num-node-list.csv.gz", "num-edge-list.csv.gz")
_SPLIT = ("train.csv.gz", "valid.csv.gz", "test.csv.gz")
_URL = "http://snap.stanford.edu/ogb/data/nodeproppred/{}.zip"
_RELEASE = "RELEASE_v1.txt"


def load_ogb(config: DatasetConfig) -> NodeDataset:
    """Loads ``arxiv`` or ``products`` with its published split."""
    folder = _find_folder(config)
    with preflight.exclusive(folder):
        return _load(config, folder)


def _load(config: DatasetConfig, folder: Path) -> NodeDataset:
    files = _required_files(config.name, folder)
    missing = preflight.missing_files(files)
    if missing:
        _download(config.name, folder, missing)
    processed = folder / "processed" / "geometric_data_processed.pt"
    if not processed.exists():
        preflight.require_writable(processed.parent)
    release = folder / _RELEASE
    if not release.exists():
        try:
            release.touch()
        except OSError as error:
            raise preflight.unwritable_error(folder, first_line(error)) from error
    return _read(config, folder, files, processed)


def _read(config: DatasetConfig, folder: Path, files: list[Path], processed: Path) -> NodeDataset:
    # Importing ogb starts a thread that looks for a newer version; it has no switch, so it is imported this late.
    from ogb.nodeproppred import PygNodePropPredDataset
    from torch_geometric.data.data import DataEdgeAttr, DataTensorAttr
    from torch_geometric.data.storage import GlobalStorage

    class Guarded(PygNodePropPredDataset):  # type: ignore[misc]  # ogb has no types
        """Does not unpickle ``pre_transform.pt``, which says that nothing was transformed."""

        def _process(self) -> None:
            if not processed.exists():
                processed.parent.mkdir(exist_ok=True)
                self.process()

    splits = [file for file in files if file.parent.name != "raw"]
    # ogb prefers this one.
    splits = [path for path in [splits[0].with_name("split_dict.pt")] if path.exists()] or splits
    reading = [processed] if processed.exists() else files
    if not config.trust_pickle:
        preflight.check_files([*reading, *splits])
        if reading is files:
            check_raw(files)
    try:
        with (
            preflight.quiet(),
            preflight.removed_on_failure([processed]),
            # ogb loads its own file without saying weights_only: these are the classes that file is made of.
            torch.serialization.safe_globals([DataEdgeAttr, DataTensorAttr, GlobalStorage]),
            preflight.unpickling(config.trust_pickle),
        ):
            dataset = Guarded(f"ogbn-{config.name}", root=str(folder.parent))
            data = dataset[0]
            reading = splits
            split = dataset.get_idx_split()
            split = tuple(split[part] for part in ("train", "valid", "test"))
            x, y, edge_index = data.x, data.y, data.edge_index
    except preflight.READ_ERRORS as error:
        if preflight.cannot_write(error, [processed, *files]):
            raise preflight.unwritable_error(processed.parent, first_line(error)) from error
        raise preflight.damaged_error(reading, error) from error
    return prepare(
        config,
        x=x,
        y=y,
        edge_index=edge_index,
        split=split,
        num_classes=dataset.num_classes,
    )


def _find_folder(config: DatasetConfig) -> Path:
    root = Path(config.root).expanduser().absolute()
    plain, suffixed = f"ogbn_{config.name}", f"ogbn_{config.name}_pyg"
    if root.name in (plain, suffixed) and os.path.isdir(root / "raw"):
        return root
    # ogb prefers the folder with the suffix.
    return root / suffixed if os.path.exists(root / suffixed) else root / plain


def _required_files(name: str, folder: Path) -> list[Path]:
    split, extra = _DATASETS[name]
    return [folder / "raw" / file for file in (*_RAW, *extra)] + [folder / "split" / split / file for file in _SPLIT]


def _download(name: str, folder: Path, missing: list[Path]) -> None:
    """Fetches ogb's archive and moves in what is missing; files that are there already stay."""
    url = _URL.format(name)
    preflight.require_network(missing, [url])
    from ogb.utils.url import download_url

    preflight.require_writable(folder)
    log.info("downloading %s into %s", url, folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (
            preflight.stall_limit(),
            preflight.quiet(),
            tempfile.TemporaryDirectory(dir=folder, prefix=".download-") as scratch,
        ):
            preflight.unpack(Path(download_url(url, scratch)), Path(scratch))
            unpacked = Path(scratch, name)
            for source in sorted(path for path in unpacked.rglob("*") if path.is_file()):
                target = folder / source.relative_to(unpacked)
                if not target.exists():
                    target.parent.mkdir(parents=True, exist_ok=True)
                    shutil.move(source, target)
    except preflight.DOWNLOAD_ERRORS as error:
        raise preflight.download_error(missing, [url], error) from error
    still_missing = preflight.missing_files(missing)
    if still_missing:
        raise preflight.download_error(still_missing, [url], DatasetError("the archive lacks them"))
