"""Autograd functions whose forward is exact and whose backward works from kept maps.

Everything a backward pass needs goes through ``save_for_backward``, so that any saved-tensor hook sees the true bytes.

Shapes: N nodes, D features, C output features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from iexact_runner.compression import ops
from iexact_runner.compression.maps import KeptMap
from iexact_runner.data.graph import Adjacency


@dataclass(frozen=True)
class SavedMap:
    """What a function tells :mod:`iexact_runner.measure` of a map it keeps.

    Args:
        shape: logical shape of the map.
        stored_type: what an element is kept as, for example ``int2``.
        fp32_bytes: bytes that plain PyG modules keep in its place on the same device.
        parts: how many of the saved tensors, from the first on, make up the map.
    """

    shape: tuple[int, ...]
    stored_type: str
    fp32_bytes: int
    parts: int


class Linear(Function):
    """x W^T + b; the weight gradient g^T x comes from the kept map, unbiased for an unbiased map."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, kept: KeptMap, fp32_bytes: int) -> Tensor:
        layout, tensors = kept
        ctx.layout = layout
        ctx.saved_map = SavedMap(layout.shape, layout.stored_type, fp32_bytes, len(tensors))
        ctx.save_for_backward(*tensors, weight)
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_x = grad @ weight if needs_x else None
        grad_weight = ctx.layout.weight_gradient(grad, tuple(tensors)) if needs_weight else None
        grad_bias = grad.sum(0) if needs_bias else None
        return grad_x, grad_weight, grad_bias, None, None


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


class BatchNorm(Function):
    """BatchNorm1d in training mode; mean and variance are exact, the input comes from the kept map.

    d gamma and d beta are unbiased; dx is quadratic in the kept map and so has a bias of order variance / N.
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
        kept: KeptMap,
        fp32_bytes: int,
    ) -> Tensor:
        layout, tensors = kept
        output, mean, inverse_std = torch.native_batch_norm(
            x, weight, bias, running_mean, running_var, True, momentum, eps
        )
        ctx.layout, ctx.eps = layout, eps
        ctx.saved_map = SavedMap(layout.shape, layout.stored_type, fp32_bytes, len(tensors))
        ctx.save_for_backward(*tensors, weight, mean, inverse_std)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, weight, mean, inverse_std = ctx.saved_tensors
        x = ctx.layout.decode(tuple(tensors))
        grads = torch.ops.aten.native_batch_norm_backward(
            grad, x, weight, None, None, mean, inverse_std, True, ctx.eps, list(ctx.needs_input_grad[:3])
        )
        return (*grads, None, None, None, None, None, None)


class LeakyReLU(Function):
    """LeakyReLU (ReLU at slope 0) that keeps the sign of its input in 1 bit an element: exact."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, negative_slope: float, backend: str) -> Tensor:
        output, mask = ops.leaky_relu(x, negative_slope=negative_slope, backend=backend)
        ctx.negative_slope, ctx.backend = negative_slope, backend
        ctx.saved_map = SavedMap(tuple(x.shape), "mask", 4 * x.numel(), 1)
        ctx.save_for_backward(mask)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (mask,) = ctx.saved_tensors
        return ops.leaky_relu_backward(grad, mask, negative_slope=ctx.negative_slope, backend=ctx.backend), None, None


class Dropout(Function):
    """Dropout whose mask is regenerated from the seed: exact, and nothing is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float, seed: int | Tensor, backend: str) -> Tensor:
        ctx.p, ctx.backend = p, backend
        _save_with_seed(ctx, seed)
        return ops.dropout(x, p=p, seed=seed, backend=backend)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        _, seed = _saved_with_seed(ctx)
        return ops.dropout(grad, p=ctx.p, seed=seed, backend=ctx.backend), None, None, None


class LeakyReLUDropout(Function):
    """:class:`LeakyReLU` and :class:`Dropout` in one pass over the map, with the same numbers."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, negative_slope: float, p: float, seed: int | Tensor, backend: str) -> Tensor:
        output, mask = ops.leaky_relu_dropout(x, negative_slope=negative_slope, p=p, seed=seed, backend=backend)
        ctx.negative_slope, ctx.p, ctx.backend = negative_slope, p, backend
        # Plain modules keep the output of ReLU and the dropout mask.
        ctx.saved_map = SavedMap(tuple(x.shape), "mask", 4 * x.numel() + _dropout_mask_bytes(x), 1)
        _save_with_seed(ctx, seed, mask)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (mask,), seed = _saved_with_seed(ctx)
        grad_x = ops.leaky_relu_dropout_backward(
            grad, mask, negative_slope=ctx.negative_slope, p=ctx.p, seed=seed, backend=ctx.backend
        )
        return grad_x, None, None, None, None


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


def _save_with_seed(ctx: Any, seed: int | Tensor, *tensors: Tensor) -> None:
    """Saves tensors and a seed, which is one of them if it is a tensor."""
    ctx.seed = None if isinstance(seed, Tensor) else seed
    ctx.save_for_backward(*tensors, *([seed] if isinstance(seed, Tensor) else []))


def _saved_with_seed(ctx: Any) -> tuple[tuple[Tensor, ...], int | Tensor]:
    if ctx.seed is not None:
        return ctx.saved_tensors, ctx.seed
    *tensors, seed = ctx.saved_tensors
    return tuple(tensors), seed
