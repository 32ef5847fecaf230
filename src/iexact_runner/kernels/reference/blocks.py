"""What a low-rank block does around its sketch, in plain PyTorch.

Shapes: N nodes, D features, R directions. Directions of shape (D,) are the columns themselves, each times a factor: the
diagonal of a matrix (D, D), with the result of that matrix to the last bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from iexact_runner.kernels.reference.elementwise import (
    dropout,
    leaky_relu_backward,
    leaky_relu_dropout,
    leaky_relu_dropout_backward,
)


def normalize_relu_dropout(
    h: Tensor,
    mean: Tensor,
    inverse_std: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    p: float,
    seed: int | Tensor,
    offset: int = 0,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Dropout(ReLU(gamma x^ + beta)) with x^ = (h - mean) inverse_std, and the packed mask of ReLU.

    h (N, D); the vectors (D,) are float32. The affine map is taken in float32, step by step, then rounded to h's type.
    ``out`` takes the result; it may be h. ``offset``, a multiple of 8, is the flat index of the first element in the
    map that these rows are a run of.
    """
    normalised = (h.float() - mean) * inverse_std * weight + bias
    y, mask = leaky_relu_dropout(normalised.to(h.dtype), negative_slope=0.0, p=p, seed=seed, offset=offset)
    return (y if out is None else out.copy_(y)), mask


def combine(coefficients: Tensor, directions: Tensor, shift: Tensor | None) -> Tensor:
    """Product c V^T + shift in float32: c (N, R), V (D, R), shift (D,) -> (N, D), added up in the order of R."""
    combined = torch.zeros(coefficients.size(0), directions.size(0), dtype=torch.float32, device=coefficients.device)
    if shift is not None:
        combined += shift
    if directions.dim() == 1:
        return combined.add_(coefficients.float() * directions)
    for column in range(directions.size(1)):
        combined += coefficients[:, column, None].float() * directions[:, column]
    return combined


def decode_relu_dropout(
    coefficients: Tensor,
    directions: Tensor,
    shift: Tensor,
    packed_mask: Tensor | None,
    *,
    p: float,
    seed: int | Tensor,
    offset: int = 0,
) -> Tensor:
    """Rows of dropout(mask(c V^T + shift)), float32; without a mask there was no ReLU.

    ``offset`` is the flat index of the first element of these rows in their map.
    """
    decoded = combine(coefficients, directions, shift)
    if packed_mask is not None:
        decoded = leaky_relu_backward(decoded, packed_mask, negative_slope=0.0)
    return dropout(decoded, p=p, seed=seed, offset=offset)


def gated_sums(
    grad: Tensor,
    packed_mask: Tensor,
    coefficients: Tensor,
    directions: Tensor,
    *,
    p: float,
    seed: int | Tensor,
    offset: int = 0,
) -> Tensor:
    """Sums over the nodes of g and of g (c V^T), float32 (2, D); g is ``grad`` behind ReLU and dropout.

    ``offset`` is that of :func:`normalize_relu_dropout`.
    """
    gated = _gate(grad, packed_mask, p, seed, offset)
    return torch.stack([gated.sum(0), (gated * combine(coefficients, directions, None)).sum(0)])


def gated_gradient(
    grad: Tensor,
    packed_mask: Tensor,
    coefficients: Tensor,
    directions: Tensor,
    factor: Tensor,
    shift: Tensor,
    *,
    p: float,
    seed: int | Tensor,
    offset: int = 0,
    out: Tensor | None = None,
) -> Tensor:
    """Gradient factor g + (c V^T + shift), rounded once to the type of ``grad``; g is that of :func:`gated_sums`.

    ``out`` takes the result; it may be ``grad``. ``offset`` is that of :func:`normalize_relu_dropout`.
    """
    gated = _gate(grad, packed_mask, p, seed, offset)
    result = (gated * factor + combine(coefficients, directions, shift)).to(grad.dtype)
    return result if out is None else out.copy_(result)


def _gate(grad: Tensor, packed_mask: Tensor, p: float, seed: int | Tensor, offset: int) -> Tensor:
    return leaky_relu_dropout_backward(grad.float(), packed_mask, negative_slope=0.0, p=p, seed=seed, offset=offset)
