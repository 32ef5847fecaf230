"""The compression formats in plain PyTorch: the specification in code, which every other backend equals bit for bit.

Shapes: n elements of a map in flat row-major order, G block size, b bits a code, B = 2**b - 1 the highest code.

Random numbers are part of the format. Element i draws 16 bits r(i): Philox-4x32-10 with the seed as key (low word
first) and the counter (low word of i // 8, high word of i // 8, purpose, 0) yields four words; word (i % 8) // 2 holds
element i in its low half if i is even, else in its high half. So nothing depends on the block size, the launch
geometry, the backend or the device, one Philox call serves eight neighbours, and nothing random is stored.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Purposes keep the streams of one seed apart.
ROUNDING, DROPOUT, PROJECTION = 0, 1, 2

MASK32 = 0xFFFFFFFF
PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
PHILOX_WEYL = (0x9E3779B9, 0xBB67AE85)
PHILOX_ROUNDS = 10
DRAWS = 1 << 16
GROUPS_AT_ONCE = 1 << 16
# Smallest normal number of float32 and bfloat16: a constant block has no range of its own to divide by.
SMALLEST_SCALE = 2.0**-126


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: int | Tensor) -> tuple[Tensor, ...]:
    """Philox-4x32-10 (Salmon et al., 2011) on int64 tensors that hold unsigned 32-bit words."""
    c0, c1, c2, c3 = counter
    k0, k1 = seed & MASK32, (seed >> 32) & MASK32
    for _ in range(PHILOX_ROUNDS):
        # int64 products wrap modulo 2**64, so shifting and masking still yields both 32-bit halves.
        product0, product1 = c0 * PHILOX_MULTIPLIERS[0], c2 * PHILOX_MULTIPLIERS[1]
        c0, c1 = ((product1 >> 32) & MASK32) ^ c1 ^ k0, product1 & MASK32
        c2, c3 = ((product0 >> 32) & MASK32) ^ c3 ^ k1, product0 & MASK32
        k0, k1 = (k0 + PHILOX_WEYL[0]) & MASK32, (k1 + PHILOX_WEYL[1]) & MASK32
    return c0, c1, c2, c3


def draw16(count: int, *, seed: int | Tensor, purpose: int, device: torch.device, offset: int = 0) -> Tensor:
    """The 16-bit draws r(offset), ..., r(offset + count - 1) as int32 (count,)."""
    first, last = offset // 8, -(-(offset + count) // 8)
    draws = torch.empty(last - first, 8, dtype=torch.int32, device=device)
    # Chunks whose words fit the processor's cache: several times faster than one pass over the whole map.
    for start in range(first, last, GROUPS_AT_ONCE):
        group = torch.arange(start, min(start + GROUPS_AT_ONCE, last), dtype=torch.int64, device=device)
        constant = torch.zeros_like(group)
        words = philox((group & MASK32, group >> 32, constant + purpose, constant), seed)
        rows = draws[start - first :][:GROUPS_AT_ONCE]
        for position, word in enumerate(words):
            rows[:, 2 * position] = word & 0xFFFF
            rows[:, 2 * position + 1] = word >> 16
    return draws.flatten()[offset - 8 * first :][:count]


def pack(codes: Tensor, bits: int) -> Tensor:
    """Packs uint8 codes (n,) into ceil(n * bits / 8) bytes, the first code in the lowest bits."""
    if bits == 8:
        return codes
    per_byte = 8 // bits
    codes = F.pad(codes, (0, -codes.numel() % per_byte)).view(-1, per_byte)
    packed = codes[:, 0].clone()
    for position in range(1, per_byte):
        packed |= codes[:, position] << (bits * position)
    return packed


def unpack(packed: Tensor, count: int, bits: int) -> Tensor:
    """Inverse of :func:`pack`: uint8 codes (count,)."""
    if bits == 8:
        return packed[:count]
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    codes: Tensor = (packed[:, None] >> shifts) & (2**bits - 1)
    return codes.flatten()[:count]


def stored_dtype(dtype: torch.dtype) -> torch.dtype:
    """Type of a block's zero and scale: bfloat16 for float32 maps, else the map's own."""
    return torch.bfloat16 if dtype == torch.float32 else dtype


def round_down(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Largest number of the 16-bit ``dtype`` that is not above each float32 value."""
    # + 0.0 turns -0.0 into 0.0, whose sign a minimum would otherwise leave to chance.
    rounded = values.to(dtype) + 0.0
    bits = rounded.view(torch.int16)
    below = torch.where(rounded > 0, bits - 1, torch.where(rounded < 0, bits + 1, torch.full_like(bits, -0x7FFF)))
    return torch.where(rounded.float() > values, below.view(dtype), rounded)


def round_up(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Smallest number of the 16-bit ``dtype`` that is not below each float32 value."""
    return -round_down(-values, dtype)


def level_table(levels: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Levels (B + 1,) and reciprocal bin widths (B,), both float32."""
    table = torch.tensor(levels, dtype=torch.float32, device=device)
    return table, 1.0 / (table[1:] - table[:-1])
