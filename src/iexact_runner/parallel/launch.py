"""What a launcher such as torchrun tells each process it starts. Without torch, so that the command line stays fast."""

from __future__ import annotations

import os


def launched_rank() -> int:
    """Number of this process among those that a launcher started; 0 without one."""
    return _number("RANK", 0)


def launched_size() -> int:
    """How many processes a launcher started; 1 without one."""
    return _number("WORLD_SIZE", 1)


def launched_local_rank() -> int:
    """Number of this process among those on its machine."""
    return _number("LOCAL_RANK", launched_rank())


def _number(name: str, otherwise: int) -> int:
    value = os.environ.get(name, "")
    return int(value) if value.isdecimal() else otherwise
