"""``deterministic=true``: the same seed on the same machine gives the same numbers to the last bit."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def deterministic_algorithms(enabled: bool) -> Iterator[None]:
    """Context in which torch takes deterministic algorithms alone, and raises where it has none.

    cuBLAS needs a workspace of its own for it, which it takes when the first product runs in the process.

    Args:
        enabled: false leaves all as it is.
    """
    if not enabled:
        yield
        return
    mode, benchmark = torch.get_deterministic_debug_mode(), torch.backends.cudnn.benchmark
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)
        torch.backends.cudnn.benchmark = benchmark
