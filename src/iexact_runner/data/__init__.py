"""Datasets: :func:`load_dataset` is the one entry point; one module a source does the work."""

from __future__ import annotations

from iexact_runner.config import DatasetConfig, DigitsConfig, FileConfig, SyntheticConfig
from iexact_runner.data.dataset import NodeDataset
from iexact_runner.errors import ConfigError


def load_dataset(config: DatasetConfig) -> NodeDataset:
    """Loads the dataset that ``config.source`` and ``config.name`` describe.

    Each loader is imported only when asked for: torch_geometric, ogb and scikit-learn take seconds to import.

    Raises:
        ConfigError: if a field is not valid.
        DatasetError: if files are missing or damaged.
    """
    if config.source == "ogb":
        from iexact_runner.data.ogb import load_ogb

        return load_ogb(config)
    if config.source == "pyg":
        from iexact_runner.data.pyg import load_pyg

        return load_pyg(config)
    if config.source == "digits" and isinstance(config, DigitsConfig):
        from iexact_runner.data.digits import load_digits_graph

        return load_digits_graph(config)
    if config.source == "synthetic" and isinstance(config, SyntheticConfig):
        from iexact_runner.data.synthetic import generate

        return generate(config)
    if config.source == "file" and isinstance(config, FileConfig):
        from iexact_runner.data.file import load_file

        return load_file(config)
    raise ConfigError.of("dataset.source", config.source, "choose one with dataset=NAME")


__all__ = ["NodeDataset", "load_dataset"]
