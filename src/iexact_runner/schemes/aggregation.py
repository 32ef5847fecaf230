"""Autograd functions that aggregate over neighbours. The forward pass is exact; nothing as large as (E, D) is kept.

Shapes: N nodes, E edges, D features.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from iexact_runner.compression.maps import KeptMap
from iexact_runner.data.graph import Adjacency
from iexact_runner.data.partitioned import PartitionedEdges
from iexact_runner.data.sparse import CSR
from iexact_runner.schemes.saved import SavedMap

# Features of edges that are formed at once: 16 MiB of float32.
CHUNK_ELEMENTS = 1 << 22


class SpMM(Function):
    """A x with fixed edge weights: the backward pass A^T g needs nothing of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, adjacency: Adjacency) -> Tensor:
        ctx.adjacency = adjacency
        return adjacency.matmul(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.adjacency.adjoint_matmul(grad), None


class WithHalo(Function):
    """A map (N, D) and beneath it the rows (H, D) of other processes; the gradients of these return to them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, edges: PartitionedEdges) -> Tensor:
        assert edges.halo is not None
        ctx.edges = edges
        whole = x.new_empty(x.size(0) + edges.halo.size, x.size(1))
        whole[: x.size(0)] = x
        for columns, rows in edges.halo.exchange(x):
            whole[x.size(0) :, columns] = rows
        return whole

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        nodes = grad.size(0) - ctx.edges.halo.size
        return ctx.edges.back.add_back_(grad[:nodes].clone(), grad[nodes:]), None


def with_halo(x: Tensor, edges: CSR) -> Tensor:
    """A map (N, D) and, if its graph is partitioned, the rows of others that edges come from: (N + H, D)."""
    if not isinstance(edges, PartitionedEdges):
        return x
    whole: Tensor = WithHalo.apply(x, edges)
    return whole


class WeightedSpMM(Function):
    """Sum over j of w_ij x_j; the weights' gradient <g_i, x_j> is linear in the kept map, so unbiased as the map is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, matrix: CSR, kept: KeptMap | None, fp32_bytes: int) -> Tensor:
        ctx.matrix = matrix
        tensors: tuple[Tensor, ...] = ()
        if kept is not None:
            ctx.layout, tensors = kept
            ctx.saved_map = SavedMap(ctx.layout.shape, ctx.layout.stored_type, fp32_bytes, len(tensors))
        ctx.save_for_backward(*tensors, weight)
        return matrix.with_values(weight).matmul(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, weight = ctx.saved_tensors
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        grad_weight = None
        if needs_weight:
            left, right = ctx.layout.inner_product_factors(grad, tuple(tensors))
            grad_weight = ctx.matrix.sampled_matmul(left, right).to(weight.dtype)
        grad_x = ctx.matrix.with_values(weight).transposed()[0].matmul(grad) if needs_x else None
        return grad_x, grad_weight, None, None, None


class Extremum(Function):
    """Maximum or minimum over j of w_ij x_j, feature by feature; 0 where a node has no neighbour.

    Kept is which neighbour it was, as its offset within the row, in the smallest integer type that holds it; of
    equals, the first. Weights that need gradients need the map as well.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        matrix: CSR,
        maximum: bool,
        kept: KeptMap | None,
        fp32_bytes: int,
    ) -> Tensor:
        output, chosen = _extremum(x, weight, matrix, maximum=maximum)
        layout, tensors = (None, ()) if kept is None else kept
        ctx.matrix, ctx.layout, ctx.shape, ctx.parts = matrix, layout, x.shape, len(tensors)
        ctx.saved_map = SavedMap(tuple(output.shape), str(chosen.dtype).removeprefix("torch."), fp32_bytes, 1)
        ctx.save_for_backward(chosen, *tensors, *([] if weight is None else [weight]))
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        chosen, *rest = ctx.saved_tensors
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        tensors, weight = rest[: ctx.parts], rest[ctx.parts :]
        offsets, columns = ctx.matrix.offsets.long(), ctx.matrix.columns
        grad_x = grad.new_zeros(ctx.shape if needs_x else 0)
        grad_weight = torch.zeros_like(weight[0]) if needs_weight else None
        x = ctx.layout.decode(tuple(tensors)) if needs_weight else None
        rows = max(1, CHUNK_ELEMENTS // max(1, grad.size(1)))
        for start in range(0, grad.size(0) if columns.numel() else 0, rows):
            part = slice(start, start + rows)
            first, degree = offsets[:-1][part, None], offsets.diff()[part, None]
            # A node without neighbours points at some edge, and sends it nothing.
            edge = (first + chosen[part]).clamp_(max=columns.numel() - 1)  # [rows, D]
            sent = grad[part] * (degree > 0)
            source = columns[edge].long()
            if grad_weight is not None and x is not None:
                grad_weight.scatter_add_(
                    0, edge.flatten(), (sent * x.gather(0, source)).flatten().to(grad_weight.dtype)
                )
            if needs_x:
                grad_x.scatter_add_(0, source, (sent * weight[0][edge]).to(grad.dtype) if weight else sent)
        return grad_x if needs_x else None, grad_weight, None, None, None, None


def _extremum(x: Tensor, weight: Tensor | None, matrix: CSR, *, maximum: bool) -> tuple[Tensor, Tensor]:
    """Extreme w_ij x_j (N, D) and the offset of its edge within the row."""
    largest = int(matrix.offsets.diff().max()) if matrix.offsets.numel() > 1 else 0
    output = x.new_empty(matrix.offsets.numel() - 1, x.size(1))
    chosen = output.new_empty(output.shape, dtype=_offset_type(largest))
    for nodes, entries, local in matrix.row_chunks(max(1, CHUNK_ELEMENTS // max(1, x.size(1)))):
        message = x.index_select(0, matrix.columns[entries])  # [entries, D]
        if weight is not None:
            message = message.mul_(weight[entries, None].to(message.dtype))
        extreme = local.reduce_rows(message, "max" if maximum else "min")
        rows = local.rows()
        within = torch.arange(rows.numel(), device=rows.device) - local.offsets.long()[rows]
        beaten = message.ne(extreme.index_select(0, rows))
        place = within.unsqueeze(1).expand_as(beaten).masked_fill(beaten, largest)
        first = place.new_full(extreme.shape, largest).scatter_reduce_(
            0, rows.unsqueeze(1).expand_as(place), place, "amin"
        )
        output[nodes] = extreme
        # Only a NaN equals none of its row; its gradient goes to the row's first.
        chosen[nodes] = first.masked_fill_(first == largest, 0).to(chosen.dtype)
    return output, chosen


def _offset_type(largest: int) -> torch.dtype:
    """Smallest integer type for offsets below ``largest``."""
    if largest <= 2**8:
        return torch.uint8
    return torch.int16 if largest <= 2**15 else torch.int32
