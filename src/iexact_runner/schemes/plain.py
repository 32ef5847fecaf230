"""FP32 training as plain PyG modules do it: autograd keeps whatever it keeps.

Shapes: N nodes, E edges, H heads, C features a head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch_geometric.utils import scatter, softmax

from iexact_runner.compression.maps import exact_map
from iexact_runner.compression.seeds import tensor_seed
from iexact_runner.data.graph import Adjacency
from iexact_runner.data.sparse import CSR
from iexact_runner.kernels import ops, reference
from iexact_runner.parallel.shard import WHOLE, Shard
from iexact_runner.schemes.activation import Activation, Kept, Resident
from iexact_runner.schemes.aggregation import SpMM
from iexact_runner.schemes.functions import Dropout
from iexact_runner.schemes.graph_linear import GraphWeights, Mix
from iexact_runner.schemes.normalization import BatchNorm, momentum_of


class Plain:
    """The operations of one forward pass. Other schemes override those that they keep less for.

    Args:
        training: whether dropout and batch statistics are on.
        seed: seed of this pass, an int or a 0-d int64 tensor.
        transform_first: whether a SAGE layer multiplies by its weights before it aggregates.
        shard: which rows of the whole graph these are.
    """

    # Whether a product of the features that is kept as data serves in place of the features.
    uses_known_products = True

    def __init__(
        self, *, training: bool, seed: int | Tensor, transform_first: bool = False, shard: Shard = WHOLE
    ) -> None:
        self.training = training
        self.transform_first = transform_first
        self.shard = shard
        self.seed = seed if isinstance(seed, Tensor) else shard.seed(seed)
        self._masks_drawn = 0

    def next_mask_seed(self) -> int | Tensor:
        """Seed of the next mask, whatever else is drawn: every compressing scheme drops the same elements."""
        self._masks_drawn += 1
        return tensor_seed(self.seed, self._masks_drawn - 1)

    def input(self, features: Tensor, *, dropout: float) -> Activation:
        """The activation a model starts from; features with dropout on them are a map of their own."""
        if not (self.training and dropout):
            return Activation(features, Resident())
        return Activation(self.dropout(features, dropout), Kept(), owned=True)

    def block(self, run: Callable[..., Any], *inputs: Activation) -> Any:
        """What ``run`` makes of some activations: a part of a model whose middle may be computed twice."""
        return run(*inputs)

    def linear(self, x: Activation, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Product x W^T + b."""
        return F.linear(x.value, weight, bias)

    def add_linear(self, out: Tensor, x: Activation, weight: Tensor) -> Tensor:
        """Adds x W^T to a map, in place."""
        return out.add_(self.linear(x, weight))

    def graph_linear(
        self, x: Activation, adjacency: Adjacency, weights: GraphWeights, *, own: Activation | None = None
    ) -> Tensor:
        """A (x W^T) + b + y V^T, with y another activation or x; without V there is no such term.

        Where A x is known, the product with A and that with its adjoint are saved.
        """
        known = adjacency.product_of(x.value) if self.uses_known_products else None
        if known is None:
            return self._graph_linear(x, adjacency, weights, own)
        out = self.linear(Activation(known, Resident()), weights.weight, weights.bias)
        return out if weights.own is None else self.add_linear(out, x, weights.own)

    def _graph_linear(
        self, x: Activation, adjacency: Adjacency, weights: GraphWeights, own: Activation | None
    ) -> Tensor:
        """:meth:`graph_linear` of what is not known."""
        x, other, (mix, own_mix) = x.shared(), own or x, weights.mixes
        out = self.aggregate(self._mixed_linear(x, weights.weight, mix), adjacency)
        if weights.bias is not None:
            out = out.add_(weights.bias)
        return out if weights.own is None else out.add_(self._mixed_linear(other, weights.own, own_mix))

    def _mixed_linear(self, x: Activation, weight: Tensor, mix: Mix | None) -> Tensor:
        if mix is None:
            return self.linear(x, weight)
        return self.linear(x.shared(), weight).mul_(mix.factor).add_(x.value, alpha=mix.identity)

    def aggregate(self, x: Tensor, adjacency: Adjacency) -> Tensor:
        """Product A x."""
        aggregated: Tensor = SpMM.apply(x, adjacency)
        return aggregated

    def attention(
        self,
        h: Tensor,
        att_source: Tensor,
        att_target: Tensor | None,
        edges: CSR,
        *,
        negative_slope: float,
        dropout: float = 0.0,
        product: tuple[Activation, Tensor] | None = None,
        overwrite: bool = False,
    ) -> Tensor:
        """Sum of neighbours' h (N, H C) weighted by softmax(LeakyReLU(a_source . h_j + a_target . h_i)), head by head.

        The vectors are (1, H, C); without ``att_target`` the other scores both ends. Dropout is on the weights.
        ``product`` says which activation and weight h is the product of, for schemes that keep these instead;
        ``overwrite`` that nobody else reads h.
        """
        h = h.unflatten(1, att_source.shape[1:])
        source, target = edges.columns, edges.rows()
        score_source = (h * att_source).sum(-1)
        score_target = score_source if att_target is None else (h * att_target).sum(-1)
        score = F.leaky_relu(
            score_source.index_select(0, source) + score_target.index_select(0, target), negative_slope
        )  # [E, H]
        alpha = F.dropout(softmax(score, target, num_nodes=h.size(0)), dropout, training=self.training)
        weighted = alpha.unsqueeze(-1) * h.index_select(0, source)  # [E, H, C]
        gathered: Tensor = scatter(weighted, target, dim_size=h.size(0))
        return gathered.flatten(1)

    def aggregate_softmax(self, x: Activation, t: Tensor, adjacency: Adjacency, *, semi_grad: bool) -> Tensor:
        """Sum of neighbours' x (N, D) weighted by their softmax of t x, feature by feature.

        With ``semi_grad`` the weights count as a constant.
        """
        source, target, nodes = adjacency.matrix.columns, adjacency.matrix.rows(), x.value.size(0)
        message = x.value.index_select(0, source)  # [E, D]
        scores = message.detach() * t if semi_grad else message * t
        summed: Tensor = scatter(message * softmax(scores, target, num_nodes=nodes), target, dim_size=nodes)
        return summed

    def drop_edges(self, edges: CSR, p: float, *, exactly: bool = False) -> CSR:
        """What dropout on the graph itself leaves, from the seed of this pass.

        Each entry but those of the diagonal is dropped with probability p; ``exactly`` drops floor(p E) of all.
        """
        if not self.training or p == 0:
            return edges
        count, device, seed = edges.columns.numel(), edges.columns.device, self.next_mask_seed()
        if exactly:
            draws = reference.draw16(2 * count, seed=seed, purpose=reference.DROPOUT, device=device).long()
            order = (draws[:count] << 16 | draws[count:]).argsort(stable=True)
            mask = torch.ones(count, dtype=torch.bool, device=device)
            mask[order[: int(p * count)]] = False
            return edges.masked(mask)
        return edges.masked(ops.keep_mask(count, p=p, seed=seed, device=device) | (edges.rows() == edges.columns))

    def finish(
        self,
        convolve: Callable[[], Tensor],
        *,
        norm: nn.BatchNorm1d | None,
        residual: Tensor | None,
        dropout: float,
        owned: bool = True,
    ) -> Activation:
        """A convolution and what follows it in a block: BatchNorm, + residual, ReLU, dropout.

        The convolution is called here, so that no caller holds on to its output once it is normalised; ``owned`` says
        that nobody else reads that output, which may then be overwritten.
        """
        h = convolve()
        if norm is not None:
            h = self.batch_norm(h, norm)
        if residual is not None:
            h = h + residual
        return Activation(self.relu_dropout(h, dropout), Kept(), owned=True)

    def drop(self, x: Activation, p: float) -> Activation:
        """Dropout of an activation that has other consumers."""
        return Activation(self.dropout(x.value, p), Kept(), owned=True) if self.training and p else x

    def scaled(self, x: Activation, factor: float) -> Activation:
        """An activation times a number."""
        return x if factor == 1.0 else Activation(x.value * factor, Kept(), owned=True)

    def batch_norm(self, h: Tensor, norm: nn.BatchNorm1d) -> Tensor:
        """BatchNorm1d over the nodes."""
        normalised: Tensor
        if self.training and self.shard.distributed:
            parameters = (norm.weight, norm.bias, norm.running_mean, norm.running_var, momentum_of(norm), norm.eps)
            kept = exact_map(h.detach())
            normalised = BatchNorm.apply(h, *parameters, lambda *_: kept, 4 * h.numel(), self.shard)
        else:
            normalised = norm(h)
        return normalised

    def relu(self, h: Tensor) -> Tensor:
        """ReLU."""
        return F.relu(h)

    def relu_dropout(self, h: Tensor, p: float) -> Tensor:
        """ReLU then dropout."""
        return self.dropout(self.relu(h), p)

    def dropout(self, h: Tensor, p: float) -> Tensor:
        """Dropout; a rate of 0 keeps nothing. Rows that are distributed are dropped by seed, as one process would."""
        if p > 0 and self.training and self.shard.distributed:
            dropped: Tensor = Dropout.apply(h, p, self.next_mask_seed(), "auto")
            return dropped
        return F.dropout(h, p, training=self.training) if p > 0 else h
