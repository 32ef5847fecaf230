"""The quantized product of a map with a few columns, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from iexact_runner.kernels.reference.quantizer import quantize


def quantize_product(
    z: Tensor,
    matrix: Tensor,
    shift: Tensor,
    *,
    bits: int,
    block_size: int,
    levels: tuple[float, ...] | None,
    seed: int | Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`quantize` of z M + shift: z (N, D), M (D, R), shift (R,) of one type; block_size is whole rows of R."""
    product = torch.addmm(shift, z, matrix)
    return quantize(product, bits=bits, block_size=block_size, levels=levels, seed=seed)
