"""Products of a sparse matrix with a map on a CPU, row by row, with all scales and sums in one pass over the result.

Shapes: N nodes, E entries, D features. Entries of a row are added up in their order, whoever computes it, so nothing
depends on the number of threads.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from iexact_runner.kernels.numba.common import Array, parallel, reordering, torch_threads

# Entries that one iteration of the parallel loop works on; a row with more of them is shared by its features.
ENTRIES = 1 << 13
# Features of such a row that one iteration works on: two cache lines.
FEATURES = 32
# Rows whose dot products one iteration of the parallel loop takes.
ROWS = 64
_ONE = np.uint64(1)
_FOUR = np.uint64(4)


# Indices are unsigned: of signed ones Numba asks whether they count from the end, and the loop is not vectorised.
@parallel
def _spmm_kernel(
    offsets: Array,
    columns: Array,
    values: Array,
    column_scale: Array,
    row_scale: Array,
    bias: Array,
    x: Array,
    x_stride: int,
    pieces: Array,
    add: bool,
    out: Array,
    out_stride: int,
) -> None:
    """Rows and features of each piece; absent values, scales and biases are empty."""
    from_x, from_out = np.uint64(x_stride), np.uint64(out_stride)
    weighted = len(values) > 0 or len(column_scale) > 0
    for index in numba.prange(len(pieces)):
        first, last, begin = pieces[index, 0], pieces[index, 1], np.uint64(pieces[index, 2])
        width = np.uint64(pieces[index, 3]) - begin
        total, one = np.empty(width, x.dtype), x.dtype.type(1)
        for row in range(first, last):
            for column in range(width):
                total[column] = 0
            entry, end = np.uint64(offsets[row]), np.uint64(offsets[row + 1])
            # Four at a time: each sum is then loaded and stored a quarter as often.
            while entry + _FOUR <= end:
                j0, j1 = np.uint64(columns[entry]), np.uint64(columns[entry + _ONE])
                j2, j3 = np.uint64(columns[entry + _ONE + _ONE]), np.uint64(columns[entry + _FOUR - _ONE])
                p0, p1, p2, p3 = j0 * from_x + begin, j1 * from_x + begin, j2 * from_x + begin, j3 * from_x + begin
                if weighted:
                    w0 = w1 = w2 = w3 = one
                    if len(values) > 0:
                        w0, w1 = values[entry], values[entry + _ONE]
                        w2, w3 = values[entry + _ONE + _ONE], values[entry + _FOUR - _ONE]
                    if len(column_scale) > 0:
                        w0, w1 = w0 * column_scale[j0], w1 * column_scale[j1]
                        w2, w3 = w2 * column_scale[j2], w3 * column_scale[j3]
                    for column in range(width):
                        sum01 = (total[column] + w0 * x[p0 + column]) + w1 * x[p1 + column]
                        total[column] = (sum01 + w2 * x[p2 + column]) + w3 * x[p3 + column]
                else:
                    for column in range(width):
                        sum01 = (total[column] + x[p0 + column]) + x[p1 + column]
                        total[column] = (sum01 + x[p2 + column]) + x[p3 + column]
                entry += _FOUR
            while entry < end:
                j0, w0 = np.uint64(columns[entry]), one
                if len(values) > 0:
                    w0 = values[entry]
                if len(column_scale) > 0:
                    w0 = w0 * column_scale[j0]
                p0 = j0 * from_x + begin
                for column in range(width):
                    total[column] += w0 * x[p0 + column]
                entry += _ONE
            if len(row_scale) > 0:
                scale = row_scale[row]
                for column in range(width):
                    total[column] *= scale
            if len(bias) > 0:
                for column in range(width):
                    total[column] += bias[begin + column]
            p0 = np.uint64(row) * from_out + begin
            if add:
                for column in range(width):
                    out[p0 + column] += total[column]
            else:
                for column in range(width):
                    out[p0 + column] = total[column]


def spmm(
    offsets: Tensor,
    columns: Tensor,
    x: Tensor,
    *,
    values: Tensor | None = None,
    column_scale: Tensor | None = None,
    row_scale: Tensor | None = None,
    bias: Tensor | None = None,
    out: Tensor | None = None,
    add: bool = False,
) -> Tensor:
    """See :func:`iexact_runner.kernels.reference.spmm`."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    dense, nodes = _rows_apart(x.detach().to(dtype)), offsets.numel() - 1
    direct = out is not None and out.dtype == dtype and _is_rows(out)
    target = out if out is not None and direct else torch.empty(nodes, x.size(1), dtype=dtype)
    if target.numel():
        with torch_threads():
            _spmm_kernel(
                offsets.numpy(),
                columns.numpy(),
                *(_flat(part, dtype) for part in (values, column_scale, row_scale, bias)),
                *_elements(dense),
                _pieces(offsets.numpy(), x.size(1)),
                add and direct,
                *_elements(target),
            )
    if out is None:
        return target.to(x.dtype)
    if not direct:
        return out.add_(target) if add else out.copy_(target)
    return out


@reordering
def _sampled_kernel(
    offsets: Array,
    columns: Array,
    left: Array,
    left_stride: int,
    right: Array,
    right_stride: int,
    width: int,
    out: Array,
) -> None:
    """Dot products of rows, run of rows by run of rows."""
    from_left, from_right, features = np.uint64(left_stride), np.uint64(right_stride), np.uint64(width)
    for index in numba.prange(-(-(len(offsets) - 1) // ROWS)):
        first: Any = np.int64(index) * ROWS
        for row in range(first, min(first + ROWS, len(offsets) - 1)):
            p = np.uint64(row) * from_left
            entry, end = np.uint64(offsets[row]), np.uint64(offsets[row + 1])
            while entry < end:
                q = np.uint64(columns[entry]) * from_right
                total = np.float32(0)
                for column in range(features):
                    total += left[p + column] * right[q + column]
                out[entry] = total
                entry += _ONE


def sampled_matmul(offsets: Tensor, columns: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """See :func:`iexact_runner.kernels.reference.sampled_matmul`."""
    products = torch.empty(columns.numel(), dtype=torch.float32)
    rows = [_rows_apart(side.detach().float()) for side in (left, right)]
    if products.numel():
        with torch_threads():
            _sampled_kernel(
                offsets.numpy(),
                columns.numpy(),
                *_elements(rows[0]),
                *_elements(rows[1]),
                left.size(1),
                products.numpy(),
            )
    return products.to(left.dtype)


def _pieces(offsets: Array, width: int) -> Array:
    """Rows and features (pieces, 4) with about as many entries each: first row, one past the last, the same of them."""
    nodes, entries = len(offsets) - 1, int(offsets[-1])
    # Rows without entries cost as well.
    cost = offsets.astype(np.int64) + np.arange(nodes + 1)
    cuts = np.searchsorted(cost, np.arange(0, entries + nodes, ENTRIES), side="right") - 1
    cuts = np.unique(np.append(cuts, nodes))
    large = np.flatnonzero(np.diff(offsets) > ENTRIES)
    cuts = np.unique(np.concatenate([cuts, large, large + 1]))
    whole = np.stack([cuts[:-1], cuts[1:], np.zeros_like(cuts[1:]), np.full_like(cuts[1:], width)], axis=1)
    shared = np.isin(whole[:, 0], large)
    begins = np.arange(0, width, FEATURES)
    slices = np.stack([begins, np.minimum(begins + FEATURES, width)], axis=1)
    rows = np.repeat(whole[shared, :2], len(slices), axis=0)
    return np.concatenate([whole[~shared], np.hstack([rows, np.tile(slices, (int(shared.sum()), 1))])])


def _is_rows(x: Tensor) -> bool:
    """Whether the features of a row lie side by side and rows follow each other at one distance."""
    return x.size(1) == 1 or (x.stride(1) == 1 and x.stride(0) >= x.size(1))


def _rows_apart(x: Tensor) -> Tensor:
    return x if _is_rows(x) else x.contiguous()


def _elements(x: Tensor) -> tuple[Array, int]:
    """What lies from the first element of a map (N, D) to its last (n,), and the distance of its rows."""
    distance = x.stride(0)
    length = (x.size(0) - 1) * distance + x.size(1) if x.numel() else 0
    return x.detach().as_strided((length,), (1,)).numpy(), distance


def _flat(part: Tensor | None, dtype: torch.dtype) -> Array:
    """A vector, empty if it is absent."""
    if part is None:
        return torch.empty(0, dtype=dtype).numpy()
    return part.detach().to(dtype).flatten().contiguous().numpy()
