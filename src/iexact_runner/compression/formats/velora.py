"""VeLoRA (Miles et al., NeurIPS 2024, arXiv 2405.17991): of the input of a product, one number a sub-token.

A row is cut into sub-tokens of ``group_size`` features, and each is projected onto one unit vector v, the direction of
their mean: kept are the coefficients z = x v, and the backward pass takes z v^T for the map (section 3). The gradient
is biased. The paper takes v from the first batch and holds it; here every pass takes that of its own map, which costs
one sum and is never out of date. Maps that are not the input of a product stay as they are, or become blocks of
``bits`` bits. Shapes: N nodes, D features, M features a sub-token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from iexact_runner.compression.formats.of_inputs import InputFormat
from iexact_runner.compression.maps import DecodedLayout, KeptMap, MapFormat
from iexact_runner.config import CompressionConfig


@dataclass(frozen=True)
class VeLoRA(InputFormat):
    """The format.

    Args:
        group_size: M.
    """

    group_size: int

    def keep_input(self, x: Tensor) -> KeptMap:
        """Keeps the input (N, D) of a product."""
        width = min(self.group_size, x.size(1))
        tokens = F.pad(x, (0, -x.size(1) % width)).view(-1, width)
        vector = F.normalize(tokens.float().mean(0), dim=0).to(x.dtype)
        return KeptMap(VeLoRALayout(tuple(x.shape), "rank 1"), (tokens @ vector, vector))


@dataclass(frozen=True)
class VeLoRALayout(DecodedLayout):
    """Coefficients of all sub-tokens, and the vector (M,)."""

    def decode(self, tensors: tuple[Tensor, ...]) -> Tensor:
        """The projected map (N, D)."""
        coefficients, vector = tensors
        nodes, columns = self.shape
        return (coefficients.unsqueeze(1) * vector).view(nodes, -1)[:, :columns].contiguous()


def make_format(config: CompressionConfig) -> VeLoRA:
    """From the fields of a configuration."""
    assert config.group_size is not None
    return VeLoRA(MapFormat(config.bits, 1.0, 0, None, None, config.backend), config.group_size)
