"""The processes that train one graph, as ``torchrun`` starts them: who they are, and what they tell each other.

The contract is ``env://`` of torch.distributed: ``RANK``, ``WORLD_SIZE``, ``MASTER_ADDR`` and ``MASTER_PORT``, which
torchrun, Slurm through submitit, and Ray set.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from iexact_runner.errors import ConfigError, TeamError, UserError, first_line
from iexact_runner.parallel.launch import launched_local_rank, launched_rank, launched_size

# Seconds in which processes that lost another one say that they are there: they notice at about the same time.
CHECK_IN = 5.0


@dataclass(frozen=True)
class Team:
    """One process of several; of a single one, every exchange is a return.

    Args:
        rank: number of this process, from 0; the first one writes and shows.
        size: how many there are.
        local_rank: number of this process on its machine.
        timeout: seconds after which a process that does not answer counts as lost.
        store: what processes leave notes in for the others.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    timeout: float = 0.0
    store: Store | None = None

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and shows."""
        return self.rank == 0

    def from_first(self, value: Any) -> Any:
        """What the first process gives."""
        if self.size == 1:
            return value
        held = [value if self.first else None]
        dist.broadcast_object_list(held, src=0)
        return held[0]

    @contextmanager
    def first_alone(self) -> Iterator[None]:
        """A context that the first process of a machine is through before the others enter it."""
        if self.size > 1 and self.local_rank:
            dist.barrier()
        yield
        if self.size > 1 and not self.local_rank:
            dist.barrier()

    def gathered(self, value: Any) -> list[Any]:
        """What each process gives, in order."""
        if self.size == 1:
            return [value]
        held: list[Any] = [None] * self.size
        dist.all_gather_object(held, value)
        return held

    def agree(self, **values: Any) -> None:
        """Checks that all processes have the same values.

        Raises:
            ConfigError: with the first difference, in every process.
        """
        others = self.gathered(values)
        for rank, other in enumerate(others):
            for name, value in others[0].items():
                if other[name] != value:
                    raise ConfigError(f"process {rank}: {name} is {other[name]}, in process 0 it is {value}")

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """A context that says in one line which process is lost, for which torch.distributed has many errors.

        Raises:
            TeamError: naming this process, the lost ones and their machines, and what to do.
        """
        try:
            yield
        except RuntimeError as error:
            if self.size == 1 or isinstance(error, UserError) or not _says_lost(error):
                raise
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a launcher ends the others too, which ends by itself
            raise TeamError(
                f"{_place(self.rank, self.size)}: {self._lost()}, or has not answered for {self.timeout:g} s "
                "(parallel.timeout); resume=auto goes on, with as many processes or others"
            ) from error

    def _lost(self) -> str:
        """Which processes have ended; asked in a thread, for the process that keeps the notes may hang."""
        if self.store is None:
            return "another process has ended"
        found: list[str] = []
        asking = threading.Thread(
            target=lambda store: found.append(self._missing(store)), args=[self.store], daemon=True
        )
        asking.start()
        asking.join(2 * CHECK_IN)
        return found[0] if found else "process 0 has ended"

    def _missing(self, store: Store) -> str:
        """Which processes do not say that they are there."""
        others = [rank for rank in range(self.size) if rank != self.rank]
        try:
            store.set(_note("there", self.rank), "")
            hosts = {rank: store.get(_note("host", rank)).decode() for rank in others}
        except RuntimeError:  # its own process kept the notes
            return "process 0 has ended"
        missing, deadline = others, time.monotonic() + CHECK_IN
        while missing and time.monotonic() < deadline:
            try:
                missing = [rank for rank in missing if not store.check([_note("there", rank)])]
            except RuntimeError:
                break
            time.sleep(0.05)
        names = [f"process {rank} on {hosts[rank]}" for rank in missing]
        return f"{' and '.join(names) or 'another process'} has ended"


@contextmanager
def joined(*, device: str, timeout: float) -> Iterator[Team]:
    """Joins the processes that a launcher started, and leaves them at the end.

    Args:
        device: ``cpu`` talks by gloo, a GPU by NCCL.
        timeout: seconds after which a process that does not answer counts as lost.

    Raises:
        TeamError: if the others cannot be reached.
    """
    rank, size = launched_rank(), launched_size()
    if size == 1:
        yield Team()
        return
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise ConfigError(f"parallel=graph: {missing[0]} is not set; start the processes with torchrun")
    # Its many lines about a lost connection say less than the one line of TeamError.
    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)
    limit = timedelta(seconds=timeout)
    try:
        store, _, _ = next(rendezvous("env://", timeout=limit))
        store.set_timeout(limit)
        notes = PrefixStore("iexact", store)
        notes.set(_note("host", rank), socket.gethostname())
        own = PrefixStore("torch", store)
        dist.init_process_group(backend_of(device), store=own, rank=rank, world_size=size, timeout=limit)
    except (RuntimeError, ValueError) as error:  # dist.DistError is a RuntimeError
        raise TeamError(f"{_place(rank, size)}: cannot reach the others: {first_line(error)}") from error
    try:
        yield Team(rank, size, launched_local_rank(), timeout, notes)
    finally:
        dist.destroy_process_group()


def backend_of(device: str) -> str:
    """Of torch.distributed: tensors of a GPU travel by NCCL, those of a CPU, such as lists of rows, by gloo."""
    return "cpu:gloo,cuda:nccl" if device != "cpu" and torch.cuda.is_available() else "gloo"


def _says_lost(error: BaseException) -> bool:
    """Whether an error of torch.distributed says that another process does not answer any more."""
    message = str(error).lower()
    signs = ("connection closed by peer", "connection reset", "broken pipe", "timed out", "gloo", "nccl", "timeout")
    return isinstance(error, dist.DistBackendError) or any(sign in message for sign in signs)


def _note(name: str, rank: int) -> str:
    return f"{name}/{rank}"


def _place(rank: int, size: int) -> str:
    return f"process {rank} of {size} on {socket.gethostname()}"
