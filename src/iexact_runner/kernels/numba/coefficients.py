"""Coefficients of a sketch with a number of bits for each direction, on the CPU, equal to ``reference``.

Shapes: N nodes, R directions, W bits a node, a multiple of 8.
"""

from __future__ import annotations

import numba
import numpy as np
import torch
from torch import Tensor

from iexact_runner.kernels.numba.common import Array, draw16, flat32, jit, keys, parallel, torch_threads
from iexact_runner.kernels.reference import DRAWS, ROUNDING, inverse_steps

# Rows of a run: whole groups of eight draws whatever R is.
_ROWS = 256
_HALF, _DRAW_STEP = np.float32(0.5), np.float32(1.0 / DRAWS)
_BYTE, _LOW = np.uint64(8), np.uint64(0xFF)
# Comparing with all levels in turn is the faster way up to 5 bits.
_MOST_COMPARED = 32


@jit
def _codes(c: Array, u: Array, count: int, levels: Array, inverses: Array, codes: Array) -> None:
    """Numbers of the levels that c (n,) becomes, of ``count`` levels that stand at ``count`` in the table."""
    codes[:] = 0
    if count <= _MOST_COMPARED:
        for number in range(1, count):
            level = levels[count + number]
            for index in range(len(c)):
                codes[index] += np.uint32(c[index] >= level)
    else:
        step = count >> 1
        while step:
            for index in range(len(c)):
                above = c[index] >= levels[count + np.int64(codes[index]) + step]
                codes[index] += np.uint32(step * above)
            step >>= 1
    for index in range(len(c)):
        place = count + np.int64(codes[index])
        codes[index] += np.uint32(u[index] < (c[index] - levels[place]) * inverses[place])


@jit
def _pack_rows(codes: Array, bits: Array, packed: Array) -> None:
    """Puts the codes (R, n) of each node side by side: (n, W / 8)."""
    for node in range(packed.shape[0]):
        held, have, place = np.uint64(0), np.uint64(0), 0
        for column in range(len(bits)):
            held |= np.uint64(codes[column, node]) << have
            have += np.uint64(bits[column])
            while have >= _BYTE:
                packed[node, place] = np.uint8(held & _LOW)
                held >>= _BYTE
                have -= _BYTE
                place += 1
        for rest in range(place, packed.shape[1]):
            packed[node, rest] = np.uint8(held & _LOW)
            held >>= _BYTE


@parallel
def _quantize_kernel(
    coefficients: Array,
    bits: Array,
    levels: Array,
    inverses: Array,
    stochastic: bool,
    key0: np.uint64,
    key1: np.uint64,
    packed: Array,
) -> None:
    """Packed codes of each node: (N, R) -> (N, W / 8)."""
    nodes, rank = coefficients.shape
    for run in numba.prange(-(-nodes // _ROWS)):
        first = np.int64(run) * _ROWS
        last = min(first + _ROWS, nodes)
        draws = draw16(first * rank, (last - first) * rank if stochastic else 0, ROUNDING, key0, key1)
        codes = np.empty((rank, last - first), np.uint32)
        c, u = np.empty(last - first, np.float32), np.full(last - first, _HALF)
        for column in range(rank):
            for node in range(last - first):
                c[node] = coefficients[first + node, column]
            if stochastic:
                for node in range(last - first):
                    u[node] = (np.float32(draws[node * rank + column]) + _HALF) * _DRAW_STEP
            _codes(c, u, 1 << bits[column], levels, inverses, codes[column])
        _pack_rows(codes, bits, packed[first:last])


@parallel
def _dequantize_kernel(packed: Array, bits: Array, starts: Array, levels: Array, out: Array) -> None:
    """Levels of the codes: (N, W / 8) -> (N, R)."""
    nodes, rank = out.shape
    size = packed.shape[1]
    for run in numba.prange(-(-nodes // _ROWS)):
        first = np.int64(run) * _ROWS
        row = np.zeros(size + 2, np.uint32)
        for node in range(first, min(first + _ROWS, nodes)):
            for place in range(size):
                row[place] = packed[node, place]
            for column in range(rank):
                place = starts[column] >> 3
                pair = row[place] | (row[place + 1] << np.uint32(8))
                count = np.uint32(1) << np.uint32(bits[column])
                code = (pair >> np.uint32(starts[column] & 7)) & (count - np.uint32(1))
                out[node, column] = levels[count + code]


def quantize_coefficients(
    coefficients: Tensor, bits: Tensor, levels: Tensor, *, width: int, seed: int | Tensor | None
) -> Tensor:
    """See :func:`iexact_runner.kernels.reference.quantize_coefficients`."""
    packed = torch.empty(coefficients.size(0), width // 8, dtype=torch.uint8)
    key0, key1 = keys(0 if seed is None else seed)
    values = flat32(coefficients).reshape(coefficients.shape)
    table, inverses = levels.numpy(), inverse_steps(levels).numpy()
    with torch_threads():
        _quantize_kernel(values, bits.numpy(), table, inverses, seed is not None, key0, key1, packed.numpy())
    return packed


def dequantize_coefficients(packed: Tensor, bits: Tensor, levels: Tensor) -> Tensor:
    """See :func:`iexact_runner.kernels.reference.dequantize_coefficients`."""
    out = torch.empty(packed.size(0), bits.numel(), dtype=torch.float32)
    with torch_threads():
        _dequantize_kernel(packed.numpy(), bits.numpy(), _starts(bits), levels.numpy(), out.numpy())
    return out


def _starts(bits: Tensor) -> Array:
    """First bit of each direction's codes."""
    starts: Array = (bits.cumsum(0) - bits).numpy()
    return starts
