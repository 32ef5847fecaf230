"""Triton kernels of the element-wise maps; see ``triton_kernels``. Shapes: n elements, T of them a program."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from iexact_runner.kernels.reference import DRAWS, DROPOUT, PROJECTION, dropout_factor, dropout_threshold
from iexact_runner.kernels.triton.common import (
    TILE,
    WARPS,
    bytes_of_tile,
    drawn,
    grid,
    narrow,
    pack,
    packed_bytes,
    seed_on,
    split,
    tile,
    unpack,
    widen,
)

_DROPOUT, _PROJECTION = tl.constexpr(DROPOUT), tl.constexpr(PROJECTION)
_HALF = tl.constexpr(DRAWS // 2)


def _dropping(x: Tensor, p: float, seed: int | Tensor, offset: int) -> tuple[object, ...]:
    """Kernel arguments from the seed to SHIFT."""
    return (
        seed_on(x.device, seed),
        offset // 8,
        dropout_threshold(p),
        dropout_factor(p),
        *split(x.numel()),
        offset % 8,
    )


@triton.jit
def _leak(x, passes, slope, DTYPE: tl.constexpr):
    """Float32 x where ``passes``, else slope * x rounded to DTYPE; 0 at slope 0, where inf * 0 is a NaN."""
    return tl.where(passes, x, tl.where(slope == 0, 0.0, widen(narrow(x * slope, DTYPE))))


@triton.jit
def _activate(x, passes, slope, DTYPE: tl.constexpr):
    """Float32 LeakyReLU of x, rounded to DTYPE; at slope 0 a -0.0 stays, as in PyTorch's ReLU on a processor."""
    return tl.where((slope == 0) & (x == 0), x, _leak(x, passes, slope, DTYPE))


@triton.jit
def scale_kept(x, draws, threshold, factor, DTYPE: tl.constexpr):
    """Float32 x * factor, rounded to DTYPE, where the draw is not below the threshold, else 0."""
    return tl.where(draws.to(tl.int32) >= threshold, widen(narrow(x * factor, DTYPE)), 0.0)


@triton.jit
def store_mask(mask_ptr, mask, units, UNIT: tl.constexpr, TILE: tl.constexpr):
    """Packs mask, bool [TILE], and stores its bytes [TILE / 8]."""
    place, filled = bytes_of_tile(units, UNIT, 1, TILE)
    tl.store(mask_ptr + place, pack(tl.reshape(mask.to(tl.int32), [TILE // 8, 8]), 1), mask=filled)


@triton.jit
def _load_mask(mask_ptr, units, UNIT: tl.constexpr, TILE: tl.constexpr):
    """Inverse of :func:`store_mask`."""
    place, filled = bytes_of_tile(units, UNIT, 1, TILE)
    return tl.reshape(unpack(tl.load(mask_ptr + place, mask=filled, other=0), 1), [TILE]) != 0


@triton.jit
def _leaky_relu_kernel(x_ptr, out_ptr, mask_ptr, slope, units, UNIT: tl.constexpr, TILE: tl.constexpr):
    """Out = x if not x <= 0 else slope * x: x [n] -> out [n], mask of the first case [n / 8]."""
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    start, position, inside = tile(units, UNIT, TILE)
    x = widen(tl.load(x_ptr + start + position, mask=inside, other=0.0))
    passes = (x > 0) | (x != x)
    tl.store(out_ptr + start + position, narrow(_activate(x, passes, slope, DTYPE), DTYPE), mask=inside)
    store_mask(mask_ptr, passes & inside, units, UNIT, TILE)


def leaky_relu(x: Tensor, *, negative_slope: float) -> tuple[Tensor, Tensor]:
    """See :func:`reference.leaky_relu`."""
    x = x.contiguous()
    out, mask = torch.empty_like(x), packed_bytes(x.numel(), 1, x.device)
    if x.numel():
        with torch.cuda.device_of(x):
            _leaky_relu_kernel[grid(x.numel())](
                x, out, mask, float(negative_slope), *split(x.numel()), TILE, num_warps=WARPS, enable_fp_fusion=False
            )
    return out, mask


@triton.jit
def _leaky_relu_backward_kernel(grad_ptr, mask_ptr, out_ptr, slope, units, UNIT: tl.constexpr, TILE: tl.constexpr):
    """Out = grad if mask else slope * grad: grad [n], mask [n / 8] -> out [n]."""
    DTYPE: tl.constexpr = grad_ptr.dtype.element_ty
    start, position, inside = tile(units, UNIT, TILE)
    grad = widen(tl.load(grad_ptr + start + position, mask=inside, other=0.0))
    passes = _load_mask(mask_ptr, units, UNIT, TILE)
    tl.store(out_ptr + start + position, narrow(_leak(grad, passes, slope, DTYPE), DTYPE), mask=inside)


def leaky_relu_backward(grad: Tensor, packed_mask: Tensor, *, negative_slope: float) -> Tensor:
    """See :func:`reference.leaky_relu_backward`."""
    grad = grad.contiguous()
    out = torch.empty_like(grad)
    if grad.numel():
        slope = float(negative_slope)
        with torch.cuda.device_of(grad):
            _leaky_relu_backward_kernel[grid(grad.numel())](
                grad, packed_mask, out, slope, *split(grad.numel()), TILE, num_warps=WARPS, enable_fp_fusion=False
            )
    return out


@triton.jit(do_not_specialize=["first_group", "threshold"])
def _dropout_mask_kernel(
    mask_ptr,
    seed_ptr,
    first_group,
    threshold,
    units,
    UNIT: tl.constexpr,
    SHIFT: tl.constexpr,
    TILE: tl.constexpr,
):
    """Mask = draw >= threshold: [n / 8]."""
    start, _, inside = tile(units, UNIT, TILE)
    draws = drawn(seed_ptr, first_group, start, _DROPOUT, SHIFT, TILE)
    store_mask(mask_ptr, (draws.to(tl.int32) >= threshold) & inside, units, UNIT, TILE)


def dropout_mask(count: int, *, p: float, seed: int | Tensor, device: torch.device, offset: int = 0) -> Tensor:
    """See :func:`reference.dropout_mask`."""
    mask = packed_bytes(count, 1, device)
    if count:
        drawing = (seed_on(device, seed), offset // 8, dropout_threshold(p), *split(count), offset % 8)
        with torch.cuda.device_of(mask):
            _dropout_mask_kernel[grid(count)](mask, *drawing, TILE, num_warps=WARPS, enable_fp_fusion=False)
    return mask


@triton.jit
def _apply_dropout_mask_kernel(x_ptr, mask_ptr, out_ptr, factor, units, UNIT: tl.constexpr, TILE: tl.constexpr):
    """Out = x * factor if mask else 0: x [n], mask [n / 8] -> out [n]."""
    start, position, inside = tile(units, UNIT, TILE)
    x = widen(tl.load(x_ptr + start + position, mask=inside, other=0.0))
    out = tl.where(_load_mask(mask_ptr, units, UNIT, TILE), x * factor, 0.0)
    tl.store(out_ptr + start + position, narrow(out, out_ptr.dtype.element_ty), mask=inside)


def apply_dropout_mask(x: Tensor, packed_mask: Tensor, *, p: float) -> Tensor:
    """See :func:`reference.apply_dropout_mask`."""
    x = x.contiguous()
    out = torch.empty_like(x)
    if x.numel():
        with torch.cuda.device_of(x):
            _apply_dropout_mask_kernel[grid(x.numel())](
                x, packed_mask, out, dropout_factor(p), *split(x.numel()), TILE, num_warps=WARPS, enable_fp_fusion=False
            )
    return out


@triton.jit(do_not_specialize=["first_group", "threshold"])
def _dropout_kernel(
    x_ptr,
    out_ptr,
    seed_ptr,
    first_group,
    threshold,
    factor,
    units,
    UNIT: tl.constexpr,
    SHIFT: tl.constexpr,
    TILE: tl.constexpr,
):
    """Out = x * factor if draw >= threshold else 0: x [n] -> out [n]."""
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    start, position, inside = tile(units, UNIT, TILE)
    x = widen(tl.load(x_ptr + start + position, mask=inside, other=0.0))
    draws = drawn(seed_ptr, first_group, start, _DROPOUT, SHIFT, TILE)
    tl.store(out_ptr + start + position, narrow(scale_kept(x, draws, threshold, factor, DTYPE), DTYPE), mask=inside)


def dropout(x: Tensor, *, p: float, seed: int | Tensor, offset: int = 0) -> Tensor:
    """See :func:`reference.dropout`."""
    x = x.contiguous()
    out = torch.empty_like(x)
    if x.numel():
        with torch.cuda.device_of(x):
            _dropout_kernel[grid(x.numel())](
                x, out, *_dropping(x, p, seed, offset), TILE, num_warps=WARPS, enable_fp_fusion=False
            )
    return out


@triton.jit(do_not_specialize=["first_group", "threshold"])
def _leaky_relu_dropout_kernel(
    x_ptr,
    out_ptr,
    mask_ptr,
    slope,
    seed_ptr,
    first_group,
    threshold,
    factor,
    units,
    UNIT: tl.constexpr,
    SHIFT: tl.constexpr,
    TILE: tl.constexpr,
):
    """Out = dropout(leaky_relu(x)): x [n] -> out [n], mask of the elements that pass the latter unchanged [n / 8]."""
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    start, position, inside = tile(units, UNIT, TILE)
    x = widen(tl.load(x_ptr + start + position, mask=inside, other=0.0))
    passes = (x > 0) | (x != x)
    draws = drawn(seed_ptr, first_group, start, _DROPOUT, SHIFT, TILE)
    out = scale_kept(_activate(x, passes, slope, DTYPE), draws, threshold, factor, DTYPE)
    tl.store(out_ptr + start + position, narrow(out, DTYPE), mask=inside)
    store_mask(mask_ptr, passes & inside, units, UNIT, TILE)


def leaky_relu_dropout(
    x: Tensor, *, negative_slope: float, p: float, seed: int | Tensor, offset: int = 0
) -> tuple[Tensor, Tensor]:
    """See :func:`reference.leaky_relu_dropout`."""
    x = x.contiguous()
    out, mask = torch.empty_like(x), packed_bytes(x.numel(), 1, x.device)
    if x.numel():
        drawing = (float(negative_slope), *_dropping(x, p, seed, offset))
        with torch.cuda.device_of(x):
            _leaky_relu_dropout_kernel[grid(x.numel())](
                x, out, mask, *drawing, TILE, num_warps=WARPS, enable_fp_fusion=False
            )
    return out, mask


@triton.jit(do_not_specialize=["first_group", "threshold"])
def _leaky_relu_dropout_backward_kernel(
    grad_ptr,
    mask_ptr,
    out_ptr,
    slope,
    seed_ptr,
    first_group,
    threshold,
    factor,
    units,
    UNIT: tl.constexpr,
    SHIFT: tl.constexpr,
    TILE: tl.constexpr,
):
    """Out = leaky_relu_backward(dropout(grad), mask): grad [n], mask [n / 8] -> out [n]."""
    DTYPE: tl.constexpr = grad_ptr.dtype.element_ty
    start, position, inside = tile(units, UNIT, TILE)
    grad = widen(tl.load(grad_ptr + start + position, mask=inside, other=0.0))
    passes = _load_mask(mask_ptr, units, UNIT, TILE)
    draws = drawn(seed_ptr, first_group, start, _DROPOUT, SHIFT, TILE)
    out = _leak(scale_kept(grad, draws, threshold, factor, DTYPE), passes, slope, DTYPE)
    tl.store(out_ptr + start + position, narrow(out, DTYPE), mask=inside)


def leaky_relu_dropout_backward(
    grad: Tensor, packed_mask: Tensor, *, negative_slope: float, p: float, seed: int | Tensor, offset: int = 0
) -> Tensor:
    """See :func:`reference.leaky_relu_dropout_backward`."""
    grad = grad.contiguous()
    out = torch.empty_like(grad)
    if grad.numel():
        drawing = (float(negative_slope), *_dropping(grad, p, seed, offset))
        with torch.cuda.device_of(grad):
            _leaky_relu_dropout_backward_kernel[grid(grad.numel())](
                grad, packed_mask, out, *drawing, TILE, num_warps=WARPS, enable_fp_fusion=False
            )
    return out


@triton.jit
def _rademacher_kernel(out_ptr, seed_ptr, magnitude, units, UNIT: tl.constexpr, TILE: tl.constexpr):
    """Out = magnitude if draw >= 1/2 else -magnitude: [n]."""
    start, position, inside = tile(units, UNIT, TILE)
    draws = drawn(seed_ptr, 0, start, _PROJECTION, 0, TILE)
    out = tl.where(draws.to(tl.int32) >= _HALF, magnitude, -magnitude)
    tl.store(out_ptr + start + position, narrow(out, out_ptr.dtype.element_ty), mask=inside)


def rademacher(rows: int, columns: int, *, seed: int | Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """See :func:`reference.rademacher`."""
    out = torch.empty(rows, columns, dtype=dtype, device=device)
    if out.numel():
        with torch.cuda.device_of(out):
            _rademacher_kernel[grid(out.numel())](
                out,
                seed_on(device, seed),
                columns**-0.5,
                *split(out.numel()),
                TILE,
                num_warps=WARPS,
                enable_fp_fusion=False,
            )
    return out
