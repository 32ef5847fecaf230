"""A screen that cannot be written, for its disk is full, its reader has left or it is closed, ends no run."""

from __future__ import annotations

import io
import os
import select
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer


class Descriptor(io.FileIO):
    """A file descriptor whose first write that fails is the last that is tried.

    Args:
        number: the descriptor, which stays open.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number, "w", closefd=False)
        self.problem: OSError | None = None

    def write(self, data: ReadableBuffer, /) -> int:
        """Writes what it can; keeps the first failure as ``problem``, after which all counts as written."""
        if self.problem is None:
            try:
                while (written := super().write(data)) is None:  # full for a moment, and set not to wait
                    select.select([], [self], [])
                return written
            except OSError as error:
                self.problem = error
        return memoryview(data).nbytes


@contextmanager
def forgiving_streams() -> Iterator[Callable[[], bool]]:
    """Context in which writing to ``stdout`` and ``stderr`` cannot fail; those that a caller has replaced stay.

    Yields:
        What tells whether something was lost, and says so in a line where that is possible.
    """
    found: dict[str, Descriptor] = {}
    try:
        for number, name in enumerate(("stdout", "stderr"), start=1):
            stream = getattr(sys, name)
            if stream is getattr(sys, f"__{name}__"):
                found[name] = Descriptor(number if stream is not None else _taken(number))
                setattr(sys, name, _text(found[name], stream))
        yield lambda: any([_is_lost(name, descriptor) for name, descriptor in found.items()])
    finally:
        for name in found:
            getattr(sys, name).flush()
            setattr(sys, name, getattr(sys, f"__{name}__"))


def _is_lost(name: str, descriptor: Descriptor) -> bool:
    getattr(sys, name).flush()
    problem = descriptor.problem
    # Who has left, as in ``iexact | head``, need not be told.
    if problem is not None and not isinstance(problem, BrokenPipeError):
        print(f"iexact: {name}: cannot be written ({problem.strerror}); the records are whole", file=sys.stderr)
    return problem is not None


def _text(descriptor: Descriptor, like: TextIO | None) -> TextIO:
    """A text stream as the interpreter makes it, but for letters that its encoding lacks."""
    encoding, by_line = (like.encoding, getattr(like, "line_buffering", False)) if like else ("utf-8", False)
    buffer = io.BufferedWriter(descriptor)
    return io.TextIOWrapper(buffer, encoding=encoding, errors="backslashreplace", line_buffering=by_line)


def _taken(number: int) -> int:
    """A descriptor that cannot be written, in the place of a closed one, which the next file would be given else."""
    while (taken := os.open(os.devnull, os.O_RDONLY)) < number:
        pass  # a lower one was closed too
    return taken
