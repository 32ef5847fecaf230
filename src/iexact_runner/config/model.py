"""Fields of the models."""

from __future__ import annotations

from dataclasses import dataclass

from omegaconf import MISSING

from iexact_runner.config.checks import check, check_at_least, check_probability


@dataclass
class ModelConfig:
    """Fields that every model has."""

    name: str = MISSING
    num_layers: int = 3
    hidden_channels: int = 128
    dropout: float = 0.5
    input_dropout: float = 0.0
    batch_norm: bool = True
    residual: bool = False

    def __post_init__(self) -> None:
        check_at_least("model.num_layers", self.num_layers, 1)
        check_at_least("model.hidden_channels", self.hidden_channels, 1)
        check_probability("model.dropout", self.dropout)
        check_probability("model.input_dropout", self.input_dropout)


@dataclass
class SAGEConfig(ModelConfig):
    """GraphSAGE with mean aggregation."""


@dataclass
class GCNConfig(ModelConfig):
    """GCN with self-loops and symmetric normalisation."""


@dataclass
class GCN2Config(ModelConfig):
    """GCNII: initial residual ``alpha`` and identity mapping ``log(theta / layer + 1)`` (null: no identity mapping)."""

    alpha: float = 0.1
    theta: float | None = 0.5
    shared_weights: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check(0.0 <= self.alpha <= 1.0, "model.alpha", self.alpha, "must be between 0 and 1")
        check(self.theta is None or self.theta > 0, "model.theta", self.theta, "must be above 0, or null for none")


@dataclass
class GATConfig(ModelConfig):
    """GAT; ``shared_attention`` scores both ends of an edge with one vector; ``label_input`` feeds training labels."""

    heads: int = 3
    shared_attention: bool = False
    edge_dropout: float = 0.0
    label_input: bool = False
    label_mask_rate: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least("model.heads", self.heads, 1)
        check_probability("model.edge_dropout", self.edge_dropout)
        rate = self.label_mask_rate
        check(0.0 < rate < 1.0, "model.label_mask_rate", rate, "must be above 0 and below 1")


MODEL_CONFIGS = {"sage": SAGEConfig, "gcn": GCNConfig, "gcn2": GCN2Config, "gat": GATConfig}
