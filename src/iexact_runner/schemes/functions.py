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
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from iexact_runner.compression.maps import KeptMap
from iexact_runner.kernels import block_ops, ops
from iexact_runner.kernels.reference import dropout_factor
from iexact_runner.schemes.graph_linear import linear
from iexact_runner.schemes.ownership import sole_owner
from iexact_runner.schemes.saved import SavedMap, restore_seed, save_with_seed

# Elements of a map that one step of a chunked pass works on: 1 MiB of float32, which stays in a cache.
CHUNK_ELEMENTS = 1 << 18


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
        grad_bias = grad.sum(0) if needs_bias else None
        spare = sole_owner(grad)
        grad_x = linear(grad, weight.t(), overwrite=spare) if needs_x else None
        return grad_x, grad_weight, grad_bias, None, None, None


class BatchNorm(Function):
    """BatchNorm1d in training mode; mean and variance are exact, the input comes from the kept map.

    The map is kept by ``keep(mean, 1 / deviation)``, once the statistics of its columns are known.
    d gamma and d beta are unbiased; dx is quadratic in the kept map and so has a bias of order variance / N, unless the
    map decodes to two independent estimates.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        momentum: float,
        eps: float,
        keep: Callable[[Tensor, Tensor], KeptMap],
        fp32_bytes: int,
    ) -> Tensor:
        output, mean, inverse_std = torch.native_batch_norm(
            x, weight, bias, running_mean, running_var, True, momentum, eps
        )
        layout, tensors = keep(mean, inverse_std)
        ctx.layout, ctx.eps = layout, eps
        ctx.saved_map = SavedMap(layout.shape, layout.stored_type, fp32_bytes, len(tensors))
        ctx.save_for_backward(*tensors, weight, mean, inverse_std)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, weight, mean, inverse_std = ctx.saved_tensors
        x = ctx.layout.decode(tuple(tensors))
        other = ctx.layout.independent()
        if other is not ctx.layout:
            grads = _batch_norm_backward(grad, x, weight, mean, inverse_std, again=other.decode(tuple(tensors)))
        elif grad.is_cuda or not ctx.layout.decodes_afresh:
            grads = torch.ops.aten.native_batch_norm_backward(
                grad, x, weight, None, None, mean, inverse_std, True, ctx.eps, list(ctx.needs_input_grad[:3])
            )
        else:
            grads = _batch_norm_backward(grad, x, weight, mean, inverse_std)
        return *grads, None, None, None, None, None, None


def _batch_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, inverse_std: Tensor, *, again: Tensor | None = None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of x, which takes the place of ``x`` or ``again``, of gamma and of beta.

    In chunks of rows that fit a cache, for the CPU kernel of torch needs a third map beside ``grad`` and ``x``.
    ``again`` is another estimate of x, for the second of the two places that x has in its own gradient.
    """
    rows = max(1, CHUNK_ELEMENTS // max(1, x.size(1)))
    grad_bias = grad.sum(0, dtype=mean.dtype)
    grad_weight = torch.zeros_like(mean)
    for start in range(0, x.size(0), rows):
        centred = x[start : start + rows].sub_(mean)
        grad_weight += (centred * grad[start : start + rows]).sum(0, dtype=mean.dtype)
    grad_weight *= inverse_std
    factor = inverse_std if weight is None else inverse_std * weight
    # dx = factor (g - mean(g) - x^ mean(g x^)), the mean already taken off x.
    slope, shift = factor * inverse_std * grad_weight / -x.size(0), factor * grad_bias / -x.size(0)
    if again is not None:
        x = again.sub_(mean)
    for start in range(0, x.size(0), rows):
        x[start : start + rows].mul_(slope).addcmul_(grad[start : start + rows], factor).add_(shift)
    return x, None if weight is None else grad_weight, None if weight is None else grad_bias


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
        ctx.saved_map = SavedMap(tuple(x.shape), "mask", 4 * x.numel() + _dropout_mask_bytes(x), len(masks))
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
        shape, fp32_bytes = tuple(x.shape), 4 * x.numel() + (_dropout_mask_bytes(x) if p else 0)
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


def _batch_statistics(
    x: Tensor, running_mean: Tensor | None, running_var: Tensor | None, momentum: float
) -> tuple[Tensor, Tensor]:
    """Mean and variance of each column, float32 of shape (D,); moves the running ones."""
    if isinstance(x, FakeTensor):  # torch has no rule for the shapes of its kernel
        return x.new_empty(x.size(1), dtype=torch.float32), x.new_empty(x.size(1), dtype=torch.float32)
    mean, variance = torch.ops.aten.batch_norm_update_stats(x, running_mean, running_var, momentum)
    return mean, variance


class BatchNormReLUDropout(Function):
    """:class:`BatchNorm` with gamma and beta, then :class:`LeakyReLUDropout` at slope 0, for maps kept as a sketch.

    ``keep`` keeps x^, ``keep_signs`` the sign mask beside z = gamma x^ + beta, which has the same coefficients; both
    are put together from them where they are needed.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        momentum: float,
        eps: float,
        p: float,
        seed: int | Tensor,
        backend: str,
        keep: Callable[[Tensor, Tensor], KeptMap],
        keep_signs: Callable[[Tensor], KeptMap],
        overwrite: bool = False,
    ) -> Tensor:
        # On a processor the statistics of a 16-bit map would be rounded to 16 bits.
        exact = x if x.is_cuda else x.float()
        mean, variance = _batch_statistics(exact, running_mean, running_var, momentum)
        inverse_std = (variance + eps).rsqrt()
        layout, tensors = keep(mean, inverse_std)
        output, mask = block_ops.normalize_relu_dropout(
            x, mean, inverse_std, weight, bias, p=p, seed=seed, backend=backend, overwrite=overwrite
        )
        if output is x:
            ctx.mark_dirty(x)
        ctx.signed, signed = keep_signs(mask)
        ctx.layout, ctx.p, ctx.backend, ctx.parts = layout, p, backend, len(tensors)
        # Plain modules keep the input of BatchNorm, the output of ReLU, the dropout mask, and what comes out.
        fp32_bytes = 4 * x.numel() + (_dropout_mask_bytes(x) if p else 0)
        shape, kind, parts = layout.shape, layout.stored_type, ctx.signed.parts
        ctx.saved_map = (
            SavedMap(shape, kind, 4 * x.numel(), len(tensors)),
            SavedMap(shape, kind, 4 * x.numel(), parts),
            SavedMap(shape, "mask", fp32_bytes, ctx.signed.signs.parts),
        )
        save_with_seed(ctx, seed, *tensors, *signed, weight, inverse_std)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (*tensors, weight, inverse_std), seed = restore_seed(ctx)
        signed = tuple(tensors[ctx.parts :])
        mask, (coefficients, _) = ctx.signed.mask(signed, seed), ctx.signed.factors(signed)
        directions = tensors[ctx.layout.coefficients.parts] * inverse_std.unsqueeze(1)  # of x^, in place of x
        # Where dropout is in the mask already, its factor is all that is left of it.
        p, kept = (0.0, dropout_factor(ctx.p)) if ctx.signed.signs.dropped else (ctx.p, 1.0)
        gate = dict(p=p, seed=seed, backend=ctx.backend)
        grad_bias, grad_weight = block_ops.gated_sums(grad, mask, coefficients, directions, **gate) * kept
        grad_x = None
        if ctx.needs_input_grad[0]:
            # dx = factor (g - mean(g) - x^ mean(g x^)).
            factor = weight * inverse_std
            slope, shift = factor * grad_weight / -grad.size(0), factor * grad_bias / -grad.size(0)
            factor = factor * kept
            directions, spare = directions * slope.unsqueeze(1), sole_owner(grad)
            grad_x = block_ops.gated_gradient(
                grad, mask, coefficients, directions, factor, shift, **gate, overwrite=spare
            )
        if ctx.signed.decoded is not None:
            ctx.signed.decoded.clear()
        return grad_x, grad_weight, grad_bias, *[None] * 10


class MaskedDropout(Function):
    """The same dropout with its mask kept in 1 bit an element, as EXACT's reference does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float, seed: int | Tensor, backend: str) -> Tensor:
        mask = ops.dropout_mask(x, p=p, seed=seed, backend=backend)
        ctx.p, ctx.backend = p, backend
        ctx.saved_map = SavedMap(tuple(x.shape), "mask", _dropout_mask_bytes(x), 1)
        ctx.save_for_backward(mask)
        return ops.apply_dropout_mask(x, mask, p=p, backend=backend)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (mask,) = ctx.saved_tensors
        return ops.apply_dropout_mask(grad, mask, p=ctx.p, backend=ctx.backend), None, None, None


def _dropout_mask_bytes(x: Tensor) -> int:
    """Bytes of plain dropout's mask: floats on the CPU, one byte an element on a GPU."""
    return x.numel() * (1 if x.is_cuda else 4)
