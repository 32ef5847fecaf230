"""Epochs per second."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Throughput:
    """Epochs per second over the timed epochs: median, 20th and 80th percentile."""

    median: float
    p20: float
    p80: float
    warmup_epochs: int
    timed_epochs: int

    @classmethod
    def of(cls, seconds: Sequence[float], *, warmup_epochs: int) -> Throughput:
        """From the seconds of each timed epoch."""
        rates = sorted(1.0 / max(second, 1e-9) for second in seconds)
        cuts = statistics.quantiles(rates, n=10, method="inclusive") if len(rates) > 1 else [rates[0]] * 9
        return cls(statistics.median(rates), cuts[1], cuts[7], warmup_epochs, len(rates))

    def to_dict(self) -> dict[str, Any]:
        """In the layout of ``summary.json``."""
        return {
            "epochs_per_second": {"median": self.median, "p20": self.p20, "p80": self.p80},
            "warmup_epochs": self.warmup_epochs,
            "timed_epochs": self.timed_epochs,
        }


def time_epochs(
    epoch: Callable[[], float],
    *,
    warmup_epochs: int,
    timed_epochs: int,
    max_seconds: float,
    meter: AbstractContextManager[Any] | None = None,
) -> Throughput:
    """Calls ``epoch``, which runs one and returns its seconds, first to warm up, then to be timed inside ``meter``.

    Past a quarter of ``max_seconds`` the warm-up ends, past ``max_seconds`` the timing, after three epochs at least.
    """
    warmed: list[float] = []
    while len(warmed) < warmup_epochs and sum(warmed) < max_seconds / 4:
        warmed.append(epoch())
    timed: list[float] = []
    with meter or nullcontext():
        while len(timed) < timed_epochs and (len(timed) < 3 or sum(timed) < max_seconds):
            timed.append(epoch())
    return Throughput.of(timed, warmup_epochs=len(warmed))
