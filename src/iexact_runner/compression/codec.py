"""Block-wise stochastic quantization of a tensor: the public pair :func:`quantize` and :func:`dequantize`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from iexact_runner.kernels import backends, ops, reference

BITS = (1, 2, 4, 8)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Quantized:
    """A tensor of n elements kept as packed codes and one (zero, scale) pair a block.

    Args:
        codes: uint8 (ceil(n * bits / 8),), first element in the lowest bits.
        zero: (ceil(n / block_size),), bfloat16 for a float32 tensor, else the tensor's own type.
        scale: like ``zero``.
        shape: shape of the original tensor; likewise ``dtype``.
        bits: bits of a code.
        block_size: elements that share a (zero, scale) pair.
        levels: value of each code in units of the scale; None is 0, 1, ..., 2**bits - 1.
    """

    codes: Tensor
    zero: Tensor
    scale: Tensor
    shape: tuple[int, ...]
    dtype: torch.dtype
    bits: int
    block_size: int
    levels: tuple[float, ...] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes kept: codes, zeros and scales."""
        return self.codes.nbytes + self.zero.nbytes + self.scale.nbytes


def quantize(
    x: Tensor,
    *,
    bits: int,
    block_size: int,
    levels: Sequence[float] | None = None,
    seed: int | Tensor,
    backend: str = "auto",
) -> Quantized:
    """Quantizes a tensor with block-wise stochastic rounding (i-EXACT, arXiv 2309.11856, section 3).

    The tensor is cut into blocks of ``block_size`` consecutive elements of its row-major order; the last may be
    shorter. Within a block, h = (x - zero) / scale lies in [0, 2**bits - 1] and is rounded to one of the two levels
    around it, at random, so that the expectation of the decoded value is x. A block that holds a NaN or an infinity,
    or whose range exceeds what the stored type can hold, decodes to NaN.

    Args:
        x: float32, bfloat16 or float16 tensor of any shape and stride.
        bits: bits of a code: 1, 2, 4 or 8.
        block_size: elements of a block, 1 or more.
        levels: 2**bits increasing numbers from 0 to 2**bits - 1; None for uniform levels.
        seed: key of the counter-based random numbers, an int or a 0-d int64 tensor. The same seed gives the same
            codes on every backend, whatever the block size; no global generator is touched.
        backend: ``auto``, ``torch``, ``numba`` (CPU) or ``triton`` (GPU).

    Returns:
        The packed codes with what is needed to decode them.

    Raises:
        ValueError: if an argument is not valid; the message names it, its value and what is valid.
    """
    _check_tensor(x)
    _check_format(bits, block_size)
    _check_seed(seed)
    table = check_levels(levels, bits=bits)
    backends.resolve(backend, x.device)
    codes, zero, scale = ops.quantize(
        x.detach(), bits=bits, block_size=block_size, levels=table, seed=seed, backend=backend
    )
    return Quantized(codes, zero, scale, tuple(x.shape), x.dtype, bits, block_size, table)


def dequantize(quantized: Quantized, *, backend: str = "auto") -> Tensor:
    """Decodes to ``zero + scale * level(code)``, with the shape and type of the original tensor.

    Args:
        quantized: what :func:`quantize` returned.
        backend: ``auto``, ``torch``, ``numba`` (CPU) or ``triton`` (GPU).

    Raises:
        ValueError: if the backend is not valid, or a stored tensor is on another device than the codes or does not
            have the size that the format asks for.
    """
    count = torch.Size(quantized.shape).numel()
    _check_format(quantized.bits, quantized.block_size)
    if quantized.dtype not in DTYPES:
        raise ValueError(f"dtype={quantized.dtype}: must be one of {', '.join(map(str, DTYPES))}")
    blocks = -(-count // quantized.block_size)
    for name, size in (("codes", -(-count * quantized.bits // 8)), ("zero", blocks), ("scale", blocks)):
        part: Tensor = getattr(quantized, name)
        if part.numel() != size:
            raise ValueError(f"{name} holds {part.numel()} elements: shape, bits and block_size ask for {size}")
        dtype = torch.uint8 if name == "codes" else reference.stored_dtype(quantized.dtype)
        if part.dtype != dtype:
            raise ValueError(f"{name} is {part.dtype}: must be {dtype}")
        if part.device != quantized.codes.device:
            raise ValueError(f"{name} is on {part.device}: must be on {quantized.codes.device}, as the codes are")
    backends.resolve(backend, quantized.codes.device)
    return ops.dequantize(
        quantized.codes,
        quantized.zero,
        quantized.scale,
        bits=quantized.bits,
        block_size=quantized.block_size,
        levels=quantized.levels,
        shape=quantized.shape,
        dtype=quantized.dtype,
        backend=backend,
    )


def check_levels(levels: Sequence[float] | None, *, bits: int) -> tuple[float, ...] | None:
    """Levels as a tuple, None if they are uniform.

    Raises:
        ValueError: if they are not 2**bits increasing numbers from 0 to 2**bits - 1.
    """
    if levels is None:
        return None
    if isinstance(levels, str):
        raise ValueError(f"levels={levels!r}: must be numbers")
    table = tuple(float(level) for level in levels)
    top = 2**bits - 1
    if len(table) != top + 1:
        raise ValueError(f"levels={table}: {bits} bits need {top + 1} levels, got {len(table)}")
    if table[0] != 0 or table[-1] != top:
        raise ValueError(f"levels={table}: must start at 0 and end at {top}")
    if not all(low < high for low, high in zip(table, table[1:], strict=False)):
        raise ValueError(f"levels={table}: must be increasing")
    return None if table == tuple(range(top + 1)) else table


def _check_tensor(x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise ValueError(f"x={x!r:.60}: must be a tensor")
    if x.dtype not in DTYPES:
        raise ValueError(f"x.dtype={x.dtype}: must be one of {', '.join(map(str, DTYPES))}")
    if x.layout != torch.strided:
        raise ValueError(f"x.layout={x.layout}: must be a dense (strided) tensor")


def _check_format(bits: int, block_size: int) -> None:
    if type(bits) is not int or bits not in BITS:
        raise ValueError(f"bits={bits}: must be one of {', '.join(map(str, BITS))}")
    if type(block_size) is not int or not 1 <= block_size < 2**63:
        raise ValueError(f"block_size={block_size}: must be an int of 1 or more, below 2**63")


def _check_seed(seed: int | Tensor) -> None:
    if isinstance(seed, Tensor):
        if seed.dim() != 0 or seed.dtype != torch.int64:
            raise ValueError(f"seed of shape {tuple(seed.shape)}, {seed.dtype}: must be an int or a 0-d int64 tensor")
    elif type(seed) is not int or not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed={seed}: must be an int of 64 bits with sign, or a 0-d int64 tensor")
