"""The processes that a command starts beside itself on this machine, to share a graph as torchrun's do."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path

from iexact_runner.errors import OF_ONE_PROCESS, TeamError, UserError
from iexact_runner.runs.parents import end_with_parent

# Seconds in which helpers end by themselves after the first process has.
END_SECONDS = 60.0
LOCALHOST = "127.0.0.1"


@contextmanager
def beside(size: int, job: Callable[[Path], None]) -> Iterator[None]:
    """A context in which this process is the first of so many; the others do ``job``, given a folder of their own.

    They end with this process, also if it is killed, and are ended where the context ends with an error. Each process
    has its share of the cores, or as many threads as ``OMP_NUM_THREADS`` says.

    Args:
        size: of all processes.
        job: can be pickled.

    Raises:
        TeamError: if one of them cannot be started.
    """
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // size))
    common = {"WORLD_SIZE": str(size), "MASTER_ADDR": LOCALHOST, "MASTER_PORT": str(_free_port())}
    own = common | {"RANK": "0", "LOCAL_RANK": "0"}
    before = {name: os.environ.get(name) for name in own}
    helpers: list[tuple[SpawnProcess, Connection]] = []
    try:
        for rank in range(1, size):
            environment = common | {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": threads}
            helpers.append(_started(job, environment))
        for rank, (_, begun) in enumerate(helpers, start=1):
            try:
                begun.recv()
            except EOFError:  # this one would wait for it until its time is up
                raise TeamError(f"process {rank} of {size} ended before it began") from None
        os.environ |= own
        with _threads(int(threads)):
            yield
        for helper, _ in helpers:
            helper.join(END_SECONDS)
    finally:
        for helper, begun in helpers:
            helper.kill()
            begun.close()
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def _started(job: Callable[[Path], None], environment: Mapping[str, str]) -> tuple[SpawnProcess, Connection]:
    """A process, and where it tells that it has begun."""
    context, usual = multiprocessing.get_context("spawn"), multiprocessing.get_start_method(allow_none=True)
    ours, theirs = context.Pipe(duplex=False)
    helper = context.Process(target=_help, args=(job, environment, theirs))
    multiprocessing.set_start_method("spawn", force=True)  # a worker of joblib has one that its child would not know
    try:
        helper.start()
    finally:
        multiprocessing.set_start_method(usual, force=True)
    theirs.close()
    return helper, ours


@contextmanager
def _threads(most: int) -> Iterator[None]:
    import torch  # which the helpers are importing meanwhile

    before = torch.get_num_threads()
    torch.set_num_threads(min(before, most))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _help(job: Callable[[Path], None], environment: Mapping[str, str], begun: Connection) -> None:
    """What another process than the first does."""
    begun.send(True)
    begun.close()
    os.environ |= environment
    end_with_parent()
    # The first process finishes its epoch when it is interrupted, for which it needs the others, and then ends them.
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)
    with tempfile.TemporaryDirectory(prefix="iexact.") as folder:
        try:
            job(Path(folder))
        except UserError as error:
            if isinstance(error, OF_ONE_PROCESS):  # of others the first process tells
                print(f"iexact: {error}", file=sys.stderr)
            raise SystemExit(1) from None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((LOCALHOST, 0))
        port: int = probe.getsockname()[1]
    return port
