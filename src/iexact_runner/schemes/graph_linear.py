"""A linear map of the neighbours' features and one of a node's own, in as few maps as it takes.

Shapes: N nodes, D features, C output features.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from iexact_runner.compression.maps import KeptMap
from iexact_runner.data.graph import Adjacency
from iexact_runner.parallel.shard import column_sums
from iexact_runner.schemes.ownership import sole_owner
from iexact_runner.schemes.saved import SavedMap

# Elements that are multiplied at once where a product takes the place of its factor: 512 KiB of float32 on a CPU.
CHUNK_ELEMENTS = 1 << 17
GPU_CHUNK_ELEMENTS = 1 << 22


class Mix(NamedTuple):
    """Of a weight W (D, D): factor * W + identity * I in its place (GCNII); the matrix itself is never made."""

    factor: float
    identity: float


class GraphWeights(NamedTuple):
    """Parameters of A (x W^T) + b + y V^T: W (C, D), b (C,), V (C, D), and what stands for W and V."""

    weight: Tensor
    bias: Tensor | None = None
    own: Tensor | None = None
    mixes: tuple[Mix | None, Mix | None] = (None, None)


def graph_linear(
    x: Tensor, adjacency: Adjacency, weights: GraphWeights, *, own: Tensor | None = None, overwrite: bool = False
) -> Tensor:
    """A (x W^T) + b + y V^T for x (N, D) and y = ``own`` (N, D), or x without it; without V there is no such term.

    ``overwrite`` gives x up: the result takes its place where D = C, and what comes between where C < D.
    """
    weight, bias, own_weight, (mix, own_mix) = weights
    if own_weight is not None and own is None:
        product = linear(x, weight, mix=mix)
        out = linear(x, own_weight, mix=own_mix, overwrite=overwrite)
        return adjacency.matmul(product, bias=bias, out=out, add=True)
    width = weight.size(0)
    if overwrite and width < x.size(1) and weight.dtype == x.dtype:
        out = adjacency.matmul(_linear_into(x[:, :width], x, weight), bias=bias)
    else:
        out = adjacency.matmul_(linear(x, weight, mix=mix, overwrite=overwrite), bias=bias)
    return out if own is None or own_weight is None else add_linear(out, own, own_weight, mix=own_mix)


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, mix: Mix | None = None, overwrite: bool = False
) -> Tensor:
    """X W^T + b, which may take the place of x (N, D): it does where W is (D, D)."""
    if not overwrite or weight.size(0) != x.size(1) or weight.dtype != x.dtype or not x.is_contiguous():
        return _product(x, weight, bias, mix)
    return _linear_into(x, x, weight, bias, mix)


def add_linear(out: Tensor, x: Tensor, weight: Tensor, *, mix: Mix | None = None) -> Tensor:
    """Adds x W^T to ``out`` (N, C), in place."""
    # A GPU adds up where it multiplies. A CPU would round some sums differently from those of plain PyG.
    if out.is_cuda and mix is None and out.dtype == x.dtype == weight.dtype and not torch.is_autocast_enabled("cuda"):
        return out.addmm_(x, weight.t())
    for own, part in zip(_row_parts(out, wide=x), _row_parts(x), strict=True):
        own.add_(_product(part, weight, None, mix))
    return out


def _linear_into(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None, mix: Mix | None = None) -> Tensor:
    """Writes x W^T + b to ``out`` (N, C), which may be x or its first columns."""
    for own, part in zip(_row_parts(out, wide=x), _row_parts(x), strict=True):
        own.copy_(_product(part, weight, bias, mix))
    return out


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, mix: Mix | None) -> Tensor:
    product = F.linear(x, weight, bias)
    return product if mix is None else product.mul_(mix.factor).add_(x, alpha=mix.identity)


def _row_parts(x: Tensor, *, wide: Tensor | None = None) -> Iterator[Tensor]:
    """Runs of rows, as many at once as elements of ``wide`` allow; none is one row of many.

    A product of one row is rounded differently from that row of a larger one.
    """
    elements = CHUNK_ELEMENTS if x.device.type == "cpu" else GPU_CHUNK_ELEMENTS
    nodes, rows = x.size(0), max(2, elements // max(1, (x if wide is None else wide).size(1)))
    start, rows = 0, nodes if isinstance(x, FakeTensor) else rows  # which has no memory to save
    while start < nodes:
        stop = nodes if nodes - start <= rows + 1 else start + rows
        yield x[start:stop]
        start = stop


class GraphLinear(Function):
    """:func:`graph_linear`, its weights' gradients from the kept maps of x and, if it has another one, of y.

    Beside the gradient of its output, the backward pass makes one map more, or none where it has no ``own_weight`` and
    may overwrite that gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        own: Tensor | None,
        weight: Tensor,
        own_weight: Tensor | None,
        bias: Tensor | None,
        adjacency: Adjacency,
        kept: KeptMap,
        own_kept: KeptMap | None,
        mixes: tuple[Mix | None, Mix | None],
        fp32_bytes: list[int],
        overwrite: bool,
    ) -> Tensor:
        ctx.mixes = mixes
        ctx.adjacency, ctx.layout, ctx.parts = adjacency, kept.layout, len(kept.tensors)
        ctx.own_layout = None if own_kept is None else own_kept.layout
        maps, described = [kept], [SavedMap(kept.layout.shape, kept.layout.stored_type, fp32_bytes[0], ctx.parts)]
        if own_kept is not None:
            maps.append(own_kept)
            layout, parts = own_kept.layout, len(own_kept.tensors)
            described.append(SavedMap(layout.shape, layout.stored_type, fp32_bytes[1], parts))
        ctx.saved_map = tuple(described)
        ctx.save_for_backward(*(tensor for each in maps for tensor in each.tensors), weight, own_weight)
        weights = GraphWeights(weight, bias, own_weight, mixes)
        out = graph_linear(x, adjacency, weights, own=own, overwrite=overwrite)
        if out is x:
            ctx.mark_dirty(x)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, weight, own_weight = ctx.saved_tensors
        kept, own_kept = tuple(tensors[: ctx.parts]), tuple(tensors[ctx.parts :])
        needs_x, needs_own, needs_weight, needs_own_weight, needs_bias = ctx.needs_input_grad[:5]
        grad_own = grad_weight = grad_own_weight = grad_x = None
        grad_bias = column_sums(grad) if needs_bias else None
        spare = sole_owner(grad)
        in_place = spare and own_weight is None
        received = ctx.adjacency.adjoint_matmul_(grad) if in_place else ctx.adjacency.adjoint_matmul(grad)
        if own_weight is not None and ctx.own_layout is None:
            grad_weight, grad_own_weight = ctx.layout.weight_gradients([received, grad], kept)
        else:
            grad_weight = ctx.layout.weight_gradient(received, kept) if needs_weight else None
            grad_own_weight = ctx.own_layout.weight_gradient(grad, own_kept) if needs_own_weight else None
        mix, own_mix = ctx.mixes
        if needs_own:
            weights = GraphWeights(weight, None, own_weight, ctx.mixes)
            grad_x, grad_own = _both_gradients(received, grad, weights, overwrite=spare)
        elif needs_x:
            grad_x = linear(received, weight.t(), mix=mix, overwrite=True)
            if own_weight is not None and ctx.own_layout is None:
                add_linear(grad_x, grad, own_weight.t(), mix=own_mix)
        if mix is not None and grad_weight is not None:
            grad_weight.mul_(mix.factor)
        if own_mix is not None and grad_own_weight is not None:
            grad_own_weight.mul_(own_mix.factor)
        return grad_x, grad_own, grad_weight, grad_own_weight, grad_bias, *[None] * 6


def _both_gradients(received: Tensor, grad: Tensor, weights: GraphWeights, *, overwrite: bool) -> tuple[Tensor, Tensor]:
    """Products received W and grad V (N, D), in the place of their factors where these may be overwritten.

    The first takes the place of ``grad``: autograd adds other gradients to the second, in place if its memory was never
    asked after.
    """
    weight, _, own_weight, (mix, own_mix) = weights
    assert own_weight is not None
    if not overwrite or weight.size(0) != weight.size(1):
        grad_own = linear(grad, own_weight.t(), mix=own_mix)
        return linear(received, weight.t(), mix=mix, overwrite=True), grad_own
    for part, own in zip(_row_parts(received), _row_parts(grad), strict=True):
        product = _product(part, weight.t(), None, mix)
        part.copy_(_product(own, own_weight.t(), None, own_mix))
        own.copy_(product)
    return grad, received
