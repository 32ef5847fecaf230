"""Randomized Hadamard transform before block-wise stochastic quantization.

Within groups of G elements, y = H S x / sqrt(G) with random signs S and the Hadamard matrix H spreads what is large
over all of them, so that the range of a block is smaller for the same energy (as in QuIP#, Tseng et al., ICML 2024, for
weights). Both are orthogonal, so decoding is unbiased as the rounding is. Shapes: N nodes, D features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from iexact_runner.compression.maps import DecodedLayout, KeptMap, MapFormat, MapLayout
from iexact_runner.compression.seeds import tensor_seed
from iexact_runner.config import CompressionConfig
from iexact_runner.kernels import ops


@dataclass(frozen=True)
class Hadamard:
    """The format.

    Args:
        group_size: G, a power of two; a block of the quantizer is one group.
        blocks: quantizes the transformed map.
    """

    group_size: int
    blocks: MapFormat

    @property
    def bits(self) -> int | None:
        """Of a code."""
        return self.blocks.bits

    @property
    def references_features(self) -> bool:
        """As plain modules do."""
        return True

    def keep(self, x: Tensor, *, seed: int | Tensor, project: bool) -> KeptMap:
        """Keeps a map (N, D), unbiased; its elements are taken in row-major order, the last group filled with zeros."""
        groups = F.pad(x.flatten(), (0, -x.numel() % self.group_size)).view(-1, self.group_size)
        signs = ops.rademacher(groups, self.group_size, 1, seed=tensor_seed(seed, 0), backend=self.blocks.backend)
        turned = (groups * signs.view(-1)) @ hadamard(self.group_size, like=groups)
        inner, tensors = self.blocks.encode(turned, seed=seed)
        layout = HadamardLayout(tuple(x.shape), inner.stored_type, inner)
        return KeptMap(layout, (*tensors, signs.view(-1) > 0))


@dataclass(frozen=True)
class HadamardLayout(DecodedLayout):
    """The quantized transform, and the signs.

    Args:
        inner: of the quantized transform.
    """

    inner: MapLayout

    def decode(self, tensors: tuple[Tensor, ...]) -> Tensor:
        """Unbiased estimate (N, D) of the map."""
        *codes, positive = tensors
        turned = self.inner.decode(tuple(codes))
        groups = (turned @ hadamard(turned.size(1), like=turned)) * (2.0 * positive - 1.0).to(turned.dtype)
        return groups.flatten()[: self.shape[0] * self.shape[1]].view(self.shape)


def hadamard(size: int, *, like: Tensor) -> Tensor:
    """The symmetric orthogonal Hadamard matrix (size, size) of Sylvester; ``size`` is a power of two."""
    index = torch.arange(size, device=like.device)
    common = index.unsqueeze(0) & index.unsqueeze(1)
    parity = torch.zeros_like(common)
    for bit in range(size.bit_length() - 1):
        parity ^= (common >> bit) & 1
    return (1 - 2 * parity).to(like.dtype).mul_(size**-0.5)


def make_format(config: CompressionConfig) -> Hadamard:
    """From the fields of a configuration."""
    assert config.group_size is not None
    blocks = MapFormat(config.bits, 1.0, 0, None, None, config.backend)
    return Hadamard(config.group_size, blocks)
