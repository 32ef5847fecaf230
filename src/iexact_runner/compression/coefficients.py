"""Coefficients of a sketch with bits dealt over its directions: reverse water-filling and Lloyd-Max levels.

A Gaussian of variance v that is rounded to the nearest of the best 2**b levels keeps the error v D(b). Bits go, one by
one, where one more removes most: that is reverse water-filling (Cover and Thomas, section 10.3) for whole bits.

Shapes: N nodes, R directions, W bits a node.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import torch
from scipy.special import ndtr
from torch import Tensor

from iexact_runner.compression.curves import Array
from iexact_runner.kernels import sketch_ops
from iexact_runner.kernels.reference import MOST_BITS

_ITERATIONS = 4000


@functools.cache
def lloyd_max(bits: int) -> tuple[Array, float]:
    """Levels (2**bits,) of least mean squared error for a standard normal value, and that error D(bits).

    Each level is the mean of the values that are rounded to it, each border lies midway between two levels (Max, 1960;
    Lloyd, 1982).
    """
    count = 2**bits
    # Panter and Dite: the best levels lie about as densely as the cube root of the density, N(0, 3) here.
    levels = np.sqrt(3.0) * _normal_quantiles((np.arange(count) + 0.5) / count)
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


def _normal_quantiles(shares: Array) -> Array:
    quantiles: Array = (torch.erfinv(torch.from_numpy(2 * shares - 1)) * 2**0.5).numpy()
    return quantiles


@functools.cache
def level_table(device: torch.device) -> Tensor:
    """Levels of all numbers of bits, those of b bits from entry 2**b on: float32 (512,)."""
    table = np.zeros(2 << MOST_BITS)
    for bits in range(MOST_BITS + 1):
        table[1 << bits : 2 << bits] = lloyd_max(bits)[0]
    return torch.tensor(table, dtype=torch.float32, device=device)


def deal_bits(variances: Tensor, total: int) -> Tensor:
    """Bits of each direction, int32 (R,): ``total`` of them, 8 at most each, where they remove most of the error.

    D is convex, so that the largest gains of all directions are the first ones of each; nothing leaves the device.
    """
    distortions = variances.new_tensor([lloyd_max(bits)[1] for bits in range(MOST_BITS + 1)])
    gains = variances.float().unsqueeze(1) * (distortions[:-1] - distortions[1:])  # [R, 8]
    chosen = gains.flatten().topk(min(total, gains.numel())).indices
    bits = torch.zeros(gains.numel(), dtype=torch.int32, device=variances.device)
    return bits.scatter_(0, chosen, 1).view(gains.shape).sum(1, dtype=torch.int32)


@dataclass(frozen=True)
class CoefficientLayout:
    """Standardised coefficients (N, R) as codes of Lloyd-Max levels; their tensors are the codes and the bits (R,)."""

    shape: tuple[int, int]
    width: int
    backend: str

    @property
    def parts(self) -> int:
        """How many tensors the coefficients are made of."""
        return 2

    @property
    def stored_type(self) -> str:
        """What the coefficients of a node are kept as, for people."""
        return f"{self.width} bits a node"

    def stored(self, tensors: tuple[Tensor, ...]) -> Tensor:
        """The coefficients (N, R), decoded."""
        codes, bits = tensors
        return sketch_ops.dequantize_coefficients(codes, bits, level_table(codes.device), backend=self.backend)


@dataclass(frozen=True)
class CoefficientFormat:
    """How coefficients are kept if bits are dealt over directions.

    Args:
        bits: W, of a node and map, a multiple of 8.
        stochastic: round to either of the two levels about a coefficient, by chance, instead of to the nearer one.
        backend: who runs the kernels.
    """

    bits: int
    stochastic: bool
    backend: str

    def encode(
        self, coefficients: Tensor, dealt: Tensor, *, seed: int | Tensor
    ) -> tuple[CoefficientLayout, tuple[Tensor, ...]]:
        """Keeps standardised coefficients (N, R)."""
        width = min(self.bits, MOST_BITS * dealt.numel())
        codes = sketch_ops.quantize_coefficients(
            coefficients.float(),
            dealt,
            level_table(coefficients.device),
            width=width,
            seed=seed if self.stochastic else None,
            backend=self.backend,
        )
        shape = (coefficients.size(0), coefficients.size(1))
        return CoefficientLayout(shape, width, self.backend), (codes, dealt)
