"""Peak memory: of a piece of work, beyond what was there before it, and of a run since it began."""

from __future__ import annotations

import ctypes
import gc
import itertools
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from iexact_runner.kept import MIB

# torch's number for the severity of errors: information is 0, a warning 1.
_LOG_ERRORS = 2


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
    # The allocator would warn of each release of what was there before, which is not to be counted.
    with _errors_alone():
        recorded.start()
        try:
            yield changes
        finally:
            recorded.stop()
            changes += _changes(recorded)


@contextmanager
def _errors_alone() -> Iterator[None]:
    """Context in which torch's C++ code logs no warnings; where its level is out of reach, nothing changes."""
    try:
        level = ctypes.c_int.in_dll(ctypes.CDLL(torch._C.__file__), "FLAGS_caffe2_log_level")
    except (OSError, ValueError):  # a build that logs by another library
        yield
        return
    before, level.value = level.value, max(level.value, _LOG_ERRORS)
    try:
        yield
    finally:
        level.value = before


def _changes(recorded: profile) -> list[int]:
    inner = recorded.profiler
    if inner is None or inner.kineto_results is None:
        raise RuntimeError("torch's profiler recorded nothing: was another one running?")
    recorded_events: list[Any] = inner.kineto_results.events()  # whose stubs lack the bytes
    events = [event for event in recorded_events if event.name() == "[memory]"]
    return [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]


def allocated(device: torch.device) -> int | None:
    """Bytes allocated on a CUDA device; None elsewhere."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else None


def reset_peak(device: torch.device) -> None:
    """Starts the peak figures of a device anew, from what is really in use."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()  # the reserved peak would else begin at what an earlier run left cached
        torch.cuda.reset_peak_memory_stats(device)
    with suppress(OSError):  # only Linux has it
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_mib(device: torch.device) -> dict[str, float | None]:
    """Peak MiB since :func:`reset_peak`: allocated and reserved on a CUDA device, and resident in this process.

    None for what a machine does not count: CUDA's figures without it, the resident set outside of Linux.
    """
    cuda = device.type == "cuda"
    return {
        "peak_allocated_mib": torch.cuda.max_memory_allocated(device) / MIB if cuda else None,
        "peak_reserved_mib": torch.cuda.max_memory_reserved(device) / MIB if cuda else None,
        "peak_resident_mib": _peak_resident_mib(),
    }


def _peak_resident_mib() -> float | None:
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        return None
    found = re.search(r"VmHWM:\s*(\d+) kB", status)
    return None if found is None else int(found[1]) / 1024
