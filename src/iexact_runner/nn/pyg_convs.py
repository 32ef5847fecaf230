"""Layers of torch_geometric that aggregate without anything as large as (E, C), kept or formed.

Each is put in front of PyG's own class, whose parameters, options and evaluation it inherits. A call that has no twin
(edge features, two node sets, hooks on messages) goes to PyG's own code.

Shapes: N nodes, E edges, C channels, H heads.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.parameter import UninitializedParameter
from torch_geometric import nn as pyg
from torch_geometric.nn import aggr
from torch_geometric.utils import is_torch_sparse_tensor

from iexact_runner.data.graph import Adjacency, mean_scale
from iexact_runner.nn.interception import Compression, Pass, kind_without_twin
from iexact_runner.schemes.activation import Activation, Kept

REDUCTIONS = {
    aggr.SumAggregation: "sum",
    aggr.MeanAggregation: "mean",
    aggr.MaxAggregation: "max",
    aggr.MinAggregation: "min",
    aggr.SoftmaxAggregation: "softmax",
}
KEPT = {
    "sum": "nothing; its input, compressed, for edge weights that need gradients",
    "mean": "nothing; its input, compressed, for edge weights that need gradients",
    "max": "which neighbour it was",
    "min": "which neighbour it was",
    "softmax": "its messages once a node, quantized",
}
HOOKS = [
    f"_{step}_forward_{kind}"
    for step in ("propagate", "message", "aggregate", "message_and_aggregate", "edge_update")
    for kind in ("pre_hooks", "hooks")
]


# A base that mypy sees as untyped, as all of torch_geometric.
class Convolution(pyg.MessagePassing):  # type: ignore[misc]
    """What the twins share: aggregation of x_j, weighted by edge weights if there are any."""

    _compression: Compression
    # Whether calls may bring edge weights, and whether the entries of a sparse adjacency are such weights.
    edge_weights: ClassVar[bool] = True
    entries_are_weights: ClassVar[bool] = True

    @classmethod
    def option_without_twin(cls, conv: Any) -> str | None:
        """The option for which a layer of PyG has no twin, or None if it has one."""
        reduction = REDUCTIONS.get(type(conv.aggr_module))
        if reduction is None or (reduction == "softmax" and cls.edge_weights):
            return f"aggr={conv.aggr}"
        if conv.flow != "source_to_target":
            return f"flow={conv.flow}"
        return f"decomposed_layers={conv.decomposed_layers}" if conv.decomposed_layers > 1 else None

    @classmethod
    def kept(cls, conv: Any) -> str:
        """What a layer keeps of its aggregation, for people; its linear layers have their own line."""
        return KEPT[REDUCTIONS[type(conv.aggr_module)]]

    @property
    def reduction(self) -> str:
        """Name of the aggregation."""
        return REDUCTIONS[type(self.aggr_module)]

    def propagate(self, edge_index: Any, size: Any = None, **inputs: Any) -> Any:
        """Aggregated messages (N, C), from PyG's own code where there is no twin."""
        x = inputs["x"]
        x, target = x if isinstance(x, (tuple, list)) else (x, x)
        weight, edge_attr = inputs.get("edge_weight"), inputs.get("edge_attr")
        run = self.running(x, edge_index, target=target, size=size, weight=weight, edge_attr=edge_attr)
        if run is not None:
            if is_torch_sparse_tensor(edge_index):
                weight = self.entries(edge_index)
            return self.aggregate_messages(run, self.messages(x), edge_index, weight)
        return super().propagate(edge_index, size=size, **inputs)

    def messages(self, x: Tensor) -> Tensor:
        """What each node sends (N, C), before edge weights."""
        return x

    def entries(self, graph: Tensor) -> Tensor | None:
        """Edge weights in a sparse adjacency; PyG's softmax does not look at them."""
        weighted = self.entries_are_weights and self.reduction != "softmax"
        return self._compression.graphs.values(graph) if weighted else None

    def aggregate_messages(self, run: Pass, x: Tensor, graph: Tensor, weight: Tensor | None) -> Tensor:
        """Aggregation of (N, C) over the in-neighbours."""
        graphs, nodes, reduction = self._compression.graphs, x.size(0), self.reduction
        linear = reduction in ("sum", "mean")
        if linear and (weight is None or not weight.requires_grad):
            return run.ops.aggregate(x, graphs.adjacency(graph, nodes, weight, mean=reduction == "mean"))
        if reduction == "softmax":
            softmax = self.aggr_module
            t = softmax.t if isinstance(softmax.t, Tensor) else torch.full((1,), softmax.t, device=x.device)
            adjacency = graphs.adjacency(graph, nodes, None, mean=False)
            return run.ops.aggregate_softmax(Activation(x, Kept()), t, adjacency, semi_grad=softmax.semi_grad)
        edges = graphs.edges(graph, nodes)
        ordered = None if weight is None else graphs.weights(graph, nodes, weight)
        if ordered is None or not linear:
            return run.ops.aggregate_extremum(x, ordered, edges, maximum=reduction == "max")
        total = run.ops.aggregate_weighted(run.activation(x), ordered, edges)
        return total if reduction == "sum" else total * mean_scale(edges).to(total.dtype)

    def fixed_adjacency(self, nodes: int, graph: Tensor, weight: Tensor | None) -> Adjacency | None:
        """The operator of fixed weights; None where PyG's own code makes them: with gradients, or cached."""
        if self.reduction != "sum" or (weight is not None and weight.requires_grad):
            return None
        graphs = self._compression.graphs
        if not self.normalize:
            weight = self.entries(graph) if is_torch_sparse_tensor(graph) else weight
            return graphs.adjacency(graph, nodes, weight, mean=False)
        if self.cached:
            return None
        improved = getattr(self, "improved", False)
        return graphs.normalised(graph, nodes, weight, self_loops=self.add_self_loops, improved=improved)

    def transforms_first(self, x: Any, linear: Any) -> bool:
        """Whether the weight comes before the aggregation: all products of x then share its one kept map."""
        run = self._compression.current()
        if run is None or not run.ops.transform_first or isinstance(linear.weight, UninitializedParameter):
            return False
        return isinstance(x, Tensor) and self.reduction in ("sum", "mean")

    def running(
        self, x: Any, graph: Any, *, target: Any = None, size: Any = None, weight: Any = None, edge_attr: Any = None
    ) -> Pass | None:
        """The pass that compresses this call; None if none runs or the call has no twin, which is noted."""
        run = self._compression.current()
        if run is None or not torch.is_grad_enabled():
            return None
        reason = self.call_without_twin(x, graph, x if target is None else target, size, weight, edge_attr)
        if reason is not None:
            self._compression.leave(type(self).__name__.removeprefix("Compressed"), reason)
            return None
        return run

    def call_without_twin(self, x: Any, graph: Any, target: Any, size: Any, weight: Any, edge_attr: Any) -> str | None:
        """Why a call has no twin, or None if it has."""
        if (reason := kind_without_twin(x, rank=2)) is not None:
            return reason
        nodes = x.size(0)
        if edge_attr is not None:
            return "edge features"
        if self.explain or any(getattr(self, name) for name in HOOKS):
            return "hooks or explanation of messages"
        if not isinstance(graph, Tensor) or graph.requires_grad:
            return f"graph is a {type(graph).__name__}, or its entries need gradients"
        if target.size(0) != nodes or size not in (None, (nodes, nodes), [nodes, nodes]):
            return "two sets of nodes"
        # PyG's own code then says what is wrong.
        if not self._compression.graphs.fits(graph, nodes):
            return "edges do not fit the nodes"
        misfit = weight is not None and not is_torch_sparse_tensor(graph) and weight.numel() != graph.size(1)
        return "edge weights do not fit the edges" if misfit else None

    def _set_jittable_templates(self, raise_on_error: bool = False) -> None:
        """Leaves the methods alone that PyG generates: they are those of its own class."""


class GCNConv(Convolution):
    """D^-1/2 (A + I) D^-1/2 x W + b (Kipf and Welling, ICLR 2017)."""

    def forward(self, x: Any, edge_index: Any, edge_weight: Tensor | None = None) -> Any:
        """Maps (N, D) to (N, C)."""
        run = self.running(x, edge_index)
        adjacency = None if run is None else self.fixed_adjacency(x.size(0), edge_index, edge_weight)
        if run is None or adjacency is None:
            return super().forward(x, edge_index, edge_weight)
        out = run.ops.aggregate(self.lin(x), adjacency)
        return out if self.bias is None else out + self.bias


class GCN2Conv(Convolution):
    """(1 - beta) s + beta s W, with s = (1 - alpha) A x + alpha x_0 (GCNII; Chen et al., ICML 2020)."""

    def forward(self, x: Tensor, x_0: Tensor, edge_index: Any, edge_weight: Tensor | None = None) -> Any:
        """Maps (N, C) and the first map (N, C) to (N, C)."""
        run = self.running(x, edge_index, target=x_0)
        adjacency = None if run is None else self.fixed_adjacency(x.size(0), edge_index, edge_weight)
        if run is None or adjacency is None:
            return super().forward(x, x_0, edge_index, edge_weight)
        if run.ops.transform_first:
            out = run.ops.aggregate(self._mix(x, self.weight1), adjacency).mul_(1 - self.alpha)
            weight = self.weight1 if self.weight2 is None else self.weight2
            return out.add_(self._mix(x_0, weight), alpha=self.alpha)
        propagated = run.ops.aggregate(x, adjacency).mul_(1 - self.alpha)
        if self.weight2 is None:
            return self._mix(propagated.add_(x_0, alpha=self.alpha), self.weight1)
        out = self._mix(propagated, self.weight1)
        del propagated  # one map less beside the next product
        # alpha (x_0 W), not (alpha x_0) W: all layers then share the one kept map of x_0.
        return out.add_(self._mix(x_0, self.weight2), alpha=self.alpha)

    def _mix(self, h: Tensor, weight: Tensor) -> Tensor:
        return torch.addmm(h, h, weight, beta=1 - self.beta, alpha=self.beta)


class SAGEConv(Convolution):
    """mean_j x_j W_l + b + x_i W_r, or with another aggregation (Hamilton et al., NeurIPS 2017)."""

    edge_weights = False

    def forward(self, x: Any, edge_index: Any, size: Any = None) -> Any:
        """Maps (N, D) to (N, C)."""
        if self.project or not self.transforms_first(x, self.lin_l):
            return super().forward(x, edge_index, size)
        h = F.linear(x, self.lin_l.weight)
        out = self.propagate(edge_index, x=(h, h), size=size)
        out = out if self.lin_l.bias is None else out + self.lin_l.bias
        out = out + self.lin_r(x) if self.root_weight else out
        return F.normalize(out, p=2.0, dim=-1) if self.normalize else out


class GraphConv(Convolution):
    """sum_j w_ij x_j W_1 + b + x_i W_2, or with another aggregation (Morris et al., AAAI 2019)."""

    def forward(self, x: Any, edge_index: Any, edge_weight: Tensor | None = None, size: Any = None) -> Any:
        """Maps (N, D) to (N, C)."""
        if not self.transforms_first(x, self.lin_rel):
            return super().forward(x, edge_index, edge_weight, size)
        h = F.linear(x, self.lin_rel.weight)
        out = self.propagate(edge_index, x=(h, h), edge_weight=edge_weight, size=size)
        out = out + self.lin_root(x)
        return out if self.lin_rel.bias is None else out + self.lin_rel.bias


class GENConv(Convolution):
    """MLP(x_i + aggregated ReLU(x_j) + eps) (Li et al., 2020); the messages are made once a node."""

    edge_weights = False
    entries_are_weights = False

    def messages(self, x: Tensor) -> Tensor:
        """ReLU(x) + eps."""
        messages: Tensor = F.relu(x) + self.eps
        return messages


class GATConv(Convolution):
    """sum_j alpha_ij W x_j + b, alpha = softmax_j LeakyReLU(a_src . W x_j + a_dst . W x_i) (Velickovic et al.)."""

    @classmethod
    def option_without_twin(cls, conv: Any) -> str | None:
        """Edge features and two sets of nodes have none."""
        if conv.edge_dim is not None:
            return f"edge_dim={conv.edge_dim}"
        return "in_channels a pair" if conv.lin is None else super().option_without_twin(conv)

    @classmethod
    def kept(cls, conv: Any) -> str:
        """No coefficient of an edge."""
        return "W x, or x, compressed, and the scores of the nodes"

    def forward(
        self, x: Any, edge_index: Any, edge_attr: Any = None, size: Any = None, return_attention_weights: Any = None
    ) -> Any:
        """Maps (N, D) to (N, H * C), or to (N, C) if heads are averaged."""
        run = self.running(x, edge_index, size=size, edge_attr=edge_attr)
        if run is not None and return_attention_weights is not None:
            self._compression.leave("GATConv", "attention weights asked for")
        if run is None or return_attention_weights is not None:
            return super().forward(x, edge_index, edge_attr, size, return_attention_weights)
        edges = self._compression.graphs.edges(edge_index, x.size(0), self_loops=self.add_self_loops)
        h = self.lin(x)  # [N, H C]
        dropout = self.dropout if self.training else 0.0
        out = run.ops.attention(
            h,
            self.att_src,
            self.att_dst,
            edges,
            negative_slope=self.negative_slope,
            dropout=dropout,
            product=(run.activation(x), self.lin.weight),
        )
        out = out if self.concat else out.unflatten(1, (self.heads, self.out_channels)).mean(dim=1)
        out = out if self.res is None else out + self.res(x)
        return out if self.bias is None else out + self.bias


CONVOLUTIONS: dict[type[Any], type[Convolution]] = {
    pyg.GCNConv: GCNConv,
    pyg.GCN2Conv: GCN2Conv,
    pyg.SAGEConv: SAGEConv,
    pyg.GraphConv: GraphConv,
    pyg.GENConv: GENConv,
    pyg.GATConv: GATConv,
}
