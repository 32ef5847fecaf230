"""Maps on the host: in memory, in pinned memory beside a GPU, or in files without a name."""

from __future__ import annotations

import math
import mmap
import os
import tempfile
from dataclasses import dataclass

import torch
from torch import Tensor

from iexact_runner.errors import ConfigError


@dataclass(frozen=True)
class HostMap:
    """A map on the host.

    Args:
        tensor: the map.
        mapping: of the file that holds it; None for memory.
    """

    tensor: Tensor
    mapping: mmap.mmap | None = None

    @classmethod
    def new(cls, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, *, folder: str | None) -> HostMap:
        """One without values, in memory or in a file without a name, which is gone with the map.

        Raises:
            OSError: if the folder cannot hold it.
        """
        size = math.prod(shape) * dtype.itemsize
        if folder is None or not size:
            return cls(torch.empty(shape, dtype=dtype, device=device))
        with tempfile.TemporaryFile(dir=folder) as file:
            if hasattr(os, "posix_fallocate"):  # a disk that is full later would kill the process
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                file.truncate(size)
            mapping = mmap.mmap(file.fileno(), size)
        return cls(torch.frombuffer(mapping, dtype=dtype).view(shape), mapping)

    def release(self) -> None:
        """Gives the memory of a mapped file back; the system reads it again where it is needed."""
        if self.mapping is not None and hasattr(mmap, "MADV_DONTNEED"):
            self.mapping.madvise(mmap.MADV_DONTNEED)


def cannot_hold(field: str, folder: str, size: int, error: OSError) -> ConfigError:
    """What a user is told of a folder that cannot hold a file of ``size`` bytes."""
    return ConfigError.of(field, folder, f"cannot hold a file of {size / 2**20:.0f} MiB: {error.strerror}")
