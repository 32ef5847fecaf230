"""The only choice of who runs the compression kernels; every backend offers the functions of ``reference``."""

from __future__ import annotations

from types import ModuleType

import torch

from iexact_runner.compression import reference
from iexact_runner.errors import ConfigError


def resolve(name: str, device: torch.device) -> str:
    """The backend that ``name`` (``auto``, ``torch``, ``triton``) means for tensors on ``device``.

    Raises:
        ConfigError: if the named backend does not exist or cannot run on the device.
    """
    if name in ("auto", "torch"):
        return "torch"
    if name == "triton":
        raise ConfigError.of("compression.backend", name, "this version has no Triton kernels yet; use auto or torch")
    raise ConfigError.of("compression.backend", name, "must be one of auto, torch, triton")


def select(name: str, device: torch.device) -> ModuleType:
    """The module whose functions run the kernels."""
    return {"torch": reference}[resolve(name, device)]
