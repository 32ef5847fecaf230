"""Fields of the models."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from iexact_runner.config.checks import check, check_at_least, check_choice, check_probability

INITIAL_WEIGHTS = ("glorot", "xavier_normal")


@dataclass
class ModelConfig:
    """Fields that every model has.

    Args:
        name: which model; ``model=NAME`` chooses it with the fields it needs.
        num_layers: number of convolutions.
        hidden_channels: width of the maps between them, a head for GAT.
        dropout: rate after each activation.
        input_dropout: rate on the features; they are then a map that is kept.
        batch_norm: whether BatchNorm follows a hidden layer's convolution.
        residual: whether a layer's input is added where the widths agree.
        dropout2: scale what dropout keeps by 1 - rate, in training and in evaluation: dropout as first published,
            without the factor 1 / (1 - rate) in training.
    """

    name: str = MISSING
    num_layers: int = 3
    hidden_channels: int = 128
    dropout: float = 0.5
    input_dropout: float = 0.0
    batch_norm: bool = True
    residual: bool = False
    dropout2: bool = False

    def __post_init__(self) -> None:
        check_at_least("model.num_layers", self.num_layers, 1)
        check_at_least("model.hidden_channels", self.hidden_channels, 1)
        check_probability("model.dropout", self.dropout)
        check_probability("model.input_dropout", self.input_dropout)


@dataclass
class SAGEConfig(ModelConfig):
    """GraphSAGE with mean aggregation.

    Args:
        use_linear: add a linear map of a layer's input to its convolution.
    """

    use_linear: bool = False


@dataclass
class GCNConfig(ModelConfig):
    """GCN with self-loops and symmetric normalisation.

    Args:
        use_linear: add a linear map of a layer's input to its convolution.
    """

    use_linear: bool = False


@dataclass
class GraphConvConfig(ModelConfig):
    """GraphConv with sums over the neighbours."""


@dataclass
class DeeperGCNConfig(ModelConfig):
    """DeeperGCN: softmax aggregation (GENConv) in pre-activation residual layers.

    Args:
        residual: whether a layer's input is added to what it gives.
        t: inverse temperature of the softmax over the neighbours; 0 is their mean.
        semi_grad: whether the softmax counts as a constant in the backward pass.
    """

    residual: bool = True
    t: float = 0.1
    semi_grad: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check(math.isfinite(self.t), "model.t", self.t, "must be finite")


@dataclass
class GCN2Config(ModelConfig):
    """GCNII: initial residual and identity mapping.

    Args:
        alpha: share of the first map in the input of every layer.
        theta: the weights of a layer count log(theta / layer + 1), the identity the rest; null is no identity.
        shared_weights: whether the first map has the weights of the layer, instead of its own.
    """

    alpha: float = 0.1
    theta: float | None = 0.5
    shared_weights: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check(0.0 <= self.alpha <= 1.0, "model.alpha", self.alpha, "must be between 0 and 1")
        check(self.theta is None or self.theta > 0, "model.theta", self.theta, "must be above 0, or null for none")


@dataclass
class GATConfig(ModelConfig):
    """GAT.

    Args:
        heads: attention heads of all layers but the last, which has one.
        shared_attention: score both ends of an edge with one vector instead of two.
        attention_dropout: rate on the attention coefficients of every layer.
        edge_dropout: share of the edges that a training pass leaves out, the same for all layers.
        exact_edge_dropout: leave out exactly floor(``edge_dropout`` E) of E edges, self-loops among them, as the
            published code does; else each proper edge by its own draw, and no self-loop.
        initial_weights: ``glorot`` is uniform; ``xavier_normal`` that of the published code, with a gain of sqrt(2).
        label_input: feed training labels as features; the loss counts only nodes whose label was not fed.
        label_mask_rate: share of the training labels that are fed as input; the loss is that of the others.
    """

    heads: int = 3
    shared_attention: bool = False
    attention_dropout: float = 0.0
    edge_dropout: float = 0.0
    exact_edge_dropout: bool = False
    initial_weights: str = "glorot"
    label_input: bool = False
    label_mask_rate: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least("model.heads", self.heads, 1)
        check_probability("model.attention_dropout", self.attention_dropout)
        check_probability("model.edge_dropout", self.edge_dropout)
        check_choice("model.initial_weights", self.initial_weights, INITIAL_WEIGHTS)
        rate = self.label_mask_rate
        check(0.0 < rate < 1.0, "model.label_mask_rate", rate, "must be above 0 and below 1")


@dataclass
class ModuleConfig(ModelConfig):
    """A model of one's own, compressed by ``iexact_runner.compress``.

    Its class is called with the widths of the features and of the scores, with ``hidden_channels``, ``num_layers`` and
    ``dropout`` where it has parameters of these names, and with ``kwargs``; the other fields are not for it.

    Args:
        target: ``package.module:Class``, an ``nn.Module`` whose ``forward(x, edge_index)`` returns scores (N, classes);
            for the command line only, for it is imported.
        kwargs: further arguments of the class.
    """

    target: str = MISSING
    kwargs: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        module, _, name = self.target.partition(":")
        parts = [*module.split("."), *name.split(".")]
        check(all(part.isidentifier() for part in parts), "model.target", self.target, "must be package.module:Class")
        if self.name == "module":  # so that tables tell two models apart
            self.name = f"module_{name.split('.')[-1]}"


MODEL_CONFIGS: dict[str, type[ModelConfig]] = {
    "sage": SAGEConfig,
    "gcn": GCNConfig,
    "gcn2": GCN2Config,
    "gat": GATConfig,
    "graphconv": GraphConvConfig,
    "deepergcn": DeeperGCNConfig,
    "module": ModuleConfig,
}


def model_config(name: str) -> type[ModelConfig] | None:
    """The class of the fields that a model has; None if there is no such model."""
    return ModuleConfig if name.startswith("module_") else MODEL_CONFIGS.get(name)
