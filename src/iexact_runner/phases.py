"""Which phase of a run ran out of memory: what would help differs."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

Phase = Literal["data", "training step", "evaluation"]


class PhaseOutOfMemory(MemoryError):
    """An allocation failed in a phase; its message is that of the allocator.

    Args:
        name: the phase.
        message: of the error.
    """

    def __init__(self, name: Phase, message: str) -> None:
        super().__init__(message)
        self.phase = name


@contextmanager
def phase(name: Phase) -> Iterator[None]:
    """Names the phase in an error of memory that ends it; an inner phase goes before an outer one.

    Raises:
        PhaseOutOfMemory: in place of the error, with the frames as text: the frames themselves hold the maps of the
            phase, so that who catches it gives up its ``__traceback__`` before anything else.
    """
    try:
        yield
    except PhaseOutOfMemory:
        raise
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        failure = PhaseOutOfMemory(name, str(error))
        failure.add_note(traceback.format_exc())
        error.__traceback__ = None
        raise failure from None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on the CPU or on a GPU."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in str(error)
