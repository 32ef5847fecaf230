"""Coefficients of a sketch with a number of bits for each direction, on a GPU, equal to ``reference``.

Shapes: N nodes, R directions, W bits a node, a multiple of 8; a program works on ROWS nodes. R is no constant of the
kernels, so that another number of directions compiles nothing, or little: decoding compiles for each power of two.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from iexact_runner.kernels.reference import ROUNDING, inverse_steps
from iexact_runner.kernels.triton.common import WARPS, halves, seed_on, uniform

_ROUNDING = tl.constexpr(ROUNDING)
ROWS = 128
# Coefficients that a program decodes, neighbours in memory by neighbouring threads.
DECODED = 1024


@triton.jit
def _draw(seed_ptr, index):
    """16-bit draws of rounding for flat elements: int64 [ROWS] -> uint32 [ROWS]."""
    of_group = halves(tl.load(seed_ptr), index // 8, _ROUNDING)
    draws = of_group[0]
    for lane in tl.static_range(1, 8):
        draws = tl.where(index % 8 == lane, of_group[lane], draws)
    return draws


@triton.jit(do_not_specialize=["nodes", "rank"])
def _quantize_coefficients_kernel(
    c_ptr,
    bits_ptr,
    levels_ptr,
    inverse_ptr,
    seed_ptr,
    out_ptr,
    nodes,
    rank,
    BYTES: tl.constexpr,
    PLACES: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Codes of the levels about c [N, R], side by side: -> out [N, W / 8]."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = row < nodes
    place = tl.arange(0, PLACES)[None, :]
    packed = tl.zeros([ROWS, PLACES], tl.int32)
    first = 0
    for column in range(rank):
        c = tl.load(c_ptr + row * rank + column, mask=there, other=0.0)
        bits = tl.load(bits_ptr + column)
        count = 1 << bits
        code = tl.zeros([ROWS], tl.int32)
        for halving in tl.static_range(1, 9):
            step = count >> halving
            above = (step > 0) & (c >= tl.load(levels_ptr + count + code + step))
            code += tl.where(above, step, 0)
        u = 0.5
        if seed_ptr is not None:
            u = uniform(_draw(seed_ptr, row * rank + column))
        share = (c - tl.load(levels_ptr + count + code)) * tl.load(inverse_ptr + count + code)
        code += (u < share).to(tl.int32)
        shift = first - 8 * place  # [1, PLACES]
        left = code[:, None] << tl.where(shift >= 0, shift, 0)
        right = code[:, None] >> tl.where(shift < 0, -shift, 0)
        touches = (shift > -8) & (shift < 8)
        packed |= tl.where(touches, tl.where(shift >= 0, left, right), 0) & 0xFF
        first += bits
    out = out_ptr + row[:, None] * BYTES + place
    tl.store(out, packed.to(tl.uint8), mask=there[:, None] & (place < BYTES))


@triton.jit(do_not_specialize=["nodes", "rank"])
def _dequantize_coefficients_kernel(
    packed_ptr,
    bits_ptr,
    levels_ptr,
    out_ptr,
    nodes,
    rank,
    BYTES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Levels of the codes in packed [N, W / 8]: -> out [N, R], R being at most COLUMNS."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    there = (row < nodes) & (column < rank)
    bits = tl.load(bits_ptr + column, mask=column < rank, other=0)
    first = tl.cumsum(bits, axis=1) - bits
    place, count = first // 8, 1 << bits
    low = tl.load(packed_ptr + row * BYTES + place, mask=there & (place < BYTES), other=0).to(tl.int32)
    high = tl.load(packed_ptr + row * BYTES + place + 1, mask=there & (place + 1 < BYTES), other=0).to(tl.int32)
    code = ((low | (high << 8)) >> (first % 8)) & (count - 1)
    tl.store(out_ptr + row * rank + column, tl.load(levels_ptr + count + code, mask=there), mask=there)


def quantize_coefficients(
    coefficients: Tensor, bits: Tensor, levels: Tensor, *, width: int, seed: int | Tensor | None
) -> Tensor:
    """See :func:`reference.quantize_coefficients`."""
    nodes, rank = coefficients.shape
    out = torch.empty(nodes, width // 8, dtype=torch.uint8, device=coefficients.device)
    if out.numel():
        drawing = None if seed is None else seed_on(out.device, seed)
        tables = (levels, inverse_steps(levels), drawing)
        sizes = (nodes, rank, width // 8, triton.next_power_of_2(width // 8), ROWS)
        with torch.cuda.device_of(out):
            _quantize_coefficients_kernel[(triton.cdiv(nodes, ROWS),)](
                coefficients.contiguous(), bits, *tables, out, *sizes, num_warps=WARPS, enable_fp_fusion=False
            )
    return out


def dequantize_coefficients(packed: Tensor, bits: Tensor, levels: Tensor) -> Tensor:
    """See :func:`reference.dequantize_coefficients`."""
    nodes, rank = packed.size(0), bits.numel()
    out = torch.empty(nodes, rank, dtype=torch.float32, device=packed.device)
    if out.numel():
        columns = triton.next_power_of_2(rank)
        rows = max(1, DECODED // columns)
        sizes = (nodes, rank, packed.size(1), rows, columns)
        with torch.cuda.device_of(out):
            _dequantize_coefficients_kernel[(triton.cdiv(nodes, rows),)](
                packed, bits, levels, out, *sizes, num_warps=WARPS, enable_fp_fusion=False
            )
    return out
