"""The seam between networks and compression: a model is a chain of blocks, and knows nothing of how maps are kept."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

from iexact_runner.compression.directions import Directions
from iexact_runner.config import CompressionConfig, ModelConfig
from iexact_runner.data.graph import Graph
from iexact_runner.data.partitioned import begin_pass
from iexact_runner.schemes import Activation, Plain, start_pass

# What maps an activation, called as ``layer(x, graph, ops)``, or with a first activation at the end.
Layer = Callable[..., Any]


class Block(nn.Module):
    """conv -> BatchNorm -> (+ input) -> ReLU -> dropout.

    Args:
        conv: module called as ``conv(x, graph, ops)``, or ``conv(x, graph, ops, initial)`` if it has a first map.
        channels: width of the convolution's output.
        batch_norm: whether to normalise.
        residual: whether to add the block's input where the widths agree.
        dropout: rate after the activation.
        factor: what is multiplied with at the end.
    """

    def __init__(
        self,
        conv: nn.Module,
        *,
        channels: int,
        batch_norm: bool,
        residual: bool,
        dropout: float,
        factor: float = 1.0,
    ) -> None:
        super().__init__()
        self.conv = conv
        self.channels = channels
        self.norm = nn.BatchNorm1d(channels) if batch_norm else None
        self.residual = residual
        self.dropout = dropout
        self.factor = factor

    def reset_parameters(self) -> None:
        """Draws new weights and forgets the running statistics."""
        for part in (self.conv, self.norm):
            if part is not None:
                part.reset_parameters()  # type: ignore[operator]

    def forward(self, x: Activation, graph: Graph, ops: Plain, initial: Activation | None = None) -> Activation:
        """Maps (N, D) to (N, channels)."""
        residual = x.value if self.residual and x.value.size(1) == self.channels else None
        x = x if residual is None else x.shared()
        convolve = partial(self.conv, x, graph, ops, *([] if initial is None else [initial]))
        out = ops.finish(convolve, norm=self.norm, residual=residual, dropout=self.dropout)
        return ops.scaled(out, self.factor)


def kept_factor(config: ModelConfig, rate: float) -> float:
    """What a model multiplies with after a dropout."""
    return 1.0 - rate if config.dropout2 else 1.0


class GNN(nn.Module, ABC):
    """A chain of blocks of one kind of convolution; the last convolution stands alone as the head.

    Args:
        config: widths, depth and rates.
        in_channels: D, width of the features.
        out_channels: number of classes.
        compression: how maps are kept while training.
    """

    # How the edges (2, E) of N nodes become what the convolutions apply; each model names its own.
    build_graph: Callable[[Any, int], Graph]
    # Whether the convolution adds its own (linear) residual, so that the block must not.
    residual_in_conv = False
    # Whether what a node gathers is a weighted sum of its neighbours, which a sample of them can estimate.
    gathers_sums = True

    def __init__(
        self, config: ModelConfig, *, in_channels: int, out_channels: int, compression: CompressionConfig
    ) -> None:
        super().__init__()
        hidden = self.hidden_width(config)
        widths = [in_channels, *[hidden] * (config.num_layers - 1)]
        self.blocks = nn.ModuleList(
            Block(
                self.make_conv(config, width, index, config.hidden_channels),
                channels=hidden,
                batch_norm=config.batch_norm,
                residual=config.residual and not self.residual_in_conv,
                dropout=config.dropout,
                factor=kept_factor(config, config.dropout),
            )
            for index, width in enumerate(widths[:-1])
        )
        self.head = self.make_conv(config, widths[-1], config.num_layers - 1, out_channels)
        self.input_dropout = config.input_dropout
        self.input_factor = kept_factor(config, config.input_dropout)
        self.compression = compression
        # Of the low-rank scheme: what it finds in one pass and uses in the next ones.
        self.directions: list[Directions] = []

    def hidden_width(self, config: Any) -> int:
        """Width of the maps between blocks."""
        width: int = config.hidden_channels
        return width

    @abstractmethod
    def make_conv(self, config: Any, in_channels: int, layer: int, out_channels: int) -> nn.Module:
        """The convolution of one layer, counted from 0; the last is layer ``num_layers - 1``."""

    def reset_parameters(self) -> None:
        """Draws new weights and forgets the running statistics."""
        for part in (*self.blocks, self.head):
            part.reset_parameters()

    def prepare_graph(self, graph: Any, ops: Plain) -> Graph:
        """What a model does to the graph once a forward pass; nothing by default."""
        prepared: Graph = graph
        return prepared

    def layers(self) -> tuple[Layer | None, list[Layer]]:
        """What makes a first map that all layers read, if there is such a map, and the layers."""
        return None, [*self.blocks, self.head]

    def forward(
        self, features: Tensor, graph: Graph, *, seed: int | Tensor = 0, map_seed: int | Tensor | None = None
    ) -> Tensor:
        """Maps features (N, D) to scores (N, classes); ``seed`` is that of this training step."""
        ops = start_pass(
            self.compression,
            training=self.training,
            seed=seed,
            map_seed=map_seed,
            directions=self.directions,
            shard=begin_pass(graph, seed if map_seed is None else map_seed),
        )
        graph = self.prepare_graph(graph, ops)
        x = ops.scaled(ops.input(features, dropout=self.input_dropout), self.input_factor)
        for block in self.blocks:
            x = ops.block(partial(block, graph=graph, ops=ops), x)
        scores: Tensor = self.head(x, graph, ops)
        return scores
