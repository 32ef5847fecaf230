"""Seeds derived from seeds: run -> step -> tensor, so that nothing random is drawn from a global generator.

And the normal numbers that are drawn from them outside of the kernels.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from iexact_runner.kernels import reference
from iexact_runner.kernels.ops import RowSeed

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def mix(*parts: int) -> int:
    """Hashes integers (run seed, step, ...) into one signed 64-bit seed (SplitMix64, Steele et al., 2014)."""
    state = 0
    for part in parts:
        state = (state + (part & _MASK) + _GOLDEN) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return _signed(state)


def tensor_seed(step_seed: int | Tensor, index: int) -> int | Tensor:
    """Seed of the ``index``-th random tensor of a step; distinct keys suffice, for Philox hashes them itself.

    Plain arithmetic, so that a 0-d int64 ``step_seed`` stays a tensor and a compiled step is not compiled again.
    """
    stride = _signed(((index + 1) * _GOLDEN) & _MASK)
    if isinstance(step_seed, Tensor):
        return step_seed + stride
    derived = _signed((step_seed + stride) & _MASK)
    return RowSeed.of(derived, step_seed.first_row) if isinstance(step_seed, RowSeed) else derived


def normal_draws(count: int, *, seed: int | Tensor, device: torch.device) -> Tensor:
    """Standard normal numbers (count,) from a seed, by the transform of Box and Muller."""
    pairs = count + count % 2
    draws = reference.draw16(pairs, seed=seed, purpose=reference.PROJECTION, device=device)
    radius, angle = ((draws.float() + 0.5) / 2**16).view(2, -1)
    length, turn = (-2 * radius.log()).sqrt(), 2 * math.pi * angle
    return torch.cat([length * turn.cos(), length * turn.sin()])[:count]
