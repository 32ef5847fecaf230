"""Evaluation of a few rows: what aggregates reads all rows of a map, what does not reads the rows' own.

Shapes: N nodes of a map, R rows of them, E edges that end there, H heads, C features a head, D features.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from iexact_runner.data.graph import Adjacency
from iexact_runner.data.sparse import CSR
from iexact_runner.schemes.activation import Activation
from iexact_runner.schemes.attention import attention_weights, node_scores
from iexact_runner.schemes.evaluation import Evaluation
from iexact_runner.schemes.graph_linear import GraphWeights, add_linear, linear


class RowEvaluation(Evaluation):
    """The operations of a layer on some rows; the graph's part has R rows, and as many columns as the map has rows."""

    def __init__(self) -> None:
        super().__init__(transform_first=True)
        self.rows = slice(0, 0)
        self._made: dict[int, tuple[Tensor, Tensor]] | None = None

    def begin_layer(self, *, remembers: bool) -> None:
        """Forgets what the layer before made; ``remembers`` says that all chunks read one map."""
        self._made = {} if remembers else None

    def linear(self, x: Activation, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Product x W^T + b of the rows' own."""
        return linear(self._own(x.value), weight, bias)

    def add_linear(self, out: Tensor, x: Activation, weight: Tensor) -> Tensor:
        """Adds x W^T of the rows' own."""
        return add_linear(out, self._own(x.value), weight)

    def _graph_linear(
        self, x: Activation, adjacency: Adjacency, weights: GraphWeights, own: Activation | None
    ) -> Tensor:
        weight, bias, own_weight, (mix, own_mix) = weights
        if weight.size(0) < x.value.size(1):
            out = adjacency.matmul(self._of_all(x.value, weight), bias=bias)
        else:
            out = linear(adjacency.matmul(x.value), weight, bias, mix=mix)
        if own_weight is None:
            return out
        return add_linear(out, self._own((own or x).value), own_weight, mix=own_mix)

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
        """Head by head, the neighbours' h from the product that it is of."""
        assert product is not None
        everything = self._of_all(product[0].value, product[1])
        source = self._once(att_source, lambda: node_scores(everything.unflatten(1, att_source.shape[1:]), att_source))
        target = node_scores(h.unflatten(1, att_source.shape[1:]), att_source if att_target is None else att_target)
        alpha = attention_weights(source, target, edges, negative_slope)
        output = torch.empty_like(h)
        heads = zip(_heads(output, att_source), _heads(everything, att_source), alpha.unbind(1), strict=True)
        for out, values, weights in heads:
            out.copy_(edges.with_values(weights.contiguous()).matmul(values))
        return output

    def scaled(self, x: Activation, factor: float) -> Activation:
        """The rows' own times a number."""
        return super().scaled(Activation(self._own(x.value), x.source, owned=x.owned), factor)

    def finish(
        self,
        convolve: Callable[[], Tensor],
        *,
        norm: nn.BatchNorm1d | None,
        residual: Tensor | None,
        dropout: float,
        owned: bool = True,
    ) -> Activation:
        """A convolution and what follows it in a block."""
        own = None if residual is None else self._own(residual)
        return super().finish(convolve, norm=norm, residual=own, dropout=dropout, owned=owned)

    def _own(self, x: Tensor) -> Tensor:
        """The rows of a map that has more."""
        count = self.rows.stop - self.rows.start
        return x if x.size(0) == count else x[self.rows]

    def _of_all(self, x: Tensor, weight: Tensor) -> Tensor:
        """Product x W^T of all rows, once for all chunks that read one map."""
        return self._once(weight, lambda: linear(x, weight))

    def _once(self, key: Tensor, make: Callable[[], Tensor]) -> Tensor:
        if self._made is None:
            return make()
        if id(key) not in self._made:
            self._made[id(key)] = key, make()  # the key too, whose number another tensor would have once it is gone
        return self._made[id(key)][1]


def _heads(x: Tensor, vector: Tensor) -> tuple[Tensor, ...]:
    """The maps (N, C) of each head of (N, H C)."""
    heads: tuple[Tensor, ...] = x.unflatten(1, vector.shape[1:]).unbind(1)
    return heads
