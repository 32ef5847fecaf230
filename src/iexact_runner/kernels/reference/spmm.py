"""Products of a sparse matrix with a map, and of maps at its entries, by torch's CSR products.

Shapes: N nodes, E entries, D features.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor


def csr_tensor(
    offsets: Tensor,
    columns: Tensor,
    values: Tensor | None,
    *,
    width: int | None = None,
    row_scale: Tensor | None = None,
    column_scale: Tensor | None = None,
) -> Tensor:
    """A matrix from its parts as a torch CSR tensor, its rows and columns scaled by (N, 1) each.

    Without values (E,), all entries are ones; ``width`` is the number of columns, that of the rows if it is None.
    """
    if column_scale is not None:
        gathered = column_scale.flatten()[columns]
        values = gathered if values is None else gathered * values
    if row_scale is not None:
        gathered = torch.repeat_interleave(row_scale.flatten(), offsets.diff(), output_size=columns.numel())
        values = gathered if values is None else gathered * values
    if values is None:
        values = torch.ones(columns.numel(), dtype=torch.float32, device=columns.device)
    nodes = offsets.numel() - 1
    with warnings.catch_warnings():  # torch tells of CSR at its first use what is no news to a user
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        warnings.filterwarnings("ignore", message="Sparse invariant checks are implicitly disabled")
        size = (nodes, nodes if width is None else width)
        return torch.sparse_csr_tensor(offsets, columns, values, size=size, check_invariants=False)


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
    """diag(row_scale) A diag(column_scale) x + bias for x (N, D), written into ``out`` or added to it.

    A has a row for each row of the product, which may be fewer than N. On a CPU half types are computed in float32, for
    torch's CSR product knows none there.
    """
    matrix = csr_tensor(offsets, columns, values, width=x.size(0), column_scale=column_scale)
    matrix = matrix.to(x.dtype if x.is_cuda or x.dtype == torch.float64 else torch.float32)
    if x.is_cuda and columns.numel() > matrix.numel():  # cuSPARSE refuses more entries than places
        matrix = summed(matrix)
    dense = x.to(matrix.dtype)
    product = dense.new_empty(matrix.size(0), dense.size(1))
    # Written into place, for ``matrix @ dense`` makes a second map of zeros to add the product to.
    torch.addmm(product, matrix, dense, beta=0.0, out=product)
    if row_scale is not None:
        product.mul_(row_scale)
    if bias is not None:
        product.add_(bias)
    if out is None:
        return product.to(x.dtype)
    return out.add_(product) if add else out.copy_(product)


def summed(matrix: Tensor) -> Tensor:
    """A CSR matrix as a dense one, entries of the same place added up."""
    rows = torch.arange(matrix.size(0), device=matrix.device)
    rows = rows.repeat_interleave(matrix.crow_indices().diff(), output_size=matrix.values().numel())
    dense = torch.zeros(matrix.shape, dtype=torch.float64, device=matrix.device)
    dense.index_put_((rows, matrix.col_indices()), matrix.values().double(), accumulate=True)
    return dense.to(matrix.dtype)


def sampled_matmul(offsets: Tensor, columns: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Dot products (E,) of row i of ``left`` with row j of ``right``, (N, D) each, for each entry (i, j)."""
    if not columns.numel():  # which torch refuses
        return left.new_empty(0)
    pattern = csr_tensor(offsets, columns, left.new_zeros(columns.numel(), dtype=torch.float32), width=right.size(0))
    # The half types have no such product everywhere; the entries are few beside the maps.
    products: Tensor = torch.sparse.sampled_addmm(pattern, left.float(), right.float().T, beta=0.0).values()
    return products.to(left.dtype)
