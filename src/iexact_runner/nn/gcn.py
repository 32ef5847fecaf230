"""GCN (Kipf and Welling, ICLR 2017)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from iexact_runner.config import GCNConfig
from iexact_runner.data.graph import Adjacency, gcn_adjacency
from iexact_runner.nn.block import GNN
from iexact_runner.schemes import Activation, Plain
from iexact_runner.schemes.graph_linear import GraphWeights


class GCNConv(nn.Module):
    """D^-1/2 (A + I) D^-1/2 x W + b, parameters named as in ``torch_geometric.nn.GCNConv``.

    Args:
        in_channels: D.
        out_channels: C.
        use_linear: add x W_res, a linear map of the input.
    """

    def __init__(self, in_channels: int, out_channels: int, *, use_linear: bool) -> None:
        super().__init__()
        self.lin = nn.Linear(in_channels, out_channels, bias=False)
        self.res = nn.Linear(in_channels, out_channels, bias=False) if use_linear else None
        self.bias = nn.Parameter(torch.empty(out_channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws new weights (Glorot) and sets the bias to zero."""
        nn.init.xavier_uniform_(self.lin.weight)
        if self.res is not None:
            self.res.reset_parameters()
        nn.init.zeros_(self.bias)

    def forward(self, x: Activation, graph: Adjacency, ops: Plain) -> Tensor:
        """Maps (N, D) to (N, C)."""
        own = None if self.res is None else self.res.weight
        return ops.graph_linear(x, graph, GraphWeights(self.lin.weight, self.bias, own))


class GCN(GNN):
    """Chain of :class:`GCNConv` blocks."""

    build_graph = staticmethod(gcn_adjacency)

    def make_conv(self, config: GCNConfig, in_channels: int, layer: int, out_channels: int) -> GCNConv:
        """Every layer alike."""
        return GCNConv(in_channels, out_channels, use_linear=config.use_linear)
