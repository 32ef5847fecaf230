"""The rows of a map that a process needs of others, its halo, and how they travel: as they are, halved, or quantized.

Shapes: N rows of this process, H rows of its halo, D columns.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from iexact_runner.kernels import ops
from iexact_runner.kernels.reference import stored_dtype
from iexact_runner.parallel.shard import DistributedShard

# Bits of an element of the messages that are quantized.
_BITS = {"int8": 8, "int4": 4, "int2": 2}
# Of rows in float32 that travel at once, in runs of columns of a multiple of this many.
MESSAGE_BYTES, COLUMNS = 8 << 20, 8


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
        stream: of several that round the same step in different ways.
        seed: of the step.
        drawn: seeds that it has taken.
    """

    rank: int = 0
    stream: int = 0
    seed: int = 0
    drawn: int = 0

    def begin(self, seed: int) -> None:
        """A step begins, with its own seed."""
        self.seed, self.drawn = seed, 0

    def next(self) -> int:
        """Seed of the next message; distinct ones suffice, as for maps."""
        self.drawn += 1
        key = self.seed + (self.rank << 40) + (self.stream << 32) + self.drawn
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
        messages: how rows travel: ``fp32``, ``bf16``, ``int8``, ``int4`` or ``int2``.
        draws: seeds of the rounding.
        traffic: is counted here.
    """

    shard: DistributedShard
    rows: Tensor
    send_counts: tuple[int, ...]
    receive_counts: tuple[int, ...]
    most: int
    messages: str = "fp32"
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

    def start(self, x: Tensor, scale: Tensor | None = None) -> Incoming:
        """Sends rows of ``x`` (N, D), each times its ``scale`` (N, 1) if there is one; what comes is waited for later.

        Every process of the graph must do so.
        """
        if isinstance(x, FakeTensor):  # which has no process to ask
            return Incoming(self, x.new_empty(self.size, x.size(1)), x, None)
        rows = x.detach().index_select(0, self.rows)
        if scale is not None:
            rows = rows * scale.index_select(0, self.rows).to(rows.dtype)
        payload = self._encode(rows)
        received = payload.new_empty(self.size, *payload.shape[1:])
        work = _all_to_all(received, payload, self.receive_counts, self.send_counts, asynchronous=True)
        self.traffic.exchanges += 1
        self.traffic.sent_bytes += payload.nbytes
        return Incoming(self, received, x, work)

    def add_back_(self, x: Tensor, far: Tensor) -> Tensor:
        """Adds rows ``far`` (H, D), which belong to other processes, to the rows ``x`` (N, D) of those: the adjoint.

        Every process of the graph must do so.
        """
        if isinstance(x, FakeTensor):
            return x
        payload = self._encode(far)
        received = payload.new_empty(self.rows.numel(), *payload.shape[1:])
        work = _all_to_all(received, payload, self.send_counts, self.receive_counts, asynchronous=True)
        self.traffic.exchanges += 1
        self.traffic.sent_bytes += payload.nbytes
        return x.index_add_(0, self.rows, Incoming(self, received, x, work).wait())

    def _encode(self, rows: Tensor) -> Tensor:
        """Rows as they travel; quantized ones are bytes: codes, then the row's zero and scale."""
        if self.messages == "fp32":
            return rows.contiguous()
        if self.messages == "bf16":
            return rows.bfloat16()
        bits, width = _BITS[self.messages], rows.size(1)
        # Whole bytes a row, filled up with its last element, which changes no extremum.
        padded = torch.cat([rows, rows[:, -1:].expand(-1, -width % (8 // bits))], dim=1).float()
        codes, zero, scale = ops.quantize(
            padded, bits=bits, block_size=padded.size(1), levels=None, seed=self.draws.next(), backend="auto"
        )
        parts = [
            codes.view(rows.size(0), padded.size(1) * bits // 8),
            *(_bytes(part.unsqueeze(1)) for part in (zero, scale)),
        ]
        return torch.cat(parts, dim=1)

    def decode(self, payload: Tensor, like: Tensor) -> Tensor:
        """Rows (H, D) of what has come, for a map like this one."""
        if self.messages not in _BITS or isinstance(like, FakeTensor):
            return payload.to(like.dtype)
        bits, width = _BITS[self.messages], like.size(1)
        padded = width + -width % (8 // bits)
        kind = stored_dtype(torch.float32)
        codes, zero, scale = payload.split([padded * bits // 8, kind.itemsize, kind.itemsize], dim=1)
        decoded = ops.dequantize(
            codes.contiguous().flatten(),
            *(_typed(part, kind) for part in (zero, scale)),
            bits=bits,
            block_size=padded,
            levels=None,
            shape=(payload.size(0), padded),
            dtype=torch.float32,
            backend="auto",
        )
        return decoded[:, :width].to(like.dtype)


@dataclass
class Incoming:
    """Rows on their way."""

    halo: Halo
    payload: Tensor
    like: Tensor
    work: dist.Work | None

    def wait(self) -> Tensor:
        """The rows (H, D), once they are there."""
        if self.work is not None:
            start = time.perf_counter()
            self.work.wait()
            self.halo.traffic.waiting_seconds += time.perf_counter() - start
        return self.halo.decode(self.payload, self.like)


def _typed(x: Tensor, kind: torch.dtype) -> Tensor:
    """Numbers from their bytes, which a copy of their own aligns."""
    return x.clone(memory_format=torch.contiguous_format).view(kind).flatten()


def _bytes(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)


def _all_to_all(
    received: Tensor,
    sent: Tensor,
    receive_counts: tuple[int, ...] | None,
    send_counts: tuple[int, ...] | None,
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
