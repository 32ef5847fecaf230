"""Coefficients of a sketch and the signs that it does not know, as custom operators like those of ``ops``.

Shapes: N nodes, D features, R directions, W bits a node; directions V are (D, R), or (D,) of the columns themselves.
"""

from __future__ import annotations

import torch
from torch import Tensor

from iexact_runner.kernels.levels import level_table
from iexact_runner.kernels.ops import operator, packed_bytes, row_offset, seed_tensor
from iexact_runner.kernels.reference import chunk_bytes, chunk_rows


@operator(
    call=lambda kernels, coefficients, **options: kernels.quantize_coefficients(
        coefficients, levels=level_table(coefficients.device), **options
    )
)
def _quantize_coefficients(coefficients: Tensor, bits: Tensor, width: int, seed: Tensor | None, backend: str) -> Tensor:
    return coefficients.new_empty(coefficients.size(0), width // 8, dtype=torch.uint8)


def quantize_coefficients(
    coefficients: Tensor, bits: Tensor, *, width: int, seed: int | Tensor | None, backend: str
) -> Tensor:
    """Packed codes (N, W / 8) of the levels about each coefficient; without a seed the nearer ones."""
    drawn = None if seed is None else seed_tensor(seed, coefficients.device)
    return _quantize_coefficients(coefficients.contiguous(), bits, width, drawn, backend)


@operator(call=lambda kernels, packed, bits: kernels.dequantize_coefficients(packed, bits, level_table(packed.device)))
def _dequantize_coefficients(packed: Tensor, bits: Tensor, backend: str) -> Tensor:
    return packed.new_empty(packed.size(0), bits.numel(), dtype=torch.float32)


def dequantize_coefficients(packed: Tensor, bits: Tensor, *, backend: str) -> Tensor:
    """The levels (N, R) of packed codes."""
    return _dequantize_coefficients(packed, bits, backend)


@operator()
def _pack_signs(
    packed_mask: Tensor,
    coefficients: Tensor,
    directions: Tensor,
    shift: Tensor,
    limit: Tensor,
    exact: bool,
    p: float,
    seed: Tensor,
    offset: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    width = directions.size(0)
    rows = chunk_rows(width)
    chunks = (coefficients.size(0) + rows - 1) // rows
    streams = packed_mask.new_empty(chunks, chunk_bytes(width))
    return streams, packed_mask.new_empty(2, chunks, dtype=torch.int32)


def pack_signs(
    mask: Tensor,
    coefficients: Tensor,
    directions: Tensor,
    shift: Tensor,
    limit: Tensor,
    *,
    exact: bool,
    p: float,
    seed: int | Tensor,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """The stream of each chunk of rows (chunks, room), and its bits and gaps (2, chunks)."""
    drawing = (exact, p, seed_tensor(seed, mask.device), row_offset(seed, shift))
    return _pack_signs(mask, coefficients, directions, shift, limit, *drawing, backend)


@operator()
def _join_streams(streams: Tensor, counts: Tensor, capacity: int, backend: str) -> Tensor:
    return streams.new_empty(capacity)


def join_streams(streams: Tensor, counts: Tensor, *, capacity: int, backend: str) -> Tensor:
    """The streams of all chunks one behind the other (capacity,)."""
    return _join_streams(streams, counts, capacity, backend)


@operator()
def _unpack_signs(
    stream: Tensor,
    counts: Tensor,
    coefficients: Tensor,
    directions: Tensor,
    shift: Tensor,
    limit: Tensor,
    exact: bool,
    p: float,
    seed: Tensor,
    offset: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    count = coefficients.size(0) * directions.size(0)
    return packed_bytes(stream, count), stream.new_empty((), dtype=torch.int32)


def unpack_signs(
    stream: Tensor,
    counts: Tensor,
    coefficients: Tensor,
    directions: Tensor,
    shift: Tensor,
    limit: Tensor,
    *,
    exact: bool,
    p: float,
    seed: int | Tensor,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """All signs, 0 where dropout drops, and of how many chunks the bits stored are not those found."""
    drawing = (exact, p, seed_tensor(seed, stream.device), row_offset(seed, shift))
    return _unpack_signs(stream, counts, coefficients, directions, shift, limit, *drawing, backend)
