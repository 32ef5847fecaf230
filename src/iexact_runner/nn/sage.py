"""GraphSAGE with mean aggregation (Hamilton et al., NeurIPS 2017)."""

from __future__ import annotations

from torch import Tensor, nn

from iexact_runner.config import SAGEConfig
from iexact_runner.data.graph import Adjacency, mean_adjacency
from iexact_runner.nn.block import GNN
from iexact_runner.schemes import Activation, Plain
from iexact_runner.schemes.activation import Kept
from iexact_runner.schemes.graph_linear import GraphWeights


def neighbors_and_self(x: Activation, graph: Adjacency, ops: Plain, *, neighbors: nn.Linear, own: Tensor) -> Tensor:
    """A x W_neighbors + b + x W_own: maps (N, D) to (N, C)."""
    if ops.transform_first:
        # (A x) W = A (x W): both products then share the one kept map of x.
        return ops.graph_linear(x, graph, GraphWeights(neighbors.weight, neighbors.bias, own))
    known = graph.product_of(x.value)
    if known is None:
        aggregated = Activation(ops.aggregate(x.value, graph), Kept(), owned=True)
    else:
        aggregated = Activation(known, Kept())
    out = ops.linear(aggregated, neighbors.weight, neighbors.bias)
    del aggregated  # one map less beside the next product
    return ops.add_linear(out, x, own)


class SAGEConv(nn.Module):
    """mean_{j in N(i)} x_j W_l + b + x_i W_r, parameters named as in ``torch_geometric.nn.SAGEConv``.

    Args:
        in_channels: D.
        out_channels: C.
        use_linear: add x_i W_res, another linear map of the input.
    """

    def __init__(self, in_channels: int, out_channels: int, *, use_linear: bool = False) -> None:
        super().__init__()
        self.res = nn.Linear(in_channels, out_channels, bias=False) if use_linear else None
        self.lin_l = nn.Linear(in_channels, out_channels)
        self.lin_r = nn.Linear(in_channels, out_channels, bias=False)

    def reset_parameters(self) -> None:
        """Draws new weights."""
        for part in (self.lin_l, self.lin_r, self.res):
            if part is not None:
                part.reset_parameters()

    def forward(self, x: Activation, graph: Adjacency, ops: Plain) -> Tensor:
        """Maps (N, D) to (N, C)."""
        own = self.lin_r.weight if self.res is None else self.lin_r.weight + self.res.weight
        return neighbors_and_self(x, graph, ops, neighbors=self.lin_l, own=own)


class SAGE(GNN):
    """Chain of :class:`SAGEConv` blocks."""

    build_graph = staticmethod(mean_adjacency)

    def make_conv(self, config: SAGEConfig, in_channels: int, layer: int, out_channels: int) -> SAGEConv:
        """Every layer alike."""
        return SAGEConv(in_channels, out_channels, use_linear=config.use_linear)
