"""Products of a sparse matrix with a map on a GPU: scales, bias and addition to another map in the same pass.

Shapes: N nodes, E entries, D features. Entries are dealt evenly: a program has SHARE of them, whole rows and parts of
rows alike, so that a node with many neighbours keeps no program waiting. Parts of a row are added to one another in no
fixed order; where torch asks for one, and for types other than float32, ``reference`` has the product.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from iexact_runner.kernels import reference
from iexact_runner.kernels.triton.common import split

SHARE, BLOCK = 128, 4
# A warp has 4 columns a thread.
MOST_COLUMNS = 128


@triton.jit
def _row_sum(
    first,
    last,
    columns_ptr,
    values_ptr,
    scale_ptr,
    x_ptr,
    x_units,
    group,
    width,
    X_UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """Sum of the rows of x that entries from ``first`` to ``last`` name: float32 [GROUPS, 4], columns in fours."""
    feature = group * 4 + tl.arange(0, 4)[None, None, :]
    total = tl.zeros([GROUPS, 4], tl.float32)
    for start in range(first, last, BLOCK):
        entry = start + tl.arange(0, BLOCK)[:, None, None] + 0 * group  # read by each thread for itself
        there = entry < last
        column = tl.load(columns_ptr + entry, mask=there, other=0).to(tl.int64)
        x = tl.load(x_ptr + (column * x_units * X_UNIT + feature), mask=there & (feature < width), other=0.0)
        if values_ptr is not None:
            x = x * tl.load(values_ptr + entry, mask=there, other=0.0)
        if scale_ptr is not None:
            x = x * tl.load(scale_ptr + column, mask=there, other=0.0)
        total += tl.sum(x, axis=0)
    return total


@triton.jit(do_not_specialize=["x_units", "out_units", "nodes", "entries", "width"])
def _spmm_kernel(
    offsets_ptr,
    columns_ptr,
    values_ptr,
    column_scale_ptr,
    row_scale_ptr,
    bias_ptr,
    begun_ptr,
    x_ptr,
    out_ptr,
    x_units,
    out_units,
    nodes,
    entries,
    width,
    X_UNIT: tl.constexpr,
    OUT_UNIT: tl.constexpr,
    ADD: tl.constexpr,
    SHARE: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """Out = row_scale (A (column_scale x)) + bias; begun [programs] is each program's first row to begin in its share.

    Rows that are cut are 0 before, or what is to be added to.
    """
    first = tl.program_id(0).to(tl.int64) * SHARE
    last = tl.minimum(first + SHARE, entries)
    limit = tl.where(last == entries, last + 1, last)  # rows without entries at the end belong to the last program
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)[None, :, None]
    feature = (tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)[:, None]) * 4 + tl.arange(0, 4)[None, :]
    inside = feature < width
    row = tl.load(begun_ptr + tl.program_id(0)).to(tl.int64)
    start = tl.load(offsets_ptr + row).to(tl.int64)
    if start > first:  # the row before goes on here
        total = _row_sum(
            first,
            tl.minimum(start, last),
            columns_ptr,
            values_ptr,
            column_scale_ptr,
            x_ptr,
            x_units,
            group,
            width,
            X_UNIT,
            BLOCK,
            GROUPS,
        )
        if row_scale_ptr is not None:
            total *= tl.load(row_scale_ptr + row - 1)
        tl.atomic_add(out_ptr + ((row - 1) * out_units * OUT_UNIT + feature), total, mask=inside, sem="relaxed")
    while (row < nodes) & (start < limit):
        end = tl.load(offsets_ptr + row + 1).to(tl.int64)
        total = _row_sum(
            start,
            tl.minimum(end, last),
            columns_ptr,
            values_ptr,
            column_scale_ptr,
            x_ptr,
            x_units,
            group,
            width,
            X_UNIT,
            BLOCK,
            GROUPS,
        )
        if row_scale_ptr is not None:
            total *= tl.load(row_scale_ptr + row)
        if bias_ptr is not None:
            total += tl.load(bias_ptr + feature, mask=inside, other=0.0)
        place = out_ptr + (row * out_units * OUT_UNIT + feature)
        if end > last:
            tl.atomic_add(place, total, mask=inside, sem="relaxed")
        else:
            if ADD:
                total += tl.load(place, mask=inside, other=0.0)
            tl.store(place, total, mask=inside)
        row += 1
        start = end


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
    """See :func:`reference.spmm`."""
    nodes, width, entries = offsets.numel() - 1, x.size(1), columns.numel()
    factors = (values, column_scale, row_scale, bias)
    floats = all(each is None or each.dtype == torch.float32 for each in (x, *factors, out))
    if not floats or not entries or not width or torch.are_deterministic_algorithms_enabled():
        named = dict(zip(("values", "column_scale", "row_scale", "bias"), factors, strict=True))
        return reference.spmm(offsets, columns, x, **named, out=out, add=add)
    x = x if x.stride(1) == 1 else x.contiguous()
    product = x.new_empty(nodes, width) if out is None or out.stride(1) != 1 else out
    programs, groups = triton.cdiv(entries, SHARE), min(MOST_COLUMNS, triton.next_power_of_2(max(4, width))) // 4
    firsts = torch.arange(0, entries, SHARE, dtype=offsets.dtype, device=x.device)
    begun = torch.searchsorted(offsets, firsts)
    adds = add and product is out
    if not adds:  # what is cut, and some rows that will be written over
        product.index_fill_(0, (begun - 1).clamp_(min=0), 0.0)
    (x_units, x_unit), (out_units, out_unit) = split(x.stride(0)), split(product.stride(0))
    sizes = (x_units, out_units, nodes, entries, width, x_unit, out_unit, adds, SHARE, BLOCK, groups)
    vectors = [None if each is None else each.contiguous() for each in factors]
    with torch.cuda.device_of(x):
        _spmm_kernel[programs, triton.cdiv(width, 4 * groups)](
            offsets, columns, *vectors, begun, x, product, *sizes, num_warps=1, enable_fp_fusion=False
        )
    if product is out or out is None:
        return product
    return out.add_(product) if add else out.copy_(product)
