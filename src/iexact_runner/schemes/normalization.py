"""BatchNorm whose backward pass works from kept maps, over all rows of a graph or with other processes that have some.

Shapes: N nodes, D features.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from iexact_runner.compression.directions import per_feature
from iexact_runner.compression.maps import KeptMap
from iexact_runner.kernels import block_ops
from iexact_runner.kernels.reference import dropout_factor
from iexact_runner.parallel.shard import WHOLE, Shard, column_statistics
from iexact_runner.schemes.ownership import sole_owner
from iexact_runner.schemes.saved import SavedMap, dropout_mask_bytes, restore_seed, save_with_seed

# Elements of a map that one step of a chunked pass works on: 1 MiB of float32, which stays in a cache.
CHUNK_ELEMENTS = 1 << 18


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
        shard: Shard = WHOLE,
    ) -> Tensor:
        if shard.distributed:
            mean, variance = column_statistics(x, running_mean, running_var, momentum, shard)
            inverse_std = (variance + eps).rsqrt()
            output = F.batch_norm(x, mean, variance, weight, bias, eps=eps)
        else:
            output, mean, inverse_std = torch.native_batch_norm(
                x, weight, bias, running_mean, running_var, True, momentum, eps
            )
        layout, tensors = keep(mean, inverse_std)
        ctx.layout, ctx.eps, ctx.shard = layout, eps, shard
        ctx.saved_map = SavedMap(layout.shape, layout.stored_type, fp32_bytes, len(tensors))
        ctx.save_for_backward(*tensors, weight, mean, inverse_std)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, weight, mean, inverse_std = ctx.saved_tensors
        x = ctx.layout.decode(tuple(tensors))
        other, shard = ctx.layout.independent(), ctx.shard
        if other is not ctx.layout:
            again = other.decode(tuple(tensors))
            grads = _batch_norm_backward(grad, x, weight, mean, inverse_std, again=again, shard=shard)
        elif shard.distributed:
            x = x if ctx.layout.decodes_afresh else x.clone()
            grads = _batch_norm_backward(grad, x, weight, mean, inverse_std, shard=shard)
        elif grad.is_cuda or not ctx.layout.decodes_afresh:
            grads = torch.ops.aten.native_batch_norm_backward(
                grad, x, weight, None, None, mean, inverse_std, True, ctx.eps, list(ctx.needs_input_grad[:3])
            )
        else:
            grads = _batch_norm_backward(grad, x, weight, mean, inverse_std)
        return *grads, *[None] * 7


def _batch_norm_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    inverse_std: Tensor,
    *,
    again: Tensor | None = None,
    shard: Shard = WHOLE,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of x, which takes the place of ``x`` or ``again``, and what these rows add to those of gamma and beta.

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
    sum_weight, sum_bias = shard.sum_(torch.stack([grad_weight, grad_bias])) / -shard.count(x)
    slope, shift = factor * inverse_std * sum_weight, factor * sum_bias
    if again is not None:
        x = again.sub_(mean)
    for start in range(0, x.size(0), rows):
        x[start : start + rows].mul_(slope).addcmul_(grad[start : start + rows], factor).add_(shift)
    return x, None if weight is None else grad_weight, None if weight is None else grad_bias


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
        shard: Shard = WHOLE,
    ) -> Tensor:
        mean, variance = column_statistics(x, running_mean, running_var, momentum, shard)
        inverse_std = (variance + eps).rsqrt()
        layout, tensors = keep(mean, inverse_std)
        output, mask = block_ops.normalize_relu_dropout(
            x, mean, inverse_std, weight, bias, p=p, seed=seed, backend=backend, overwrite=overwrite
        )
        if output is x:
            ctx.mark_dirty(x)
        ctx.signed, signed = keep_signs(mask)
        ctx.layout, ctx.p, ctx.backend, ctx.parts, ctx.shard = layout, p, backend, len(tensors), shard
        # Plain modules keep the input of BatchNorm, the output of ReLU, the dropout mask, and what comes out.
        fp32_bytes = 4 * x.numel() + (dropout_mask_bytes(x) if p else 0)
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
        directions = tensors[ctx.layout.coefficients.parts]
        directions = directions * per_feature(inverse_std, directions)  # of x^, in place of x
        # Where dropout is in the mask already, its factor is all that is left of it.
        p, kept = (0.0, dropout_factor(ctx.p)) if ctx.signed.signs.dropped else (ctx.p, 1.0)
        gate = dict(p=p, seed=seed, backend=ctx.backend)
        grad_bias, grad_weight = block_ops.gated_sums(grad, mask, coefficients, directions, **gate) * kept
        grad_x = None
        if ctx.needs_input_grad[0]:
            # dx = factor (g - mean(g) - x^ mean(g x^)).
            factor = weight * inverse_std
            sum_weight, sum_bias = ctx.shard.sum_(torch.stack([grad_weight, grad_bias])) / -ctx.shard.count(grad)
            slope, shift = factor * sum_weight, factor * sum_bias
            factor = factor * kept
            directions, spare = directions * per_feature(slope, directions), sole_owner(grad)
            grad_x = block_ops.gated_gradient(
                grad, mask, coefficients, directions, factor, shift, **gate, overwrite=spare
            )
        if ctx.signed.decoded is not None:
            ctx.signed.decoded.clear()
        return grad_x, grad_weight, grad_bias, *[None] * 11


def momentum_of(norm: nn.BatchNorm1d) -> float:
    """Weight of the new batch in the running statistics, counted as ``nn.BatchNorm1d`` does."""
    if norm.num_batches_tracked is None:
        return 0.0
    norm.num_batches_tracked.add_(1)
    return 1.0 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
