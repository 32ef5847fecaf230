"""How rows of a map travel: as they are, in bfloat16, quantized, as coefficients in a few directions; or some of them.

A message is a tensor of one dimension: what is for the first process, then what is for the second. Shapes: n rows that
are sent, H rows that come, D columns, R directions.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from iexact_runner.kernels import ops
from iexact_runner.kernels.reference import stored_dtype

# Of float32 rows that are in memory at once on their way into a message, or out of it.
CHUNK_BYTES = 8 << 20
# Bits of a coefficient.
_COEFFICIENT_BITS = 8
# In bytes: a component of a direction; and a zero or a scale, in the type that the quantizer gives them.
_FLOAT = torch.float32.itemsize
_SCALE_TYPE = stored_dtype(torch.float32)
_SCALE = _SCALE_TYPE.itemsize
# Of the place of a row among those for a process.
_PLACE = torch.int32.itemsize

Seeds = Callable[[], int]


class Rows(Protocol):
    """Rows (n, D) that are to be sent, which are gathered a few at a time."""

    shape: tuple[int, int]
    dtype: torch.dtype
    device: torch.device

    def __getitem__(self, part: slice) -> Tensor:
        """Some of them."""

    def picked(self, places: Tensor) -> Rows:
        """Those at some places."""


class Format(Protocol):
    """A way to send rows."""

    @property
    def whole(self) -> bool:
        """Whether one message has all columns; else a few columns travel at a time."""

    def length(self, rows: int, width: int) -> int:
        """Elements for a process that so many rows of so many columns go to."""

    def encode(self, rows: Rows, counts: Sequence[int], seeds: Seeds) -> Tensor:
        """The message, for processes that so many rows each go to."""

    def decode(self, message: Tensor, counts: Sequence[int], width: int, columns: slice) -> Tensor:
        """Columns of the rows (H, D) that came, so many from each process."""


@dataclass(frozen=True)
class Plain:
    """Rows as they are, or in a shorter type.

    Args:
        dtype: that they are rounded to; None for their own.
    """

    dtype: torch.dtype | None = None
    whole = False

    def length(self, rows: int, width: int) -> int:
        """Elements for so many rows."""
        return rows * width

    def encode(self, rows: Rows, counts: Sequence[int], seeds: Seeds) -> Tensor:
        """The message."""
        return rows[:].to(self.dtype or rows.dtype).flatten()

    def decode(self, message: Tensor, counts: Sequence[int], width: int, columns: slice) -> Tensor:
        """Columns of the rows that came."""
        return message.view(sum(counts), width)[:, columns]


@dataclass(frozen=True)
class Quantized:
    """A zero and a scale a row, and codes with stochastic rounding.

    Zero and scale are those of the quantizer, rounded outwards before codes are drawn, so that they bias nothing.

    Args:
        bits: of a code.
    """

    bits: int
    whole = False

    def length(self, rows: int, width: int) -> int:
        """Bytes for so many rows."""
        return rows * (self._padded(width) * self.bits // 8 + 2 * _SCALE)

    def encode(self, rows: Rows, counts: Sequence[int], seeds: Seeds) -> Tensor:
        """The message: of each row its codes, its zero and its scale."""
        count, width = rows.shape
        padded = self._padded(width)
        x = rows[:].float()
        # Whole bytes a row, filled up with its last element, which changes no extremum.
        x = torch.cat([x, x[:, -1:].expand(-1, padded - width)], dim=1)
        codes, zero, scale = ops.quantize(
            x, bits=self.bits, block_size=padded, levels=None, seed=seeds(), backend="auto"
        )
        parts = [codes.view(count, padded * self.bits // 8), *(_bytes(part.unsqueeze(1)) for part in (zero, scale))]
        return torch.cat(parts, dim=1).flatten()

    def decode(self, message: Tensor, counts: Sequence[int], width: int, columns: slice) -> Tensor:
        """Columns of the rows that came."""
        padded, count = self._padded(width), sum(counts)
        codes, zero, scale = message.view(count, self.length(1, width)).split(
            [padded * self.bits // 8, _SCALE, _SCALE], dim=1
        )
        decoded = _decoded(codes, zero, scale, bits=self.bits, shape=(count, padded))
        return decoded[:, :width][:, columns]

    def _padded(self, width: int) -> int:
        return width + -width % (8 // self.bits)


@dataclass(frozen=True)
class LowRank:
    """Coefficients of 8 bits in the leading directions of the rows that a process sends, which travel with them.

    Directions are the eigenvectors of the rows' second moments, as those of the sketch of ``lowrank``; each process
    finds its own. There are a zero and a scale for each direction and receiver, and rounding is stochastic. What other
    directions hold is lost, so the rows that come have a bias.

    Args:
        rank: R, or as many columns as there are, if they are fewer.
    """

    rank: int
    whole = True

    def length(self, rows: int, width: int) -> int:
        """Bytes for so many rows, directions included."""
        rank = min(self.rank, width)
        return rank * (rows + _FLOAT * width + 2 * _SCALE) if rows else 0

    def encode(self, rows: Rows, counts: Sequence[int], seeds: Seeds) -> Tensor:
        """The message: for each process the directions, zeros, scales and, direction by direction, codes."""
        count, width = rows.shape
        moments = torch.zeros(width, width, device=rows.device)
        for part in _chunks(count, width):
            x = rows[part].float()
            moments.addmm_(x.T, x)
        # Of rows that are not finite any directions will do, for the loss is not finite either and says so better.
        vectors = torch.linalg.eigh(moments.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0))[1]
        directions = vectors[:, -min(self.rank, width) :].contiguous()
        coefficients = rows[:0].new_empty(directions.size(1), count, dtype=torch.float32)
        for part in _chunks(count, width):
            torch.mm(directions.T, rows[part].float().T, out=coefficients[:, part])
        parts = []
        for own in coefficients.split(list(counts), dim=1):
            if own.size(1):
                codes, zero, scale = ops.quantize(
                    own.contiguous(),
                    bits=_COEFFICIENT_BITS,
                    block_size=own.size(1),
                    levels=None,
                    seed=seeds(),
                    backend="auto",
                )
                parts += [_bytes(directions).flatten(), _bytes(zero), _bytes(scale), codes]
        return torch.cat(parts) if parts else torch.empty(0, dtype=torch.uint8, device=rows.device)

    def decode(self, message: Tensor, counts: Sequence[int], width: int, columns: slice) -> Tensor:
        """Columns of the rows that came."""
        rank = min(self.rank, width)
        sizes = [self.length(count, width) for count in counts]
        found = [torch.empty(0, len(range(width)[columns]), device=message.device)]
        for count, own in zip(counts, message.split(sizes), strict=True):
            if not count:
                continue
            vectors, zero, scale, codes = own.split([_FLOAT * rank * width, _SCALE * rank, _SCALE * rank, rank * count])
            directions = _typed(vectors, torch.float32).view(width, rank)[columns]
            coefficients = _decoded(codes, zero, scale, bits=_COEFFICIENT_BITS, shape=(rank, count))
            found.append(coefficients.T @ directions.T)
        return torch.cat(found)


@dataclass(frozen=True)
class Sampled:
    """A random share of the rows for each process, divided by that share, and their places; the others are 0.

    So the sums of neighbours are right on average: boundary node sampling of BNS-GCN (Wan et al., MLSys 2022), with
    a draw for every message in place of one an epoch.

    Args:
        share: of the rows for a process, of which at least one goes.
        form: how those travel that do.
    """

    share: float
    form: Format
    whole = True

    def length(self, rows: int, width: int) -> int:
        """Bytes for so many rows, places included."""
        drawn = self._drawn(rows)
        return drawn * _PLACE + self._bytes_of(drawn, width)

    def encode(self, rows: Rows, counts: Sequence[int], seeds: Seeds) -> Tensor:
        """The message: for each process places and rows."""
        generator = torch.Generator().manual_seed(seeds())
        drawn, places = [self._drawn(count) for count in counts], []
        for count, few in zip(counts, drawn, strict=True):
            places.append(torch.randperm(count, generator=generator)[:few].sort().values)
        firsts = itertools.accumulate(counts, initial=0)
        chosen = torch.cat([first + own for first, own in zip(firsts, places, strict=False)])
        message = self.form.encode(rows.picked(chosen.to(rows.device)), drawn, seeds)
        parts = _bytes(message).split([self._bytes_of(few, rows.shape[1]) for few in drawn])
        named = (_bytes(own.to(rows.device, torch.int32)) for own in places)
        return torch.cat([part for pair in zip(named, parts, strict=True) for part in pair])

    def decode(self, message: Tensor, counts: Sequence[int], width: int, columns: slice) -> Tensor:
        """Columns of the rows that came, and zeros for the others."""
        found = []
        for count, own in zip(counts, message.split([self.length(count, width) for count in counts]), strict=True):
            few = self._drawn(count)
            places, rows = own.split([few * _PLACE, own.numel() - few * _PLACE])
            decoded = self.form.decode(_typed(rows, self._type), [few], width, columns) * (count / max(1, few))
            whole = decoded.new_zeros(count, decoded.size(1))
            found.append(whole.index_copy_(0, _typed(places, torch.int32).long(), decoded))
        return torch.cat(found)

    def _drawn(self, count: int) -> int:
        return math.ceil(self.share * count)

    @property
    def _type(self) -> torch.dtype:
        """Of the elements of the messages of ``form``."""
        return (self.form.dtype or torch.float32) if isinstance(self.form, Plain) else torch.uint8

    def _bytes_of(self, rows: int, width: int) -> int:
        return self.form.length(rows, width) * self._type.itemsize


def format_of(name: str, *, rank: int, share: float = 1.0) -> Format:
    """The format that ``messages.forward`` or ``messages.backward`` names.

    Args:
        name: as there.
        rank: that of ``lowrank``.
        share: of the rows that travel.
    """
    formats: dict[str, Format] = {"fp32": Plain(), "bf16": Plain(torch.bfloat16), "lowrank": LowRank(rank)}
    formats |= {f"int{bits}": Quantized(bits) for bits in (8, 4, 2)}
    if share == 1.0:
        return formats[name]
    return Sampled(share, Plain(torch.float32) if name == "fp32" else formats[name])


def _chunks(count: int, width: int) -> Iterator[slice]:
    rows = max(1, CHUNK_BYTES // (_FLOAT * max(1, width)))
    return (slice(start, min(start + rows, count)) for start in range(0, count, rows))


def _decoded(codes: Tensor, zero: Tensor, scale: Tensor, *, bits: int, shape: tuple[int, int]) -> Tensor:
    return ops.dequantize(
        codes.contiguous().flatten(),
        *(_typed(part, _SCALE_TYPE) for part in (zero, scale)),
        bits=bits,
        block_size=shape[1],
        levels=None,
        shape=shape,
        dtype=torch.float32,
        backend="auto",
    )


def _typed(x: Tensor, kind: torch.dtype) -> Tensor:
    """Numbers from their bytes, which a copy of their own aligns."""
    return x.clone(memory_format=torch.contiguous_format).view(kind).flatten()


def _bytes(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)
