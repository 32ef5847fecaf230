"""The signs of a map, in 1 bit an element or as its sketch knows them.

Shapes: N nodes, D features, R directions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from iexact_runner.compression.deferred import defer
from iexact_runner.kernels import sketch_ops
from iexact_runner.kernels.reference import chunk_rows, stream_lengths

# Room on a GPU for more signs than the pass before had, whose number is there without waiting.
SPARE, _LEAST_SPARE = 1.125, 4096
# Rows that the share of sure signs is counted in.
SHARE_ROWS = 512


def sure_from(z: Tensor, missed: Tensor, limits: Sequence[tuple[float, float | None]]) -> list[Tensor]:
    """From which |z~| on (D,) a sign is sure, for z~ in sampled rows (S, D) and the deviation of z from it (D,).

    Of each pair in ``limits``: a number of deviations, or less where only about a share of the signs may be unsure.
    """
    found, ranked = [], None
    for threshold, share in limits:
        if share is None:
            found.append(threshold * missed)
            continue
        if ranked is None:
            ranked = _ascending((z[:: max(1, z.size(0) // SHARE_ROWS)].abs() / missed).flatten())
        found.append(ranked[max(1, int(share * ranked.numel())) - 1].clamp(max=threshold) * missed)
    return found


def _ascending(values: Tensor) -> Tensor:
    """Sorted values; NumPy is thirty times faster than torch on one core."""
    if values.is_cuda or isinstance(values, FakeTensor):
        return values.sort().values
    return torch.from_numpy(np.sort(values.numpy()))


@dataclass
class Room:
    """Bytes that the stored signs of one map take from pass to pass, so that a GPU is not waited for.

    Args:
        bytes: of the pass before; None before the first.
        share: about the most signs that are stored, of all that dropout keeps.
        most: bytes that the pass before could have taken, to which a mini-batch of another size is compared.
    """

    bytes: int | None = None
    share: float = 1.0
    most: int | None = None
    _pending: tuple[Tensor, torch.cuda.Event, int] | None = None

    def __deepcopy__(self, memo: object) -> Room:
        return Room(self.bytes, self.share, self.most)

    def state(self) -> dict[str, Any]:
        """As a checkpoint holds it."""
        return {"bytes": self.bytes, "share": self.share, "most": self.most}

    def capacity(self, lengths: Tensor, most: int, *, p: float) -> int:
        """Bytes to reserve: as many as there are on a CPU; on a GPU those of the pass before and some more.

        Of tensors without data, whose number cannot be known, the share of what a dropout of rate p keeps.
        """
        if isinstance(lengths, FakeTensor):
            return int(most * self.share * (1 - p))
        if not lengths.is_cuda:
            return int(lengths.sum())
        if self.bytes is not None and torch.cuda.is_current_stream_capturing():
            return self._some_more(most)
        self.settle()
        total = torch.empty((), dtype=torch.int64, pin_memory=True).copy_(lengths.sum(), non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()
        self._pending = total, copied, most
        if self.bytes is None:  # waited for once, instead of room for every sign of all maps at once
            self.settle()
        return self._some_more(most)

    def settle(self) -> None:
        """Reads the number of the pass before, which is long there."""
        if self._pending is not None:
            total, copied, self.most = self._pending
            copied.synchronize()
            self.bytes = int(total)
            self._pending = None

    def _some_more(self, most: int) -> int:
        """Bytes for as large a share as the pass before had, and a reserve."""
        assert self.bytes is not None
        expected = self.bytes * most / self.most if self.most else self.bytes
        return min(most, int(expected * SPARE) + _LEAST_SPARE)


@dataclass
class Decoded:
    """The mask of a sketch that was decoded in the backward pass, until its own block has had it.

    The coefficients, which take more memory and less time, are decoded again.
    """

    mask: Tensor | None = None

    @classmethod
    def new(cls) -> Decoded | None:
        """An empty one; none in a graph that is compiled, which shares what it computes twice."""
        return None if torch.compiler.is_compiling() else cls()

    def clear(self) -> None:
        """Forgets it."""
        self.mask = None


@dataclass(frozen=True)
class SignLayout:
    """The signs of a map z (N, D) for the gradient of ReLU.

    With all of them stored, their tensor is the packed mask. Else they are the stream of stored bits, and how many of
    them belong to each chunk of rows.

    Args:
        sketched: whether the sketch gives those that it is sure of.
        exact: whether its errors are listed, so that all signs are true.
        p: rate of the dropout after ReLU, whose dropped elements have no sign; 0 where all have one.
        backend: who runs the kernels.
    """

    sketched: bool = False
    exact: bool = False
    p: float = 0.0
    backend: str = "auto"

    @property
    def parts(self) -> int:
        """How many tensors the signs are made of."""
        return 2 if self.sketched else 1

    @property
    def dropped(self) -> bool:
        """Whether what dropout drops is missing from the mask already."""
        return self.sketched and self.p > 0

    def keep(
        self,
        mask: Tensor,
        coefficients: Tensor,
        directions: Tensor,
        shift: Tensor,
        limit: Tensor,
        *,
        seed: int | Tensor,
        room: Room | None,
    ) -> tuple[Tensor, ...]:
        """What is kept of a packed mask for z~ = c V^T + shift, sure from ``limit`` (D,) on."""
        if not self.sketched:
            return (mask,)
        streams, counts = sketch_ops.pack_signs(
            mask, coefficients, directions, shift, limit, exact=self.exact, p=self.p, seed=seed, backend=self.backend
        )
        capacity = streams.numel() if room is None else room.capacity(stream_lengths(counts), streams.numel(), p=self.p)
        stream = sketch_ops.join_streams(streams, counts, capacity=capacity, backend=self.backend)
        short = chunk_rows(directions.size(0)) * directions.size(0) < 1 << 15
        return stream, counts[: 1 + self.exact].to(torch.int16 if short else torch.int32)

    def mask(
        self,
        tensors: tuple[Tensor, ...],
        coefficients: Tensor,
        directions: Tensor,
        shift: Tensor,
        limit: Tensor,
        *,
        seed: int | Tensor,
    ) -> Tensor:
        """The packed mask, of which nothing is set where dropout drops if :attr:`dropped`.

        Raises:
            RuntimeError: if the sketch is not sure of as many elements as it was in the forward pass.
        """
        if not self.sketched:
            return tensors[0]
        stream, counts = tensors
        counts = F.pad(counts.int(), (0, 0, 0, 2 - counts.size(0)))
        mask, wrong = sketch_ops.unpack_signs(
            stream,
            counts,
            coefficients,
            directions,
            shift,
            limit,
            exact=self.exact,
            p=self.p,
            seed=seed,
            backend=self.backend,
        )
        if not defer(wrong):
            torch._assert_async(wrong == 0, "the signs of a low-rank sketch were not decoded as they were encoded")
        return mask
