"""The quantized product of a map with a few columns, in one pass over the map; see ``quantizer``.

Shapes: N nodes, D features, R columns, G = K R block size; a program works on ROWS rows.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from iexact_runner.kernels.reference import ROUNDING, stored_dtype
from iexact_runner.kernels.triton.common import (
    WARPS,
    codes_of,
    draw16,
    larger,
    levels_on,
    pack,
    packed_bytes,
    seed_on,
    smaller,
    uniform,
    widen,
    zero_and_scale,
)
from iexact_runner.kernels.triton.quantizer import quantize

_ROUNDING = tl.constexpr(ROUNDING)
# Rows of a program, and elements of its product: 32 a thread.
ROWS = 64
LARGEST_PRODUCT = 4096
# Features that are multiplied at a time.
COLUMNS = 32
# tl.dot multiplies no less.
LEAST_COLUMNS = 16


def fits(z: Tensor, rank: int, block_size: int) -> bool:
    """Whether :func:`quantize_product` takes the map: whole blocks and bytes in the rows of a program."""
    rows = block_size // rank
    whole = rank % 8 == 0 and block_size % rank == 0 and rows & (rows - 1) == 0 and rows <= ROWS
    return z.dtype == torch.float32 and whole and ROWS * triton.next_power_of_2(rank) <= LARGEST_PRODUCT


@triton.jit(do_not_specialize=["nodes"])
def _quantize_product_kernel(
    z_ptr,
    matrix_ptr,
    shift_ptr,
    codes_ptr,
    zero_ptr,
    scale_ptr,
    levels_ptr,
    seed_ptr,
    nodes,
    WIDTH: tl.constexpr,
    RANK: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PADDED: tl.constexpr,
):
    """Product c = z M + shift, code = round((c - zero) / scale).

    z [N, D], M [D, R], shift [R] -> codes [N R b / 8], zero and scale [N / K].
    """
    TOP: tl.constexpr = (1 << BITS) - 1
    BLOCKS: tl.constexpr = ROWS // BLOCK_ROWS
    first = tl.program_id(0).to(tl.int64) * ROWS
    row = first + tl.arange(0, ROWS)[:, None]
    there = row < nodes
    rank = tl.arange(0, PADDED)[None, :]
    product = tl.zeros([ROWS, PADDED], tl.float32)
    for start in range(0, WIDTH, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        z = tl.load(z_ptr + (row * WIDTH + column[None, :]), mask=there & (column[None, :] < WIDTH), other=0.0)
        inside = (column[:, None] < WIDTH) & (rank < RANK)
        matrix = tl.load(matrix_ptr + (column[:, None] * RANK + rank), mask=inside, other=0.0)
        product = tl.dot(z, matrix, product, input_precision="ieee")
    product += tl.load(shift_ptr + rank, mask=rank < RANK, other=0.0)
    inside = there & (rank < RANK)
    low = tl.reshape(tl.where(inside, product, float("inf")), [BLOCKS, BLOCK_ROWS * PADDED])
    high = tl.reshape(tl.where(inside, product, float("-inf")), [BLOCKS, BLOCK_ROWS * PADDED])
    low, high = tl.reduce(low, 1, smaller), tl.reduce(high, 1, larger)  # [BLOCKS]
    zero, scale = zero_and_scale(low, high, zero_ptr.dtype.element_ty, TOP)
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    exists = block * BLOCK_ROWS < nodes
    tl.store(zero_ptr + block, zero, mask=exists)
    tl.store(scale_ptr + block, scale, mask=exists)

    zero, scale = widen(zero), widen(scale)
    inverse = tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)
    product = tl.reshape(product, [BLOCKS, BLOCK_ROWS * PADDED])
    h = tl.where((zero == zero)[:, None], (product - zero[:, None]) * inverse[:, None], 0.0)
    h = tl.where(inside, tl.reshape(h, [ROWS, PADDED]), 0.0)
    group = row * (RANK // 8) + tl.arange(0, PADDED // 8)[None, :]
    u = tl.reshape(uniform(draw16(tl.load(seed_ptr), group, _ROUNDING, 0)), [ROWS, PADDED])
    codes = tl.reshape(codes_of(h, u, levels_ptr, TOP), [ROWS, PADDED * BITS // 8, 8 // BITS])
    byte = tl.arange(0, PADDED * BITS // 8)[None, :]
    place = row * (RANK * BITS // 8) + byte
    tl.store(codes_ptr + place, pack(codes, BITS), mask=there & (byte < RANK * BITS // 8))


def _fused_product(
    z: Tensor,
    matrix: Tensor,
    shift: Tensor,
    *,
    bits: int,
    block_size: int,
    levels: tuple[float, ...] | None,
    seed: int | Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`reference.quantize_product`, for what :func:`fits`; products are in float32, not in TF32."""
    (nodes, width), rank = z.shape, matrix.size(1)
    z, matrix = z.contiguous(), matrix.contiguous()
    codes = packed_bytes(nodes * rank, bits, z.device)
    zero = torch.empty(-(-nodes * rank // block_size), dtype=stored_dtype(z.dtype), device=z.device)
    scale = torch.empty_like(zero)
    if nodes:
        kept = (codes, zero, scale, levels_on(z.device, levels), seed_on(z.device, seed))
        padded = max(LEAST_COLUMNS, triton.next_power_of_2(rank))
        sizes = (nodes, width, rank, bits, block_size // rank, ROWS, COLUMNS, padded)
        with torch.cuda.device_of(z):
            _quantize_product_kernel[(triton.cdiv(nodes, ROWS),)](
                z, matrix, shift, *kept, *sizes, num_warps=WARPS, enable_fp_fusion=False
            )
    return codes, zero, scale


def quantize_product(
    z: Tensor,
    matrix: Tensor,
    shift: Tensor,
    *,
    bits: int,
    block_size: int,
    levels: tuple[float, ...] | None,
    seed: int | Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`reference.quantize_product`; the product is a map of its own where it does not fit a program."""
    form: dict[str, Any] = {"bits": bits, "block_size": block_size, "levels": levels, "seed": seed}
    if fits(z, matrix.size(1), block_size):
        return _fused_product(z, matrix, shift, **form)
    return quantize(torch.addmm(shift, z, matrix), **form)
