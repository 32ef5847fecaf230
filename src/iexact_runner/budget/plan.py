"""How each map of a model is kept under a budget, as it is recorded and shown."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from iexact_runner.compression.choices import Choice
from iexact_runner.compression.directions import Directions
from iexact_runner.kept import MIB


@dataclass(frozen=True)
class PlannedMap:
    """One map of a plan.

    Args:
        layer: where it is kept.
        shape: (nodes, columns).
        sketched: whether it is kept as a sketch.
        choice: how it is kept.
        bytes: that it is expected to keep.
        error: that it is expected to add to the squared error of the gradient.
    """

    layer: str
    shape: tuple[int, int]
    sketched: bool
    choice: Choice
    bytes: float
    error: float


@dataclass(frozen=True)
class Plan:
    """How all maps of a model are kept, in the order of a pass.

    Args:
        maps: the maps.
        budget: bytes that a step may keep.
        saved: bytes that a step kept when the plan was tried.
        gradient_norm: of a step; None if no gradient was computed, and errors are in no unit.
        measured_error: relative error of that gradient under the plan.
        evaluations: gradients that were computed to find it.
    """

    maps: tuple[PlannedMap, ...]
    budget: float
    saved: int
    gradient_norm: float | None = None
    measured_error: float | None = None
    evaluations: int = 0

    @property
    def error(self) -> float | None:
        """Relative error of the gradient that is expected; None if none was measured."""
        total: float = sum(each.error for each in self.maps)
        return total**0.5 / self.gradient_norm if self.gradient_norm else None

    def choices(self) -> list[Choice]:
        """How each map is kept."""
        return [each.choice for each in self.maps]

    def directions(self) -> list[Directions]:
        """States of the maps for a model that is to keep them so."""
        return [Directions(choice=choice) for choice in self.choices()]

    def record(self) -> dict[str, Any]:
        """Plain values for a summary."""
        total = sum(each.error for each in self.maps)
        return {
            "budget_mib": self.budget / MIB,
            "saved_mib": self.saved / MIB,
            "expected_error": self.error,
            "measured_error": self.measured_error,
            "evaluations": self.evaluations,
            "maps": [
                {
                    "layer": each.layer,
                    "shape": list(each.shape),
                    "kept": each.choice.label(sketched=each.sketched),
                    "mib": each.bytes / MIB,
                    "error_share": each.error / total if total else 0.0,
                    **each.choice.state(),
                }
                for each in self.maps
            ],
        }
