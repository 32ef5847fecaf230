"""The compression formats as Triton kernels: the functions, signatures and bits of ``reference``, for a GPU.

Shapes: n elements of a map in flat row-major order, G block size, b bits a code, B = 2**b - 1 the highest code,
T elements a program, S = gcd(G, 8) elements a segment, which lies in one block.

Every launch turns off floating-point fusion: a fused multiply-add would change the last bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from iexact_runner.kernels.reference import ROUNDING, stored_dtype
from iexact_runner.kernels.triton.common import (
    TILE,
    WARPS,
    byte_count,
    bytes_of_tile,
    codes_of,
    draw16,
    drawn,
    grid,
    larger,
    levels_on,
    load_eights,
    narrow,
    pack,
    packed_bytes,
    seed_on,
    small_float,
    smaller,
    split,
    tile,
    uniform,
    unpack,
    widen,
    zero_and_scale,
)

_ROUNDING = tl.constexpr(ROUNDING)
# Far above any tile, far below 2**31: distances within a program are clipped to it and fit int32.
_FAR = tl.constexpr(1 << 30)
LARGEST_TILE = 8192


def tile_shape(width: int) -> tuple[int, int, int]:
    """How a program tiles blocks of ``width`` elements: (blocks, padded width, warps), 32 elements a thread.

    Raises:
        ValueError: if one block would not fit into the registers of a program.
    """
    padded: int = triton.next_power_of_2(width)
    if padded > LARGEST_TILE:
        raise ValueError(f"width={width}: a tile holds at most {LARGEST_TILE} elements")
    blocks = max(1, TILE // padded)
    return blocks, padded, blocks * padded * WARPS // TILE


@triton.jit
def _segments(start, width_units, WIDTH_UNIT: tl.constexpr, SEGMENT: tl.constexpr, TILE: tl.constexpr):
    """Block of each segment from ``start``: the first block (int64) and offsets from it, int32 [TILE / SEGMENT]."""
    width = tl.cast(width_units, tl.int64) * WIDTH_UNIT
    first = start // width
    # Beyond _FAR only the distance to the block's end matters.
    near = tl.minimum(width, _FAR)
    position = tl.maximum(start - first * width - (width - near), 0).to(tl.int32)
    return first, (position + tl.arange(0, TILE // SEGMENT) * SEGMENT) // near.to(tl.int32)


@triton.jit(do_not_specialize=["first_group"])
def _quantize_kernel(
    x_ptr,
    codes_ptr,
    zero_ptr,
    scale_ptr,
    levels_ptr,
    seed_ptr,
    first_group,
    units,
    width_units,
    UNIT: tl.constexpr,
    WIDTH_UNIT: tl.constexpr,
    SHIFT: tl.constexpr,
    BITS: tl.constexpr,
    BLOCKS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Blocks of G <= TILE elements, G a multiple of 8: code = round((x - zero) / scale), read once.

    x [n] -> codes [n * b / 8], zero and scale [n / G].
    """
    TOP: tl.constexpr = (1 << BITS) - 1
    DTYPE: tl.constexpr = zero_ptr.dtype.element_ty
    width = tl.cast(width_units, tl.int32) * WIDTH_UNIT
    first = tl.program_id(0).to(tl.int64) * BLOCKS
    start = first * width
    count = tl.cast(units, tl.int64) * UNIT
    row, eight = tl.arange(0, BLOCKS), tl.arange(0, TILE // 8)
    column = tl.arange(0, TILE)[None, :]
    limit = count - start
    position = (row * width)[:, None] + (eight * 8)[None, :]  # [BLOCKS, TILE / 8]
    x = load_eights(x_ptr + start, position, (eight * 8 < width)[None, :], limit)  # [BLOCKS, TILE]
    inside = (column < width) & ((row * width)[:, None] + column < limit)
    low = tl.reduce(tl.where(inside, x, float("inf")), 1, smaller)  # [BLOCKS]
    high = tl.reduce(tl.where(inside, x, float("-inf")), 1, larger)
    zero, scale = zero_and_scale(low, high, DTYPE, TOP)
    exists = row * width < limit
    tl.store(zero_ptr + first + row, zero, mask=exists)
    tl.store(scale_ptr + first + row, scale, mask=exists)

    zero, scale = widen(zero), widen(scale)
    inverse = tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)
    h = tl.where(inside & (zero == zero)[:, None], (x - zero[:, None]) * inverse[:, None], 0.0)
    group = tl.cast(first_group, tl.int64) + start // 8 + (row * (width // 8))[:, None] + eight[None, :]
    u = tl.reshape(uniform(draw16(tl.load(seed_ptr), group, _ROUNDING, SHIFT)), [BLOCKS, TILE])
    codes = tl.reshape(codes_of(h, u, levels_ptr, TOP), [BLOCKS, TILE * BITS // 8, 8 // BITS])
    byte = tl.arange(0, TILE * BITS // 8)
    width_bytes = tl.cast(width_units, tl.int32) * (WIDTH_UNIT // 8 * BITS)
    place = first * width_bytes + (row[:, None] * width_bytes + byte[None, :])  # [BLOCKS, TILE * b / 8]
    filled = (byte[None, :] < width_bytes) & (place < byte_count(units, UNIT, BITS))
    tl.store(codes_ptr + place, pack(codes, BITS), mask=filled)


@triton.jit
def _extrema_kernel(
    x_ptr,
    zero_ptr,
    scale_ptr,
    units,
    width_units,
    UNIT: tl.constexpr,
    WIDTH_UNIT: tl.constexpr,
    BITS: tl.constexpr,
    BLOCKS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Zero and scale of blocks of any size G: minimum and maximum over steps of TILE elements.

    x [n] -> zero and scale [n / G].
    """
    DTYPE: tl.constexpr = zero_ptr.dtype.element_ty
    width = tl.cast(width_units, tl.int64) * WIDTH_UNIT
    count = tl.cast(units, tl.int64) * UNIT
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    low = tl.full([BLOCKS, TILE], float("inf"), tl.float32)
    high = tl.full([BLOCKS, TILE], float("-inf"), tl.float32)
    for begin in range(0, width, TILE):
        column = begin + tl.arange(0, TILE)[None, :]
        index = (block * width)[:, None] + column  # [BLOCKS, TILE]
        inside = (column < width) & (index < count)
        x = widen(tl.load(x_ptr + index, mask=inside, other=0.0))
        low = smaller(low, tl.where(inside, x, float("inf")))
        high = larger(high, tl.where(inside, x, float("-inf")))
    low, high = tl.reduce(low, 1, smaller), tl.reduce(high, 1, larger)  # [BLOCKS]
    zero, scale = zero_and_scale(low, high, DTYPE, (1 << BITS) - 1)
    exists = block * width < count
    tl.store(zero_ptr + block, zero, mask=exists)
    tl.store(scale_ptr + block, scale, mask=exists)


@triton.jit(do_not_specialize=["first_group"])
def _codes_kernel(
    x_ptr,
    codes_ptr,
    zero_ptr,
    scale_ptr,
    levels_ptr,
    seed_ptr,
    first_group,
    units,
    width_units,
    UNIT: tl.constexpr,
    WIDTH_UNIT: tl.constexpr,
    SHIFT: tl.constexpr,
    BITS: tl.constexpr,
    SEGMENT: tl.constexpr,
    TILE: tl.constexpr,
):
    """Codes for any G, whose bytes may straddle blocks: code = round((x - zero) / scale).

    x [n], zero and scale [n / G] -> codes [n * b / 8].
    """
    TOP: tl.constexpr = (1 << BITS) - 1
    start, position, inside = tile(units, UNIT, TILE)
    eight = tl.arange(0, TILE // 8)[None, :] * 8
    limit = tl.cast(units, tl.int64) * UNIT - start
    x = tl.reshape(load_eights(x_ptr + start, eight, eight < limit, limit), [TILE // SEGMENT, SEGMENT])
    first, block = _segments(start, width_units, WIDTH_UNIT, SEGMENT, TILE)
    exists = tl.arange(0, TILE // SEGMENT) * SEGMENT < limit
    zero = widen(tl.load(zero_ptr + first + block, mask=exists, other=0.0))  # [TILE / SEGMENT]
    scale = widen(tl.load(scale_ptr + first + block, mask=exists, other=1.0))
    inverse = tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)
    h = tl.where((zero == zero)[:, None], (x - zero[:, None]) * inverse[:, None], 0.0)
    h = tl.where(inside, tl.reshape(h, [TILE]), 0.0)
    codes = codes_of(h, uniform(drawn(seed_ptr, first_group, start, _ROUNDING, SHIFT, TILE)), levels_ptr, TOP)
    packed = pack(tl.reshape(codes, [TILE * BITS // 8, 8 // BITS]), BITS)
    place, filled = bytes_of_tile(units, UNIT, BITS, TILE)
    tl.store(codes_ptr + place, packed, mask=filled)


def quantize(
    x: Tensor, *, bits: int, block_size: int, levels: tuple[float, ...] | None, seed: int | Tensor, offset: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`reference.quantize`."""
    x = x.contiguous()
    count = x.numel()
    codes = packed_bytes(count, bits, x.device)
    zero = torch.empty(-(-count // block_size), dtype=stored_dtype(x.dtype), device=x.device)
    scale = torch.empty_like(zero)
    if count == 0:
        return codes, zero, scale
    (units, unit), (width_units, width_unit) = split(count), split(block_size)
    sizes = (units, width_units, unit, width_unit)
    drawing = (levels_on(x.device, levels), seed_on(x.device, seed), offset // 8, *sizes, offset % 8, bits)
    with torch.cuda.device_of(x):
        if block_size % 8 == 0 and block_size <= LARGEST_TILE:
            blocks, width, warps = tile_shape(block_size)
            warps *= 1 if levels is None else 2  # levels keep three more registers an element
            _quantize_kernel[(triton.cdiv(zero.numel(), blocks),)](
                x, codes, zero, scale, *drawing, blocks, width, num_warps=warps, enable_fp_fusion=False
            )
            return codes, zero, scale
        blocks, width, warps = tile_shape(min(block_size, TILE))
        _extrema_kernel[(triton.cdiv(zero.numel(), blocks),)](
            x, zero, scale, *sizes, bits, blocks, width, num_warps=2 * warps, enable_fp_fusion=False
        )
        _codes_kernel[grid(count)](
            x, codes, zero, scale, *drawing, min(width_unit, 8), TILE, num_warps=2 * WARPS, enable_fp_fusion=False
        )
    return codes, zero, scale


@triton.jit
def _dequantize_kernel(
    codes_ptr,
    zero_ptr,
    scale_ptr,
    levels_ptr,
    out_ptr,
    units,
    width_units,
    UNIT: tl.constexpr,
    WIDTH_UNIT: tl.constexpr,
    BITS: tl.constexpr,
    SEGMENT: tl.constexpr,
    TILE: tl.constexpr,
):
    """Out = level(code) * scale + zero: codes [n * b / 8], zero and scale [n / G] -> out [n]."""
    start, position, inside = tile(units, UNIT, TILE)
    count = tl.cast(units, tl.int64) * UNIT
    place, filled = bytes_of_tile(units, UNIT, BITS, TILE)
    packed = tl.load(codes_ptr + place, mask=filled, other=0)
    codes = tl.reshape(unpack(packed, BITS), [TILE // SEGMENT, SEGMENT])
    steps = small_float(codes) if levels_ptr is None else tl.load(levels_ptr + codes)
    first, block = _segments(start, width_units, WIDTH_UNIT, SEGMENT, TILE)
    exists = start + tl.arange(0, TILE // SEGMENT) * SEGMENT < count
    zero = widen(tl.load(zero_ptr + first + block, mask=exists, other=0.0))  # [TILE / SEGMENT]
    scale = widen(tl.load(scale_ptr + first + block, mask=exists, other=0.0))
    out = tl.reshape(steps * scale[:, None] + zero[:, None], [TILE])
    tl.store(out_ptr + start + position, narrow(out, out_ptr.dtype.element_ty), mask=inside)


def dequantize(
    packed: Tensor,
    zero: Tensor,
    scale: Tensor,
    *,
    bits: int,
    block_size: int,
    levels: tuple[float, ...] | None,
    shape: tuple[int, ...],
    dtype: torch.dtype,
) -> Tensor:
    """See :func:`reference.dequantize`."""
    out = torch.empty(shape, dtype=dtype, device=packed.device)
    if out.numel() == 0:
        return out
    (units, unit), (width_units, width_unit) = split(out.numel()), split(block_size)
    with torch.cuda.device_of(out):
        _dequantize_kernel[grid(out.numel())](
            packed,
            zero,
            scale,
            levels_on(out.device, levels),
            out,
            units,
            width_units,
            unit,
            width_unit,
            bits,
            min(width_unit, 8),
            TILE,
            num_warps=WARPS if width_unit >= 8 else 2 * WARPS,
            enable_fp_fusion=False,
        )
    return out
