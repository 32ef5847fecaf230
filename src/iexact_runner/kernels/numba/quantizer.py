"""The compression kernels for the CPU, compiled by Numba: same functions, signatures and bits as ``reference``.

Shapes: n elements of a map in flat row-major order, G block size, b bits a code, B = 2**b - 1 the highest code,
C = CHUNK elements that one iteration of a parallel loop works on.
"""

from __future__ import annotations

import functools

import numba
import numpy as np
import torch
from torch import Tensor

from iexact_runner.kernels.numba.common import (
    CHUNK,
    Array,
    chunk_bounds,
    draw16,
    flat32,
    jit,
    keys,
    pack,
    parallel,
    torch_threads,
    unpack,
)
from iexact_runner.kernels.reference import DRAWS, ROUNDING, SMALLEST_SCALE, level_table, stored_dtype

_ZERO, _ONE, _HALF, _DRAW_STEP = (np.float32(number) for number in (0.0, 1.0, 0.5, 1.0 / DRAWS))
_SMALLEST_SCALE, _NAN = np.float32(SMALLEST_SCALE), np.float32(np.nan)
_MAGNITUDE, _SIGN_SHIFT = np.int32(0x7FFFFFFF), np.int32(31)
_UP = np.uint32(1)
_BFLOAT16_REST, _FLOAT16_REST = np.int32(0xFFFF), np.int32(0x1FFF)
_FLOAT16_NORMAL, _FLOAT16_MAX, _FLOAT16_STEP = np.float32(2.0**-14), np.float32(65504.0), np.float32(2.0**24)
# Comparing with all levels in turn is the faster way up to 16 of them; for 256 there is a table of where to look.
_MOST_COMPARED = 16
_CELLS = 4096
_CELLS_PER_UNIT = np.float32(_CELLS / 255)


@jit
def _extrema(x_bits: Array) -> tuple[np.float32, np.float32]:
    """Minimum and maximum of the float32 numbers with these bits (int32); a NaN ends up in one of them."""
    low, high = _MAGNITUDE, -_MAGNITUDE
    for index in range(len(x_bits)):
        # Integers in the order of the floats: unlike a minimum of floats, theirs is vectorised and sees NaNs.
        bits = x_bits[index]
        key = bits ^ ((bits >> _SIGN_SHIFT) & _MAGNITUDE)
        low, high = min(low, key), max(high, key)
    return _of_key(low), _of_key(high)


@jit
def _of_key(key: np.int32) -> np.float32:
    return np.int32(key ^ ((key >> _SIGN_SHIFT) & _MAGNITUDE)).view(np.float32)


@jit
def _round_zero(low: np.float32, is_float16: bool) -> np.float32:
    """``reference.round_down`` of a finite minimum; a float16 map's is exact already. -0.0 becomes 0.0."""
    low = np.float32(low + _ZERO)
    bits = low.view(np.int32)
    if is_float16:
        return low
    if low < _ZERO:
        bits += _BFLOAT16_REST
    return np.int32(bits & ~_BFLOAT16_REST).view(np.float32)


@jit
def _round_scale(scale: np.float32, is_float16: bool) -> np.float32:
    """``reference.round_up`` of a positive number, to bfloat16 or float16."""
    bits = np.float32(scale).view(np.int32)
    if not is_float16:
        return np.int32((bits + _BFLOAT16_REST) & ~_BFLOAT16_REST).view(np.float32)
    if scale < _FLOAT16_NORMAL:
        return np.float32(np.ceil(scale * _FLOAT16_STEP) / _FLOAT16_STEP)
    if scale > _FLOAT16_MAX:
        return np.float32(np.inf)
    return np.int32((bits + _FLOAT16_REST) & ~_FLOAT16_REST).view(np.float32)


@jit
def _normalize(x: Array, zero: np.float32, inverse: np.float32, h: Array) -> None:
    """With h = (x - zero) * inverse, NaN in a poisoned block."""
    for index in range(len(x)):
        h[index] = (x[index] - zero) * inverse


@jit
def _uniform_codes(h: Array, draws: Array, top: np.int32, codes: Array) -> None:
    """Rounds to code = floor(h) + [u < h - floor(h)], at most B; 0 where h is NaN."""
    for index in range(len(h)):
        known = h[index] if h[index] > _ZERO else _ZERO
        lower = np.floor(known)
        u = (np.float32(draws[index]) + _HALF) * _DRAW_STEP
        codes[index] = np.uint8(min(np.int32(lower) + np.int32(u < known - lower), top))


@jit
def _level_codes(h: Array, draws: Array, table: Array, inverse_width: Array, codes: Array) -> None:
    """Rounds to code = i + [u < (h - table[i]) * inverse_width[i]], with i the bin of h; 0 where h is NaN."""
    lower, slope = np.empty(len(h), np.float32), np.empty(len(h), np.float32)
    for index in range(len(h)):
        codes[index], lower[index], slope[index] = 0, table[0], inverse_width[0]
    # One level after the other for all elements: a search for each of them would not be vectorised.
    for code in range(1, len(inverse_width)):
        level, steepness = table[code], inverse_width[code]
        for index in range(len(h)):
            above = h[index] >= level
            codes[index] = np.uint8(code) if above else codes[index]
            lower[index] = level if above else lower[index]
            slope[index] = steepness if above else slope[index]
    for index in range(len(h)):
        u = (np.float32(draws[index]) + _HALF) * _DRAW_STEP
        codes[index] += np.uint8(u < (h[index] - lower[index]) * slope[index])


@jit
def _searched_codes(h: Array, draws: Array, table: Array, inverse_width: Array, lowest: Array, codes: Array) -> None:
    """The codes of :func:`_level_codes`, with the bin looked up: ``lowest`` has that of each cell of h."""
    most = lowest[-1]
    for index in range(len(h)):
        known = h[index] if h[index] > _ZERO else _ZERO
        bin_index = np.uint32(lowest[np.uint32(known * _CELLS_PER_UNIT)])
        for _ in range(most):
            following = min(bin_index + _UP, np.uint32(len(inverse_width) - 1))
            bin_index = following if known >= table[following] else bin_index
        u = (np.float32(draws[index]) + _HALF) * _DRAW_STEP
        up = u < (h[index] - table[bin_index]) * inverse_width[bin_index]
        codes[index] = np.uint8(bin_index + np.uint32(up))


@parallel
def _range_kernel(x_bits: Array, block_size: int, top: np.float32, is_float16: bool, zero: Array, scale: Array) -> None:
    """With m the minimum and M the maximum of a block, zero = down(m) and scale = up(max((M - zero) / B, 2**-126)).

    Both NaN if either is not finite: int32 (n,) -> float32 (ceil(n / G),) twice.
    """
    for block in numba.prange(len(zero)):
        start = np.int64(block) * block_size
        low, high = _extrema(x_bits[start : min(start + block_size, len(x_bits))])
        block_zero, block_scale = _NAN, _NAN
        if np.isfinite(low) and np.isfinite(high):
            block_zero = _round_zero(low, is_float16)
            block_scale = _round_scale(max((high - block_zero) / top, _SMALLEST_SCALE), is_float16)
        finite = np.isfinite(block_zero) and np.isfinite(block_scale)
        zero[block] = block_zero if finite else _NAN
        scale[block] = block_scale if finite else _NAN


@parallel
def _quantize_kernel(
    x: Array,
    zero: Array,
    scale: Array,
    table: Array | None,
    inverse_width: Array | None,
    lowest: Array | None,
    block_size: int,
    bits: int,
    key0: np.uint64,
    key1: np.uint64,
    offset: int,
    packed: Array,
) -> None:
    """Rounds h = (x - zero) / scale at random to a level beside it: float32 (n,) -> uint8 (ceil(n * b / 8),)."""
    per_byte, top = 8 // bits, np.int32(2**bits - 1)
    for chunk in numba.prange(-(-len(x) // CHUNK)):
        start, stop = chunk_bounds(chunk, len(x))
        codes, h = np.zeros(CHUNK, np.uint8), np.empty(stop - start, np.float32)
        block, first = start // block_size, start
        while first < stop:
            last = min((block + 1) * block_size, stop)
            _normalize(x[first:last], zero[block], _ONE / scale[block], h[first - start :])
            block, first = block + 1, last
        draws = draw16(offset + start, stop - start, ROUNDING, key0, key1)
        # Numba compiles the kernel for each of the three: this branch is not in the machine code.
        if table is None:
            _uniform_codes(h, draws, top, codes)
        elif lowest is None:
            _level_codes(h, draws, table, inverse_width, codes)
        else:
            _searched_codes(h, draws, table, inverse_width, lowest, codes)
        pack(codes, bits, packed[start // per_byte : -(-stop // per_byte)])


@jit
def _levels(codes: Array, table: Array | None, levels: Array) -> None:
    """Level of each code, the code itself where levels are uniform."""
    for index in range(len(levels)):
        levels[index] = np.float32(codes[index]) if table is None else table[codes[index]]


@jit
def _scale_and_shift(levels: Array, zero: np.float32, scale: np.float32, decoded: Array) -> None:
    """Decodes to level * scale + zero, rounded twice."""
    for index in range(len(decoded)):
        decoded[index] = levels[index] * scale + zero


@parallel
def _dequantize_kernel(
    packed: Array, zero: Array, scale: Array, table: Array | None, block_size: int, bits: int, decoded: Array
) -> None:
    """Decodes to zero + scale * level(code): uint8 (ceil(n * b / 8),) -> float32 (n,)."""
    per_byte = 8 // bits
    for chunk in numba.prange(-(-len(decoded) // CHUNK)):
        start, stop = chunk_bounds(chunk, len(decoded))
        codes, levels = np.empty(CHUNK, np.uint8), np.empty(stop - start, np.float32)
        unpack(packed[start // per_byte : -(-stop // per_byte)], bits, codes)
        _levels(codes, table, levels)
        block, first = start // block_size, start
        while first < stop:
            last = min((block + 1) * block_size, stop)
            _scale_and_shift(levels[first - start :], zero[block], scale[block], decoded[first:last])
            block, first = block + 1, last


def quantize(
    x: Tensor, *, bits: int, block_size: int, levels: tuple[float, ...] | None, seed: int | Tensor, offset: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`iexact_runner.kernels.reference.quantize`."""
    flat, dtype = flat32(x), stored_dtype(x.dtype)
    count = len(flat)
    size = min(block_size, max(count, 1))  # so that no product of it overflows
    packed = torch.empty(-(-count * bits // 8), dtype=torch.uint8)
    zero, scale = torch.empty(2, -(-count // size), dtype=torch.float32)
    table, inverse_width, lowest = _tables(levels)
    key0, key1 = keys(seed)
    zeros, scales = zero.numpy(), scale.numpy()
    with torch_threads():
        _range_kernel(flat.view(np.int32), size, np.float32(2**bits - 1), dtype == torch.float16, zeros, scales)
        _quantize_kernel(
            flat, zeros, scales, table, inverse_width, lowest, size, bits, key0, key1, offset, packed.numpy()
        )
    return packed, _stored(zero, dtype), _stored(scale, dtype)


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
    """See :func:`iexact_runner.kernels.reference.dequantize`."""
    decoded = torch.empty(shape, dtype=torch.float32)
    table, _, _ = _tables(levels)
    size = min(block_size, max(decoded.numel(), 1))
    with torch_threads():
        _dequantize_kernel(packed.numpy(), flat32(zero), flat32(scale), table, size, bits, decoded.view(-1).numpy())
    return decoded.to(dtype)


def _stored(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Numbers that ``dtype`` holds exactly, in that type; which NaN a conversion gives is open, here it is one."""
    stored = values.to(dtype)
    return stored.masked_fill_(stored.isnan(), torch.nan)


@functools.lru_cache(maxsize=32)
def _tables(levels: tuple[float, ...] | None) -> tuple[Array | None, Array | None, Array | None]:
    """``reference.level_table`` as arrays, and the table for :func:`_searched_codes`; None for what is not needed."""
    if levels is None:
        return None, None, None
    table, inverse_width = (part.numpy() for part in level_table(levels, torch.device("cpu")))
    return table, inverse_width, _lowest_bins(table) if len(table) > _MOST_COMPARED else None


def _lowest_bins(table: Array) -> Array:
    """For each of the cells that h falls into, the lowest bin there (C + 1,); then the most levels in any cell.

    A level in a lower cell than h is below it, and one in a higher cell above it, however the products are rounded.
    """
    cells = (table[1:-1] * _CELLS_PER_UNIT).astype(np.uint32)
    lowest = np.searchsorted(cells, np.arange(_CELLS + 1, dtype=np.uint32))
    return np.append(lowest, np.bincount(cells).max()).astype(np.uint8)
