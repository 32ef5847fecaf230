"""Plain PyG modules on a torch CSR adjacency: the FP32 baseline that every ratio in this project is taken against."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch_geometric import nn as pyg

from iexact_runner.config import DeeperGCNConfig, GATConfig, GCN2Config, ModelConfig
from iexact_runner.data.graph import Edges, Graph
from iexact_runner.data.sparse import CSR


class PyGBaseline(nn.Module):
    """The same network as :func:`iexact_runner.nn.build_model`, written with the layers of torch_geometric.

    Args:
        config: widths, depth and rates; edge dropout, shared attention vectors, the linear map beside a convolution
            and the factor of ``dropout2`` have no PyG layer and are left out.
        in_channels: D, width of the features.
        out_channels: number of classes.
    """

    def __init__(self, config: ModelConfig, *, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.config = config
        hidden = config.hidden_channels
        if isinstance(config, GATConfig):
            hidden *= config.heads
        gcn2 = isinstance(config, GCN2Config)
        self.lin_in = nn.Linear(in_channels, hidden) if gcn2 else None
        self.lin_out = nn.Linear(hidden, out_channels) if gcn2 else None
        layers = config.num_layers
        widths = [hidden if gcn2 else in_channels, *[hidden] * (layers - 1)]
        last = hidden if gcn2 else out_channels
        self.convs = nn.ModuleList(
            _pyg_conv(config, width, last if index == layers - 1 else config.hidden_channels, index)
            for index, width in enumerate(widths)
        )
        normed = layers if gcn2 else layers - 1
        self.norms = nn.ModuleList(nn.BatchNorm1d(hidden) for _ in range(normed if config.batch_norm else 0))

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        """Maps features (N, D) to scores (N, classes) with a CSR adjacency, or an edge_index for GAT."""
        p, training = self.config.dropout, self.training
        x = F.dropout(x, self.config.input_dropout, training)
        initial: tuple[Tensor, ...] = ()
        if self.lin_in is not None:
            initial = (F.relu(self.lin_in(x)),)
            x = F.dropout(initial[0], p, training)
        blocks = len(self.convs) - (self.lin_out is None)
        for index in range(blocks):
            x = self.block(index, x, *initial, adjacency)
        # Only GCN2 has blocks after which a linear layer follows.
        scores: Tensor = self.convs[-1](x, adjacency) if self.lin_out is None else self.lin_out(x)
        return scores

    def block(self, index: int, x: Tensor, *rest: Tensor) -> Tensor:
        """A convolution and what follows it."""
        h: Tensor = self.convs[index](x, *rest)
        if self.config.batch_norm:
            h = self.norms[index](h)
        if self.config.residual and not isinstance(self.config, GATConfig) and h.shape == x.shape:
            h = h + x
        return F.dropout(F.relu(h), self.config.dropout, self.training)


class PyGDeeperGCN(nn.Module):
    """DeeperGCN, written with the layers of torch_geometric; arguments as in :class:`PyGBaseline`."""

    def __init__(self, config: DeeperGCNConfig, *, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.config = config
        hidden = config.hidden_channels
        self.lin_in = nn.Linear(in_channels, hidden)
        kind = "softmax_sg" if config.semi_grad else "softmax"
        self.convs = nn.ModuleList(
            pyg.GENConv(hidden, hidden, aggr=kind, t=config.t, num_layers=1, bias=True)
            for _ in range(config.num_layers)
        )
        self.norms = nn.ModuleList(nn.BatchNorm1d(hidden) for _ in range(config.num_layers if config.batch_norm else 0))
        self.lin_out = nn.Linear(hidden, out_channels)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        """Maps features (N, D) to scores (N, classes)."""
        x = self.lin_in(F.dropout(x, self.config.input_dropout, self.training))
        for index, conv in enumerate(self.convs):
            h = conv(x if index == 0 else self._activate(x, index - 1), edge_index)
            x = x + h if self.config.residual and index else h
        scores: Tensor = self.lin_out(self._activate(x, len(self.convs) - 1))
        return scores

    def _activate(self, x: Tensor, index: int) -> Tensor:
        x = F.relu(self.norms[index](x) if self.norms else x)
        return F.dropout(x, self.config.dropout, self.training)


def build_baseline(config: ModelConfig, *, in_channels: int, out_channels: int) -> PyGBaseline | PyGDeeperGCN:
    """The network of :func:`iexact_runner.nn.build_model` in plain PyG layers, its weights freshly drawn."""
    if isinstance(config, DeeperGCNConfig):
        return PyGDeeperGCN(config, in_channels=in_channels, out_channels=out_channels)
    return PyGBaseline(config, in_channels=in_channels, out_channels=out_channels)


def baseline_graph(graph: Graph, config: ModelConfig) -> Tensor:
    """What :func:`build_baseline` takes for a graph: an edge_index where PyG's layers form messages, else torch CSR.

    Of a CSR adjacency PyG 2.8's softmax aggregation has another gradient than of the same edge_index, and a wrong one.
    """
    if isinstance(graph, Edges):
        return graph.edge_index
    if isinstance(graph, CSR) or isinstance(config, DeeperGCNConfig):
        matrix = graph if isinstance(graph, CSR) else graph.matrix
        return torch.stack([matrix.columns.long(), matrix.rows()])
    if graph.column_scale is None:  # a mean: PyG divides by the degree itself
        return graph.matrix.tensor()
    return graph.matrix.tensor(row_scale=graph.row_scale, column_scale=graph.column_scale)


def _pyg_conv(config: ModelConfig, in_channels: int, out_channels: int, layer: int) -> nn.Module:
    conv: nn.Module
    if config.name == "sage":
        conv = pyg.SAGEConv(in_channels, out_channels)
    elif config.name == "gcn":
        conv = pyg.GCNConv(in_channels, out_channels, normalize=False)
    elif config.name == "graphconv":
        conv = pyg.GraphConv(in_channels, out_channels)
    elif isinstance(config, GCN2Config):
        conv = pyg.GCN2Conv(
            in_channels,
            alpha=config.alpha,
            theta=config.theta,
            layer=None if config.theta is None else layer + 1,
            shared_weights=config.shared_weights,
            normalize=False,
        )
    else:
        assert isinstance(config, GATConfig)
        heads = 1 if layer == config.num_layers - 1 else config.heads
        conv = pyg.GATConv(
            in_channels,
            out_channels,
            heads=heads,
            residual=config.residual,
            dropout=config.attention_dropout,
            add_self_loops=False,
        )
    return conv
