"""Products of a sparse matrix with maps as custom operators; see :mod:`iexact_runner.kernels.ops`.

Shapes: N nodes, E entries, D features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from iexact_runner.kernels.backends import select

# Operators, because torch.compile does not trace through sparse layouts.
_PARTS = "Tensor offsets, Tensor columns, Tensor? values, Tensor? column_scale, Tensor? row_scale, Tensor? bias"


@torch.library.custom_op("iexact::spmm", mutates_args=(), schema=f"({_PARTS}, Tensor x) -> Tensor")
def _spmm(
    offsets: Tensor,
    columns: Tensor,
    values: Tensor | None,
    column_scale: Tensor | None,
    row_scale: Tensor | None,
    bias: Tensor | None,
    x: Tensor,
) -> Tensor:
    product: Tensor = select("auto", x.device).spmm(
        offsets, columns, x, values=values, column_scale=column_scale, row_scale=row_scale, bias=bias
    )
    return product


@_spmm.register_fake
def _(offsets: Tensor, *parts_and_x: Tensor) -> Tensor:
    return parts_and_x[-1].new_empty(offsets.numel() - 1, parts_and_x[-1].size(1))


@torch.library.custom_op(
    "iexact::spmm_into", mutates_args=("out",), schema=f"({_PARTS}, Tensor x, Tensor(a!) out, bool add) -> ()"
)
def _spmm_into(
    offsets: Tensor,
    columns: Tensor,
    values: Tensor | None,
    column_scale: Tensor | None,
    row_scale: Tensor | None,
    bias: Tensor | None,
    x: Tensor,
    out: Tensor,
    add: bool,
) -> None:
    scales = dict(values=values, column_scale=column_scale, row_scale=row_scale, bias=bias)
    select("auto", x.device).spmm(offsets, columns, x, **scales, out=out, add=add)


@_spmm_into.register_fake
def _(*arguments: object) -> None:
    return None


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
    """diag(row_scale) A diag(column_scale) x + bias for x (N, D), written into ``out`` or added to it."""
    parts = (offsets, columns, values, column_scale, row_scale, bias)
    if out is None:
        product: Tensor = _spmm(*parts, x)
        return product
    _spmm_into(*parts, x, out, add)
    return out


@torch.library.custom_op(
    "iexact::sampled_matmul",
    mutates_args=(),
    schema="(Tensor offsets, Tensor columns, Tensor left, Tensor right) -> Tensor",
)
def _sampled(offsets: Tensor, columns: Tensor, left: Tensor, right: Tensor) -> Tensor:
    products: Tensor = select("auto", left.device).sampled_matmul(offsets, columns, left, right)
    return products


@_sampled.register_fake
def _(offsets: Tensor, columns: Tensor, left: Tensor, right: Tensor) -> Tensor:
    return left.new_empty(columns.numel())


def sampled_matmul(offsets: Tensor, columns: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Dot products (E,) of row i of ``left`` with row j of ``right``, (N, D) each, for each entry (i, j)."""
    products: Tensor = _sampled(offsets, columns, left, right)
    return products
