"""Work that is done one ahead, in a thread beside the one that uses it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, TypeVar

T = TypeVar("T")


class Timed(NamedTuple):
    """Seconds of work in the thread, and how many of them were waited for."""

    worked: float
    waited: float


def one_ahead(tasks: Iterable[Callable[[], T]]) -> Iterator[tuple[T, Timed]]:
    """Results of some tasks in their order, the next one at work while one is used.

    An error of a task is raised where its result would be; nothing is at work once the iterator is closed.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="iexact-batches") as pool:
        pending = None
        for task in tasks:
            following = pool.submit(_timed, task)
            if pending is not None:
                yield _waited_for(pending)
            pending = following
        if pending is not None:
            yield _waited_for(pending)


def _timed(task: Callable[[], T]) -> tuple[T, float]:
    start = time.perf_counter()
    return task(), time.perf_counter() - start


def _waited_for(pending: Future[tuple[T, float]]) -> tuple[T, Timed]:
    start = time.perf_counter()
    result, worked = pending.result()
    return result, Timed(worked, time.perf_counter() - start)
