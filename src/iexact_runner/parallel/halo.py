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


@dataclass
class Known:
    """What both sides of each exchange of a pass have of its rows, to which the next message is the difference.

    The sender decodes what it sends as the receiver does, so an error of one message is part of the next. A pass makes
    the same exchanges as the one before it.

    Args:
        interval: epochs between two in which rows travel whole.
        rows: of each exchange those sent (n, D) and those that came (H, D), in float32.
        turn: which exchange of the pass is next.
        frozen: what travels changes nothing, as in a pass that is taken again with other draws.
    """

    interval: int
    rows: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    turn: int = 0
    frozen: bool = False

    def begin_epoch(self, epoch: int) -> None:
        """An epoch begins, counted from 1: its rows travel whole where an interval does."""
        if (epoch - 1) % self.interval == 0:
            self.rows.clear()

    def next(self, sent: int, received: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """The rows of the next exchange, of a map like ``x`` (N, D): zeros, where they travel whole."""
        self.turn += 1
        if self.turn > len(self.rows):
            both = [x.new_zeros(count, x.size(1), dtype=torch.float32) for count in (sent, received)]
            self.rows.append((both[0], both[1]))
        return self.rows[self.turn - 1]


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
        known: what differences are sent to; None sends the rows themselves.
    """

    shard: DistributedShard
    rows: Tensor
    send_counts: tuple[int, ...]
    receive_counts: tuple[int, ...]
    most: int
    form: messages.Format = messages.Plain()
    draws: Draws = field(default_factory=Draws, compare=False)
    traffic: Traffic = field(default_factory=Traffic, compare=False)
    known: Known | None = field(default=None, compare=False)

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

    def tensors(self) -> list[Tensor]:
        """What it holds: which rows are sent, and what is known of them."""
        return [self.rows, *(part for both in (self.known.rows if self.known else ()) for part in both)]

    def begin_pass(self, seed: int) -> None:
        """A pass begins, whose messages are rounded by this seed."""
        self.draws.begin(seed)
        if self.known is not None:
            self.known.turn = 0

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
        if rows.known is not None and self.known is not None and not self.known.frozen:
            for run in self.column_runs(width):
                rows.known[:, run] += self.form.decode(message, to, width, run)
        return Arriving(self, received, of, width, work)


class Exchange:
    """Rows of a halo on their way: iterating waits for them and yields some columns, and all rows (H, .) of these."""

    def __init__(self, halo: Halo, x: Tensor, scale: Tensor | None) -> None:
        self._halo, self._x, self._scale = halo, x, scale
        self._sent, self._came = self._known(halo, x)
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
            rows = self._with_known(arriving.wait(run if whole else slice(None)), run).to(self._x.dtype)
            if not whole and number + 1 < len(self._runs):
                arriving = self._send(self._runs[number + 1])
            yield run, rows

    def _send(self, run: slice) -> Arriving:
        halo, sent = self._halo, self._sent
        known = None if sent is None else sent[:, run]
        rows = _Rows(self._x.detach()[:, run], halo.rows, self._scale, known)
        return halo.send(rows, halo.send_counts, halo.receive_counts)

    @staticmethod
    def _known(halo: Halo, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        if halo.known is None or isinstance(x, FakeTensor):
            return None, None
        return halo.known.next(halo.rows.numel(), halo.size, x)

    def _with_known(self, rows: Tensor, run: slice) -> Tensor:
        """The rows that came, of a message that holds their difference to what was known."""
        if self._came is None or self._halo.known is None:
            return rows
        if self._halo.known.frozen:
            return self._came[:, run] + rows
        known = self._came[:, run]
        known += rows
        return known


class _Rows:
    """Rows of a map, or those that ``index`` names, gathered and scaled as they are asked for; less what is known."""

    def __init__(
        self, x: Tensor, index: Tensor | None = None, scale: Tensor | None = None, known: Tensor | None = None
    ) -> None:
        self._x, self._index, self._scale, self.known = x, index, scale, known
        self.shape = (x.size(0) if index is None else index.numel(), x.size(1))
        self.dtype, self.device = x.dtype, x.device

    def __getitem__(self, part: slice) -> Tensor:
        if self._index is None:
            return self._x[part]
        index = self._index[part]
        rows = self._x.index_select(0, index)
        if self._scale is not None:
            rows.mul_(self._scale.index_select(0, index).to(rows.dtype))
        return rows if self.known is None else rows.float().sub_(self.known[part])

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
