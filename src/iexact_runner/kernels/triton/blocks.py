"""What a block with BatchNorm does around its sketch, in single passes; see ``triton_kernels``.

Shapes: N nodes, D features, R directions; n = N D elements. A program works on a tile of ROWS x COLUMNS, D and R being
known to the compiler: a model has few widths, and each is compiled once. So is the row from which sums and gradients
draw, which is 0 unless processes share a graph.

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
    draw16,
    drawn,
    grid,
    halves,
    narrow,
    packed_bytes,
    seed_on,
    split,
    tile,
    widen,
)
from iexact_runner.kernels.triton.elementwise import scale_kept, store_mask

_DROPOUT = tl.constexpr(DROPOUT)
# 8 elements a thread: a tile of gradients, one of sketched values and two of sums stay in registers. A coefficient
# serves a row of a tile, so that wide tiles load least: with 128 columns the sums take half of the time of 64.
BLOCK_TILE, MOST_COLUMNS = 1024, 128
# Rows are summed up by so many programs for each run of columns: enough to fill a GPU.
SUM_PROGRAMS = 512


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
def _rows_and_columns(first, nodes, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Rows from ``first`` (int64 [ROWS, 1]), this program's columns (int32 [1, COLUMNS]); whether each is there."""
    row = first + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    return row, column, row < nodes, column < WIDTH


@triton.jit
def _combined(total, c_ptr, v_ptr, row, column, there, within, WIDTH: tl.constexpr, RANK: tl.constexpr):
    """Adds c V^T to a tile: c [N, R], V^T [R, D] -> [ROWS, COLUMNS]; without RANK c [N, D] times v [D]."""
    if RANK is None:
        coefficient = tl.load(c_ptr + (row * WIDTH + column), mask=there & within, other=0.0)
        total += coefficient * tl.load(v_ptr + column, mask=within, other=0.0)
    else:
        for rank in range(RANK):
            coefficient = tl.load(c_ptr + row * RANK + rank, mask=there, other=0.0)
            total += coefficient * tl.load(v_ptr + rank * WIDTH + column, mask=within, other=0.0)
    return total


@triton.jit
def _mask_bits(mask_ptr, row, there, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Bits of a packed mask [n / 8] in this program's tile: int32 [ROWS, COLUMNS]."""
    if WIDTH % 8 == 0:
        eight = tl.program_id(1) * (COLUMNS // 8) + tl.arange(0, COLUMNS // 8)[None, :]
        packed = tl.load(mask_ptr + (row * (WIDTH // 8) + eight), mask=there & (eight < WIDTH // 8), other=0)
        bits = (packed.to(tl.int32)[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1
        bits = tl.reshape(bits, [ROWS, COLUMNS])
    else:
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        index = row * WIDTH + column
        packed = tl.load(mask_ptr + index // 8, mask=there & (column < WIDTH), other=0)
        bits = (packed.to(tl.int32) >> (index % 8).to(tl.int32)) & 1
    return bits


@triton.jit
def _draws(
    seed_ptr, first_group, row, WIDTH: tl.constexpr, SHIFT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Draws of dropout in this program's tile: uint32 [ROWS, COLUMNS]."""
    seed, first_group = tl.load(seed_ptr), tl.cast(first_group, tl.int64)
    if WIDTH % 8 == 0:
        eight = tl.program_id(1) * (COLUMNS // 8) + tl.arange(0, COLUMNS // 8)[None, :]
        draws = tl.reshape(draw16(seed, first_group + row * (WIDTH // 8) + eight, _DROPOUT, SHIFT), [ROWS, COLUMNS])
    else:  # neighbours in a row do not share their draws with others: each is drawn by itself
        index = row * WIDTH + tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :] + SHIFT
        of_group = halves(seed, first_group + index // 8, _DROPOUT)
        draws = of_group[0]
        for lane in tl.static_range(1, 8):
            draws = tl.where(index % 8 == lane, of_group[lane], draws)
    return draws


@triton.jit
def _gated(
    x,
    mask_ptr,
    seed_ptr,
    first_group,
    threshold,
    factor,
    row,
    drawn_row,
    there,
    WIDTH: tl.constexpr,
    SHIFT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Float32 tile x * factor where mask and dropout let it pass, else 0; either may be None.

    A row draws what ``drawn_row`` of the whole map does.
    """
    if mask_ptr is not None:
        x = tl.where(_mask_bits(mask_ptr, row, there, WIDTH, ROWS, COLUMNS) != 0, x, 0.0)
    if seed_ptr is not None:
        draws = _draws(seed_ptr, first_group, drawn_row, WIDTH, SHIFT, ROWS, COLUMNS)
        x = tl.where(draws.to(tl.int32) >= threshold, x * factor, 0.0)
    return x


@triton.jit(do_not_specialize=["first_group", "threshold", "nodes"])
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
    SHIFT: tl.constexpr,
    WIDTH: tl.constexpr,
    RANK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Out = dropout(mask(c V^T + shift)): c [N, R], V^T [R, D], mask [n / 8] -> out [N, D]."""
    row, column, there, within = _rows_and_columns(tl.program_id(0).to(tl.int64) * ROWS, nodes, WIDTH, ROWS, COLUMNS)
    shift = tl.load(shift_ptr + column, mask=within, other=0.0)
    total = tl.zeros([ROWS, COLUMNS], tl.float32) + shift
    out = _combined(total, c_ptr, v_ptr, row, column, there, within, WIDTH, RANK)
    out = _gated(out, mask_ptr, seed_ptr, first_group, threshold, factor, row, row, there, WIDTH, SHIFT, ROWS, COLUMNS)
    tl.store(out_ptr + (row * WIDTH + column), out, mask=there & within)


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
        c, v, rank = _factors(coefficients, directions)
        rows, columns = tile_of(width)
        sizes = (offset // 8, nodes, offset % 8, width, rank, rows, columns)
        drawing = _drawing(out.device, p, seed)
        with torch.cuda.device_of(out):
            _decode_relu_dropout_kernel[triton.cdiv(nodes, rows), triton.cdiv(width, columns)](
                c, v, shift.float(), packed_mask, out, *drawing, *sizes, num_warps=WARPS, enable_fp_fusion=False
            )
    return out


@triton.jit(do_not_specialize=["threshold", "nodes"])
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
    FIRST_ROW: tl.constexpr,
    WIDTH: tl.constexpr,
    RANK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Sums of g and of g (c V^T) over every so many rows: grad [N, D] -> sums [programs, 2, D]."""
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    product = tl.zeros([ROWS, COLUMNS], tl.float32)
    for index in range(tl.program_id(0), tl.cdiv(nodes, ROWS), tl.num_programs(0)):
        row, column, there, within = _rows_and_columns(tl.cast(index, tl.int64) * ROWS, nodes, WIDTH, ROWS, COLUMNS)
        g = widen(tl.load(grad_ptr + (row * WIDTH + column), mask=there & within, other=0.0))
        g = _gated(g, mask_ptr, seed_ptr, 0, threshold, factor, row, row + FIRST_ROW, there, WIDTH, 0, ROWS, COLUMNS)
        estimate = tl.zeros([ROWS, COLUMNS], tl.float32)
        estimate = _combined(estimate, c_ptr, v_ptr, row, column, there, within, WIDTH, RANK)
        total += g
        product += g * estimate
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    place = sums_ptr + tl.program_id(0) * (2 * WIDTH) + column
    tl.store(place, tl.sum(total, axis=0), mask=column < WIDTH)
    tl.store(place + WIDTH, tl.sum(product, axis=0), mask=column < WIDTH)


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
    c, v, rank = _factors(coefficients, directions)
    rows, columns = tile_of(width)
    programs = min(SUM_PROGRAMS, triton.cdiv(nodes, rows))
    sums = torch.empty(programs, 2, width, dtype=torch.float32, device=grad.device)
    numbers = (*_drawing(grad.device, p, seed), nodes, offset // max(1, width), width, rank, rows, columns)
    with torch.cuda.device_of(grad):
        _gated_sums_kernel[programs, triton.cdiv(width, columns)](
            grad.contiguous(), packed_mask, c, v, sums, *numbers, num_warps=WARPS, enable_fp_fusion=False
        )
    return sums.sum(0)


@triton.jit(do_not_specialize=["threshold", "nodes"])
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
    FIRST_ROW: tl.constexpr,
    WIDTH: tl.constexpr,
    RANK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Out = scale g + (c V^T + shift): grad [N, D], c [N, R], V^T [R, D] -> out [N, D]."""
    row, column, there, within = _rows_and_columns(tl.program_id(0).to(tl.int64) * ROWS, nodes, WIDTH, ROWS, COLUMNS)
    g = widen(tl.load(grad_ptr + (row * WIDTH + column), mask=there & within, other=0.0))
    g = _gated(g, mask_ptr, seed_ptr, 0, threshold, factor, row, row + FIRST_ROW, there, WIDTH, 0, ROWS, COLUMNS)
    total = tl.zeros([ROWS, COLUMNS], tl.float32) + tl.load(shift_ptr + column, mask=within, other=0.0)
    total = _combined(total, c_ptr, v_ptr, row, column, there, within, WIDTH, RANK)
    out = g * tl.load(scale_ptr + column, mask=within, other=0.0) + total
    tl.store(out_ptr + (row * WIDTH + column), narrow(out, out_ptr.dtype.element_ty), mask=there & within)


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
        c, v, rank = _factors(coefficients, directions)
        rows, columns = tile_of(width)
        numbers = (*_drawing(grad.device, p, seed), nodes, offset // max(1, width), width, rank, rows, columns)
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


def _factors(coefficients: Tensor, directions: Tensor) -> tuple[Tensor, Tensor, int | None]:
    """Coefficients (N, R), directions (R, D) whose rows are read along the features, and R; None of columns (D,)."""
    if directions.dim() == 1:
        return coefficients.float().contiguous(), directions.float().contiguous(), None
    return coefficients.float().contiguous(), directions.float().T.contiguous(), directions.size(1)
