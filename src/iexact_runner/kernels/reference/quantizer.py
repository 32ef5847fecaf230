"""Block-wise stochastic quantization in plain PyTorch.

Shapes: n elements of a map in flat row-major order, G block size, b bits a code, B = 2**b - 1 the highest code.
"""

from __future__ import annotations

import torch
from torch import Tensor

from iexact_runner.kernels.reference.common import (
    DRAWS,
    ROUNDING,
    SMALLEST_SCALE,
    draw16,
    level_table,
    pack,
    round_down,
    round_up,
    stored_dtype,
    unpack,
)


def quantize(
    x: Tensor, *, bits: int, block_size: int, levels: tuple[float, ...] | None, seed: int | Tensor, offset: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantizes a map block by block with stochastic rounding (i-EXACT, section 3).

    With h = (x - zero) / scale, an h between the levels l < u becomes u with probability (h - l) / (u - l), else l.
    zero and scale are the stored ones: zero <= min and zero + B * scale >= max hold after rounding them.
    A block that holds a NaN or an infinity, or whose range overflows, gets NaN for both and codes 0.
    ``offset`` is the flat index of the first element in the map that x is a piece of.

    Returns:
        Packed codes uint8 (ceil(n * b / 8),), zero and scale (ceil(n / G),).
    """
    flat = x.reshape(-1).float()
    count, dtype = flat.numel(), stored_dtype(x.dtype)
    if count == 0:
        empty = torch.empty(0, dtype=dtype, device=x.device)
        return torch.empty(0, dtype=torch.uint8, device=x.device), empty, empty.clone()
    blocks = _as_blocks(flat, block_size)
    low, high = blocks.aminmax(dim=1)
    top = 2**bits - 1
    zero = round_down(low, dtype)
    # A tensor divides exactly everywhere; by a Python number, CUDA multiplies with its reciprocal.
    scale = round_up(((high - zero.float()) / torch.full_like(high, top)).clamp_min(SMALLEST_SCALE), dtype)
    poisoned = ~(zero.isfinite() & scale.isfinite())
    zero, scale = zero.masked_fill(poisoned, torch.nan), scale.masked_fill(poisoned, torch.nan)

    inverse = 1.0 / scale.float()
    h = ((blocks - zero.float()[:, None]) * inverse[:, None]).masked_fill_(poisoned[:, None], 0.0).flatten()[:count]
    draws = draw16(count, seed=seed, purpose=ROUNDING, device=x.device, offset=offset)
    u = (draws.float() + 0.5) * (1.0 / DRAWS)
    if levels is None:
        lower = h.floor()
        codes = (lower + (u < h - lower)).clamp_(max=top)
    else:
        table, inverse_width = level_table(levels, x.device)
        bin_index = torch.bucketize(h, table[1:-1], right=True)
        codes = bin_index + (u < (h - table[bin_index]) * inverse_width[bin_index])
    return pack(codes.to(torch.uint8), bits), zero, scale


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
) -> Tensor:
    """Decodes to zero + scale * level(code), in float32 without fused multiply-add, then to ``dtype``."""
    count = torch.Size(shape).numel()
    if count == 0:
        return torch.empty(shape, dtype=dtype, device=packed.device)
    codes = unpack(packed, count, bits)
    steps = codes.float() if levels is None else level_table(levels, packed.device)[0][codes.int()]
    decoded = _as_blocks(steps, block_size) * scale.float()[:, None] + zero.float()[:, None]
    return decoded.flatten()[:count].view(shape).to(dtype)


def _as_blocks(flat: Tensor, block_size: int) -> Tensor:
    """(blocks, G) view; a shorter last block is filled up with its last element, which changes no extremum."""
    block_size = min(block_size, flat.numel())
    missing = -flat.numel() % block_size
    if missing:
        flat = torch.cat([flat, flat[-1:].expand(missing)])
    return flat.view(-1, block_size)
