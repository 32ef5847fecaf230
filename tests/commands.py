"""Commands in processes of their own that start at once: forks of one that has imported what most of them import.

A new interpreter takes seconds to import torch, and tests start more than a hundred. ``start`` and ``run`` stand for
``subprocess.Popen`` and ``subprocess.run`` of ``python`` with ``-m MODULE`` or ``FILE``. A test of what is imported, or
of how an interpreter begins or ends, starts a real one.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import importlib
import multiprocessing
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle, send_handle
from pathlib import Path
from typing import Any, NoReturn

IMPORTED = (
    "hydra.core.plugins",
    "iexact_runner.cli",
    "iexact_runner.data.digits",
    "iexact_runner.data.prepare",
    "iexact_runner.experiment",
    "iexact_runner.kernels.numba",
    "iexact_runner.parallel.shard",
    "iexact_runner.report.command",
    "iexact_runner.runs.resume",
    "matplotlib.pyplot",
    "sklearn.datasets",
    "torch._dynamo",
)
READ_AT_IMPORT = ("COVERAGE_", "MKL_", "MPL", "NUMBA_", "OMP_", "PYTHON", "TRITON_")


class Command:
    """A process that ``start`` has started; as ``subprocess.Popen``, it belongs to who asked for it.

    Args:
        arguments: behind ``python``.
        report: file descriptor from which its number and then its exit status are read.
        streams: files for stdout and stderr.
    """

    def __init__(self, arguments: tuple[str, ...], report: int, streams: list[Any]) -> None:
        self.args = arguments
        self.returncode: int | None = None
        self._report, self._streams = os.fdopen(report), streams
        self.pid = int(self._report.readline())

    def poll(self) -> int | None:
        """The exit status, or None while it runs."""
        if self.returncode is None and select.select([self._report], [], [], 0)[0]:
            self.returncode = int(self._report.readline())
            self._report.close()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """The exit status.

        Raises:
            subprocess.TimeoutExpired: if it has not ended after so many seconds.
        """
        if self.returncode is None:
            if not select.select([self._report], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
            self.poll()
        assert self.returncode is not None
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """What it wrote to stdout and stderr until it ended."""
        self.wait(timeout)
        texts = []
        for stream in self._streams:
            stream.seek(0)
            texts.append(stream.read())
            stream.close()
        return texts[0], texts[1]

    def send_signal(self, sent: int) -> None:
        """Sends a signal, if it has not ended."""
        if self.poll() is None:
            os.kill(self.pid, sent)

    def kill(self) -> None:
        """Sends SIGKILL, if it has not ended."""
        self.send_signal(signal.SIGKILL)


def start(*arguments: object, cwd: Path, env: Mapping[str, str] | None = None) -> Command:
    """Starts ``python ARGUMENTS``, with files for what it writes and nothing to read."""
    words, variables = tuple(map(str, arguments)), dict(os.environ if env is None else env)
    early = sorted(item for item in variables.items() if item[0].startswith(READ_AT_IMPORT))
    process, connection = _server(tuple(early))
    report, theirs = os.pipe()
    streams = [tempfile.TemporaryFile("w+") for _ in range(2)]
    with open(os.devnull) as nothing:
        connection.send((words, str(cwd), variables))
        for handle in (nothing.fileno(), *(stream.fileno() for stream in streams), theirs):
            send_handle(connection, handle, process.pid)
    os.close(theirs)
    return Command(words, report, streams)


def start_ranks(size: int, *arguments: object, cwd: Path) -> list[Command]:
    """Starts so many processes that share a graph on this machine, as torchrun starts them."""
    shared = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    environment = os.environ | shared | {"OMP_NUM_THREADS": "1"}
    return [
        start(*arguments, cwd=cwd, env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(size)
    ]


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def run(
    *arguments: object, cwd: Path, env: Mapping[str, str] | None = None, timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    """Runs ``python ARGUMENTS`` to its end, with what it wrote.

    Raises:
        subprocess.TimeoutExpired: if it has not ended after so many seconds, and was killed.
    """
    command = start(*arguments, cwd=cwd, env=env)
    try:
        stdout, stderr = command.communicate(timeout)
    finally:
        command.kill()
    return subprocess.CompletedProcess(command.args, command.wait(), stdout, stderr)


@functools.cache
def _server(variables: tuple[tuple[str, str], ...]) -> tuple[subprocess.Popen[bytes], Connection]:
    """A process with these variables that forks; it ends with this one."""
    ours, theirs = multiprocessing.Pipe()
    kept = {name: value for name, value in os.environ.items() if not name.startswith(READ_AT_IMPORT)}
    command = [sys.executable, __file__, str(theirs.fileno())]
    process = subprocess.Popen(command, env=kept | dict(variables), pass_fds=[theirs.fileno()])
    theirs.close()
    return process, ours


def _serve(connection: Connection) -> tuple[str, ...]:
    """Forks for each command, and returns its words in the process that is to run it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the tests
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # no zombies
    while True:
        try:
            words: tuple[str, ...]
            words, folder, variables = connection.recv()
        except EOFError:
            os._exit(0)
        handles = [recv_handle(connection) for _ in range(4)]
        if not os.fork():
            connection.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            report = handles.pop()
            process = os.fork()
            if process:
                _tell(report, process)
            os.close(report)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            for place, handle in enumerate(handles):
                os.dup2(handle, place)
                os.close(handle)
            os.chdir(folder)
            os.environ.clear()
            os.environ.update(variables)
            return words
        for handle in handles:
            os.close(handle)


def _tell(report: int, process: int) -> NoReturn:
    """Says which process was started, and how it has ended."""
    os.write(report, f"{process}\n".encode())
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    os.write(report, f"{status}\n".encode())
    os._exit(0)


def _become(words: tuple[str, ...]) -> None:
    """Does in this process what ``python WORDS`` does."""
    if words[0] == "-m":
        sys.argv, sys.path[0] = [words[0], *words[2:]], os.getcwd()
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = list(words), str(Path(words[0]).parent)
        runpy.run_path(words[0], run_name="__main__")


if __name__ == "__main__":
    for _name in IMPORTED:
        with contextlib.suppress(ImportError):
            importlib.import_module(_name)
    gc.freeze()  # what looks for garbage would copy the pages of all that was imported
    atexit.register(gc.freeze)
    _become(_serve(Connection(int(sys.argv[1]))))
