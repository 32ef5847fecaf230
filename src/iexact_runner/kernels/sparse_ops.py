"""Products of a sparse matrix with maps as custom operators, because torch.compile does not trace sparse layouts.

See :mod:`iexact_runner.kernels.ops`. Shapes: N nodes, E entries, D features.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

from torch import Tensor

from iexact_runner.kernels.ops import operator


@operator()
def _spmm(
    offsets: Tensor,
    columns: Tensor,
    x: Tensor,
    values: Tensor | None,
    column_scale: Tensor | None,
    row_scale: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    return x.new_empty(offsets.numel() - 1, x.size(1))


def _write_product(kernels: ModuleType, **arguments: Any) -> None:
    kernels.spmm(**arguments)


@operator(call=_write_product, writes=("out",))
def _spmm_into(
    offsets: Tensor,
    columns: Tensor,
    x: Tensor,
    values: Tensor | None,
    column_scale: Tensor | None,
    row_scale: Tensor | None,
    bias: Tensor | None,
    out: Tensor,
    add: bool,
) -> None:
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
    factors = (offsets, columns, x, values, column_scale, row_scale, bias)
    if out is None:
        return _spmm(*factors)
    _spmm_into(*factors, out, add)
    return out


@operator()
def _sampled_matmul(offsets: Tensor, columns: Tensor, left: Tensor, right: Tensor) -> Tensor:
    return left.new_empty(columns.numel())


def sampled_matmul(offsets: Tensor, columns: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Dot products (E,) of row i of ``left`` with row j of ``right``, (N, D) each, for each entry (i, j)."""
    return _sampled_matmul(offsets, columns, left, right)
