"""Coefficients of a sketch and the signs that it does not know, as custom operators like those of ``ops``.

Shapes: N nodes, D features, R directions, W bits a node; directions V are (D, R), or (D,) of the columns themselves.
"""

from __future__ import annotations

import torch
from torch import Tensor

from iexact_runner.kernels.backends import select
from iexact_runner.kernels.levels import level_table
from iexact_runner.kernels.ops import operator, packed_bytes, row_offset, seed_tensor
from iexact_runner.kernels.reference import chunk_bytes, chunk_rows


@operator(
    "quantize_coefficients",
    "(Tensor coefficients, Tensor bits, int width, Tensor? seed, str backend) -> Tensor",
)
def _quantize_coefficients(coefficients: Tensor, bits: Tensor, width: int, seed: Tensor | None, backend: str) -> Tensor:
    kernels = select(backend, coefficients.device)
    codes: Tensor = kernels.quantize_coefficients(
        coefficients, bits, level_table(coefficients.device), width=width, seed=seed
    )
    return codes


@_quantize_coefficients.register_fake
def _(coefficients: Tensor, bits: Tensor, width: int, seed: Tensor | None, backend: str) -> Tensor:
    return coefficients.new_empty(coefficients.size(0), width // 8, dtype=torch.uint8)


def quantize_coefficients(
    coefficients: Tensor, bits: Tensor, *, width: int, seed: int | Tensor | None, backend: str
) -> Tensor:
    """Packed codes (N, W / 8) of the levels about each coefficient; without a seed the nearer ones."""
    drawn = None if seed is None else seed_tensor(seed, coefficients.device)
    codes: Tensor = _quantize_coefficients(coefficients.contiguous(), bits, width, drawn, backend)
    return codes


@operator("dequantize_coefficients", "(Tensor packed, Tensor bits, str backend) -> Tensor")
def _dequantize_coefficients(packed: Tensor, bits: Tensor, backend: str) -> Tensor:
    kernels = select(backend, packed.device)
    decoded: Tensor = kernels.dequantize_coefficients(packed, bits, level_table(packed.device))
    return decoded


@_dequantize_coefficients.register_fake
def _(packed: Tensor, bits: Tensor, backend: str) -> Tensor:
    return packed.new_empty(packed.size(0), bits.numel(), dtype=torch.float32)


def dequantize_coefficients(packed: Tensor, bits: Tensor, *, backend: str) -> Tensor:
    """The levels (N, R) of packed codes."""
    decoded: Tensor = _dequantize_coefficients(packed, bits, backend)
    return decoded


@operator(
    "pack_signs",
    "(Tensor mask, Tensor coefficients, Tensor directions, Tensor shift, Tensor limit, Tensor seed, bool exact,"
    " float p, SymInt offset, str backend) -> (Tensor, Tensor)",
)
def _pack_signs(
    mask: Tensor,
    coefficients: Tensor,
    directions: Tensor,
    shift: Tensor,
    limit: Tensor,
    seed: Tensor,
    exact: bool,
    p: float,
    offset: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    streams: tuple[Tensor, Tensor] = select(backend, mask.device).pack_signs(
        mask, coefficients, directions, shift, limit, exact=exact, p=p, seed=seed, offset=offset
    )
    return streams


@_pack_signs.register_fake
def _(
    mask: Tensor,
    coefficients: Tensor,
    directions: Tensor,
    shift: Tensor,
    limit: Tensor,
    seed: Tensor,
    exact: bool,
    p: float,
    offset: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    width = directions.size(0)
    rows = chunk_rows(width)
    chunks = (coefficients.size(0) + rows - 1) // rows
    return mask.new_empty(chunks, chunk_bytes(width)), mask.new_empty(2, chunks, dtype=torch.int32)


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
    drawing = (seed_tensor(seed, mask.device), exact, p, row_offset(seed, shift))
    streams: tuple[Tensor, Tensor] = _pack_signs(mask, coefficients, directions, shift, limit, *drawing, backend)
    return streams


@operator("join_streams", "(Tensor streams, Tensor counts, SymInt capacity, str backend) -> Tensor")
def _join_streams(streams: Tensor, counts: Tensor, capacity: int, backend: str) -> Tensor:
    joined: Tensor = select(backend, streams.device).join_streams(streams, counts, capacity=capacity)
    return joined


@_join_streams.register_fake
def _(streams: Tensor, counts: Tensor, capacity: int, backend: str) -> Tensor:
    return streams.new_empty(capacity)


def join_streams(streams: Tensor, counts: Tensor, *, capacity: int, backend: str) -> Tensor:
    """The streams of all chunks one behind the other (capacity,)."""
    joined: Tensor = _join_streams(streams, counts, capacity, backend)
    return joined


@operator(
    "unpack_signs",
    "(Tensor stream, Tensor counts, Tensor coefficients, Tensor directions, Tensor shift, Tensor limit, Tensor seed,"
    " bool exact, float p, SymInt offset, str backend) -> (Tensor, Tensor)",
)
def _unpack_signs(
    stream: Tensor,
    counts: Tensor,
    coefficients: Tensor,
    directions: Tensor,
    shift: Tensor,
    limit: Tensor,
    seed: Tensor,
    exact: bool,
    p: float,
    offset: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    unpacked: tuple[Tensor, Tensor] = select(backend, stream.device).unpack_signs(
        stream, counts, coefficients, directions, shift, limit, exact=exact, p=p, seed=seed, offset=offset
    )
    return unpacked


@_unpack_signs.register_fake
def _(
    stream: Tensor,
    counts: Tensor,
    coefficients: Tensor,
    directions: Tensor,
    shift: Tensor,
    limit: Tensor,
    seed: Tensor,
    exact: bool,
    p: float,
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
    drawing = (seed_tensor(seed, stream.device), exact, p, row_offset(seed, shift))
    unpacked: tuple[Tensor, Tensor] = _unpack_signs(
        stream, counts, coefficients, directions, shift, limit, *drawing, backend
    )
    return unpacked
