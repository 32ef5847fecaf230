"""Tiles of a map (N, D) with a sketch, whose elements go in eights: a thread has all whose bits share a byte.

A tile of ROWS x COLUMNS is two halves [ROWS, COLUMNS / 8, 4], of 16 bytes of float32 a thread each, and its masks are
bytes int32 [ROWS, COLUMNS / 8], for which no thread asks another. ``row`` is int64 [ROWS, 1], and ``eight`` int32
[1, COLUMNS / 8] counts eights of columns from the first of a row on; the last may have fewer than eight.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from iexact_runner.kernels.reference import DROPOUT
from iexact_runner.kernels.triton.common import halves, widen

_DROPOUT = tl.constexpr(DROPOUT)


@triton.jit
def columns_of(eight):
    """The columns of the left and the right half: int32 [1, COLUMNS / 8, 4] each."""
    left = eight[:, :, None] * 8 + tl.arange(0, 4)[None, None, :]
    return left, left + 4


@triton.jit
def bits_of(byte):
    """Whether the bit of each element is set in bytes [ROWS, COLUMNS / 8], for both halves."""
    lane = tl.arange(0, 4)[None, None, :]
    return (byte[:, :, None] >> lane) & 1 != 0, (byte[:, :, None] >> (4 + lane)) & 1 != 0


@triton.jit
def load_halves(ptr, row, eight, nodes, WIDTH: tl.constexpr):
    """Float32 of a map [N, D] in both halves, 0 outside of it."""
    in_left, in_right = columns_of(eight)
    place, there = row[:, :, None] * WIDTH, (row < nodes)[:, :, None]
    left = tl.load(ptr + (place + in_left), mask=there & (in_left < WIDTH), other=0.0)
    right = tl.load(ptr + (place + in_right), mask=there & (in_right < WIDTH), other=0.0)
    return widen(left), widen(right)


@triton.jit
def load_columns(ptr, eight, WIDTH: tl.constexpr):
    """A vector [D] in both halves: float32 [1, COLUMNS / 8, 4] each."""
    in_left, in_right = columns_of(eight)
    left = tl.load(ptr + in_left, mask=in_left < WIDTH, other=0.0)
    return left, tl.load(ptr + in_right, mask=in_right < WIDTH, other=0.0)


@triton.jit
def store_halves(ptr, left, right, row, eight, nodes, WIDTH: tl.constexpr):
    """Writes both halves to their places in a map [N, D]."""
    place, there = row[:, :, None] * WIDTH, (row < nodes)[:, :, None]
    if ptr.dtype.element_ty.primitive_bitwidth == 16:  # of which a whole eight is 16 bytes
        both = tl.permute(tl.join(left, right), (0, 1, 3, 2))
        column = eight[:, :, None] * 8 + tl.arange(0, 8)[None, None, :]
        both = tl.reshape(both, [left.shape[0], left.shape[1], 8])
        tl.store(ptr + (place + column), both, mask=there & (column < WIDTH))
    else:
        in_left, in_right = columns_of(eight)
        tl.store(ptr + (place + in_left), left, mask=there & (in_left < WIDTH))
        tl.store(ptr + (place + in_right), right, mask=there & (in_right < WIDTH))


@triton.jit
def combined(left, right, c_ptr, v_ptr, row, eight, nodes, rank, WIDTH: tl.constexpr):
    """Adds c V^T to both halves: c [N, R], V^T [R, D]; without a rank c [N, D] times v [D]."""
    if rank is None:
        c_left, c_right = load_halves(c_ptr, row, eight, nodes, WIDTH)
        v_left, v_right = load_columns(v_ptr, eight, WIDTH)
        left, right = left + c_left * v_left, right + c_right * v_right
    else:
        # By each thread for its own eights: a column of rows would go to all threads by way of shared memory.
        c_row, there = c_ptr + (row * rank + 0 * eight)[:, :, None], (row < nodes)[:, :, None]
        for direction in range(rank):
            c = tl.load(c_row + direction, mask=there, other=0.0)
            v_left, v_right = load_columns(v_ptr + direction * WIDTH, eight, WIDTH)
            left += c * v_left
            right += c * v_right
    return left, right


def factors(coefficients: Tensor, directions: Tensor) -> tuple[Tensor, Tensor, int | None]:
    """Coefficients (N, R), directions (R, D) for :func:`combined`, and R; columns (D,) as they are, and None."""
    if directions.dim() == 1:
        return coefficients.float().contiguous(), directions.float().contiguous(), None
    return coefficients.float().contiguous(), directions.float().T.contiguous(), directions.size(1)


@triton.jit
def mask_bytes(mask_ptr, row, eight, nodes, WIDTH: tl.constexpr):
    """Bytes of a packed mask [n / 8]; past the last column there may be anything."""
    there = (row < nodes) & (8 * eight < WIDTH)
    if WIDTH % 8 == 0:
        byte = tl.load(mask_ptr + (row * (WIDTH // 8) + eight), mask=there, other=0).to(tl.int32)
    else:
        first = row * WIDTH + 8 * eight
        shift, last = (first % 8).to(tl.int32), tl.minimum(WIDTH - 8 * eight, 8)
        low = tl.load(mask_ptr + first // 8, mask=there, other=0).to(tl.int32)
        high = tl.load(mask_ptr + first // 8 + 1, mask=there & (shift + last > 8), other=0).to(tl.int32)
        byte = ((low | (high << 8)) >> shift) & 0xFF
    return byte


@triton.jit
def _passing(seed, group, threshold):
    draws = halves(seed, group, _DROPOUT)
    byte = tl.zeros(group.shape, tl.int32)
    for lane in tl.static_range(8):
        byte |= (draws[lane].to(tl.int32) >= threshold).to(tl.int32) << lane
    return byte


@triton.jit
def passing_bytes(seed_ptr, first_group, threshold, row, eight, WIDTH: tl.constexpr, SHIFT: tl.constexpr):
    """Bytes of what dropout lets pass in a map whose first element draws at 8 * first_group + SHIFT."""
    seed, first = tl.load(seed_ptr), row * WIDTH + 8 * eight + SHIFT
    group = tl.cast(first_group, tl.int64) + first // 8
    byte = _passing(seed, group, threshold)
    if WIDTH % 8 != 0 or SHIFT != 0:  # eight elements that belong to two Philox calls
        both = byte | (_passing(seed, group + 1, threshold) << 8)
        byte = (both >> (first % 8).to(tl.int32)) & 0xFF
    return byte


@triton.jit
def gated(
    left,
    right,
    mask_ptr,
    seed_ptr,
    first_group,
    threshold,
    factor,
    row,
    drawn_row,
    eight,
    nodes,
    WIDTH: tl.constexpr,
    SHIFT: tl.constexpr,
):
    """Both halves times ``factor`` where mask and dropout let them pass, else 0; either may be None.

    A row draws what ``drawn_row`` of the whole map does.
    """
    if mask_ptr is not None:
        in_left, in_right = bits_of(mask_bytes(mask_ptr, row, eight, nodes, WIDTH))
        left, right = tl.where(in_left, left, 0.0), tl.where(in_right, right, 0.0)
    if seed_ptr is not None:
        byte = passing_bytes(seed_ptr, first_group, threshold, drawn_row, eight, WIDTH, SHIFT)
        in_left, in_right = bits_of(byte)
        left, right = tl.where(in_left, left * factor, 0.0), tl.where(in_right, right * factor, 0.0)
    return left, right
