"""Ctrl-C and SIGTERM during training: they wait for a moment at which the state can be written."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupts:
    """Context in which what would raise ``KeyboardInterrupt`` waits while :attr:`wait` is set; a second one does not.

    Only the main thread can take signals; elsewhere, and for signals that have other handlers, nothing changes.
    """

    def __init__(self) -> None:
        self.wait = False
        self.pending = False
        self._held = False
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) is signal.default_int_handler:
                    self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Context in which even a second one waits: a file is being written."""
        self._held = True
        try:
            yield
        finally:
            self._held = False

    def _receive(self, number: int, frame: FrameType | None) -> None:
        stop = not self._held and (self.pending or not self.wait)
        self.pending = True
        if stop:
            raise KeyboardInterrupt
