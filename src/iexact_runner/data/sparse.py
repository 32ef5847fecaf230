"""Sparse matrices as row offsets and column indices, and their products with dense maps.

Shapes: N nodes, E entries, D columns of a map. Values that are all ones, or that scales of the nodes determine, are
made when a product needs them: E floats for the time of one product instead of for the whole run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from iexact_runner.kernels import reference, sparse_ops

# Columns of a map that are multiplied at once where the product takes its place: three cache lines of float32.
COLUMNS = 48


@dataclass(frozen=True)
class CSR:
    """A sparse (N, N) matrix: offsets (N + 1,), column indices (E,), both int32 where they fit, and values (E,).

    Without values, all entries are ones.
    """

    offsets: Tensor
    columns: Tensor
    values: Tensor | None = None

    @property
    def num_entries(self) -> int:
        """E."""
        return self.columns.numel()

    def rows(self) -> Tensor:
        """Row of each entry (E,), int64."""
        counts = self.offsets.diff()
        nodes = torch.arange(counts.numel(), device=counts.device)
        return torch.repeat_interleave(nodes, counts, output_size=self.columns.numel())

    def tensor(self, *, row_scale: Tensor | None = None, column_scale: Tensor | None = None) -> Tensor:
        """The matrix, its rows and columns scaled by (N, 1) each, as a torch CSR tensor."""
        return reference.csr_tensor(
            self.offsets, self.columns, self.values, row_scale=row_scale, column_scale=column_scale
        )

    def matmul(
        self,
        x: Tensor,
        *,
        column_scale: Tensor | None = None,
        row_scale: Tensor | None = None,
        bias: Tensor | None = None,
        out: Tensor | None = None,
        add: bool = False,
    ) -> Tensor:
        """The product with (N, D) features, the matrix's rows and columns scaled by (N, 1) each, plus a bias (D,).

        Written into ``out`` if it is given, or added to it. On a CPU half types are computed in float32.
        """
        scales = dict(column_scale=column_scale, row_scale=row_scale)
        return sparse_ops.spmm(self.offsets, self.columns, x, values=self.values, **scales, bias=bias, out=out, add=add)

    def matmul_(
        self,
        x: Tensor,
        *,
        column_scale: Tensor | None = None,
        row_scale: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        """:meth:`matmul` written over ``x``, a few columns at a time; on a GPU, where each is a launch, all at once."""
        columns = max(1, x.size(1)) if x.is_cuda else COLUMNS
        for start in range(0, x.size(1), columns):
            part = slice(start, start + columns)
            own_bias = None if bias is None else bias[part]
            x[:, part] = self.matmul(x[:, part], column_scale=column_scale, row_scale=row_scale, bias=own_bias)
        return x

    def sampled_matmul(self, left: Tensor, right: Tensor) -> Tensor:
        """Dot products (E,) of row i of ``left`` with row j of ``right``, (N, D) each, for each entry (i, j)."""
        return sparse_ops.sampled_matmul(self.offsets, self.columns, left, right)

    def reduce_rows(self, entries: Tensor, reduction: str) -> Tensor:
        """Sum, max or min (N, K) over each row of numbers (E, K) that belong to the entries; 0 for an empty row."""
        reduced: Tensor = torch.segment_reduce(entries, reduction, offsets=self.offsets, axis=0, unsafe=True)
        if reduction != "sum":
            reduced.masked_fill_((self.offsets.diff() == 0).unsqueeze(1), 0)
        return reduced

    def softmax_rows_(self, entries: Tensor) -> Tensor:
        """Softmax over each row of numbers (E, K) that belong to the entries, in place."""
        rows = self.rows()
        exponentials = entries.sub_(self.reduce_rows(entries, "max").index_select(0, rows)).exp_()
        return exponentials.div_(self.reduce_rows(exponentials, "sum").index_select(0, rows))

    def row_chunks(self, entries: int) -> Iterator[tuple[slice, slice, CSR]]:
        """Runs of whole rows with about so many entries: the rows, their entries, and the pattern of these rows."""
        offsets = self.offsets.cpu()
        rows, start = offsets.numel() - 1, 0
        while start < rows:
            first = int(offsets[start])
            stop = int(torch.searchsorted(offsets, first + entries, right=True)) - 1
            stop = min(rows, max(stop, start + 1))
            part = slice(first, int(offsets[stop]))
            yield slice(start, stop), part, CSR(self.offsets[start : stop + 1] - first, self.columns[part])
            start = stop

    def transposed(self) -> tuple[CSR, Tensor]:
        """The transpose, and the position (E,) in this matrix of each of its entries.

        Found by sorting where a gradient needs it, rather than held: an index an edge is as much as a second matrix.
        """
        order = torch.argsort(self.columns, stable=True)
        # Searched for rather than counted: a GPU would be waited for to know how many counts there are.
        firsts = torch.arange(self.offsets.numel(), dtype=self.columns.dtype, device=self.columns.device)
        offsets = torch.searchsorted(self.columns[order], firsts).to(self.offsets.dtype)
        values = None if self.values is None else self.values[order]
        return CSR(offsets, self.rows()[order].to(self.columns.dtype), values), order

    def masked(self, mask: Tensor) -> CSR:
        """The entries where ``mask`` (E,) is set."""
        before = torch.cat([mask.new_zeros(1, dtype=torch.int64), mask.cumsum(0)])
        values = None if self.values is None else self.values[mask]
        return CSR(before[self.offsets].to(self.offsets.dtype), self.columns[mask], values)

    def with_diagonal(self, *, first: int = 0) -> CSR:
        """The pattern with exactly one entry (i, first + i) in each row i, whose columns ascend.

        Args:
            first: number of the first row, where these are a run of rows of a larger matrix.
        """
        own = first + torch.arange(self.offsets.numel() - 1, device=self.columns.device)
        rest = self.masked(self.columns != own[self.rows()])
        rows = rest.rows()
        below = rest.columns < own[rows]
        offsets = rest.offsets + torch.arange(rest.offsets.numel(), device=own.device, dtype=rest.offsets.dtype)
        columns = rest.columns.new_empty(rest.columns.numel() + own.numel())
        # An entry moves on by one for each diagonal one before it.
        places = torch.arange(rest.columns.numel(), device=own.device) + rows + ~below
        columns[places] = rest.columns
        columns[offsets[:-1] + torch.zeros_like(own).index_add_(0, rows, below.long())] = own.to(columns.dtype)
        return CSR(offsets, columns)

    def with_values(self, values: Tensor) -> CSR:
        """The same pattern with other values (E,)."""
        return replace(self, values=values)

    def tensors(self) -> list[Tensor]:
        """The parts."""
        return [part for part in (self.offsets, self.columns, self.values) if part is not None]

    def map(self, function: Callable[[Tensor], Tensor]) -> CSR:
        """The matrix with a function applied to its parts, for example to move them to a device."""
        values = None if self.values is None else function(self.values)
        return CSR(function(self.offsets), function(self.columns), values)
