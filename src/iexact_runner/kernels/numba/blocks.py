"""What a block with BatchNorm does around its sketch, in single passes for the CPU, equal to ``reference``.

Shapes: N nodes, D features, R directions; masks are packed, 1 bit an element: uint8 (ceil(N D / 8),). Directions of the
columns themselves are one row (1, D) of factors.
Maps are worked on in runs of rows that begin with a packed byte and stay in the first-level cache.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from iexact_runner.kernels.numba.common import (
    CHUNK,
    Array,
    draw16,
    flat32,
    jit,
    keys,
    pack,
    parallel,
    torch_threads,
    unpack,
)
from iexact_runner.kernels.numba.elementwise import (
    activate,
    drop,
    dropout_numbers,
    empty_mask,
    gate,
    leaky_relu_dropout,
    passes,
)
from iexact_runner.kernels.reference import DROPOUT

# Threshold of the draws, factor of what stays, and Philox key.
Drawing = tuple[np.uint16, np.float32, np.uint64, np.uint64, int]
_ZERO = np.float32(0.0)
# Parts of a map whose sums are taken one by one: a fixed number, so that they do not depend on that of the threads.
_PARTS = 64


def _rows(width: int) -> int:
    """Rows of a run: a multiple of 8, about CHUNK elements."""
    return max(8, CHUNK // max(width, 1) // 8 * 8)


@jit
def _bounds(first: Any, rows: int, nodes: int, width: int) -> tuple[Any, Any, Any, Any]:
    """First row of a run and the one past its last, and the same of its elements."""
    last = first + rows if first + rows < nodes else nodes
    return first, last, first * width, last * width


# Rows are indexed, not sliced: each slice would be counted, at the price of an atomic operation.
@jit
def _normalize(h: Array, mean: Array, inverse_std: Array, weight: Array, bias: Array, out: Array) -> None:
    """Rows (h - mean) inverse_std weight + bias, rounded at every step: (n, D) and (D,) -> (n, D)."""
    for row in range(out.shape[0]):
        for column in range(out.shape[1]):
            centred = h[row, column] - mean[column]
            out[row, column] = centred * inverse_std[column] * weight[column] + bias[column]


@jit
def combine(coefficients: Array, directions: Array, shift: Array, out: Array) -> None:
    """Rows c V^T + shift, added up in the order of R: (n, R), (R, D), (D,) -> (n, D)."""
    if coefficients.shape[1] != directions.shape[0]:
        for row in range(out.shape[0]):
            for column in range(out.shape[1]):
                out[row, column] = shift[column] + coefficients[row, column] * directions[0, column]
        return
    fours = directions.shape[0] // 4 * 4
    for row in range(out.shape[0]):
        for column in range(out.shape[1]):
            out[row, column] = shift[column]
        # Four at a time: each sum is then loaded and stored a quarter as often.
        for rank in range(0, fours, 4):
            c0, c1 = coefficients[row, rank], coefficients[row, rank + 1]
            c2, c3 = coefficients[row, rank + 2], coefficients[row, rank + 3]
            for column in range(out.shape[1]):
                total = out[row, column] + c0 * directions[rank, column]
                total += c1 * directions[rank + 1, column]
                total += c2 * directions[rank + 2, column]
                out[row, column] = total + c3 * directions[rank + 3, column]
        for rank in range(fours, directions.shape[0]):
            coefficient = coefficients[row, rank]
            for column in range(out.shape[1]):
                out[row, column] += coefficient * directions[rank, column]


@jit
def _add_sums(gated: Array, combined: Array, sums: Array) -> None:
    """Adds the sums over the rows of g and of g (c V^T): (n, D) -> (2, D)."""
    for row in range(gated.shape[0]):
        for column in range(gated.shape[1]):
            sums[0, column] += gated[row, column]
            sums[1, column] += gated[row, column] * combined[row, column]


@jit
def _scale_and_add(gated: Array, factor: Array, combined: Array, out: Array) -> None:
    """Rows g factor + (c V^T + shift): (n, D)."""
    for row in range(out.shape[0]):
        for column in range(out.shape[1]):
            out[row, column] = gated[row, column] * factor[column] + combined[row, column]


@jit
def _dropped(x: Array, first: int, drawing: Drawing, out: Array) -> None:
    """Dropout of the elements from number ``first`` on; a threshold of 0 drops none."""
    threshold, factor, key0, key1, offset = drawing
    if threshold == 0:
        out[:] = x
    else:
        drop(x, draw16(offset + first, len(x), DROPOUT, key0, key1), threshold, factor, out)


@parallel
def _normalize_relu_dropout_kernel(
    h: Array,
    mean: Array,
    inverse_std: Array,
    weight: Array,
    bias: Array,
    drawing: Drawing,
    rows: int,
    y: Array,
    mask: Array,
) -> None:
    """Dropout(ReLU(v)) with v = (h - mean) inverse_std weight + bias, and the mask not v <= 0."""
    nodes, width = h.shape
    for index in numba.prange(-(-nodes // rows)):
        first, last, start, stop = _bounds(np.int64(index) * rows, rows, nodes, width)
        # Buffers of their own: loops that write what they read are not vectorised.
        normalised, activated = np.empty((last - first, width), np.float32), np.empty(stop - start, np.float32)
        codes = np.zeros(rows * width, np.uint8)
        _normalize(h[first:last], mean, inverse_std, weight, bias, normalised)
        passes(normalised.reshape(-1), codes)
        pack(codes, 1, mask[start // 8 : -(-stop // 8)])
        activate(normalised.reshape(-1), _ZERO, activated)
        _dropped(activated, start, drawing, y[start:stop])


@jit
def _gated(grad: Array, mask: Array, first: int, drawing: Drawing) -> Array:
    """Gradient behind dropout and ReLU, of the elements from number ``first`` on."""
    codes, dropped, gated = np.empty((len(grad) + 7) // 8 * 8, np.uint8), np.empty_like(grad), np.empty_like(grad)
    _dropped(grad, first, drawing, dropped)
    unpack(mask, 1, codes)
    gate(dropped, codes, _ZERO, gated)
    return gated


@parallel
def _gated_sums_kernel(
    grad: Array,
    mask: Array,
    coefficients: Array,
    directions: Array,
    drawing: Drawing,
    rows: int,
    sums: Array,
) -> None:
    """Sums of g and of g (c V^T) over each part: (N D,) -> float64 (parts, 2, D)."""
    nodes, width = len(coefficients), directions.shape[1]
    each = -(-nodes // (len(sums) * rows)) * rows
    shift = np.zeros(width, np.float32)
    for part in numba.prange(len(sums)):
        begin, end, _, _ = _bounds(np.int64(part) * each, each, nodes, width)
        for first in range(begin, end, rows):
            _, last, start, stop = _bounds(first, rows, nodes, width)
            gated = _gated(grad[start:stop], mask[start // 8 : -(-stop // 8)], start, drawing).reshape((-1, width))
            combined = np.empty_like(gated)
            combine(coefficients[first:last], directions, shift, combined)
            run = np.zeros((2, width), np.float32)
            _add_sums(gated, combined, run)
            sums[part] += run


@parallel
def _gated_gradient_kernel(
    grad: Array,
    mask: Array,
    coefficients: Array,
    directions: Array,
    scale: Array,
    shift: Array,
    drawing: Drawing,
    rows: int,
    out: Array,
) -> None:
    """Gradient scale g + (c V^T + shift): (N D,) -> (N, D)."""
    nodes, width = len(coefficients), directions.shape[1]
    for index in numba.prange(-(-nodes // rows)):
        first, last, start, stop = _bounds(np.int64(index) * rows, rows, nodes, width)
        gated = _gated(grad[start:stop], mask[start // 8 : -(-stop // 8)], start, drawing).reshape((-1, width))
        combined = np.empty_like(gated)
        combine(coefficients[first:last], directions, shift, combined)
        _scale_and_add(gated, scale, combined, out[first:last])


@parallel
def _decode_relu_dropout_kernel(
    coefficients: Array,
    directions: Array,
    shift: Array,
    mask: Array | None,
    drawing: Drawing,
    rows: int,
    out: Array,
) -> None:
    """Dropout(mask(c V^T + shift)): (n, R) -> (n D,)."""
    nodes, width = len(coefficients), directions.shape[1]
    for index in numba.prange(-(-nodes // rows)):
        first, last, start, stop = _bounds(np.int64(index) * rows, rows, nodes, width)
        decoded, gated = np.empty((last - first, width), np.float32), np.empty(stop - start, np.float32)
        combine(coefficients[first:last], directions, shift, decoded)
        combined = decoded.reshape(-1)
        # Numba compiles the kernel for both: this branch is not in the machine code.
        if mask is None:
            gated[:] = combined
        else:
            codes = np.empty((stop - start + 7) // 8 * 8, np.uint8)
            unpack(mask[start // 8 : -(-stop // 8)], 1, codes)
            gate(combined, codes, _ZERO, gated)
        _dropped(gated, start, drawing, out[start:stop])


def normalize_relu_dropout(
    h: Tensor,
    mean: Tensor,
    inverse_std: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    p: float,
    seed: int | Tensor,
    offset: int = 0,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See :func:`iexact_runner.kernels.reference.normalize_relu_dropout`."""
    if h.dtype != torch.float32:  # then the normalised map is rounded before its sign is looked at
        normalised = (h.float() - mean) * inverse_std * weight + bias
        y, mask = leaky_relu_dropout(normalised.to(h.dtype), negative_slope=0.0, p=p, seed=seed, offset=offset)
        return (y if out is None else out.copy_(y)), mask
    y, mask = torch.empty(h.shape, dtype=torch.float32) if out is None else out, empty_mask(h.numel())
    vectors = [flat32(vector) for vector in (mean, inverse_std, weight, bias)]
    numbers = ((*dropout_numbers(p), *keys(seed), offset), _rows(h.size(1)))
    if h.numel():
        with torch_threads():
            _normalize_relu_dropout_kernel(flat32(h).reshape(h.shape), *vectors, *numbers, flat32(y), mask.numpy())
    return y, mask


def decode_relu_dropout(
    coefficients: Tensor,
    directions: Tensor,
    shift: Tensor,
    packed_mask: Tensor | None,
    *,
    p: float,
    seed: int | Tensor,
    offset: int = 0,
) -> Tensor:
    """See :func:`iexact_runner.kernels.reference.decode_relu_dropout`."""
    out = torch.empty(coefficients.size(0), directions.size(0), dtype=torch.float32)
    mask = None if packed_mask is None else packed_mask.numpy()
    arrays = (*factors(coefficients, directions), flat32(shift))
    numbers = ((*dropout_numbers(p), *keys(seed), offset), _rows(directions.size(0)))
    with torch_threads():
        _decode_relu_dropout_kernel(*arrays, mask, *numbers, flat32(out))
    return out


def gated_sums(
    grad: Tensor,
    packed_mask: Tensor,
    coefficients: Tensor,
    directions: Tensor,
    *,
    p: float,
    seed: int | Tensor,
    offset: int = 0,
) -> Tensor:
    """See :func:`iexact_runner.kernels.reference.gated_sums`."""
    sums = np.zeros((_PARTS, 2, directions.size(0)))
    numbers = ((*dropout_numbers(p), *keys(seed), offset), _rows(directions.size(0)))
    arrays = factors(coefficients, directions)
    with torch_threads():
        _gated_sums_kernel(flat32(grad), packed_mask.numpy(), *arrays, *numbers, sums)
    return torch.from_numpy(sums).sum(0).float()


def gated_gradient(
    grad: Tensor,
    packed_mask: Tensor,
    coefficients: Tensor,
    directions: Tensor,
    factor: Tensor,
    shift: Tensor,
    *,
    p: float,
    seed: int | Tensor,
    offset: int = 0,
    out: Tensor | None = None,
) -> Tensor:
    """See :func:`iexact_runner.kernels.reference.gated_gradient`."""
    direct = out is not None and out.dtype == torch.float32
    result = out if out is not None and direct else torch.empty(grad.shape, dtype=torch.float32)
    arrays = (*factors(coefficients, directions), flat32(factor), flat32(shift))
    numbers = ((*dropout_numbers(p), *keys(seed), offset), _rows(directions.size(0)))
    with torch_threads():
        _gated_gradient_kernel(flat32(grad), packed_mask.numpy(), *arrays, *numbers, result.numpy())
    if out is None:
        return result.to(grad.dtype)
    return out if direct else out.copy_(result)


def factors(coefficients: Tensor, directions: Tensor) -> tuple[Array, Array]:
    """Coefficients (N, R) and, for loops along the features, directions (R, D) or (1, D)."""
    columns = directions.detach().float()
    columns = columns.unsqueeze(1) if columns.dim() == 1 else columns
    return coefficients.detach().float().contiguous().numpy(), columns.T.contiguous().numpy()
