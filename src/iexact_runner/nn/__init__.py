"""The models: one definition each, whatever the compression scheme."""

from __future__ import annotations

from typing import Any

from iexact_runner.config import CompressionConfig, ModelConfig, ModuleConfig
from iexact_runner.errors import ConfigError
from iexact_runner.nn.block import GNN, Block
from iexact_runner.nn.convert import Report, compress, compressed_pass
from iexact_runner.nn.deepergcn import DeeperGCN
from iexact_runner.nn.gat import GAT
from iexact_runner.nn.gcn import GCN
from iexact_runner.nn.gcn2 import GCN2
from iexact_runner.nn.graphconv import GraphNet
from iexact_runner.nn.module import ModuleNet
from iexact_runner.nn.sage import SAGE

__all__ = [
    "GAT",
    "GCN",
    "GCN2",
    "GNN",
    "MODELS",
    "SAGE",
    "Block",
    "DeeperGCN",
    "Model",
    "Report",
    "build_model",
    "compress",
    "compressed_pass",
    "model_class_of",
]

Model = GNN | GCN2 | DeeperGCN | ModuleNet
MODELS: dict[str, type[Model]] = {
    "sage": SAGE,
    "gcn": GCN,
    "gcn2": GCN2,
    "gat": GAT,
    "graphconv": GraphNet,
    "deepergcn": DeeperGCN,
    "module": ModuleNet,
}


def model_class_of(config: ModelConfig) -> type[Model]:
    """The class of a model.

    Raises:
        ConfigError: if the name is not that of a model.
    """
    name = "module" if isinstance(config, ModuleConfig) else config.name
    if name not in MODELS:
        raise ConfigError.of("model.name", name, f"must be one of {', '.join(MODELS)}")
    return MODELS[name]


def build_model(config: ModelConfig, *, in_channels: int, out_channels: int, compression: CompressionConfig) -> Model:
    """A model with freshly drawn weights, from torch's global generator.

    Raises:
        ConfigError: if the name is not that of a model.
    """
    model_class: Any = model_class_of(config)
    model: Model = model_class(config, in_channels=in_channels, out_channels=out_channels, compression=compression)
    return model
