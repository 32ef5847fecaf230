"""What autograd functions say of the maps they keep, and how they keep seeds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class SavedMap:
    """What a function tells :mod:`iexact_runner.measure` of a map it keeps.

    Args:
        shape: logical shape of the map.
        stored_type: what an element is kept as, for example ``int2``.
        fp32_bytes: bytes that plain PyG modules keep in its place on the same device.
        parts: how many of the saved tensors, from the first on, make up the map.
    """

    shape: tuple[int, ...]
    stored_type: str
    fp32_bytes: int
    parts: int


def save_with_seed(ctx: Any, seed: int | Tensor, *tensors: Tensor) -> None:
    """Saves tensors and a seed, which is one of them if it is a tensor."""
    ctx.seed = None if isinstance(seed, Tensor) else seed
    ctx.save_for_backward(*tensors, *([seed] if isinstance(seed, Tensor) else []))


def restore_seed(ctx: Any) -> tuple[tuple[Tensor, ...], int | Tensor]:
    """What :func:`save_with_seed` saved."""
    if ctx.seed is not None:
        return ctx.saved_tensors, ctx.seed
    *tensors, seed = ctx.saved_tensors
    return tuple(tensors), seed


def dropout_mask_bytes(x: Tensor) -> int:
    """Bytes of plain dropout's mask: floats on the CPU, one byte an element on a GPU."""
    return x.numel() * (1 if x.is_cuda else 4)
