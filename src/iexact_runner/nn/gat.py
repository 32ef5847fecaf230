"""Graph attention network (Velickovic et al., ICLR 2018)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch_geometric.nn.inits import glorot

from iexact_runner.config import CompressionConfig, GATConfig
from iexact_runner.data.graph import attention_edges
from iexact_runner.data.sparse import CSR
from iexact_runner.nn.block import GNN
from iexact_runner.schemes import Activation, Plain
from iexact_runner.schemes.aggregation import with_halo

NEGATIVE_SLOPE = 0.2


class GATConv(nn.Module):
    """sum_j alpha_ij W x_j + b (+ W_res x_i), alpha = softmax_j LeakyReLU(a_src . W x_j + a_dst . W x_i).

    Parameters are named as in ``torch_geometric.nn.GATConv``; heads are concatenated.

    Args:
        in_channels: D.
        out_channels: C, features a head.
        heads: H.
        shared_attention: score both ends of an edge with ``att_src``; there is no ``att_dst`` then.
        residual: add a linear map of the layer's input.
        attention_dropout: rate on alpha.
        initial_weights: as in :class:`~iexact_runner.config.GATConfig`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        heads: int,
        shared_attention: bool,
        residual: bool,
        attention_dropout: float,
        initial_weights: str,
    ) -> None:
        super().__init__()
        self.heads = heads
        self.attention_dropout = attention_dropout
        self.draw: Callable[[Tensor | None], Any] = xavier_normal if initial_weights == "xavier_normal" else glorot
        self.lin = nn.Linear(in_channels, heads * out_channels, bias=False)
        self.att_src = nn.Parameter(torch.empty(1, heads, out_channels))
        self.att_dst = None if shared_attention else nn.Parameter(torch.empty(1, heads, out_channels))
        self.res = nn.Linear(in_channels, heads * out_channels, bias=False) if residual else None
        self.bias = nn.Parameter(torch.empty(heads * out_channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws new weights and sets the bias to zero."""
        for weight in (self.lin.weight, self.att_src, self.att_dst, None if self.res is None else self.res.weight):
            self.draw(weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Activation, graph: CSR, ops: Plain) -> Tensor:
        """Maps (N, D) to (N, H * C)."""
        h = ops.linear(x if self.res is None else x.shared(), self.lin.weight)  # [N, H C]
        nodes, whole = h.size(0), with_halo(h, graph)
        alone = whole is h  # rows of other processes are no product of what is kept here
        del h
        out = ops.attention(
            whole,
            self.att_src,
            self.att_dst,
            graph,
            negative_slope=NEGATIVE_SLOPE,
            dropout=self.attention_dropout if self.training else 0.0,
            product=(x, self.lin.weight) if alone else None,
            overwrite=True,
        )
        out = out if alone else out[:nodes]
        if self.res is not None:
            return ops.linear(x, self.res.weight, self.bias).add_(out)
        # Under autocast the sum has the bias' precision.
        return out.add_(self.bias) if out.dtype == self.bias.dtype else out + self.bias


def xavier_normal(weight: Tensor | None) -> None:
    """Draws a weight as DGL's GATConv does, whose gain is that of ReLU."""
    if weight is not None:
        nn.init.xavier_normal_(weight, gain=nn.init.calculate_gain("relu"))


class GAT(GNN):
    """Chain of :class:`GATConv` blocks; the last has one head. Residuals are inside the convolutions.

    Edges are dropped once a forward pass, the same for all layers.
    """

    build_graph = staticmethod(attention_edges)
    residual_in_conv = True
    gathers_sums = False  # a softmax takes all neighbours together

    def __init__(
        self, config: GATConfig, *, in_channels: int, out_channels: int, compression: CompressionConfig
    ) -> None:
        super().__init__(config, in_channels=in_channels, out_channels=out_channels, compression=compression)
        self.edge_dropout = config.edge_dropout
        self.exact_edge_dropout = config.exact_edge_dropout

    def hidden_width(self, config: GATConfig) -> int:
        """All heads side by side."""
        return config.heads * config.hidden_channels

    def make_conv(self, config: GATConfig, in_channels: int, layer: int, out_channels: int) -> GATConv:
        """One head in the last layer, ``heads`` in the others."""
        heads = 1 if layer == config.num_layers - 1 else config.heads
        return GATConv(
            in_channels,
            out_channels,
            heads=heads,
            shared_attention=config.shared_attention,
            residual=config.residual,
            attention_dropout=config.attention_dropout,
            initial_weights=config.initial_weights,
        )

    def prepare_graph(self, graph: CSR, ops: Plain) -> CSR:
        """Edge dropout, once for all layers."""
        return ops.drop_edges(graph, self.edge_dropout, exactly=self.exact_edge_dropout)
