"""What a block with BatchNorm does around its sketch, as custom operators; see :mod:`iexact_runner.kernels.ops`.

Shapes: N nodes, D features, R directions; directions V are (D, R), or (D,) of the columns themselves.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from iexact_runner.kernels import reference
from iexact_runner.kernels.ops import RowSeed, operator, packed_bytes, quantize, row_offset, seed_tensor


@operator()
def _normalize_relu_dropout(
    h: Tensor,
    mean: Tensor,
    inverse_std: Tensor,
    weight: Tensor,
    bias: Tensor,
    p: float,
    seed: Tensor,
    offset: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return h.new_empty(h.shape), packed_bytes(h, h.numel())


@operator(call=lambda kernels, h, **options: kernels.normalize_relu_dropout(h, **options, out=h)[1], writes=("h",))
def _normalize_relu_dropout_(
    h: Tensor,
    mean: Tensor,
    inverse_std: Tensor,
    weight: Tensor,
    bias: Tensor,
    p: float,
    seed: Tensor,
    offset: int,
    backend: str,
) -> Tensor:
    return packed_bytes(h, h.numel())


def normalize_relu_dropout(
    h: Tensor,
    mean: Tensor,
    inverse_std: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    p: float,
    seed: int | Tensor,
    backend: str,
    overwrite: bool = False,
) -> tuple[Tensor, Tensor]:
    """BatchNorm from its statistics, ReLU and dropout in one pass, and the packed mask of ReLU."""
    options = (mean, inverse_std, weight, bias, p, seed_tensor(seed, h.device), row_offset(seed, h), backend)
    if overwrite and h.is_contiguous():
        return h, _normalize_relu_dropout_(h, *options)
    return _normalize_relu_dropout(h.contiguous(), *options)


@operator()
def _decode_relu_dropout(
    coefficients: Tensor,
    directions: Tensor,
    shift: Tensor,
    packed_mask: Tensor | None,
    p: float,
    seed: Tensor,
    offset: int,
    backend: str,
) -> Tensor:
    return coefficients.new_empty(coefficients.size(0), directions.size(0), dtype=torch.float32)


def decode_relu_dropout(
    coefficients: Tensor,
    directions: Tensor,
    shift: Tensor,
    mask: Tensor | None,
    *,
    p: float,
    seed: int | Tensor,
    backend: str,
    offset: int = 0,
) -> Tensor:
    """Rows of dropout(mask(c V^T + shift)) in one pass."""
    drawing = (p, seed_tensor(seed, coefficients.device), offset + row_offset(seed, shift))
    return _decode_relu_dropout(coefficients.contiguous(), directions, shift, mask, *drawing, backend)


@operator()
def _gated_sums(
    grad: Tensor,
    packed_mask: Tensor,
    coefficients: Tensor,
    directions: Tensor,
    p: float,
    seed: Tensor,
    offset: int,
    backend: str,
) -> Tensor:
    return grad.new_empty(2, grad.size(1), dtype=torch.float32)


def gated_sums(
    grad: Tensor,
    mask: Tensor,
    coefficients: Tensor,
    directions: Tensor,
    *,
    p: float,
    seed: int | Tensor,
    backend: str,
) -> Tensor:
    """Sums over the nodes of g and of g (c V^T), (2, D), with g the gradient behind ReLU and dropout."""
    drawing = (p, seed_tensor(seed, grad.device), row_offset(seed, grad))
    return _gated_sums(grad.contiguous(), mask, coefficients.contiguous(), directions, *drawing, backend)


@operator()
def _gated_gradient(
    grad: Tensor,
    packed_mask: Tensor,
    coefficients: Tensor,
    directions: Tensor,
    factor: Tensor,
    shift: Tensor,
    p: float,
    seed: Tensor,
    offset: int,
    backend: str,
) -> Tensor:
    return grad.new_empty(grad.shape)


def _write_gradient(kernels: ModuleType, grad: Tensor, **options: Any) -> None:
    kernels.gated_gradient(grad, **options, out=grad)


@operator(call=_write_gradient, writes=("grad",))
def _gated_gradient_(
    grad: Tensor,
    packed_mask: Tensor,
    coefficients: Tensor,
    directions: Tensor,
    factor: Tensor,
    shift: Tensor,
    p: float,
    seed: Tensor,
    offset: int,
    backend: str,
) -> None:
    return None


def gated_gradient(
    grad: Tensor,
    mask: Tensor,
    coefficients: Tensor,
    directions: Tensor,
    factor: Tensor,
    shift: Tensor,
    *,
    p: float,
    seed: int | Tensor,
    backend: str,
    overwrite: bool = False,
) -> Tensor:
    """Gradient factor g + (c V^T + shift) in one pass, with g that of :func:`gated_sums`."""
    drawing = (p, seed_tensor(seed, grad.device), row_offset(seed, grad))
    options = (mask, coefficients.contiguous(), directions, factor, shift, *drawing, backend)
    if overwrite and grad.is_contiguous():
        _gated_gradient_(grad, *options)
        return grad
    return _gated_gradient(grad.contiguous(), *options)


@operator()
def _quantize_product(
    z: Tensor,
    matrix: Tensor,
    shift: Tensor,
    bits: int,
    block_size: int,
    levels: list[float] | None,
    seed: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    count, dtype = z.size(0) * matrix.size(1), reference.stored_dtype(z.dtype)
    blocks = (count + block_size - 1) // block_size
    return packed_bytes(z, count, bits), z.new_empty(blocks, dtype=dtype), z.new_empty(blocks, dtype=dtype)


def quantize_product(
    z: Tensor,
    matrix: Tensor,
    shift: Tensor,
    *,
    bits: int,
    block_size: int,
    levels: tuple[float, ...] | None,
    seed: int | Tensor,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Packed codes, zero and scale of z M + shift."""
    if isinstance(seed, RowSeed):  # the fused pass draws from the first element on
        form = dict(bits=bits, block_size=block_size, levels=levels, seed=seed, backend=backend)
        return quantize(torch.addmm(shift, z, matrix), **form)  # type: ignore[arg-type]
    table = None if levels is None else list(levels)
    factors = (z.contiguous(), matrix.contiguous(), shift)
    return _quantize_product(*factors, bits, block_size, table, seed_tensor(seed, z.device), backend)
