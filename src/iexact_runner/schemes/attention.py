"""Graph attention as an autograd function: exact forward pass, and no (E, heads, C) tensor kept or formed.

Shapes: N nodes, E edges, H heads, C features a head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from iexact_runner.compression.maps import KeptMap
from iexact_runner.data.sparse import CSR
from iexact_runner.kernels import ops
from iexact_runner.schemes.ownership import sole_owner
from iexact_runner.schemes.saved import SavedMap, restore_seed, save_with_seed


class Attended(NamedTuple):
    """Output (N, H C) of attention, and the scores (N, H) of both ends of an edge."""

    output: Tensor
    source: Tensor
    target: Tensor


def attend(
    h: Tensor,
    att_source: Tensor,
    att_target: Tensor | None,
    edges: CSR,
    *,
    negative_slope: float,
    drop: Callable[[Tensor], Tensor] = lambda alpha: alpha,
    overwrite: bool = False,
) -> Attended:
    """sum_j alpha_ij h_j of h (N, H C), one head after the other, in the place of h if that may be overwritten.

    ``drop`` is what is done to alpha (E, H).
    """
    by_head = h.unflatten(1, att_source.shape[1:])
    source = node_scores(by_head, att_source)
    target = source if att_target is None else node_scores(by_head, att_target)
    alpha = drop(attention_weights(source, target, edges, negative_slope))
    output = h if overwrite else torch.empty_like(h)
    out_by_head = output.unflatten(1, att_source.shape[1:])
    for head in range(by_head.size(1)):
        out_by_head[:, head] = edges.with_values(alpha[:, head].contiguous()).matmul(by_head[:, head])
    return Attended(output, source, target)


class Attention(Function):
    """sum_j alpha_ij h_j, alpha = softmax_j(LeakyReLU(a_src . h_j + a_dst . h_i)) (GAT), with dropout on alpha.

    Kept are h as a map and the scores (N, H) exactly; the softmax and LeakyReLU's slopes are recomputed from them
    and so exact. The gradient of h is linear in the kept map, unbiased; those of a_src and a_dst hold products of
    two decoded entries and are biased by their variance. Without ``att_target``, ``att_source`` scores both ends.
    """

    @staticmethod
    def forward(
        ctx: Any,
        h: Tensor,
        att_source: Tensor,
        att_target: Tensor | None,
        edges: CSR,
        negative_slope: float,
        dropout: float,
        seed: int | Tensor,
        backend: str,
        kept: KeptMap,
        fp32_bytes: int,
        overwrite: bool = False,
    ) -> Tensor:
        def drop(alpha: Tensor) -> Tensor:
            return ops.dropout(alpha, p=dropout, seed=seed, backend=backend) if dropout else alpha

        output, source, target = attend(
            h, att_source, att_target, edges, negative_slope=negative_slope, drop=drop, overwrite=overwrite
        )
        if output is h:
            ctx.mark_dirty(h)
        layout, tensors = kept
        ctx.layout, ctx.negative_slope, ctx.dropout, ctx.backend = layout, negative_slope, dropout, backend
        ctx.parts = len(tensors)
        ctx.saved_map = SavedMap((h.size(0), *att_source.shape[1:]), layout.stored_type, fp32_bytes, len(tensors))
        vectors = [att_source] if att_target is None else [att_source, att_target]
        save_with_seed(ctx, seed, *tensors, edges.offsets, edges.columns, source, target, *vectors)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved, seed = restore_seed(ctx)
        tensors, (offsets, columns, source, target, att_source, *others) = saved[: ctx.parts], saved[ctx.parts :]
        edges = CSR(offsets, columns)
        adjoint, order = edges.transposed()
        spare = sole_owner(grad)
        by_head = grad.unflatten(1, att_source.shape[1:])
        h = ctx.layout.decode(tensors).view(by_head.shape)
        alpha = attention_weights(source, target, edges, ctx.negative_slope)

        def drop(x: Tensor) -> Tensor:
            return ops.dropout(x, p=ctx.dropout, seed=seed, backend=ctx.backend) if ctx.dropout else x

        dropped, grad_alpha = drop(alpha), torch.empty_like(alpha)
        grad_h = by_head if spare and grad.dtype == h.dtype else torch.empty_like(h)
        for head in range(by_head.size(1)):
            grad_alpha[:, head] = edges.sampled_matmul(by_head[:, head], h[:, head])
            grad_h[:, head] = adjoint.with_values(dropped[order, head]).matmul(by_head[:, head])
        grad_alpha = drop(grad_alpha)
        rows = edges.rows()
        mean = edges.reduce_rows(alpha * grad_alpha, "sum")
        grad_score = grad_alpha.sub_(mean.index_select(0, rows)).mul_(alpha)  # [E, H]
        grad_score = torch.where(_raw_scores(source, target, edges) > 0, grad_score, ctx.negative_slope * grad_score)
        grad_source = adjoint.reduce_rows(grad_score[order], "sum")  # [N, H]
        grad_target = edges.reduce_rows(grad_score, "sum")
        if not others:
            grad_source = grad_source.add_(grad_target)
        grad_h.addcmul_(grad_source.unsqueeze(-1).to(h.dtype), att_source.to(h.dtype))
        grads = [_vector_gradient(grad_source, h)]
        for att_target in others:
            grad_h.addcmul_(grad_target.unsqueeze(-1).to(h.dtype), att_target.to(h.dtype))
            grads.append(_vector_gradient(grad_target, h))
        grad_vectors = [gradient.to(att_source.dtype) for gradient in grads]
        return grad_h.flatten(1), grad_vectors[0], grad_vectors[1] if others else None, *[None] * 8


def node_scores(h: Tensor, vector: Tensor) -> Tensor:
    """Product a . h_i of every node and head (N, H), in float32 also under autocast."""
    with torch.autocast(h.device.type, enabled=False):
        return torch.einsum("nhc,hc->nh", h.float(), vector[0].float())


def _vector_gradient(grad_score: Tensor, h: Tensor) -> Tensor:
    return torch.einsum("nh,nhc->hc", grad_score.to(h.dtype), h).unsqueeze(0)


def _raw_scores(source: Tensor, target: Tensor, edges: CSR) -> Tensor:
    return source.index_select(0, edges.columns).add_(target.index_select(0, edges.rows()))


def attention_weights(source: Tensor, target: Tensor, edges: CSR, negative_slope: float) -> Tensor:
    """Attention coefficients (E, H) from the scores of both ends (N, H)."""
    return edges.softmax_rows_(F.leaky_relu(_raw_scores(source, target, edges), negative_slope))
