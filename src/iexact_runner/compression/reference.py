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


def normalize_relu_dropout(
    h: Tensor, mean: Tensor, inverse_std: Tensor, weight: Tensor, bias: Tensor, *, p: float, seed: int | Tensor
) -> tuple[Tensor, Tensor]:
    """Dropout(ReLU(gamma x^ + beta)) with x^ = (h - mean) inverse_std, and the packed mask of ReLU.

    h (N, D); the vectors (D,) are float32. The affine map is taken in float32, step by step, then rounded to h's type.
    """
    normalised = (h.float() - mean) * inverse_std * weight + bias
    return leaky_relu_dropout(normalised.to(h.dtype), negative_slope=0.0, p=p, seed=seed)


def combine(coefficients: Tensor, directions: Tensor, shift: Tensor | None) -> Tensor:
    """Product c V^T + shift in float32: c (N, R), V (D, R), shift (D,) -> (N, D), added up in the order of R."""
    combined = torch.zeros(coefficients.size(0), directions.size(0), device=coefficients.device)
    if shift is not None:
        combined += shift
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
    grad: Tensor, packed_mask: Tensor, coefficients: Tensor, directions: Tensor, *, p: float, seed: int | Tensor
) -> Tensor:
    """Sums over the nodes of g and of g (c V^T), float32 (2, D); g is ``grad`` behind ReLU and dropout."""
    gated = _gate(grad, packed_mask, p, seed)
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
) -> Tensor:
    """Gradient factor g + (c V^T + shift), rounded once to the type of ``grad``; g is that of :func:`gated_sums`."""
    gated = _gate(grad, packed_mask, p, seed)
    return (gated * factor + combine(coefficients, directions, shift)).to(grad.dtype)


def _gate(grad: Tensor, packed_mask: Tensor, p: float, seed: int | Tensor) -> Tensor:
    return leaky_relu_dropout_backward(grad.float(), packed_mask, negative_slope=0.0, p=p, seed=seed)


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


def rademacher(rows: int, columns: int, *, seed: int | Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Projection P (rows, columns) of independent +-1 / sqrt(columns), so that E[P P^T] = I (EXACT, section 3.2)."""
    draws = draw16(rows * columns, seed=seed, purpose=PROJECTION, device=device)
    signs = (draws >= DRAWS // 2).float() * 2 - 1
    scaled: Tensor = signs * columns**-0.5
    return scaled.view(rows, columns).to(dtype)
