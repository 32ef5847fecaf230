"""The compression kernels as custom operators: what autograd functions call, and what ``torch.compile`` traces through.

Each operator picks the backend for its tensors' device, and has a fake implementation that tells shapes and types.
The functions below them take a seed as an int or a 0-d int64 tensor and keyword-only options; arguments are checked
by their callers. Formulas stand in :mod:`iexact_runner.kernels.reference`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from iexact_runner.kernels import reference
from iexact_runner.kernels.backends import select

_LIBRARY = "iexact"


def operator(name: str, schema: str):  # type: ignore[no-untyped-def]  # a decorator factory over any signature
    """Registers a function without side effects as a custom operator of this library."""
    return torch.library.custom_op(f"{_LIBRARY}::{name}", mutates_args=(), schema=schema)


def seed_tensor(seed: int | Tensor, device: torch.device) -> Tensor:
    """A seed as a 0-d int64 tensor; an int is written on the device, which a copy to it would wait for."""
    return seed if isinstance(seed, Tensor) else torch.full((), seed, dtype=torch.int64, device=device)


class RowSeed(int):
    """A seed for a run of rows of a larger map: rows here draw what the same rows draw there.

    Args:
        first_row: of the run; its place in the map, times the width, must be a multiple of 8 elements.
    """

    first_row: int

    @classmethod
    def of(cls, seed: int, first_row: int) -> RowSeed:
        """The seed of the rows from ``first_row`` on."""
        made = cls(seed)
        made.first_row = first_row
        return made


def row_offset(seed: int | Tensor, x: Tensor) -> int:
    """Elements of a larger map, as wide as ``x``, before the rows that the seed is for."""
    return seed.first_row * x.size(-1) if isinstance(seed, RowSeed) else 0


def packed_bytes(x: Tensor, count: int, bits: int = 1) -> Tensor:
    """Room for the packed codes of ``count`` elements, where ``x`` is."""
    return x.new_empty((count * bits + 7) // 8, dtype=torch.uint8)


@operator(
    "quantize",
    "(Tensor x, Tensor seed, int bits, int block_size, float[]? levels, SymInt offset, str backend)"
    " -> (Tensor, Tensor, Tensor)",
)
def _quantize(
    x: Tensor, seed: Tensor, bits: int, block_size: int, levels: list[float] | None, offset: int, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    table = None if levels is None else tuple(levels)
    kept: tuple[Tensor, Tensor, Tensor] = select(backend, x.device).quantize(
        x, bits=bits, block_size=block_size, levels=table, seed=seed, offset=offset
    )
    return kept


@_quantize.register_fake
def _(
    x: Tensor, seed: Tensor, bits: int, block_size: int, levels: list[float] | None, offset: int, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    count, dtype = x.numel(), reference.stored_dtype(x.dtype)
    blocks = (count + block_size - 1) // block_size
    return packed_bytes(x, count, bits), x.new_empty(blocks, dtype=dtype), x.new_empty(blocks, dtype=dtype)


def quantize(
    x: Tensor,
    *,
    bits: int,
    block_size: int,
    levels: tuple[float, ...] | None,
    seed: int | Tensor,
    backend: str,
    offset: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Packed codes, zero and scale of a map."""
    table = None if levels is None else list(levels)
    kept: tuple[Tensor, Tensor, Tensor] = _quantize(
        x, seed_tensor(seed, x.device), bits, block_size, table, offset + row_offset(seed, x), backend
    )
    return kept


@operator(
    "dequantize",
    "(Tensor packed, Tensor zero, Tensor scale, int bits, int block_size, float[]? levels, SymInt[] shape,"
    " ScalarType dtype, str backend) -> Tensor",
)
def _dequantize(
    packed: Tensor,
    zero: Tensor,
    scale: Tensor,
    bits: int,
    block_size: int,
    levels: list[float] | None,
    shape: list[int],
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    table = None if levels is None else tuple(levels)
    decoded: Tensor = select(backend, packed.device).dequantize(
        packed, zero, scale, bits=bits, block_size=block_size, levels=table, shape=tuple(shape), dtype=dtype
    )
    return decoded


@_dequantize.register_fake
def _(
    packed: Tensor,
    zero: Tensor,
    scale: Tensor,
    bits: int,
    block_size: int,
    levels: list[float] | None,
    shape: list[int],
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    return packed.new_empty(shape, dtype=dtype)


def dequantize(
    packed: Tensor,
    zero: Tensor,
    scale: Tensor,
    *,
    bits: int,
    block_size: int,
    levels: tuple[float, ...] | None,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    """The decoded map."""
    table = None if levels is None else list(levels)
    decoded: Tensor = _dequantize(packed, zero, scale, bits, block_size, table, list(shape), dtype, backend)
    return decoded


@operator("leaky_relu", "(Tensor x, float negative_slope, str backend) -> (Tensor, Tensor)")
def _leaky_relu(x: Tensor, negative_slope: float, backend: str) -> tuple[Tensor, Tensor]:
    activated: tuple[Tensor, Tensor] = select(backend, x.device).leaky_relu(x, negative_slope=negative_slope)
    return activated


@_leaky_relu.register_fake
def _(x: Tensor, negative_slope: float, backend: str) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), packed_bytes(x, x.numel())


def leaky_relu(x: Tensor, *, negative_slope: float, backend: str) -> tuple[Tensor, Tensor]:
    """LeakyReLU and its packed mask."""
    activated: tuple[Tensor, Tensor] = _leaky_relu(x.contiguous(), negative_slope, backend)
    return activated


@operator("leaky_relu_backward", "(Tensor grad, Tensor mask, float negative_slope, str backend) -> Tensor")
def _leaky_relu_backward(grad: Tensor, mask: Tensor, negative_slope: float, backend: str) -> Tensor:
    kernels = select(backend, grad.device)
    result: Tensor = kernels.leaky_relu_backward(grad, mask, negative_slope=negative_slope)
    return result


@_leaky_relu_backward.register_fake
def _(grad: Tensor, mask: Tensor, negative_slope: float, backend: str) -> Tensor:
    return grad.new_empty(grad.shape)


def leaky_relu_backward(grad: Tensor, mask: Tensor, *, negative_slope: float, backend: str) -> Tensor:
    """Gradient of :func:`leaky_relu`."""
    result: Tensor = _leaky_relu_backward(grad.contiguous(), mask, negative_slope, backend)
    return result


@operator("dropout", "(Tensor x, Tensor seed, float p, SymInt offset, str backend) -> Tensor")
def _dropout(x: Tensor, seed: Tensor, p: float, offset: int, backend: str) -> Tensor:
    dropped: Tensor = select(backend, x.device).dropout(x, p=p, seed=seed, offset=offset)
    return dropped


@_dropout.register_fake
def _(x: Tensor, seed: Tensor, p: float, offset: int, backend: str) -> Tensor:
    return x.new_empty(x.shape)


def dropout(x: Tensor, *, p: float, seed: int | Tensor, backend: str, offset: int = 0) -> Tensor:
    """Dropout, and its own backward."""
    dropped: Tensor = _dropout(x.contiguous(), seed_tensor(seed, x.device), p, offset + row_offset(seed, x), backend)
    return dropped


@operator("dropout_mask", "(Tensor x, Tensor seed, float p, SymInt offset, str backend) -> Tensor")
def _dropout_mask(x: Tensor, seed: Tensor, p: float, offset: int, backend: str) -> Tensor:
    kernels = select(backend, x.device)
    mask: Tensor = kernels.dropout_mask(x.numel(), p=p, seed=seed, device=x.device, offset=offset)
    return mask


@_dropout_mask.register_fake
def _(x: Tensor, seed: Tensor, p: float, offset: int, backend: str) -> Tensor:
    return packed_bytes(x, x.numel())


def dropout_mask(x: Tensor, *, p: float, seed: int | Tensor, backend: str, offset: int = 0) -> Tensor:
    """Packed mask of what :func:`dropout` keeps of ``x``, of which only size and device are used."""
    mask: Tensor = _dropout_mask(x, seed_tensor(seed, x.device), p, offset + row_offset(seed, x), backend)
    return mask


@operator("apply_dropout_mask", "(Tensor x, Tensor mask, float p, str backend) -> Tensor")
def _apply_dropout_mask(x: Tensor, mask: Tensor, p: float, backend: str) -> Tensor:
    dropped: Tensor = select(backend, x.device).apply_dropout_mask(x, mask, p=p)
    return dropped


@_apply_dropout_mask.register_fake
def _(x: Tensor, mask: Tensor, p: float, backend: str) -> Tensor:
    return x.new_empty(x.shape)


def keep_mask(count: int, *, p: float, seed: int | Tensor, device: torch.device) -> Tensor:
    """Boolean mask (count,) of what :func:`dropout` keeps of so many elements, drawn by the kernels of the device."""
    sized = torch.empty(1, device=device).expand(count)
    return reference.unpack(dropout_mask(sized, p=p, seed=seed, backend="auto"), count, 1).bool()


def apply_dropout_mask(x: Tensor, mask: Tensor, *, p: float, backend: str) -> Tensor:
    """Dropout from a stored mask, and its own backward."""
    dropped: Tensor = _apply_dropout_mask(x.contiguous(), mask, p, backend)
    return dropped


@operator(
    "leaky_relu_dropout",
    "(Tensor x, Tensor seed, float negative_slope, float p, SymInt offset, str backend) -> (Tensor, Tensor)",
)
def _leaky_relu_dropout(
    x: Tensor, seed: Tensor, negative_slope: float, p: float, offset: int, backend: str
) -> tuple[Tensor, Tensor]:
    dropped: tuple[Tensor, Tensor] = select(backend, x.device).leaky_relu_dropout(
        x, negative_slope=negative_slope, p=p, seed=seed, offset=offset
    )
    return dropped


@_leaky_relu_dropout.register_fake
def _(x: Tensor, seed: Tensor, negative_slope: float, p: float, offset: int, backend: str) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), packed_bytes(x, x.numel())


def leaky_relu_dropout(
    x: Tensor, *, negative_slope: float, p: float, seed: int | Tensor, backend: str, offset: int = 0
) -> tuple[Tensor, Tensor]:
    """LeakyReLU and dropout in one pass, and the packed mask of the former."""
    dropped: tuple[Tensor, Tensor] = _leaky_relu_dropout(
        x.contiguous(), seed_tensor(seed, x.device), negative_slope, p, offset + row_offset(seed, x), backend
    )
    return dropped


@operator(
    "leaky_relu_dropout_backward",
    "(Tensor grad, Tensor mask, Tensor seed, float negative_slope, float p, SymInt offset, str backend) -> Tensor",
)
def _leaky_relu_dropout_backward(
    grad: Tensor, mask: Tensor, seed: Tensor, negative_slope: float, p: float, offset: int, backend: str
) -> Tensor:
    result: Tensor = select(backend, grad.device).leaky_relu_dropout_backward(
        grad, mask, negative_slope=negative_slope, p=p, seed=seed, offset=offset
    )
    return result


@_leaky_relu_dropout_backward.register_fake
def _(grad: Tensor, mask: Tensor, seed: Tensor, negative_slope: float, p: float, offset: int, backend: str) -> Tensor:
    return grad.new_empty(grad.shape)


def leaky_relu_dropout_backward(
    grad: Tensor,
    mask: Tensor,
    *,
    negative_slope: float,
    p: float,
    seed: int | Tensor,
    backend: str,
    offset: int = 0,
) -> Tensor:
    """Gradient of :func:`leaky_relu_dropout`."""
    offset += row_offset(seed, grad)
    seed = seed_tensor(seed, grad.device)
    result: Tensor = _leaky_relu_dropout_backward(grad.contiguous(), mask, seed, negative_slope, p, offset, backend)
    return result


@operator("rademacher", "(Tensor like, Tensor seed, int rows, int columns, str backend) -> Tensor")
def _rademacher(like: Tensor, seed: Tensor, rows: int, columns: int, backend: str) -> Tensor:
    kernels = select(backend, like.device)
    projection: Tensor = kernels.rademacher(rows, columns, seed=seed, dtype=like.dtype, device=like.device)
    return projection


@_rademacher.register_fake
def _(like: Tensor, seed: Tensor, rows: int, columns: int, backend: str) -> Tensor:
    return like.new_empty(rows, columns)


def rademacher(like: Tensor, rows: int, columns: int, *, seed: int | Tensor, backend: str) -> Tensor:
    """Random projection (rows, columns), of the type and on the device of ``like``."""
    projection: Tensor = _rademacher(like, seed_tensor(seed, like.device), rows, columns, backend)
    return projection
