"""Processes that a launcher starts for its jobs: they end with it, also if it is killed and cannot end them."""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import threading
import time

POLL_SECONDS = 0.2


@functools.cache
def end_with_parent() -> None:
    """Makes this process end, as a kill would end it, once the process that launched it has.

    That is the one whose child it is by ``multiprocessing``, as joblib's workers are; other processes, such as jobs of
    a cluster, outlive who launched them. A thread looks, for Linux alone tells a process of its parent's end, and of
    that of the thread which started it at that.
    """
    launcher = multiprocessing.parent_process()
    if launcher is None or launcher.pid is None:
        return
    _check(launcher.pid)  # it may have ended before this process came so far
    threading.Thread(target=_watch, args=[launcher.pid], daemon=True).start()


def _watch(launcher: int) -> None:
    while True:
        time.sleep(POLL_SECONDS)
        _check(launcher)


def _check(launcher: int) -> None:
    """Kills this process if another one has become its parent."""
    if os.getppid() != launcher:
        os.kill(os.getpid(), signal.SIGKILL)
