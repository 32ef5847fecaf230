"""The rows of a map that a process needs of others, its halo, and how they come and their gradients return.

Shapes: N rows of this process, n of them that others need, H rows of its halo, D columns.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from iexact_runner.parallel import messages
from iexact_runner.parallel.shard import DistributedShard

# Of rows in float32 that travel at once, in runs of columns of a multiple of this many.
MESSAGE_BYTES, COLUMNS = messages.CHUNK_BYTES, 8


@dataclass
class Traffic:
    """What a process has sent and how long it waited for what others sent.

    Args:
        sent_bytes: payload of all messages.
        waiting_seconds: that a product waited for rows.
        exchanges: how often rows were exchanged.
    """

    sent_bytes: int = 0
    waiting_seconds: float = 0.0
    exchanges: int = 0


@dataclass
class Draws:
    """Seeds of the rounding of messages: a stream of each training step and process, which all its exchanges share.

    Args:
        rank: of the process.
        seed: of the step.
        drawn: seeds that it has taken.
    """

    rank: int = 0
    seed: int = 0
    drawn: int = 0

    def begin(self, seed: int) -> None:
        """A step begins, with its own seed."""
        self.seed, self.drawn = seed, 0

    def next(self) -> int:
        """Seed of the next message; distinct ones suffice, as for maps."""
        self.drawn += 1
        key = self.seed + (self.rank << 40) + self.drawn
        return (key + (1 << 63)) % (1 << 64) - (1 << 63)


@dataclass(frozen=True)
class Halo:
    """Which rows go to which process in each exchange, and which come back.

    Args:
        shard: the rows of this process.
        rows: int64 indices of the rows that are sent, those for process 0 first.
        send_counts: how many go to each process.
        receive_counts: how many come from each.
        most: the most rows that any process sends or receives.
        form: how rows travel.
        draws: seeds of the rounding.
        traffic: is counted here.
    """

    shard: DistributedShard
    rows: Tensor
    send_counts: tuple[int, ...]
    receive_counts: tuple[int, ...]
    most: int
    form: messages.Format = messages.Plain()
    draws: Draws = field(default_factory=Draws, compare=False)
    traffic: Traffic = field(default_factory=Traffic, compare=False)

    @classmethod
    def of(cls, shard: DistributedShard, needed: Tensor, **options: object) -> Halo:
        """The exchange that brings the ``needed`` rows (H,), in ascending order of their number in the whole graph."""
        firsts = torch.tensor(shard.cuts, device=needed.device)
        counts = torch.searchsorted(needed, firsts).diff()
        wanted = counts.new_empty(shard.processes)
        _all_to_all(wanted, counts, None, None)
        receive, send = tuple(counts.tolist()), tuple(wanted.tolist())
        rows = needed.new_empty(sum(send))
        _all_to_all(rows, needed.contiguous(), send, receive)
        sizes = torch.zeros(shard.processes, dtype=torch.int64, device=needed.device)
        sizes[shard.rank] = max(sum(send), sum(receive))
        most = int(shard.sum_(sizes).max())
        return cls(shard, rows - shard.start, send, receive, most, **options)  # type: ignore[arg-type]

    @property
    def size(self) -> int:
        """H."""
        return sum(self.receive_counts)

    def column_runs(self, width: int) -> list[slice]:
        """Columns that travel together, the same in every process, so that what is on its way stays small."""
        fitting = MESSAGE_BYTES // (4 * max(1, self.most)) // COLUMNS * COLUMNS
        step = max(COLUMNS, fitting)
        return [slice(start, min(start + step, width)) for start in range(0, width, step)]

    def exchange(self, x: Tensor, scale: Tensor | None = None) -> Exchange:
        """Sends rows of ``x`` (N, D), each times its ``scale`` (N, 1) if there is one, for others that do the same.

        Every process of the graph must do so, and take what comes.
        """
        return Exchange(self, x, scale)

    def add_back_(self, x: Tensor, far: Tensor) -> Tensor:
        """Adds rows ``far`` (H, D), which belong to other processes, to the rows ``x`` (N, D) of those: the adjoint.

        Every process of the graph must do so.
        """
        if isinstance(x, FakeTensor):
            return x
        assert not self.form.whole
        for run in self.column_runs(x.size(1)):
            part = x[:, run]
            arriving = self.send(_Rows(far[:, run]), self.receive_counts, self.send_counts)
            part.index_add_(0, self.rows, arriving.wait().to(x.dtype))
        return x

    def send(self, rows: _Rows, to: tuple[int, ...], of: tuple[int, ...]) -> Arriving:
        """Sends so many of the rows ``to`` each process, for as many ``of`` each as come."""
        message = self.form.encode(rows, to, self.draws.next)
        width = rows.shape[1]
        going, coming = ([self.form.length(count, width) for count in counts] for counts in (to, of))
        received = message.new_empty(sum(coming))
        work = _all_to_all(received, message, coming, going, asynchronous=True)
        self.traffic.exchanges += 1
        self.traffic.sent_bytes += message.nbytes
        return Arriving(self, received, of, width, work)


class Exchange:
    """Rows of a halo on their way: iterating waits for them and yields some columns, and all rows (H, .) of these."""

    def __init__(self, halo: Halo, x: Tensor, scale: Tensor | None) -> None:
        self._halo, self._x, self._scale = halo, x, scale
        self._runs = halo.column_runs(x.size(1))
        self._first = (
            None if isinstance(x, FakeTensor) else self._send(slice(None) if halo.form.whole else self._runs[0])
        )

    def __iter__(self) -> Iterator[tuple[slice, Tensor]]:
        arriving, whole = self._first, self._halo.form.whole
        for number, run in enumerate(self._runs):
            if arriving is None:  # a fake tensor has no process to ask
                yield run, self._x.new_empty(self._halo.size, len(range(self._x.size(1))[run]))
                continue
            rows = arriving.wait(run if whole else slice(None)).to(self._x.dtype)
            if not whole and number + 1 < len(self._runs):
                arriving = self._send(self._runs[number + 1])
            yield run, rows

    def _send(self, run: slice) -> Arriving:
        halo = self._halo
        return halo.send(_Rows(self._x.detach()[:, run], halo.rows, self._scale), halo.send_counts, halo.receive_counts)


class _Rows:
    """Rows of a map, or those that ``index`` names, gathered and scaled as they are asked for."""

    def __init__(self, x: Tensor, index: Tensor | None = None, scale: Tensor | None = None) -> None:
        self._x, self._index, self._scale = x, index, scale
        self.shape = (x.size(0) if index is None else index.numel(), x.size(1))
        self.dtype, self.device = x.dtype, x.device

    def __getitem__(self, part: slice) -> Tensor:
        if self._index is None:
            return self._x[part]
        index = self._index[part]
        rows = self._x.index_select(0, index)
        return rows if self._scale is None else rows.mul_(self._scale.index_select(0, index).to(rows.dtype))

    def picked(self, places: Tensor) -> _Rows:
        """Those at some places."""
        return _Rows(self._x, places if self._index is None else self._index[places], self._scale)


@dataclass
class Arriving:
    """A message on its way."""

    halo: Halo
    message: Tensor
    counts: tuple[int, ...]
    width: int
    work: dist.Work | None

    def wait(self, columns: slice = slice(None)) -> Tensor:
        """Columns of the rows (H, D), once they are there."""
        if self.work is not None:
            start = time.perf_counter()
            self.work.wait()
            self.halo.traffic.waiting_seconds += time.perf_counter() - start
            self.work = None
        return self.halo.form.decode(self.message, self.counts, self.width, columns)


def _all_to_all(
    received: Tensor,
    sent: Tensor,
    receive_counts: Sequence[int] | None,
    send_counts: Sequence[int] | None,
    *,
    asynchronous: bool = False,
) -> dist.Work | None:
    """Rows to and from all processes; of a single one, a copy."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        received.copy_(sent)
        return None
    incoming, outgoing = (None if counts is None else list(counts) for counts in (receive_counts, send_counts))
    work: dist.Work | None = dist.all_to_all_single(received, sent, incoming, outgoing, async_op=asynchronous)
    return work
