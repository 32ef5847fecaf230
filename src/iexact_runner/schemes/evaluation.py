"""Evaluation: the exact forward pass of every scheme, with a block's map overwritten wherever it can be.

Shapes: N nodes, E edges, H heads, C features a head.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from iexact_runner.data.graph import Adjacency
from iexact_runner.data.sparse import CSR
from iexact_runner.schemes.activation import Activation, Kept
from iexact_runner.schemes.attention import attend
from iexact_runner.schemes.graph_linear import GraphWeights, add_linear, graph_linear, linear
from iexact_runner.schemes.plain import Plain
from iexact_runner.schemes.softmax import gather_softmax

# Elements that are normalised at once: 4 MiB of float32.
CHUNK_ELEMENTS = 1 << 20


class Evaluation(Plain):
    """The operations of a forward pass that no backward pass follows.

    Args:
        transform_first: whether a SAGE layer multiplies by its weights before it aggregates.
    """

    def __init__(self, *, transform_first: bool = False) -> None:
        super().__init__(training=False, seed=0, transform_first=transform_first)

    def linear(self, x: Activation, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Product x W^T + b, in the place of x where it is the last to read it."""
        return linear(x.value, weight, bias, overwrite=x.owned)

    def add_linear(self, out: Tensor, x: Activation, weight: Tensor) -> Tensor:
        """Adds x W^T, a few rows at a time."""
        return add_linear(out, x.value, weight)

    def _graph_linear(
        self, x: Activation, adjacency: Adjacency, weights: GraphWeights, own: Activation | None
    ) -> Tensor:
        other = None if own is None else own.value
        return graph_linear(x.value, adjacency, weights, own=other, overwrite=x.owned)

    def aggregate(self, x: Tensor, adjacency: Adjacency) -> Tensor:
        """Product A x."""
        return adjacency.matmul(x)

    def aggregate_softmax(self, x: Activation, t: Tensor, adjacency: Adjacency, *, semi_grad: bool) -> Tensor:
        """What plain modules gather, (E, D), is never formed."""
        return gather_softmax(x.value, t, adjacency)

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
        """Head by head: what plain modules gather, (E, H, C), is never formed."""
        return attend(h, att_source, att_target, edges, negative_slope=negative_slope, overwrite=overwrite).output

    def finish(
        self,
        convolve: Callable[[], Tensor],
        *,
        norm: nn.BatchNorm1d | None,
        residual: Tensor | None,
        dropout: float,
        owned: bool = True,
    ) -> Activation:
        """A convolution and what follows it in a block, all written over its output."""
        h = convolve() if owned else convolve().clone()
        if norm is not None:
            for part in h.split(max(1, CHUNK_ELEMENTS // h.size(1))):
                part.copy_(norm(part))
        if residual is not None:
            # Autocast may have left a map of less precision than the residual, which a sum in place would keep.
            h = h.add_(residual) if torch.result_type(h, residual) == h.dtype else h + residual
        return Activation(h.relu_(), Kept(), owned=True)
