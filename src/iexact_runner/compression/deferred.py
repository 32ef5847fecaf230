"""Checks on a device that whoever captures a step reads afterwards, for a failed assertion ends the use of a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

# Not by thread: the backward pass of a GPU runs in one of its own.
_collected: list[Tensor] | None = None


@contextmanager
def deferred_checks() -> Iterator[list[Tensor]]:
    """Collects what :func:`defer` is given: 0-d tensors, not zero where something is wrong."""
    global _collected
    found: list[Tensor] = []
    _collected = found
    try:
        yield found
    finally:
        _collected = None


def defer(wrong: Tensor) -> bool:
    """Leaves a check to whoever captures this step; False if nobody does."""
    if _collected is None:
        return False
    _collected.append(wrong)
    return True
