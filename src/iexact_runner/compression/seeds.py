"""Seeds derived from seeds: run -> step -> tensor, so that nothing random is drawn from a global generator.

And the normal numbers that are drawn from them outside of the kernels.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from iexact_runner.kernels import reference
from iexact_runner.kernels.ops import RowSeed, WrittenSeed

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1
# Seeds that are written on a device at once.
_WRITTEN = 64


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


class StepSeed(int):
    """The seed of a step whose tensors are on a device: the seeds of all are written there at once, not one by one.

    Args:
        device: where.
    """

    device: torch.device
    _written: list[Tensor]

    @classmethod
    def on(cls, device: torch.device, seed: int) -> StepSeed:
        """The seed of a step on a device."""
        made = cls(seed)
        made.device, made._written = device, []
        return made

    @classmethod
    def where_it_pays(cls, device: torch.device, seed: int | Tensor) -> int | Tensor:
        """A seed for a step on a device: on a GPU, where each seed would be a launch, it writes them at once."""
        return cls.on(device, seed) if device.type == "cuda" and type(seed) is int else seed

    def written(self, index: int) -> Tensor:
        """The seed of the ``index``-th random tensor, 0-d."""
        while index >= len(self._written):
            first = len(self._written) + 1
            strides = torch.arange(first, first + _WRITTEN, device=self.device).mul_(_signed(_GOLDEN))
            self._written += strides.add_(int(self)).unbind()
        return self._written[index]


def tensor_seed(step_seed: int | Tensor, index: int) -> int | Tensor:
    """Seed of the ``index``-th random tensor of a step; distinct keys suffice, for Philox hashes them itself.

    Plain arithmetic, so that a 0-d int64 ``step_seed`` stays a tensor and a compiled step is not compiled again.
    """
    stride = _signed(((index + 1) * _GOLDEN) & _MASK)
    if isinstance(step_seed, Tensor):
        return step_seed + stride
    derived = _signed((step_seed + stride) & _MASK)
    if isinstance(step_seed, StepSeed):
        return WrittenSeed.of(derived, step_seed.written(index))
    return RowSeed.of(derived, step_seed.first_row) if isinstance(step_seed, RowSeed) else derived


def normal_draws(count: int, *, seed: int | Tensor, device: torch.device) -> Tensor:
    """Standard normal numbers (count,) from a seed, by the transform of Box and Muller."""
    pairs = count + count % 2
    draws = reference.draw16(pairs, seed=seed, purpose=reference.PROJECTION, device=device)
    radius, angle = ((draws.float() + 0.5) / 2**16).view(2, -1)
    length, turn = (-2 * radius.log()).sqrt(), 2 * math.pi * angle
    return torch.cat([length * turn.cos(), length * turn.sin()])[:count]
