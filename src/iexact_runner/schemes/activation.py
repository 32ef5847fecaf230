"""What travels between the blocks of a model: a map, and how the backward pass gets its values back."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from iexact_runner.compression.maps import KeptMap


@dataclass
class Resident:
    """The feature matrix itself: plain modules keep nothing more than a reference to it."""

    kept: KeptMap | None = None


@dataclass
class Kept:
    """A computed map; ``kept`` is filled by the first consumer that needs it and shared by all later ones."""

    kept: KeptMap | None = None


@dataclass
class Activation:
    """A map (N, D), exact in the forward pass, and its source for the backward pass.

    ``owned`` says that nobody reads the value after the next operation, which may then overwrite it.
    """

    value: Tensor
    source: Resident | Kept
    owned: bool = False

    def shared(self) -> Activation:
        """The same map for an operation that is not the last to read it."""
        return replace(self, owned=False)
