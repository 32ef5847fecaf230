"""GCNII (Chen et al., ICML 2020)."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from iexact_runner.compression.directions import Directions
from iexact_runner.config import CompressionConfig, GCN2Config
from iexact_runner.data.graph import Adjacency, gcn_adjacency
from iexact_runner.data.partitioned import begin_pass
from iexact_runner.nn.block import Block, Layer, kept_factor
from iexact_runner.schemes import Activation, Plain, start_pass
from iexact_runner.schemes.activation import Kept
from iexact_runner.schemes.graph_linear import GraphWeights, Mix

# What follows the first linear map, before ReLU.
NOTHING: dict[str, Any] = dict(norm=None, residual=None, dropout=0.0)


class GCN2Conv(nn.Module):
    """(1 - beta) s + beta s W, with s = (1 - alpha) A x + alpha x_0, named as in ``torch_geometric.nn.GCN2Conv``.

    With separate weights, each part of s has its own W. beta = log(theta / layer + 1), or 1 without theta.

    Args:
        channels: D.
        alpha: strength of the initial residual.
        theta: strength of the identity mapping; None for none.
        layer: layer number, from 1.
        shared_weights: one weight for both parts.
    """

    def __init__(self, channels: int, *, alpha: float, theta: float | None, layer: int, shared_weights: bool) -> None:
        super().__init__()
        self.alpha = alpha
        self.beta = 1.0 if theta is None else math.log(theta / layer + 1)
        self.weight1 = nn.Parameter(torch.empty(channels, channels))
        self.weight2 = None if shared_weights else nn.Parameter(torch.empty(channels, channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws new weights (Glorot)."""
        nn.init.xavier_uniform_(self.weight1)
        if self.weight2 is not None:
            nn.init.xavier_uniform_(self.weight2)

    def forward(self, x: Activation, graph: Adjacency, ops: Plain, initial: Activation) -> Tensor:
        """Maps (N, D) to (N, D)."""
        if ops.transform_first:
            # A x M = A (x M): one product for both parts of the mix, and x is all that is kept.
            own = self.weight1 if self.weight2 is None else self.weight2
            mixes = (self._mix_of(1 - self.alpha), self._mix_of(self.alpha))
            return ops.graph_linear(x, graph, GraphWeights(self.weight1.t(), None, own.t(), mixes), own=initial)
        propagated = ops.aggregate(x.value, graph).mul_(1 - self.alpha)
        if self.weight2 is None:
            return self._mix(Activation(propagated.add(initial.value, alpha=self.alpha), Kept()), self.weight1, ops)
        out = self._mix(Activation(propagated, Kept()), self.weight1, ops)
        del propagated  # one map less beside the next product
        # alpha (x_0 W), not (alpha x_0) W: all layers then share the one kept map of x_0.
        return out.add_(self._mix(initial, self.weight2, ops), alpha=self.alpha)

    def _mix_of(self, share: float) -> Mix:
        """A share of beta W + (1 - beta) I."""
        return Mix(share * self.beta, share * (1 - self.beta))

    def _mix(self, h: Activation, weight: Tensor, ops: Plain) -> Tensor:
        product = ops.linear(h, weight.t())
        return product if self.beta == 1.0 else product.mul_(self.beta).add_(h.value, alpha=1 - self.beta)


class GCN2(nn.Module):
    """linear -> ReLU -> dropout, then blocks of :class:`GCN2Conv`, then linear.

    Args:
        config: widths, depth and rates.
        in_channels: D, width of the features.
        out_channels: number of classes.
        compression: how maps are kept while training.
    """

    build_graph = staticmethod(gcn_adjacency)
    gathers_sums = True

    def __init__(
        self, config: GCN2Config, *, in_channels: int, out_channels: int, compression: CompressionConfig
    ) -> None:
        super().__init__()
        hidden = config.hidden_channels
        self.lin_in = nn.Linear(in_channels, hidden)
        self.blocks = nn.ModuleList(
            Block(
                GCN2Conv(
                    hidden,
                    alpha=config.alpha,
                    theta=config.theta,
                    layer=layer,
                    shared_weights=config.shared_weights,
                ),
                channels=hidden,
                batch_norm=config.batch_norm,
                residual=config.residual,
                dropout=config.dropout,
                factor=kept_factor(config, config.dropout),
            )
            for layer in range(1, config.num_layers + 1)
        )
        self.lin_out = nn.Linear(hidden, out_channels)
        self.input_dropout = config.input_dropout
        self.dropout = config.dropout
        self.factor = kept_factor(config, config.dropout)
        self.input_factor = kept_factor(config, config.input_dropout)
        self.compression = compression
        # Of the low-rank scheme: what it finds in one pass and uses in the next ones.
        self.directions: list[Directions] = []

    def reset_parameters(self) -> None:
        """Draws new weights and forgets the running statistics."""
        for part in (self.lin_in, *self.blocks, self.lin_out):
            part.reset_parameters()

    def layers(self) -> tuple[Layer, list[Layer]]:
        """What makes the first map, which all layers read, and the layers."""

        def first(x: Activation, graph: Adjacency, ops: Plain) -> Activation:
            return ops.finish(partial(ops.linear, x, self.lin_in.weight, self.lin_in.bias), **NOTHING)

        def last(x: Activation, graph: Adjacency, ops: Plain, initial: Activation) -> Tensor:
            return ops.linear(x, self.lin_out.weight, self.lin_out.bias)

        return first, [*self.blocks, last]

    def forward(
        self, features: Tensor, graph: Adjacency, *, seed: int | Tensor = 0, map_seed: int | Tensor | None = None
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
        x = ops.scaled(ops.input(features, dropout=self.input_dropout), self.input_factor)
        h = [ops.linear(x, self.lin_in.weight, self.lin_in.bias)]
        del x  # the features, if dropout made a map of them
        initial = ops.finish(h.pop, **NOTHING).shared()
        x = ops.scaled(ops.drop(initial, self.dropout), self.factor)
        for block in self.blocks:
            x = ops.block(lambda x, initial, block=block: block(x, graph, ops, initial), x, initial)
        return ops.linear(x, self.lin_out.weight, self.lin_out.bias)
