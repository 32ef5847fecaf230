"""Levels of least mean squared error for standard normal coefficients, at 0 to 8 bits: constants of their format."""

from __future__ import annotations

import functools

import numpy as np
import numpy.typing as npt
import torch
from scipy.special import ndtr, ndtri
from torch import Tensor

from iexact_runner.kernels.reference import MOST_BITS

_ITERATIONS = 4000


@functools.cache
def lloyd_max(bits: int) -> tuple[npt.NDArray[np.float64], float]:
    """Levels (2**bits,) of least mean squared error for a standard normal value, and that error D(bits).

    Each level is the mean of the values that are rounded to it, each border lies midway between two levels (Max, 1960;
    Lloyd, 1982).
    """
    count = 2**bits
    # Panter and Dite: the best levels lie about as densely as the cube root of the density, N(0, 3) here.
    levels = np.sqrt(3.0) * ndtri((np.arange(count) + 0.5) / count)
    for _ in range(_ITERATIONS if bits else 1):
        borders = np.concatenate([[-np.inf], (levels[1:] + levels[:-1]) / 2, [np.inf]])
        density = np.exp(-(borders**2) / 2) / np.sqrt(2 * np.pi)
        mass = np.diff(ndtr(borders))
        moved = -np.diff(density) / mass
        moved = (moved - moved[::-1]) / 2
        if np.abs(moved - levels).max() < 1e-12:
            break
        levels = moved
    return levels, float(1.0 - (mass * levels**2).sum())


@functools.cache
def level_table(device: torch.device) -> Tensor:
    """Levels of all numbers of bits, those of b bits from entry 2**b on: float32 (512,)."""
    table = np.zeros(2 << MOST_BITS)
    for bits in range(MOST_BITS + 1):
        table[1 << bits : 2 << bits] = lloyd_max(bits)[0]
    return torch.tensor(table, dtype=torch.float32, device=device)
