"""Peak memory of a piece of work: the most bytes allocated at one moment beyond what was there before it."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


class PeakMemory:
    """Context whose ``bytes`` tells, after it has ended, the peak of what was allocated in it.

    On CUDA the figures are the allocator's own; on a CPU they are those of :func:`record_allocations`.

    Args:
        device: whose memory to watch.
    """

    def __init__(self, device: torch.device) -> None:
        self.bytes = 0
        self._device = device
        self._before = 0
        self._changes: list[int] = []
        self._recording = record_allocations()

    def __enter__(self) -> PeakMemory:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            self._before = torch.cuda.memory_allocated(self._device)
        else:
            self._changes = self._recording.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self._device) - self._before
        else:
            self._recording.__exit__(kind, error, trace)
            self.bytes = max(itertools.accumulate(self._changes, initial=0))


@contextmanager
def record_allocations() -> Iterator[list[int]]:
    """Yields a list that holds, once the context has ended, the bytes of each allocation on the CPU in order.

    A release is negative. Allocations inside of operators count; memory that is not torch's is not seen.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler would announce itself on the screen
    changes: list[int] = []
    recorded = profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=False)
    recorded.start()
    try:
        yield changes
    finally:
        recorded.stop()
        changes += _changes(recorded)


def _changes(recorded: profile) -> list[int]:
    inner = recorded.profiler
    if inner is None or inner.kineto_results is None:
        raise RuntimeError("torch's profiler recorded nothing: was another one running?")
    recorded_events: list[Any] = inner.kineto_results.events()  # whose stubs lack the bytes
    events = [event for event in recorded_events if event.name() == "[memory]"]
    return [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
