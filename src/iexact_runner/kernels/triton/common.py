"""What the Triton kernels share: their launch geometry, and device functions that draw, convert, load and pack.

Sizes reach a kernel as (quotient, power-of-two divisor), units and UNIT: so the compiler knows what divides them,
without which it cannot load 16 bytes at once.

Conversions from and to bfloat16 work on integer bits: they then give one result on every GPU and in Triton's
interpreter, whose own bfloat16 rounding is not round-to-nearest-even.
"""

from __future__ import annotations

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from iexact_runner.kernels.reference import SMALLEST_SCALE, level_table

_SMALLEST_SCALE = tl.constexpr(SMALLEST_SCALE)

# 32 elements a thread.
TILE = 4096
WARPS = 4


def split(size: int) -> tuple[int, int]:
    """(quotient, divisor) with the largest power of two up to 16 that divides ``size``."""
    divisor = math.gcd(size, 16)
    return size // divisor, divisor


def seed_on(device: torch.device, seed: int | Tensor) -> Tensor:
    """The seed as a 0-d int64 tensor that kernels read: a tensor needs no synchronisation, an int no compilation."""
    if isinstance(seed, Tensor):
        return seed.to(device, non_blocking=True)
    return torch.full((), seed, dtype=torch.int64, device=device)


@functools.lru_cache(maxsize=32)
def levels_on(device: torch.device, levels: tuple[float, ...] | None) -> Tensor | None:
    """Levels (B + 1,), then reciprocal bin widths (B,); kept, as each copy to the device would wait for it."""
    return None if levels is None else torch.cat(level_table(levels, device))


def packed_bytes(count: int, bits: int, device: torch.device) -> Tensor:
    """Room for the packed codes of ``count`` elements."""
    return torch.empty(-(-count * bits // 8), dtype=torch.uint8, device=device)


def grid(count: int) -> tuple[int]:
    """Programs of TILE elements that cover ``count``."""
    return (triton.cdiv(count, TILE),)


@triton.jit
def halves(seed, group, PURPOSE: tl.constexpr):
    """One Philox-4x32-10 call per group: its eight 16-bit draws r(8 * group + lane), uint32, each of group's shape."""
    a, b, c, d = tl.philox(seed, group.to(tl.uint32), (group >> 32).to(tl.uint32), PURPOSE, 0)
    return a & 0xFFFF, a >> 16, b & 0xFFFF, b >> 16, c & 0xFFFF, c >> 16, d & 0xFFFF, d >> 16


@triton.jit
def draw16(seed, group, PURPOSE: tl.constexpr, SHIFT: tl.constexpr):
    """r(8 * group + SHIFT + lane) for lanes 0..7: group int64 [...] -> uint32 [..., 2, 2, 2], to be reshaped."""
    # The second call is dead code, and removed, when SHIFT is 0.
    r = halves(seed, group, PURPOSE) + halves(seed, group + 1, PURPOSE)
    even = tl.join(tl.join(r[SHIFT], r[SHIFT + 4]), tl.join(r[SHIFT + 2], r[SHIFT + 6]))
    odd = tl.join(tl.join(r[SHIFT + 1], r[SHIFT + 5]), tl.join(r[SHIFT + 3], r[SHIFT + 7]))
    return tl.join(even, odd)


@triton.jit
def uniform(r):
    """(r + 0.5) / 65536 of 16-bit draws, exact."""
    # 128 + r / 65536 by its bits, at full rate; a conversion from integers would run at a fraction of it.
    return (r | 0x43000000).to(tl.float32, bitcast=True) - (128.0 - 2.0**-17)


@triton.jit
def small_float(integer):
    """An int32 below 2**23 as float32, exact, at full rate."""
    return (integer | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0


@triton.jit
def small_int(value):
    """An int32 whose low byte is that of a whole float32 below 2**23, at full rate."""
    return (value + 8388608.0).to(tl.int32, bitcast=True)


@triton.jit
def widen(value):
    """float32 of a float32, bfloat16 or float16 value, exact."""
    if value.dtype == tl.bfloat16:
        wide = (value.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        wide = value.to(tl.float32)
    return wide


@triton.jit
def narrow(value, DTYPE: tl.constexpr):
    """float32 rounded to nearest even in DTYPE; a NaN becomes the canonical one of bfloat16."""
    if DTYPE == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        nearest = tl.where(value == value, rounded, 0x7FC0).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        nearest = value.to(DTYPE)
    return nearest


@triton.jit
def load_eights(ptr, position, exists, limit):
    """Float32 of the eight elements from each position [M, N] below limit, where ``exists`` [M, N]: [M, 8 * N]."""
    # Two loads of 16 bytes of float32, so that a thread has the very eight elements whose draws it computes.
    if ptr.dtype.element_ty == tl.float32:
        first = position[:, :, None] + tl.arange(0, 4)[None, None, :]  # [M, N, 4]
        left = tl.load(ptr + first, mask=exists[:, :, None] & (first < limit), other=0.0)
        right = tl.load(ptr + 4 + first, mask=exists[:, :, None] & (first + 4 < limit), other=0.0)
        x = tl.permute(tl.join(left, right), (0, 1, 3, 2))
    else:
        index = position[:, :, None] + tl.arange(0, 8)[None, None, :]  # [M, N, 8]
        x = widen(tl.load(ptr + index, mask=exists[:, :, None] & (index < limit), other=0.0))
    return tl.reshape(x, [position.shape[0], 8 * position.shape[1]])


@triton.jit
def bits_below(value, DTYPE: tl.constexpr):
    """Bits (int32) of the largest DTYPE number that is not above a finite float32; 0.0 for -0.0."""
    if DTYPE == tl.bfloat16:
        bits = value.to(tl.int32, bitcast=True)
        away = ((bits & 0xFFFF) != 0) & (value < 0)
        below = ((bits >> 16) & 0xFFFF) + away.to(tl.int32)
    else:  # the minimum of a float16 map is a float16 number already
        below = value.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    return tl.where(value == 0, 0, below)


@triton.jit
def bits_above(value, DTYPE: tl.constexpr):
    """Bits (int32) of the smallest DTYPE number that is not below a positive float32."""
    if DTYPE == tl.bfloat16:
        bits = value.to(tl.int32, bitcast=True)
        above = (bits >> 16) + ((bits & 0xFFFF) != 0).to(tl.int32)
    else:
        nearest = value.to(tl.float16)
        above = nearest.to(tl.int16, bitcast=True).to(tl.int32) + (nearest.to(tl.float32) < value).to(tl.int32)
    return above


@triton.jit
def zero_and_scale(low, high, DTYPE: tl.constexpr, TOP: tl.constexpr):
    """Zero = round-down(low), scale = max(round-up((high - zero) / TOP), 2**-126), in DTYPE; NaN if not finite."""
    infinity: tl.constexpr = 0x7F80 if DTYPE == tl.bfloat16 else 0x7C00
    nan: tl.constexpr = 0x7FC0 if DTYPE == tl.bfloat16 else 0x7E00
    finite = (tl.abs(low) < float("inf")) & (tl.abs(high) < float("inf"))
    zero_bits = bits_below(low, DTYPE)
    zero = widen(zero_bits.to(tl.uint16).to(DTYPE, bitcast=True))
    step = tl.maximum(tl.div_rn(high - zero, tl.full(zero.shape, TOP, tl.float32)), _SMALLEST_SCALE)
    scale_bits = bits_above(step, DTYPE)
    finite &= ((zero_bits & infinity) != infinity) & (scale_bits < infinity)
    zero_bits, scale_bits = tl.where(finite, zero_bits, nan), tl.where(finite, scale_bits, nan)
    return zero_bits.to(tl.uint16).to(DTYPE, bitcast=True), scale_bits.to(tl.uint16).to(DTYPE, bitcast=True)


@triton.jit
def uniform_codes(h, u, TOP: tl.constexpr):
    """Codes min(floor(h) + [u < h - floor(h)], TOP) of h in [0, TOP], in the low bytes of int32."""
    lower = tl.floor(h)
    code = lower + tl.where(u < h - lower, 1.0, 0.0)
    if TOP >= 15:  # below, rounding lifts h above TOP by far less than 2**-17, the smallest u
        code = tl.minimum(code, TOP * 1.0)
    return small_int(code)


@triton.jit
def level_codes(h, u, levels_ptr, TOP: tl.constexpr):
    """Codes int32 of h in [0, TOP]: h between the levels l < v becomes v if u < (h - l) / (v - l), else l.

    levels_ptr: the levels (TOP + 1,) followed by the reciprocal widths (TOP,) of the bins between them. Comparing with
    all levels in turn suits a few of them; :func:`searched_codes` is for 256.
    """
    bin_index = tl.zeros_like(h).to(tl.int32)
    lower = tl.zeros_like(h)
    inverse_width = tl.zeros_like(h) + tl.load(levels_ptr + TOP + 1)
    for inner in range(1, TOP):
        level = tl.load(levels_ptr + inner)
        above = h >= level
        bin_index += above.to(tl.int32)
        lower = tl.where(above, level, lower)
        inverse_width = tl.where(above, tl.load(levels_ptr + TOP + 1 + inner), inverse_width)
    return bin_index + (u < (h - lower) * inverse_width).to(tl.int32)


@triton.jit
def searched_codes(h, u, levels_ptr, TOP: tl.constexpr):
    """The codes of :func:`level_codes`, with the bin found by halving steps; TOP + 1 is 256."""
    bin_index = tl.zeros_like(h).to(tl.int32)
    for shift in tl.static_range(7, -1, -1):
        further = bin_index + (1 << shift)
        above = (h >= tl.load(levels_ptr + further)) & (further < TOP)
        bin_index = tl.where(above, further, bin_index)
    lower, inverse_width = tl.load(levels_ptr + bin_index), tl.load(levels_ptr + TOP + 1 + bin_index)
    return bin_index + (u < (h - lower) * inverse_width).to(tl.int32)


@triton.jit
def codes_of(h, u, levels_ptr, TOP: tl.constexpr):
    """Codes of h in [0, TOP] rounded at random, in the low bytes of int32; levels_ptr is None for levels 0..TOP."""
    if levels_ptr is None:
        codes = uniform_codes(h, u, TOP)
    elif TOP == 255:
        codes = searched_codes(h, u, levels_ptr, TOP)
    else:
        codes = level_codes(h, u, levels_ptr, TOP)
    return codes


@triton.jit
def pack(codes, BITS: tl.constexpr):
    """Bytes uint8 [...] of codes [..., 8 / BITS], the low bytes of int32; the first code comes in the lowest bits."""
    return tl.sum(codes << (tl.arange(0, 8 // BITS) * BITS), axis=len(codes.shape) - 1).to(tl.uint8)


@triton.jit
def byte_count(units, UNIT: tl.constexpr, BITS: tl.constexpr):
    """ceil(units * UNIT * BITS / 8) as int64, with its divisors in sight of the compiler."""
    units = tl.cast(units, tl.int64)
    if UNIT * BITS % 8 == 0:
        count = units * (UNIT * BITS // 8)
    else:
        count = (units * (UNIT * BITS) + 7) // 8
    return count


@triton.jit
def unpack(packed, BITS: tl.constexpr):
    """Codes int32 [N, 8 / BITS] of bytes uint8 [N]."""
    return (packed.to(tl.int32)[:, None] >> (tl.arange(0, 8 // BITS) * BITS)[None, :]) & ((1 << BITS) - 1)


@triton.jit
def smaller(a, b):
    """Minimum that a NaN always wins."""
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def larger(a, b):
    """Maximum that a NaN always wins."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def tile(units, UNIT: tl.constexpr, TILE: tl.constexpr):
    """First element of this program (int64), positions in the tile [TILE] and which of them are inside the map."""
    start = tl.program_id(0).to(tl.int64) * TILE
    position = tl.arange(0, TILE)
    return start, position, start + position < tl.cast(units, tl.int64) * UNIT


@triton.jit
def bytes_of_tile(units, UNIT: tl.constexpr, BITS: tl.constexpr, TILE: tl.constexpr):
    """Positions (int64) of this program's packed bytes [TILE * BITS / 8] and which of them exist."""
    place = tl.program_id(0).to(tl.int64) * (TILE * BITS // 8) + tl.arange(0, TILE * BITS // 8)
    return place, place < byte_count(units, UNIT, BITS)


@triton.jit
def drawn(seed_ptr, first_group, start, PURPOSE: tl.constexpr, SHIFT: tl.constexpr, TILE: tl.constexpr):
    """Draws uint32 [TILE] of the elements from ``start``, a multiple of 8."""
    group = tl.cast(first_group, tl.int64) + start // 8 + tl.arange(0, TILE // 8)
    return tl.reshape(draw16(tl.load(seed_ptr), group, PURPOSE, SHIFT), [TILE])
