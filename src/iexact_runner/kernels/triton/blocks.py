"""What a block with BatchNorm does around its sketch, in single passes; see ``triton_kernels``.

Shapes: N nodes, D features, R directions; n = N D elements. A program works on a tile of ROWS x COLUMNS, as in
``tiles``. D is known to the compiler: a model has few widths, and each is compiled once. So is the row from which sums
and gradients draw, which is 0 unless processes share a graph. R is not, so that other directions compile nothing.

Sums over the R directions are added up in their order, so that they have one result everywhere; they are far shorter
than what ``tl.dot`` would have to be padded to.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from iexact_runner.kernels.reference import DROPOUT, dropout_factor, dropout_threshold
from iexact_runner.kernels.triton.common import (
    TILE,
    WARPS,
    drawn,
    grid,
    narrow,
    packed_bytes,
    seed_on,
    split,
    tile,
    widen,
)
from iexact_runner.kernels.triton.elementwise import scale_kept, store_mask
from iexact_runner.kernels.triton.tiles import combined, factors, gated, load_columns, load_halves, store_halves

_DROPOUT = tl.constexpr(DROPOUT)
# An eight a thread: with more of them the passes take up to half as long again. A coefficient serves a row of a tile:
# wide tiles load least, and with 128 columns the sums take half of the time of 64.
BLOCK_TILE, MOST_COLUMNS = 1024, 128
# Rows are summed up by so many programs for each run of columns: enough to fill a GPU, where 512 take a third longer.
SUM_PROGRAMS = 1024


def tile_of(width: int) -> tuple[int, int]:
    """Rows and columns of a program's tile of a map with ``width`` features."""
    columns: int = min(MOST_COLUMNS, max(8, triton.next_power_of_2(width)))
    return BLOCK_TILE // columns, columns


def _drawing(device: torch.device, p: float, seed: int | Tensor) -> tuple[Tensor | None, int, float]:
    """Kernel arguments from the seed to the factor; no seed if nothing is dropped."""
    return (seed_on(device, seed) if p else None), dropout_threshold(p), dropout_factor(p)


@triton.jit(do_not_specialize=["first_group", "threshold"])
def _normalize_relu_dropout_kernel(
    h_ptr,
    mean_ptr,
    inverse_std_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    mask_ptr,
    seed_ptr,
    threshold,
    factor,
    first_group,
    units,
    UNIT: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
):
    """Out = dropout(relu(v)), v = (h - mean) inverse_std weight + bias: h [n] -> out [n], mask not v <= 0 [n / 8]."""
    DTYPE: tl.constexpr = h_ptr.dtype.element_ty
    start, position, inside = tile(units, UNIT, TILE)
    h = widen(tl.load(h_ptr + start + position, mask=inside, other=0.0))
    column = ((start % WIDTH).to(tl.int32) + position) % WIDTH
    if WIDTH % 4 == 0:  # neighbours in memory too: 16 bytes are loaded at once
        column = tl.max_contiguous(tl.multiple_of(column, 4), 4)
    v = (h - tl.load(mean_ptr + column)) * tl.load(inverse_std_ptr + column)
    v = widen(narrow(v * tl.load(weight_ptr + column) + tl.load(bias_ptr + column), DTYPE))
    passes = (v > 0) | (v != v)
    out = tl.where(passes | (v == 0), v, 0.0)  # -0.0 stays, as in PyTorch's ReLU on a processor
    if seed_ptr is not None:
        out = scale_kept(out, drawn(seed_ptr, first_group, start, _DROPOUT, 0, TILE), threshold, factor, DTYPE)
    tl.store(out_ptr + start + position, narrow(out, DTYPE), mask=inside)
    store_mask(mask_ptr, passes & inside, units, UNIT, TILE)


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
    """See :func:`reference.normalize_relu_dropout`."""
    h = h.contiguous()
    out, mask = torch.empty_like(h) if out is None else out, packed_bytes(h.numel(), 1, h.device)
    if h.numel():
        vectors = [vector.float().contiguous() for vector in (mean, inverse_std, weight, bias)]
        sizes = (*_drawing(h.device, p, seed), offset // 8, *split(h.numel()), h.size(1), TILE)
        with torch.cuda.device_of(h):
            _normalize_relu_dropout_kernel[grid(h.numel())](
                h, *vectors, out, mask, *sizes, num_warps=WARPS, enable_fp_fusion=False
            )
    return out, mask


@triton.jit
def _rows_and_eights(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Rows of a tile, and this program's eights of columns, as in ``tiles``."""
    row = tl.cast(tile, tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    return row, tl.program_id(1) * (COLUMNS // 8) + tl.arange(0, COLUMNS // 8)[None, :]


@triton.jit(do_not_specialize=["first_group", "threshold", "nodes", "rank"])
def _decode_relu_dropout_kernel(
    c_ptr,
    v_ptr,
    shift_ptr,
    mask_ptr,
    out_ptr,
    seed_ptr,
    threshold,
    factor,
    first_group,
    nodes,
    rank,
    SHIFT: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Out = dropout(mask(c V^T + shift)): c [N, R], V^T [R, D], mask [n / 8] -> out [N, D]."""
    row, eight = _rows_and_eights(tl.program_id(0), ROWS, COLUMNS)
    zero = tl.zeros([ROWS, COLUMNS // 8, 4], tl.float32)
    left, right = load_columns(shift_ptr, eight, WIDTH)
    left, right = combined(zero + left, zero + right, c_ptr, v_ptr, row, eight, nodes, rank, WIDTH)
    left, right = gated(
        left, right, mask_ptr, seed_ptr, first_group, threshold, factor, row, row, eight, nodes, WIDTH, SHIFT
    )
    store_halves(out_ptr, left, right, row, eight, nodes, WIDTH)


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
    """See :func:`reference.decode_relu_dropout`."""
    nodes, width = coefficients.size(0), directions.size(0)
    out = torch.empty(nodes, width, dtype=torch.float32, device=coefficients.device)
    if out.numel():
        c, v, rank = factors(coefficients, directions)
        rows, columns = tile_of(width)
        sizes = (offset // 8, nodes, rank, offset % 8, width, rows, columns)
        drawing = _drawing(out.device, p, seed)
        with torch.cuda.device_of(out):
            _decode_relu_dropout_kernel[triton.cdiv(nodes, rows), triton.cdiv(width, columns)](
                c, v, shift.float(), packed_mask, out, *drawing, *sizes, num_warps=WARPS, enable_fp_fusion=False
            )
    return out


@triton.jit(do_not_specialize=["threshold", "nodes", "rank"])
def _gated_sums_kernel(
    grad_ptr,
    mask_ptr,
    c_ptr,
    v_ptr,
    sums_ptr,
    seed_ptr,
    threshold,
    factor,
    nodes,
    rank,
    FIRST_ROW: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Sums of g and of g (c V^T) over every so many rows: grad [N, D] -> sums [programs, 2, D]."""
    zero = tl.zeros([ROWS, COLUMNS // 8, 4], tl.float32)
    sum_left, sum_right, product_left, product_right = zero, zero, zero, zero
    for index in range(tl.program_id(0), tl.cdiv(nodes, ROWS), tl.num_programs(0)):
        row, eight = _rows_and_eights(index, ROWS, COLUMNS)
        g_left, g_right = load_halves(grad_ptr, row, eight, nodes, WIDTH)
        drawn_row = row + FIRST_ROW
        g_left, g_right = gated(
            g_left, g_right, mask_ptr, seed_ptr, 0, threshold, factor, row, drawn_row, eight, nodes, WIDTH, 0
        )
        left, right = combined(zero, zero, c_ptr, v_ptr, row, eight, nodes, rank, WIDTH)
        sum_left, sum_right = sum_left + g_left, sum_right + g_right
        product_left, product_right = product_left + g_left * left, product_right + g_right * right
    row, eight = _rows_and_eights(0, 1, COLUMNS)
    place = sums_ptr + tl.program_id(0) * (2 * WIDTH)
    store_halves(place, _column_sums(sum_left), _column_sums(sum_right), row, eight, 1, WIDTH)
    store_halves(place + WIDTH, _column_sums(product_left), _column_sums(product_right), row, eight, 1, WIDTH)


@triton.jit
def _column_sums(half):
    """Sums over the rows of half a tile: [1, COLUMNS / 8, 4]."""
    return tl.sum(half, axis=0)[None, :, :]


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
    """See :func:`reference.gated_sums`."""
    nodes, width = grad.shape
    if not grad.numel():
        return torch.zeros(2, width, dtype=torch.float32, device=grad.device)
    c, v, rank = factors(coefficients, directions)
    rows, columns = tile_of(width)
    programs = min(SUM_PROGRAMS, triton.cdiv(nodes, rows))
    sums = torch.empty(programs, 2, width, dtype=torch.float32, device=grad.device)
    numbers = (*_drawing(grad.device, p, seed), nodes, rank, offset // max(1, width), width, rows, columns)
    with torch.cuda.device_of(grad):
        _gated_sums_kernel[programs, triton.cdiv(width, columns)](
            grad.contiguous(), packed_mask, c, v, sums, *numbers, num_warps=WARPS, enable_fp_fusion=False
        )
    return sums.sum(0)


@triton.jit(do_not_specialize=["threshold", "nodes", "rank"])
def _gated_gradient_kernel(
    grad_ptr,
    mask_ptr,
    c_ptr,
    v_ptr,
    scale_ptr,
    shift_ptr,
    out_ptr,
    seed_ptr,
    threshold,
    factor,
    nodes,
    rank,
    FIRST_ROW: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Out = scale g + (c V^T + shift): grad [N, D], c [N, R], V^T [R, D] -> out [N, D]."""
    row, eight = _rows_and_eights(tl.program_id(0), ROWS, COLUMNS)
    g_left, g_right = load_halves(grad_ptr, row, eight, nodes, WIDTH)
    drawn_row = row + FIRST_ROW
    g_left, g_right = gated(
        g_left, g_right, mask_ptr, seed_ptr, 0, threshold, factor, row, drawn_row, eight, nodes, WIDTH, 0
    )
    zero = tl.zeros([ROWS, COLUMNS // 8, 4], tl.float32)
    left, right = load_columns(shift_ptr, eight, WIDTH)
    left, right = combined(zero + left, zero + right, c_ptr, v_ptr, row, eight, nodes, rank, WIDTH)
    scale_left, scale_right = load_columns(scale_ptr, eight, WIDTH)
    left, right = g_left * scale_left + left, g_right * scale_right + right
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    store_halves(out_ptr, narrow(left, DTYPE), narrow(right, DTYPE), row, eight, nodes, WIDTH)


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
    """See :func:`reference.gated_gradient`."""
    grad = grad.contiguous()
    out = torch.empty_like(grad) if out is None else out
    if grad.numel():
        nodes, width = grad.shape
        c, v, rank = factors(coefficients, directions)
        rows, columns = tile_of(width)
        numbers = (*_drawing(grad.device, p, seed), nodes, rank, offset // max(1, width), width, rows, columns)
        with torch.cuda.device_of(grad):
            _gated_gradient_kernel[triton.cdiv(nodes, rows), triton.cdiv(width, columns)](
                grad,
                packed_mask,
                c,
                v,
                factor.float(),
                shift.float(),
                out,
                *numbers,
                num_warps=WARPS,
                enable_fp_fusion=False,
            )
    return out
