"""How one map is kept, where each map of a model has a choice of its own."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from iexact_runner.compression.maps import BFLOAT16_BITS


@dataclass(frozen=True)
class Choice:
    """How one map is kept.

    Args:
        bits: of a node, dealt over the coefficients of a sketch; of an element, if ``blockwise`` or without a sketch,
            16 of which are bfloat16; None keeps the map in FP32.
        sign_threshold: from how many deviations on a sketch gives a sign; None stores every sign.
        sign_share: about the most signs that are stored; None for as many as the threshold says.
        blockwise: of the columns themselves, as bfloat16 or each node's with a range of its own, which outliers do not
            leave.
    """

    bits: int | None
    sign_threshold: float | None = None
    sign_share: float | None = None
    blockwise: bool = False

    @property
    def of_columns(self) -> bool:
        """Whether a sketch holds the columns themselves, in place of coefficients in a few directions."""
        return self.bits is None or self.blockwise

    def state(self) -> dict[str, Any]:
        """Plain values, which make it again."""
        return asdict(self)

    def label(self, *, sketched: bool) -> str:
        """What it is, for people."""
        element = {None: "FP32", BFLOAT16_BITS: "BF16"}.get(self.bits, f"INT{self.bits}")
        if not sketched:
            return element
        kept = element if self.of_columns else f"{self.bits} bits a node"
        if self.sign_threshold is None:
            return f"{kept}, all signs"
        return f"{kept}, signs below {self.sign_threshold:g} deviations"


# Of every map of a model whose budget has not been dealt yet: that of the preset ``lowrank``.
UNPLANNED_BITS = 48
UNPLANNED = Choice(UNPLANNED_BITS, 2.0, 0.33)
