"""What a block with BatchNorm does around its sketch, as custom operators; see :mod:`iexact_runner.kernels.ops`.

Shapes: N nodes, D features, R directions; directions V are (D, R), or (D,) of the columns themselves.
"""

from __future__ import annotations

import torch
from torch import Tensor

from iexact_runner.kernels import reference
from iexact_runner.kernels.backends import select
from iexact_runner.kernels.ops import RowSeed, operator, packed_bytes, quantize, row_offset, seed_tensor


@operator(
    "normalize_relu_dropout",
    "(Tensor h, Tensor mean, Tensor inverse_std, Tensor weight, Tensor bias, Tensor seed, float p, SymInt offset,"
    " str backend) -> (Tensor, Tensor)",
)
def _normalize_relu_dropout(
    h: Tensor,
    mean: Tensor,
    inverse_std: Tensor,
    weight: Tensor,
    bias: Tensor,
    seed: Tensor,
    p: float,
    offset: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    finished: tuple[Tensor, Tensor] = select(backend, h.device).normalize_relu_dropout(
        h, mean, inverse_std, weight, bias, p=p, seed=seed, offset=offset
    )
    return finished


@_normalize_relu_dropout.register_fake
def _(
    h: Tensor,
    mean: Tensor,
    inverse_std: Tensor,
    weight: Tensor,
    bias: Tensor,
    seed: Tensor,
    p: float,
    offset: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return h.new_empty(h.shape), packed_bytes(h, h.numel())


@torch.library.custom_op(
    "iexact::normalize_relu_dropout_",
    mutates_args=("h",),
    schema="(Tensor(a!) h, Tensor mean, Tensor inverse_std, Tensor weight, Tensor bias, Tensor seed, float p,"
    " SymInt offset, str backend) -> Tensor",
)
def _normalize_relu_dropout_(
    h: Tensor,
    mean: Tensor,
    inverse_std: Tensor,
    weight: Tensor,
    bias: Tensor,
    seed: Tensor,
    p: float,
    offset: int,
    backend: str,
) -> Tensor:
    kernels = select(backend, h.device)
    mask: Tensor = kernels.normalize_relu_dropout(
        h, mean, inverse_std, weight, bias, p=p, seed=seed, offset=offset, out=h
    )[1]
    return mask


@_normalize_relu_dropout_.register_fake
def _(h: Tensor, *options: object) -> Tensor:
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
    options = (mean, inverse_std, weight, bias, seed_tensor(seed, h.device), p, row_offset(seed, h), backend)
    if overwrite and h.is_contiguous():
        mask: Tensor = _normalize_relu_dropout_(h, *options)
        return h, mask
    finished: tuple[Tensor, Tensor] = _normalize_relu_dropout(h.contiguous(), *options)
    return finished


@operator(
    "decode_relu_dropout",
    "(Tensor coefficients, Tensor directions, Tensor shift, Tensor? mask, Tensor seed, float p, SymInt offset,"
    " str backend) -> Tensor",
)
def _decode_relu_dropout(
    coefficients: Tensor,
    directions: Tensor,
    shift: Tensor,
    mask: Tensor | None,
    seed: Tensor,
    p: float,
    offset: int,
    backend: str,
) -> Tensor:
    decoded: Tensor = select(backend, coefficients.device).decode_relu_dropout(
        coefficients, directions, shift, mask, p=p, seed=seed, offset=offset
    )
    return decoded


@_decode_relu_dropout.register_fake
def _(
    coefficients: Tensor,
    directions: Tensor,
    shift: Tensor,
    mask: Tensor | None,
    seed: Tensor,
    p: float,
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
    decoded: Tensor = _decode_relu_dropout(
        coefficients.contiguous(),
        directions,
        shift,
        mask,
        seed_tensor(seed, coefficients.device),
        p,
        offset + row_offset(seed, shift),
        backend,
    )
    return decoded


@operator(
    "gated_sums",
    "(Tensor grad, Tensor mask, Tensor coefficients, Tensor directions, Tensor seed, float p, SymInt offset,"
    " str backend) -> Tensor",
)
def _gated_sums(
    grad: Tensor,
    mask: Tensor,
    coefficients: Tensor,
    directions: Tensor,
    seed: Tensor,
    p: float,
    offset: int,
    backend: str,
) -> Tensor:
    sums: Tensor = select(backend, grad.device).gated_sums(
        grad, mask, coefficients, directions, p=p, seed=seed, offset=offset
    )
    return sums


@_gated_sums.register_fake
def _(
    grad: Tensor,
    mask: Tensor,
    coefficients: Tensor,
    directions: Tensor,
    seed: Tensor,
    p: float,
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
    sums: Tensor = _gated_sums(
        grad.contiguous(),
        mask,
        coefficients.contiguous(),
        directions,
        seed_tensor(seed, grad.device),
        p,
        row_offset(seed, grad),
        backend,
    )
    return sums


@operator(
    "gated_gradient",
    "(Tensor grad, Tensor mask, Tensor coefficients, Tensor directions, Tensor factor, Tensor shift, Tensor seed,"
    " float p, SymInt offset, str backend) -> Tensor",
)
def _gated_gradient(
    grad: Tensor,
    mask: Tensor,
    coefficients: Tensor,
    directions: Tensor,
    factor: Tensor,
    shift: Tensor,
    seed: Tensor,
    p: float,
    offset: int,
    backend: str,
) -> Tensor:
    result: Tensor = select(backend, grad.device).gated_gradient(
        grad, mask, coefficients, directions, factor, shift, p=p, seed=seed, offset=offset
    )
    return result


@_gated_gradient.register_fake
def _(
    grad: Tensor,
    mask: Tensor,
    coefficients: Tensor,
    directions: Tensor,
    factor: Tensor,
    shift: Tensor,
    seed: Tensor,
    p: float,
    offset: int,
    backend: str,
) -> Tensor:
    return grad.new_empty(grad.shape)


@torch.library.custom_op(
    "iexact::gated_gradient_",
    mutates_args=("grad",),
    schema="(Tensor(a!) grad, Tensor mask, Tensor coefficients, Tensor directions, Tensor factor, Tensor shift,"
    " Tensor seed, float p, SymInt offset, str backend) -> ()",
)
def _gated_gradient_(
    grad: Tensor,
    mask: Tensor,
    coefficients: Tensor,
    directions: Tensor,
    factor: Tensor,
    shift: Tensor,
    seed: Tensor,
    p: float,
    offset: int,
    backend: str,
) -> None:
    select(backend, grad.device).gated_gradient(
        grad, mask, coefficients, directions, factor, shift, p=p, seed=seed, offset=offset, out=grad
    )


@_gated_gradient_.register_fake
def _(*arguments: object) -> None:
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
    drawing = (seed_tensor(seed, grad.device), p, row_offset(seed, grad))
    options = (mask, coefficients.contiguous(), directions, factor, shift, *drawing, backend)
    if overwrite and grad.is_contiguous():
        _gated_gradient_(grad, *options)
        return grad
    result: Tensor = _gated_gradient(grad.contiguous(), *options)
    return result


@operator(
    "quantize_product",
    "(Tensor z, Tensor matrix, Tensor shift, Tensor seed, int bits, int block_size, float[]? levels, str backend)"
    " -> (Tensor, Tensor, Tensor)",
)
def _quantize_product(
    z: Tensor,
    matrix: Tensor,
    shift: Tensor,
    seed: Tensor,
    bits: int,
    block_size: int,
    levels: list[float] | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    table = None if levels is None else tuple(levels)
    kept: tuple[Tensor, Tensor, Tensor] = select(backend, z.device).quantize_product(
        z, matrix, shift, bits=bits, block_size=block_size, levels=table, seed=seed
    )
    return kept


@_quantize_product.register_fake
def _(
    z: Tensor,
    matrix: Tensor,
    shift: Tensor,
    seed: Tensor,
    bits: int,
    block_size: int,
    levels: list[float] | None,
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
    kept: tuple[Tensor, Tensor, Tensor] = _quantize_product(
        z.contiguous(), matrix.contiguous(), shift, seed_tensor(seed, z.device), bits, block_size, table, backend
    )
    return kept
