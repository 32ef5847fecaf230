"""DropIT (Chen et al., ICLR 2023, arXiv 2202.13808): of the input of a product, the largest elements alone.

The k = floor(kept_frac N D) elements of largest magnitude are kept with their positions, the others count as zero
(section 3, min-k). The weight gradient is biased; that of the input needs nothing of the map. Maps that are not the
input of a product stay as they are, or become blocks of ``bits`` bits. Shapes: N nodes, D features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from iexact_runner.compression.formats.of_inputs import InputFormat
from iexact_runner.compression.maps import DecodedLayout, KeptMap, MapFormat
from iexact_runner.config import CompressionConfig


@dataclass(frozen=True)
class DropIT(InputFormat):
    """The format.

    Args:
        kept_frac: share of the elements that are kept.
    """

    kept_frac: float

    def keep_input(self, x: Tensor) -> KeptMap:
        """Keeps the input (N, D) of a product."""
        flat = x.flatten()
        positions = flat.abs().topk(int(self.kept_frac * flat.numel()), sorted=False).indices
        layout = DropITLayout(tuple(x.shape), "largest")
        # int32 as the authors' code has it, where it reaches.
        kind = torch.int32 if flat.numel() <= 2**31 else torch.int64
        return KeptMap(layout, (flat[positions], positions.to(kind)))


@dataclass(frozen=True)
class DropITLayout(DecodedLayout):
    """Values and their positions in the flat map."""

    def decode(self, tensors: tuple[Tensor, ...]) -> Tensor:
        """The map (N, D), zero where nothing was kept."""
        values, positions = tensors
        return values.new_zeros(self.shape).flatten().index_copy_(0, positions.long(), values).view(self.shape)


def make_format(config: CompressionConfig) -> DropIT:
    """From the fields of a configuration."""
    return DropIT(MapFormat(config.bits, 1.0, 0, None, None, config.backend), config.kept_frac)
