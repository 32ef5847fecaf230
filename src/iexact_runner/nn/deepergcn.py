"""DeeperGCN (Li et al., 2020): softmax aggregation in pre-activation residual layers."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from iexact_runner.compression.directions import Directions
from iexact_runner.config import CompressionConfig, DeeperGCNConfig
from iexact_runner.data.graph import Adjacency, sum_adjacency_with_self
from iexact_runner.nn.block import kept_factor
from iexact_runner.schemes import Activation, Plain, start_pass
from iexact_runner.schemes.activation import Kept

# Added to every message, as in torch_geometric.nn.GENConv.
EPSILON = 1e-7


class GENConv(nn.Module):
    """(x_i + sum_j softmax_j(t m_j) m_j) W + b with m = ReLU(x) + 1e-7, as ``torch_geometric.nn.GENConv``.

    The softmax is taken feature by feature over the neighbours, among which a node is itself.

    Args:
        channels: D.
        t: inverse temperature of the softmax.
        semi_grad: count the softmax as a constant in the backward pass.
    """

    def __init__(self, channels: int, *, t: float, semi_grad: bool) -> None:
        super().__init__()
        self.lin = nn.Linear(channels, channels)
        self.t = t
        self.semi_grad = semi_grad

    def reset_parameters(self) -> None:
        """Draws new weights."""
        self.lin.reset_parameters()

    def forward(self, x: Tensor, rectified: Activation, graph: Adjacency, ops: Plain) -> Tensor:
        """Maps x (N, D) and ReLU(x) to (N, D)."""
        t = torch.full((1,), self.t, device=x.device)
        gathered = ops.aggregate_softmax(rectified, t, graph, semi_grad=self.semi_grad)
        # A softmax does not see what is added to all messages, and sums to one in every row.
        return ops.linear(Activation(gathered.add_(EPSILON).add_(x), Kept()), self.lin.weight, self.lin.bias)


class DeeperGCN(nn.Module):
    """linear -> GENConv, then layers of BatchNorm -> ReLU -> dropout -> GENConv (+ input), then linear.

    Args:
        config: width, depth and rates.
        in_channels: D, width of the features.
        out_channels: number of classes.
        compression: how maps are kept while training.
    """

    build_graph = staticmethod(sum_adjacency_with_self)
    gathers_sums = False  # a softmax takes all neighbours together

    def __init__(
        self, config: DeeperGCNConfig, *, in_channels: int, out_channels: int, compression: CompressionConfig
    ) -> None:
        super().__init__()
        hidden, layers = config.hidden_channels, range(config.num_layers)
        self.lin_in = nn.Linear(in_channels, hidden)
        self.convs = nn.ModuleList(GENConv(hidden, t=config.t, semi_grad=config.semi_grad) for _ in layers)
        self.norms = nn.ModuleList(nn.BatchNorm1d(hidden) for _ in layers if config.batch_norm)
        self.lin_out = nn.Linear(hidden, out_channels)
        self.input_dropout = config.input_dropout
        self.dropout = config.dropout
        self.factor = kept_factor(config, config.dropout)
        self.input_factor = kept_factor(config, config.input_dropout)
        self.residual = config.residual
        self.compression = compression
        # Of the low-rank scheme: what it finds in one pass and uses in the next ones.
        self.directions: list[Directions] = []

    def reset_parameters(self) -> None:
        """Draws new weights and forgets the running statistics."""
        for part in (self.lin_in, *self.convs, *self.norms, self.lin_out):
            part.reset_parameters()

    def forward(
        self, features: Tensor, graph: Adjacency, *, seed: int | Tensor = 0, map_seed: int | Tensor | None = None
    ) -> Tensor:
        """Maps features (N, D) to scores (N, classes); ``seed`` is that of this training step."""
        ops = start_pass(
            self.compression, training=self.training, seed=seed, map_seed=map_seed, directions=self.directions
        )
        norms: list[Any] = list(self.norms) or [None] * len(self.convs)

        def activate(h: Tensor, norm: nn.BatchNorm1d | None, dropout: float, *, owned: bool = False) -> Activation:
            return ops.finish(lambda: h, norm=norm, residual=None, dropout=dropout, owned=owned)

        x = ops.scaled(ops.input(features, dropout=self.input_dropout), self.input_factor)
        h = ops.linear(x, self.lin_in.weight, self.lin_in.bias)
        h = self.convs[0](h, activate(h, None, 0.0), graph, ops)

        def layer(h: Activation, *, norm: nn.BatchNorm1d | None, conv: nn.Module) -> Tensor:
            x = ops.scaled(activate(h.value, norm, self.dropout), self.factor)
            out: Tensor = conv(x.value, x, graph, ops)
            return out.add_(h.value) if self.residual else out

        for norm, conv in zip(norms, self.convs[1:], strict=False):
            h = ops.block(partial(layer, norm=norm, conv=conv), Activation(h, Kept()))
        x = ops.scaled(activate(h, norms[-1], self.dropout, owned=True), self.factor)
        return ops.linear(x, self.lin_out.weight, self.lin_out.bias)
