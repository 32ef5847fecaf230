"""Coefficients of a sketch with bits dealt over its directions: reverse water-filling and Lloyd-Max levels.

A Gaussian of variance v that is rounded to the nearest of the best 2**b levels keeps the error v D(b). Bits go, one by
one, where one more removes most: that is reverse water-filling (Cover and Thomas, section 10.3) for whole bits.

Shapes: N nodes, R directions, W bits a node.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from iexact_runner.kernels import sketch_ops
from iexact_runner.kernels.levels import lloyd_max
from iexact_runner.kernels.reference import MOST_BITS

# Directions that bits are dealt over, as a share of the bits: more of them would get none.
DIRECTIONS_PER_BIT = 3 / 8


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def distortions() -> tuple[float, ...]:
    """D(b), the error of a standard normal value at 0 to 8 bits."""
    return tuple(lloyd_max(bits)[1] for bits in range(MOST_BITS + 1))


def directions_for(total: int) -> int:
    """Directions that so many bits a node are dealt over, if a map has as many."""
    return max(1, int(total * DIRECTIONS_PER_BIT))


def deal_bits(variances: Tensor, total: int) -> Tensor:
    """Bits of each direction, int32 (R,): ``total`` of them, 8 at most each, where they remove most of the error.

    D is convex, so that the largest gains of all directions are the first ones of each; nothing leaves the device.
    """
    errors = distortions()
    removed = [errors[bits] - errors[bits + 1] for bits in range(MOST_BITS)]
    gains = torch.stack([variances.float() * gain for gain in removed], dim=1)  # [R, 8]
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
        return sketch_ops.dequantize_coefficients(codes, bits, backend=self.backend)


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
            width=width,
            seed=seed if self.stochastic else None,
            backend=self.backend,
        )
        shape = (coefficients.size(0), coefficients.size(1))
        return CoefficientLayout(shape, width, self.backend), (codes, dealt)
