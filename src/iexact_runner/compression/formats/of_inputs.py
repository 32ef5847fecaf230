"""What formats share that are published for the input of a product alone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor

from iexact_runner.compression.maps import Format, KeptMap


@dataclass(frozen=True)
class InputFormat(ABC):
    """A format of the inputs of products.

    Args:
        others: how other maps are kept: those that BatchNorm and attention need.
    """

    others: Format

    @property
    def bits(self) -> int | None:
        """Of the other maps."""
        return self.others.bits

    @property
    def references_features(self) -> bool:
        """As plain modules do."""
        return True

    def keep(self, x: Tensor, *, seed: int | Tensor, project: bool) -> KeptMap:
        """Keeps a map (N, D)."""
        return self.keep_input(x) if project else self.others.keep(x, seed=seed, project=False)

    @abstractmethod
    def keep_input(self, x: Tensor) -> KeptMap:
        """Keeps the input (N, D) of a product."""
