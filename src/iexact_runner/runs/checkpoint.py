"""The state of a run on disk, from which a run that was killed goes on.

A file is one line, ``iexact checkpoint 1 SHA256``, and below it what ``torch.save`` makes of plain values and tensors,
which is what the digest is of. It is read with ``weights_only=True``: nothing in it can run code. ``checkpoint.pt`` is
the newest state, ``checkpoint.previous.pt`` the one before it, for the case that the newest is damaged.
"""

from __future__ import annotations

import hashlib
import io
import logging
import pickle
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from iexact_runner.runs.records import RunFolder
from iexact_runner.untrusted.pickles import check_torch_file

logger = logging.getLogger(__name__)

CURRENT, PREVIOUS = "checkpoint.pt", "checkpoint.previous.pt"
MAGIC = b"iexact checkpoint 1 "
# Of checkpoint.every=auto: the share of the time that writing may take, and the least seconds between two writes.
SHARE, LEAST_SECONDS = 0.005, 5.0


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: of the run.
        every: epochs between two of them; ``auto`` spends at most half a percent of the time on them; None is none.
    """

    def __init__(self, folder: RunFolder, every: int | str | None) -> None:
        self._folder = folder
        self._every = every
        self._written = time.monotonic()
        self._pause = LEAST_SECONDS

    @property
    def enabled(self) -> bool:
        """Whether any are written."""
        return self._every is not None

    def due(self, epoch: int) -> bool:
        """Whether one is to be written after epoch ``epoch``."""
        if isinstance(self._every, int):
            return epoch % self._every == 0
        return self.enabled and time.monotonic() - self._written >= self._pause

    def write(self, state: Mapping[str, Any]) -> None:
        """Writes a state; until it is whole the one before it stays in its place.

        Raises:
            UnwritableFolder: if it cannot be written, for example because the disk is full.
        """
        start = time.monotonic()
        self._folder.sync_metrics()
        buffer = io.BytesIO()
        torch.save(dict(state), buffer)
        data = buffer.getvalue()
        self._folder.write(CURRENT, MAGIC + _digest(data) + b"\n" + data, keep_as=PREVIOUS)
        self._written = time.monotonic()
        self._pause = max(LEAST_SECONDS, (self._written - start) / SHARE)

    def read(self, *, lines: int) -> dict[str, Any] | None:
        """The newest state that is whole; None if there is none. What is damaged is told of and passed over.

        Args:
            lines: whole lines of ``metrics.jsonl``; a state that counts on more of them is passed over too.
        """
        for name in (CURRENT, PREVIOUS):
            path = self._folder.path / name
            try:
                if path.exists() and not path.is_file():
                    raise ValueError("is not a regular file")
                state = _parsed(path.read_bytes())
                if state["lines"] > lines:
                    raise ValueError(f"is of {state['lines']} epochs, metrics.jsonl has {lines}")
            except FileNotFoundError:
                continue
            except (OSError, ValueError, KeyError, TypeError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
                logger.warning(f"{path}: {_one_line(error)}; looking for an earlier one")
                continue
            return state
        return None


def remove(folder: Path) -> None:
    """Removes the checkpoints of a run: a completed one needs none."""
    for name in (CURRENT, PREVIOUS):
        (folder / name).unlink(missing_ok=True)


def _parsed(content: bytes) -> dict[str, Any]:
    head, _, data = content.partition(b"\n")
    if not head.startswith(MAGIC):
        raise ValueError("is not a checkpoint of this version")
    if head.removeprefix(MAGIC) != _digest(data):
        raise ValueError("is damaged: its digest differs")
    check_torch_file(io.BytesIO(data))
    state: dict[str, Any] = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    return state


def _digest(data: bytes) -> bytes:
    return hashlib.sha256(data).hexdigest().encode()


def _one_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
