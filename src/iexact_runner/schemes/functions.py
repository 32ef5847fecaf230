"""Autograd functions whose forward is exact and whose backward works from kept maps.

Everything a backward pass needs goes through ``save_for_backward``, so that any saved-tensor hook sees the true bytes.

Shapes: N nodes, D features, C output features.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from iexact_runner.compression.maps import KeptMap
from iexact_runner.kernels import ops
from iexact_runner.parallel.shard import column_sums
from iexact_runner.schemes.graph_linear import linear
from iexact_runner.schemes.ownership import sole_owner
from iexact_runner.schemes.saved import SavedMap, dropout_mask_bytes, restore_seed, save_with_seed


class Linear(Function):
    """x W^T + b; the weight gradient g^T x comes from the kept map, unbiased for an unbiased map."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        kept: KeptMap,
        fp32_bytes: int,
        overwrite: bool = False,
    ) -> Tensor:
        layout, tensors = kept
        ctx.layout = layout
        ctx.saved_map = SavedMap(layout.shape, layout.stored_type, fp32_bytes, len(tensors))
        ctx.save_for_backward(*tensors, weight)
        out = linear(x, weight, bias, overwrite=overwrite)
        if out is x:
            ctx.mark_dirty(x)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        # The decoded map is gone again before the next one as large is made.
        grad_weight = ctx.layout.weight_gradient(grad, tuple(tensors)) if needs_weight else None
        grad_bias = column_sums(grad) if needs_bias else None
        spare = sole_owner(grad)
        grad_x = linear(grad, weight.t(), overwrite=spare) if needs_x else None
        return grad_x, grad_weight, grad_bias, None, None, None


class LeakyReLU(Function):
    """LeakyReLU (ReLU at slope 0) that keeps the sign of its input in 1 bit an element: exact."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        negative_slope: float,
        backend: str,
        inplace: bool = False,
    ) -> Tensor:
        output, mask = ops.leaky_relu(x, negative_slope=negative_slope, backend=backend)
        ctx.negative_slope, ctx.backend = negative_slope, backend
        ctx.saved_map = SavedMap(tuple(x.shape), "mask", 4 * x.numel(), 1)
        ctx.save_for_backward(mask)
        if inplace:
            ctx.mark_dirty(x)
            return x.copy_(output)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (mask,) = ctx.saved_tensors
        return ops.leaky_relu_backward(grad, mask, negative_slope=ctx.negative_slope, backend=ctx.backend), *[None] * 3


class ELU(Function):
    """x above zero, alpha (exp(x) - 1) below; the slope is not linear in the kept input, so the gradient is biased."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, alpha: float, kept: KeptMap, fp32_bytes: int) -> Tensor:
        layout, tensors = kept
        ctx.layout, ctx.alpha, ctx.shape = layout, alpha, x.shape
        ctx.saved_map = SavedMap(tuple(x.shape), layout.stored_type, fp32_bytes, len(tensors))
        ctx.save_for_backward(*tensors)
        return F.elu(x, alpha)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x = ctx.layout.decode(tuple(ctx.saved_tensors)).view(ctx.shape)
        return torch.ops.aten.elu_backward(grad, ctx.alpha, 1.0, 1.0, False, x), None, None, None


class Dropout(Function):
    """Dropout whose mask is regenerated from the seed: exact, and nothing is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float, seed: int | Tensor, backend: str) -> Tensor:
        ctx.p, ctx.backend = p, backend
        save_with_seed(ctx, seed)
        return ops.dropout(x, p=p, seed=seed, backend=backend)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        _, seed = restore_seed(ctx)
        return ops.dropout(grad, p=ctx.p, seed=seed, backend=ctx.backend), None, None, None


class LeakyReLUDropout(Function):
    """:class:`LeakyReLU` and :class:`Dropout` (or :class:`MaskedDropout`) in one pass, with the same numbers."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        negative_slope: float,
        p: float,
        seed: int | Tensor,
        store_mask: bool,
        backend: str,
    ) -> Tensor:
        output, sign = ops.leaky_relu_dropout(x, negative_slope=negative_slope, p=p, seed=seed, backend=backend)
        masks = [sign, ops.dropout_mask(x, p=p, seed=seed, backend=backend)] if store_mask else [sign]
        ctx.negative_slope, ctx.p, ctx.backend, ctx.masks = negative_slope, p, backend, len(masks)
        # Plain modules keep the output of ReLU and the dropout mask.
        ctx.saved_map = SavedMap(tuple(x.shape), "mask", 4 * x.numel() + dropout_mask_bytes(x), len(masks))
        save_with_seed(ctx, seed, *masks)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        masks, seed = restore_seed(ctx)
        slope, backend = ctx.negative_slope, ctx.backend
        if ctx.masks == 2:
            dropped = ops.apply_dropout_mask(grad, masks[1], p=ctx.p, backend=backend)
            grad_x = ops.leaky_relu_backward(dropped, masks[0], negative_slope=slope, backend=backend)
        else:
            grad_x = ops.leaky_relu_dropout_backward(
                grad, masks[0], negative_slope=slope, p=ctx.p, seed=seed, backend=backend
            )
        return grad_x, *[None] * 5


class SketchedReLUDropout(Function):
    """ReLU and dropout of a map that is kept as a sketch, with whatever ``keep`` keeps of the sign mask beside it."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        p: float,
        seed: int | Tensor,
        backend: str,
        keep: Callable[[Tensor], KeptMap],
        inplace: bool = False,
    ) -> Tensor:
        if p:
            output, mask = ops.leaky_relu_dropout(x, negative_slope=0.0, p=p, seed=seed, backend=backend)
        else:
            output, mask = ops.leaky_relu(x, negative_slope=0.0, backend=backend)
        ctx.layout, tensors = keep(mask)
        ctx.p, ctx.backend = p, backend
        # Plain modules keep the output of ReLU, the dropout mask, and what comes out for the next layer.
        shape, fp32_bytes = tuple(x.shape), 4 * x.numel() + (dropout_mask_bytes(x) if p else 0)
        ctx.saved_map = (
            SavedMap(shape, ctx.layout.stored_type, 4 * x.numel(), ctx.layout.parts),
            SavedMap(shape, "mask", fp32_bytes, ctx.layout.signs.parts),
        )
        save_with_seed(ctx, seed, *tensors)
        if inplace:
            ctx.mark_dirty(x)
            return x.copy_(output)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        tensors, seed = restore_seed(ctx)
        mask = ctx.layout.mask(tensors, seed)
        if ctx.layout.signs.dropped:
            grad_x = ops.apply_dropout_mask(grad, mask, p=ctx.p, backend=ctx.backend)
        else:
            grad_x = ops.leaky_relu_dropout_backward(
                grad, mask, negative_slope=0.0, p=ctx.p, seed=seed, backend=ctx.backend
            )
        if ctx.layout.decoded is not None:
            ctx.layout.decoded.clear()
        return grad_x, *[None] * 5


class MaskedDropout(Function):
    """The same dropout with its mask kept in 1 bit an element, as EXACT's reference does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float, seed: int | Tensor, backend: str) -> Tensor:
        mask = ops.dropout_mask(x, p=p, seed=seed, backend=backend)
        ctx.p, ctx.backend = p, backend
        ctx.saved_map = SavedMap(tuple(x.shape), "mask", dropout_mask_bytes(x), 1)
        ctx.save_for_backward(mask)
        return ops.apply_dropout_mask(x, mask, p=p, backend=backend)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (mask,) = ctx.saved_tensors
        return ops.apply_dropout_mask(grad, mask, p=ctx.p, backend=ctx.backend), None, None, None
