"""Softmax aggregation as an autograd function: exact forward pass, and no (E, D) tensor kept.

A weight exp(t x_j) is that of its node alone, so sums over neighbours are products with the adjacency: the aggregate is
A (e x) / A e with e = exp(t x). Where e would leave the range of float32, messages are formed for a few rows at a time.
Shapes: N nodes, E edges, D features.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from iexact_runner.compression.deferred import defer
from iexact_runner.compression.maps import KeptMap
from iexact_runner.data.graph import Adjacency
from iexact_runner.schemes.aggregation import CHUNK_ELEMENTS
from iexact_runner.schemes.saved import SavedMap

# Features at a time: the maps on the way are so much narrower.
COLUMNS = 32
# Largest spread of t x in a column for which exp(t x - max) and what is divided by it stay in float32.
LARGEST_SPREAD = 60.0
# Below every sum of weights but that of a node without neighbours.
SMALLEST_SUM = 1e-30


class SoftmaxAggregation(Function):
    """Sum over j of softmax_j(t x_j) x_j, feature by feature (GENConv; Li et al., 2020).

    The backward pass recomputes the softmax from the kept map, which is not linear in it: the gradients are biased.
    With ``semi_grad`` the softmax counts as a constant.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, t: Tensor, adjacency: Adjacency, semi_grad: bool, kept: KeptMap, fp32_bytes: int
    ) -> Tensor:
        layout, tensors = kept
        ctx.adjacency, ctx.layout, ctx.semi_grad = adjacency, layout, semi_grad
        ctx.saved_map = SavedMap(layout.shape, layout.stored_type, fp32_bytes, len(tensors))
        ctx.save_for_backward(*tensors, t)
        return gather_softmax(x, t, adjacency)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, t = ctx.saved_tensors
        x = ctx.layout.decode(tuple(tensors)).float()
        gradients = _gradients_by_edges if _far_apart(x, t) else _gradients
        grad_x, grad_t = gradients(grad, x, t, ctx.adjacency, semi_grad=ctx.semi_grad)
        grad_t = grad_t.expand_as(x[:1]).sum_to_size(1, t.numel()).view_as(t)
        return grad_x.to(grad.dtype), grad_t if ctx.needs_input_grad[1] else None, None, None, None, None


def gather_softmax(x: Tensor, t: Tensor, adjacency: Adjacency) -> Tensor:
    """Sum over j of softmax_j(t x_j) x_j for x (N, D); 0 where a node has no neighbour."""
    output = torch.empty_like(x)
    if not _far_apart(x, t):
        for part, values, weights, _ in _columns(x, t):
            total = adjacency.matmul(weights).clamp_(min=SMALLEST_SUM)
            output[:, part] = adjacency.matmul(weights.mul_(values)).div_(total)
        return output
    matrix = adjacency.matrix
    for nodes, entries, local in matrix.row_chunks(_edges_at_once(x)):
        message = x.index_select(0, matrix.columns[entries])  # [entries, D]
        output[nodes] = local.reduce_rows(local.softmax_rows_(message * t).mul_(message), "sum").to(x.dtype)
    return output


def _gradients(grad: Tensor, x: Tensor, t: Tensor, adjacency: Adjacency, *, semi_grad: bool) -> tuple[Tensor, Tensor]:
    """Gradients of x (N, D) and of t (1, D), from that of the output."""
    grad_x, grad_t = torch.empty_like(x), torch.zeros_like(x[:1])
    for part, values, weights, scale in _columns(x, t):
        total = adjacency.matmul(weights).clamp_(min=SMALLEST_SUM)
        sent = grad[:, part].float() / total
        received = adjacency.adjoint_matmul(sent)  # sum_i g_i / total_i
        if not semi_grad:
            output = adjacency.matmul(weights * values).div_(total)
            # sum_i g_i (x_j - out_i) / total_i
            excess = (values * received).sub_(adjacency.adjoint_matmul(sent.mul_(output)))
            grad_t[:, part] = (weights * values).mul_(excess).sum(0)
            received = received.addcmul_(excess, scale)
        grad_x[:, part] = weights.mul_(received)
    return grad_x, grad_t


def _gradients_by_edges(
    grad: Tensor, x: Tensor, t: Tensor, adjacency: Adjacency, *, semi_grad: bool
) -> tuple[Tensor, Tensor]:
    """:func:`_gradients` for weights of any size."""
    matrix = adjacency.matrix
    grad_x, grad_t = torch.zeros_like(x), torch.zeros_like(x[:1])
    for nodes, entries, local in matrix.row_chunks(_edges_at_once(x)):
        rows, columns = local.rows(), matrix.columns[entries]
        message = x.index_select(0, columns)  # [entries, D]
        share = local.softmax_rows_(message * t)
        output = local.reduce_rows(share * message, "sum")
        sent = share.mul_(grad[nodes].float().index_select(0, rows))  # g_i p_ij
        if not semi_grad:
            excess = message - output.index_select(0, rows)
            grad_t += (sent * message * excess).sum(0)
            sent = sent.addcmul_(sent, excess.mul_(t))
        grad_x.index_add_(0, columns, sent)
    return grad_x, grad_t


def _columns(x: Tensor, t: Tensor) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
    """A few columns at a time: which, x and exp(t x - max) in them in float32, and t."""
    for start in range(0, x.size(1), COLUMNS):
        part = slice(start, start + COLUMNS)
        scale = t.float() if t.numel() == 1 else t.float().flatten()[part]
        values = x[:, part].float()
        scores = values * scale
        yield part, values, scores.sub_(scores.amax(0)).exp_(), scale


def _far_apart(x: Tensor, t: Tensor) -> bool:
    """Whether weights may underflow beside others of their column, or are no numbers."""
    if isinstance(x, FakeTensor) or not x.numel():
        return False
    low, high = x.detach().aminmax(dim=0)
    spread = ((high - low).float() * t.detach().flatten().float().abs()).max()
    return not defer(~(spread <= LARGEST_SPREAD)) and not bool(spread <= LARGEST_SPREAD)


def _edges_at_once(x: Tensor) -> int:
    return max(1, CHUNK_ELEMENTS // max(1, x.size(1)))
