"""Devices that several processes use: a lock each, and one GPU a job."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from iexact_runner.runs.locks import DeviceLock, lock_folder, locked

POLL_SECONDS = 0.5


def device_lock(device: torch.device, *, announce: Callable[[str], None], helper: int = 0) -> DeviceLock:
    """The lock of a device, by what it is called in every process; processes that share a run have one each.

    Args:
        device: where.
        announce: is told, in a line, that this process has to wait.
        helper: number of this process among those of the run on this machine.
    """
    name = _name(device) if device.type == "cuda" or not helper else f"{_name(device)}-helper-{helper}"
    return DeviceLock(name, folder=lock_folder(), announce=announce)


@contextmanager
def own_gpu(*, announce: Callable[[str], None]) -> Iterator[None]:
    """Context in which ``cuda`` is a GPU that no other process has taken so; waits for one. Nothing without GPUs.

    Args:
        announce: is told, in a line, that this process has to wait.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        yield
        return
    folder, waiting = lock_folder(), False
    while True:
        for index in range(count):
            with locked(folder / f"{_name(torch.device('cuda', index))}.job", patience=0) as mine:
                if mine:
                    torch.cuda.set_device(index)
                    yield
                    return
        if not waiting:
            waiting = True
            announce("waiting for a GPU: a job is going on on each")
        time.sleep(POLL_SECONDS)


def _name(device: torch.device) -> str:
    if device.type != "cuda":
        return device.type
    return f"cuda-{torch.cuda.get_device_properties(device).uuid}"
