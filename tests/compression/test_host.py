"""Maps on the host, in memory or in files without a name."""

from __future__ import annotations

import errno
import os

import pytest
import torch

from iexact_runner.compression.host import HostMap

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8], ids=str)
@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("allocates", [False, True])
def test_what_is_written_is_there_after_its_memory_is_given_back(dtype, mapped, allocates, tmp_path, monkeypatch):
    if not allocates:  # as on macOS
        monkeypatch.delattr(os, "posix_fallocate", raising=False)
    values = (16 * torch.rand(37, 13)).to(dtype)
    kept = HostMap.new((37, 13), dtype, CPU, folder=str(tmp_path) if mapped else None)
    assert (kept.mapping is not None) == mapped and not list(tmp_path.iterdir())
    kept.tensor.copy_(values)
    kept.release()
    assert torch.equal(kept.tensor, values)


def test_a_full_disk_is_told_before_anything_is_written(tmp_path, monkeypatch):
    def full(file, offset, size):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(OSError, match="No space left"):
        HostMap.new((37, 13), torch.float32, CPU, folder=str(tmp_path))
    assert HostMap.new((0, 13), torch.float32, CPU, folder=str(tmp_path)).mapping is None
