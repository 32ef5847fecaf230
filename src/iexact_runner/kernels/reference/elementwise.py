"""Masks, dropout and the random projection in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from iexact_runner.kernels.reference.common import DRAWS, DROPOUT, PROJECTION, draw16, pack, unpack


def leaky_relu(x: Tensor, *, negative_slope: float) -> tuple[Tensor, Tensor]:
    """LeakyReLU (ReLU at slope 0) and the packed 1-bit mask of the elements that pass unchanged, NaN among them."""
    passes = ~(x <= 0)
    return F.leaky_relu(x, negative_slope) if negative_slope else F.relu(x), pack(passes.flatten().byte(), 1)


def leaky_relu_backward(grad: Tensor, packed_mask: Tensor, *, negative_slope: float) -> Tensor:
    """Gradient: grad where the mask is set, negative_slope * grad elsewhere."""
    passes = unpack(packed_mask, grad.numel(), 1).view(grad.shape).bool()
    return torch.where(passes, grad, grad * negative_slope if negative_slope else torch.zeros_like(grad))


def dropout_threshold(p: float) -> int:
    """An element is dropped when its 16-bit draw is below this, so p is honoured to 2**-17."""
    return min(round(p * DRAWS), DRAWS - 1)


def keep_mask(count: int, *, p: float, seed: int | Tensor, device: torch.device, offset: int = 0) -> Tensor:
    """Boolean mask (count,) of the elements that dropout keeps."""
    draws = draw16(count, seed=seed, purpose=DROPOUT, device=device, offset=offset)
    return draws >= dropout_threshold(p)


def dropout_mask(count: int, *, p: float, seed: int | Tensor, device: torch.device, offset: int = 0) -> Tensor:
    """The packed 1-bit :func:`keep_mask`."""
    return pack(keep_mask(count, p=p, seed=seed, device=device, offset=offset).byte(), 1)


def apply_dropout_mask(x: Tensor, packed_mask: Tensor, *, p: float) -> Tensor:
    """Kept elements: x / (1 - p') where the mask is set, 0 elsewhere; p' is what the threshold really drops with."""
    return _scale_kept(x, unpack(packed_mask, x.numel(), 1).bool(), p)


def dropout(x: Tensor, *, p: float, seed: int | Tensor, offset: int = 0) -> Tensor:
    """Dropout whose mask is regenerated from ``seed``; applied to a gradient it is its own backward."""
    return _scale_kept(x, keep_mask(x.numel(), p=p, seed=seed, device=x.device, offset=offset), p)


def leaky_relu_dropout(
    x: Tensor, *, negative_slope: float, p: float, seed: int | Tensor, offset: int = 0
) -> tuple[Tensor, Tensor]:
    """:func:`leaky_relu` then :func:`dropout`, and the packed mask of the former."""
    activated, mask = leaky_relu(x, negative_slope=negative_slope)
    return dropout(activated, p=p, seed=seed, offset=offset), mask


def leaky_relu_dropout_backward(
    grad: Tensor, packed_mask: Tensor, *, negative_slope: float, p: float, seed: int | Tensor, offset: int = 0
) -> Tensor:
    """Backward of :func:`leaky_relu_dropout`."""
    dropped = dropout(grad, p=p, seed=seed, offset=offset)
    return leaky_relu_backward(dropped, packed_mask, negative_slope=negative_slope)


def dropout_factor(p: float) -> float:
    """1 / (1 - p'), exact for the threshold in use; multiplied in float32, then rounded to the map's type."""
    return DRAWS / (DRAWS - dropout_threshold(p))


def _scale_kept(x: Tensor, kept: Tensor, p: float) -> Tensor:
    return torch.where(kept.view(x.shape), x * dropout_factor(p), torch.zeros_like(x))


def rademacher(rows: int, columns: int, *, seed: int | Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Projection P (rows, columns) of independent ±1 / sqrt(columns), so that E[P P^T] = I (EXACT, section 3.2)."""
    draws = draw16(rows * columns, seed=seed, purpose=PROJECTION, device=device)
    signs = (draws >= DRAWS // 2).float() * 2 - 1
    scaled: Tensor = signs * columns**-0.5
    return scaled.view(rows, columns).to(dtype)
