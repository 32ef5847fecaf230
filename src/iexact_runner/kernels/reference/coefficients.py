"""Coefficients of a sketch with a number of bits for each direction, in plain PyTorch.

Shapes: N nodes, R directions, W bits a node, a multiple of 8. A code of b bits numbers the levels in the row
[2**b, 2**(b + 1)) of a table (512,), which ascend. Direction r of a node has the bits [s_r, s_r + b_r) of its W, low
bits first, with s_r the sum of the bits before it; one of 0 bits decodes to entry 1 of the table.
"""

from __future__ import annotations

import torch
from torch import Tensor

from iexact_runner.kernels.reference.common import DRAWS, ROUNDING, draw16

# Bits of the longest code.
MOST_BITS = 8


def quantize_coefficients(
    coefficients: Tensor, bits: Tensor, levels: Tensor, *, width: int, seed: int | Tensor | None
) -> Tensor:
    """Codes of the levels about each coefficient: the nearer one, or by chance one of the two.

    c between the levels l < u becomes u if (c - l) / (u - l) is above a half, or above a random number of [0, 1) if
    there is a seed; what lies outside of the levels becomes the outermost.

    Args:
        coefficients: (N, R) float32.
        bits: (R,) int32, b_r of 0 to 8; their sum is at most W.
        levels: (512,) float32.
        width: W.
        seed: of stochastic rounding; None rounds to the nearest.

    Returns:
        uint8 (N, W / 8).
    """
    nodes, rank = coefficients.shape
    flat = coefficients.flatten()
    u = torch.full_like(flat, 0.5)
    if seed is not None:
        draws = draw16(flat.numel(), seed=seed, purpose=ROUNDING, device=flat.device)
        u = (draws.float() + 0.5) * (1.0 / DRAWS)
    u = u.view(nodes, rank)
    packed = torch.zeros(nodes, width // 8 + 2, dtype=torch.int32, device=flat.device)
    start, inverses = bits.cumsum(0) - bits, inverse_steps(levels)
    for column in range(rank):
        c, b, first = coefficients[:, column].contiguous(), int(bits[column]), int(start[column])
        row = levels[1 << b : 2 << b]
        lower = (torch.bucketize(c.nan_to_num(nan=-torch.inf), row, right=True) - 1).clamp_(0)
        codes = (lower + (u[:, column] < (c - row[lower]) * inverses[(1 << b) + lower])).int() << (first % 8)
        packed[:, first // 8] |= codes & 0xFF
        packed[:, first // 8 + 1] |= codes >> 8
    return packed[:, : width // 8].to(torch.uint8)


def inverse_steps(levels: Tensor) -> Tensor:
    """1 / (next level - level) for each entry of the table (512,), 0 for the last of its row."""
    inverses = torch.zeros_like(levels)
    inverses[:-1] = 1.0 / (levels[1:] - levels[:-1])
    rows = torch.arange(levels.numel().bit_length(), device=levels.device)
    return inverses.index_fill_(0, 2**rows - 1, 0.0)


def dequantize_coefficients(packed: Tensor, bits: Tensor, levels: Tensor) -> Tensor:
    """The levels (N, R), float32, of codes (N, W / 8)."""
    words = torch.nn.functional.pad(packed.int(), (0, 2))
    start = (bits.cumsum(0) - bits).int()
    place = start // 8
    pairs = words[:, place] | words[:, place + 1] << 8
    codes = (pairs >> start % 8) & ((1 << bits) - 1)
    decoded: Tensor = levels[(1 << bits) + codes]
    return decoded
