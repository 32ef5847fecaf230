"""GraphConv, the k-GNN of k = 1: sums over neighbours with a weight of their own (Morris et al., AAAI 2019)."""

from __future__ import annotations

from torch import Tensor, nn

from iexact_runner.config import GraphConvConfig
from iexact_runner.data.graph import Adjacency, sum_adjacency
from iexact_runner.nn.block import GNN
from iexact_runner.nn.sage import neighbors_and_self
from iexact_runner.schemes import Activation, Plain


class GraphConv(nn.Module):
    """x_i W_root + sum_{j in N(i)} x_j W_rel + b, parameters named as in ``torch_geometric.nn.GraphConv``.

    Args:
        in_channels: D.
        out_channels: C.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.lin_rel = nn.Linear(in_channels, out_channels)
        self.lin_root = nn.Linear(in_channels, out_channels, bias=False)

    def reset_parameters(self) -> None:
        """Draws new weights."""
        self.lin_rel.reset_parameters()
        self.lin_root.reset_parameters()

    def forward(self, x: Activation, graph: Adjacency, ops: Plain) -> Tensor:
        """Maps (N, D) to (N, C)."""
        return neighbors_and_self(x, graph, ops, neighbors=self.lin_rel, own=self.lin_root.weight)


class GraphNet(GNN):
    """Chain of :class:`GraphConv` blocks."""

    build_graph = staticmethod(sum_adjacency)

    def make_conv(self, config: GraphConvConfig, in_channels: int, layer: int, out_channels: int) -> GraphConv:
        """Every layer alike."""
        return GraphConv(in_channels, out_channels)
