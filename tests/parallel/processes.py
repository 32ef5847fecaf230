"""Steps of several processes on this machine, for tests: each is told what to do and gives back what it found."""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable
from functools import cache
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.multiprocessing as multiprocessing

from commands import free_port
from iexact_runner.parallel.team import Team, joined


def in_processes(size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What ``function(team, *arguments)`` returns in each of so many processes; in this one if it is one.

    Raises:
        Exception: the first that one of them raised.
    """
    if size == 1:
        return [function(Team(), *arguments)]
    port = free_port()
    workers = [_worker(rank) for rank in range(size)]
    for rank, worker in enumerate(workers):
        worker.send((rank, size, port, function, arguments))
    found = [worker.recv() for worker in workers]
    for result in found:
        if isinstance(result, Exception):
            raise result
    return found


@cache
def _worker(rank: int) -> Connection:
    """A process that stays for all tests, for one takes seconds to import torch."""
    context = multiprocessing.get_context("forkserver")
    ours, theirs = context.Pipe()
    context.set_forkserver_preload(["parallel.processes"])
    process = context.Process(target=_work, args=(theirs,), daemon=True)
    process.start()
    atexit.register(process.terminate)
    return ours


def _work(tasks: Connection) -> None:
    torch.set_num_threads(1)
    while True:
        rank, size, port, function, arguments = tasks.recv()
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        result: Any
        try:
            with joined(device="cpu", timeout=60) as team:
                result = function(team, *arguments)
        except Exception as error:
            result = error
        tasks.send(result)
