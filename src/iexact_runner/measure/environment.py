"""Where a run ran: versions, machine, commit."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from iexact_runner import __version__

PACKAGES = ("torch", "torch_geometric", "triton", "numba", "numpy", "scipy", "ogb", "hydra-core")
GIT_STATUS = ("status", "--porcelain", "--untracked-files=no", "--", ":/", ":(top,exclude)benchmarks")


def describe(device: torch.device, *, backend: str) -> dict[str, Any]:
    """The environment of a run, as plain JSON values; null for what is not installed or not known."""
    cuda = device.type == "cuda"
    return {
        "iexact_runner": __version__,
        "git_commit": git_commit(),
        "python": platform.python_version(),
        **{name.replace("-", "_"): _version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if cuda else _cpu_name(),
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "cuda": torch.version.cuda,
        "compression_backend": backend,
    }


def git_commit() -> str | None:
    """Commit of the checkout that this package runs from, ``-dirty`` if changed; None away from a checkout.

    Rows under ``benchmarks/``, which a script may be writing, are no change.
    """
    root = Path(__file__).resolve().parents[3]
    if not (root / ".git").exists():
        return None
    try:
        commit, changes = (
            subprocess.run(["git", "-C", root, *command], capture_output=True, text=True, check=True, timeout=10).stdout
            for command in (("rev-parse", "HEAD"), GIT_STATUS)
        )
    except (OSError, subprocess.SubprocessError):  # no git, no commit yet, or a checkout of somebody else
        return None
    return commit.strip() + ("-dirty" if changes.strip() else "")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
