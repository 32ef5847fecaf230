"""Activations, dropout and the random projection for the CPU, compiled by Numba, equal to ``reference`` bit for bit.

Shapes: n elements of a map in flat row-major order; masks are packed, 1 bit an element: uint8 (ceil(n / 8),).
"""

from __future__ import annotations

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
from iexact_runner.kernels.reference import (
    DRAWS,
    DROPOUT,
    PROJECTION,
    dropout_factor,
    dropout_threshold,
)

_ZERO = np.float32(0.0)


@jit
def passes(x: Array, codes: Array) -> None:
    """Codes = not x <= 0, so 1 for a NaN."""
    for index in range(len(x)):
        codes[index] = np.uint8(not x[index] <= _ZERO)


@jit
def activate(x: Array, slope: np.float32, y: Array) -> None:
    """With the slope s, y = x if x > 0 else s * x; at slope 0, y = 0 if x < 0 else x, which keeps -0.0 and NaN."""
    if slope == _ZERO:
        for index in range(len(x)):
            y[index] = _ZERO if x[index] < _ZERO else x[index]
    else:
        for index in range(len(x)):
            y[index] = x[index] if x[index] > _ZERO else x[index] * slope


@jit
def gate(grad: Array, codes: Array, slope: np.float32, out: Array) -> None:
    """Gradient where the code is set, slope * gradient elsewhere; at slope 0 that is 0 whatever the gradient."""
    if slope == _ZERO:
        for index in range(len(grad)):
            out[index] = grad[index] if codes[index] else _ZERO
    else:
        for index in range(len(grad)):
            out[index] = grad[index] if codes[index] else grad[index] * slope


@jit
def _scale_kept(x: Array, codes: Array, factor: np.float32, out: Array) -> None:
    """Product x * factor where the code is set, 0 elsewhere."""
    for index in range(len(x)):
        out[index] = x[index] * factor if codes[index] else _ZERO


@jit
def drop(x: Array, draws: Array, threshold: np.uint16, factor: np.float32, out: Array) -> None:
    """Product x * factor where draw >= threshold, 0 elsewhere."""
    for index in range(len(x)):
        out[index] = x[index] * factor if draws[index] >= threshold else _ZERO


@parallel
def _leaky_relu_kernel(x: Array, slope: np.float32, y: Array, mask: Array) -> None:
    """LeakyReLU and the mask not x <= 0: float32 (n,) -> float32 (n,), uint8 (ceil(n / 8),)."""
    for chunk in numba.prange(-(-len(x) // CHUNK)):
        start, stop = chunk_bounds(chunk, len(x))
        codes = np.zeros(CHUNK, np.uint8)
        passes(x[start:stop], codes)
        pack(codes, 1, mask[start // 8 : -(-stop // 8)])
        activate(x[start:stop], slope, y[start:stop])


@parallel
def _leaky_relu_backward_kernel(grad: Array, mask: Array, slope: np.float32, out: Array) -> None:
    """Gradient where the mask is set, slope * it elsewhere: float32 (n,), uint8 (ceil(n / 8),) -> float32 (n,)."""
    for chunk in numba.prange(-(-len(grad) // CHUNK)):
        start, stop = chunk_bounds(chunk, len(grad))
        codes = np.empty(CHUNK, np.uint8)
        unpack(mask[start // 8 : -(-stop // 8)], 1, codes)
        gate(grad[start:stop], codes, slope, out[start:stop])


@parallel
def _dropout_mask_kernel(
    count: int, threshold: np.uint16, key0: np.uint64, key1: np.uint64, offset: int, mask: Array
) -> None:
    """Mask r(offset + i) >= threshold: -> uint8 (ceil(n / 8),)."""
    for chunk in numba.prange(-(-count // CHUNK)):
        start, stop = chunk_bounds(chunk, count)
        codes = np.zeros(CHUNK, np.uint8)
        draws = draw16(offset + start, stop - start, DROPOUT, key0, key1)
        for index in range(stop - start):
            codes[index] = np.uint8(draws[index] >= threshold)
        pack(codes, 1, mask[start // 8 : -(-stop // 8)])


@parallel
def _scale_kept_kernel(x: Array, mask: Array, factor: np.float32, out: Array) -> None:
    """Product x * factor where the mask is set, 0 elsewhere: float32 (n,), uint8 (ceil(n / 8),) -> float32 (n,)."""
    for chunk in numba.prange(-(-len(x) // CHUNK)):
        start, stop = chunk_bounds(chunk, len(x))
        codes = np.empty(CHUNK, np.uint8)
        unpack(mask[start // 8 : -(-stop // 8)], 1, codes)
        _scale_kept(x[start:stop], codes, factor, out[start:stop])


@parallel
def _dropout_kernel(
    x: Array, threshold: np.uint16, factor: np.float32, key0: np.uint64, key1: np.uint64, offset: int, y: Array
) -> None:
    """Product x * factor where r(offset + i) >= threshold, 0 elsewhere: float32 (n,) -> float32 (n,)."""
    for chunk in numba.prange(-(-len(x) // CHUNK)):
        start, stop = chunk_bounds(chunk, len(x))
        draws = draw16(offset + start, stop - start, DROPOUT, key0, key1)
        drop(x[start:stop], draws, threshold, factor, y[start:stop])


@parallel
def _leaky_relu_dropout_kernel(
    x: Array,
    slope: np.float32,
    threshold: np.uint16,
    factor: np.float32,
    key0: np.uint64,
    key1: np.uint64,
    offset: int,
    y: Array,
    mask: Array,
) -> None:
    """LeakyReLU, its mask and dropout in one pass: float32 (n,) -> float32 (n,), uint8 (ceil(n / 8),)."""
    for chunk in numba.prange(-(-len(x) // CHUNK)):
        start, stop = chunk_bounds(chunk, len(x))
        # A buffer of its own: loops that write what they read are not vectorised.
        codes, activated = np.zeros(CHUNK, np.uint8), np.empty(stop - start, np.float32)
        draws = draw16(offset + start, stop - start, DROPOUT, key0, key1)
        passes(x[start:stop], codes)
        pack(codes, 1, mask[start // 8 : -(-stop // 8)])
        activate(x[start:stop], slope, activated)
        drop(activated, draws, threshold, factor, y[start:stop])


@parallel
def _leaky_relu_dropout_backward_kernel(
    grad: Array,
    mask: Array,
    slope: np.float32,
    threshold: np.uint16,
    factor: np.float32,
    key0: np.uint64,
    key1: np.uint64,
    offset: int,
    out: Array,
) -> None:
    """Dropout of the gradient, then the mask, in one pass: float32 (n,), uint8 (ceil(n / 8),) -> float32 (n,)."""
    for chunk in numba.prange(-(-len(grad) // CHUNK)):
        start, stop = chunk_bounds(chunk, len(grad))
        codes, dropped = np.empty(CHUNK, np.uint8), np.empty(stop - start, np.float32)
        draws = draw16(offset + start, stop - start, DROPOUT, key0, key1)
        unpack(mask[start // 8 : -(-stop // 8)], 1, codes)
        drop(grad[start:stop], draws, threshold, factor, dropped)
        gate(dropped, codes, slope, out[start:stop])


@parallel
def _rademacher_kernel(size: np.float32, key0: np.uint64, key1: np.uint64, signs: Array) -> None:
    """Size where r(i) >= 2**15, else -size: -> float32 (n,)."""
    for chunk in numba.prange(-(-len(signs) // CHUNK)):
        start, stop = chunk_bounds(chunk, len(signs))
        draws = draw16(start, stop - start, PROJECTION, key0, key1)
        piece = signs[start:stop]
        for index in range(len(piece)):
            piece[index] = size if draws[index] >= DRAWS // 2 else -size


def leaky_relu(x: Tensor, *, negative_slope: float) -> tuple[Tensor, Tensor]:
    """See :func:`iexact_runner.kernels.reference.leaky_relu`."""
    y, mask = torch.empty(x.shape, dtype=torch.float32), empty_mask(x.numel())
    with torch_threads():
        _leaky_relu_kernel(flat32(x), np.float32(negative_slope), flat32(y), mask.numpy())
    return y.to(x.dtype), mask


def leaky_relu_backward(grad: Tensor, packed_mask: Tensor, *, negative_slope: float) -> Tensor:
    """See :func:`iexact_runner.kernels.reference.leaky_relu_backward`."""
    out = torch.empty(grad.shape, dtype=torch.float32)
    with torch_threads():
        _leaky_relu_backward_kernel(flat32(grad), packed_mask.numpy(), np.float32(negative_slope), flat32(out))
    return out.to(grad.dtype)


def dropout_mask(count: int, *, p: float, seed: int | Tensor, device: torch.device, offset: int = 0) -> Tensor:
    """See :func:`iexact_runner.kernels.reference.dropout_mask`; ``device`` is the CPU."""
    mask = empty_mask(count)
    with torch_threads():
        _dropout_mask_kernel(count, np.uint16(dropout_threshold(p)), *keys(seed), offset, mask.numpy())
    return mask


def apply_dropout_mask(x: Tensor, packed_mask: Tensor, *, p: float) -> Tensor:
    """See :func:`iexact_runner.kernels.reference.apply_dropout_mask`."""
    out = torch.empty(x.shape, dtype=torch.float32)
    with torch_threads():
        _scale_kept_kernel(flat32(x), packed_mask.numpy(), np.float32(dropout_factor(p)), flat32(out))
    return out.to(x.dtype)


def dropout(x: Tensor, *, p: float, seed: int | Tensor, offset: int = 0) -> Tensor:
    """See :func:`iexact_runner.kernels.reference.dropout`."""
    y = torch.empty(x.shape, dtype=torch.float32)
    with torch_threads():
        _dropout_kernel(flat32(x), *dropout_numbers(p), *keys(seed), offset, flat32(y))
    return y.to(x.dtype)


def leaky_relu_dropout(
    x: Tensor, *, negative_slope: float, p: float, seed: int | Tensor, offset: int = 0
) -> tuple[Tensor, Tensor]:
    """See :func:`iexact_runner.kernels.reference.leaky_relu_dropout`."""
    if x.dtype != torch.float32:  # then the activation is rounded before dropout scales it
        activated, mask = leaky_relu(x, negative_slope=negative_slope)
        return dropout(activated, p=p, seed=seed, offset=offset), mask
    y, mask = torch.empty(x.shape, dtype=torch.float32), empty_mask(x.numel())
    slope, numbers = np.float32(negative_slope), (*dropout_numbers(p), *keys(seed))
    with torch_threads():
        _leaky_relu_dropout_kernel(flat32(x), slope, *numbers, offset, flat32(y), mask.numpy())
    return y, mask


def leaky_relu_dropout_backward(
    grad: Tensor, packed_mask: Tensor, *, negative_slope: float, p: float, seed: int | Tensor, offset: int = 0
) -> Tensor:
    """See :func:`iexact_runner.kernels.reference.leaky_relu_dropout_backward`."""
    if grad.dtype != torch.float32:  # then the gradient is rounded after dropout has scaled it
        dropped = dropout(grad, p=p, seed=seed, offset=offset)
        return leaky_relu_backward(dropped, packed_mask, negative_slope=negative_slope)
    out = torch.empty(grad.shape, dtype=torch.float32)
    slope, numbers = np.float32(negative_slope), (*dropout_numbers(p), *keys(seed))
    with torch_threads():
        _leaky_relu_dropout_backward_kernel(flat32(grad), packed_mask.numpy(), slope, *numbers, offset, flat32(out))
    return out


def rademacher(rows: int, columns: int, *, seed: int | Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """See :func:`iexact_runner.kernels.reference.rademacher`; ``device`` is the CPU."""
    signs = torch.empty(rows, columns, dtype=torch.float32)
    with torch_threads():
        _rademacher_kernel(np.float32(columns**-0.5), *keys(seed), flat32(signs))
    return signs.to(dtype)


def empty_mask(count: int) -> Tensor:
    """Room for a packed mask."""
    return torch.empty(-(-count // 8), dtype=torch.uint8)


def dropout_numbers(p: float) -> tuple[np.uint16, np.float32]:
    """Threshold of the draws and factor of the elements that stay."""
    return np.uint16(dropout_threshold(p)), np.float32(dropout_factor(p))
