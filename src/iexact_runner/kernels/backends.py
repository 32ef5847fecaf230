"""The only choice of who runs the compression kernels; every backend offers the functions of ``reference``."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from types import ModuleType

import torch

from iexact_runner.errors import ConfigError

BACKENDS = ("auto", "torch", "numba", "triton")


def resolve(name: str, device: torch.device) -> str:
    """The backend that ``name`` means for tensors on ``device``.

    ``auto`` is Triton on a GPU, Numba on a CPU, and plain PyTorch where the one that fits is not installed.

    Raises:
        ConfigError: if the named backend does not exist, is not installed or cannot run on the device.
    """
    if name not in BACKENDS:
        raise ConfigError.of("compression.backend", name, f"must be one of {', '.join(BACKENDS)}")
    fitting = {"cpu": "numba", "cuda": "triton"}.get(device.type)
    if name == "auto":
        return fitting if fitting and _installed(fitting) else "torch"
    if name != "torch" and not _installed(name):
        install = "; pip install 'iexact-runner[cpu]'" if name == "numba" else ""
        raise ConfigError.of("compression.backend", name, f"needs {name}{install}, or use auto or torch")
    if name not in ("torch", fitting):
        wanted = "CUDA tensors" if name == "triton" else "CPU tensors"
        raise ConfigError.of("compression.backend", name, f"runs on {wanted}, not on device {device}; use auto")
    return name


@functools.cache
def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


@functools.cache
def _module(backend: str) -> ModuleType:
    # Imported on first use: Numba and Triton take a second to import, and either may be absent.
    return importlib.import_module("iexact_runner.kernels." + ("reference" if backend == "torch" else backend))


def select(name: str, device: torch.device) -> ModuleType:
    """The module whose functions run the kernels for tensors on ``device``."""
    return _module(resolve(name, device))
